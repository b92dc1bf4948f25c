"""The token ids of answers by their text, for conversations that come back with it.

A model that samples, or that a grammar guides, may write a text in other tokens than the tokenizer's own. The prefix
cache knows the tokens that were written, so the next prompt must have the same ones.
"""

import threading
from array import array
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from itertools import islice

from tokenizers import Tokenizer as FastTokenizer

REMEMBERED = 1 << 25
"""Characters of the texts whose ids are kept; the least recently used go first."""
WAITING = 64
"""Answers that have ended since the last look-up; of more, the last ones are remembered."""
AT_THE_END = 256  # tokens at the end of a text that may be cut off
REPLACEMENT = "\ufffd"


class Writing:
    """An answer while its tokens arrive.

    Attributes:
        tokens: those of the answer so far, without its end token.
    """

    def __init__(self, prompt: "array[int]", before: int | None, ended: "deque[Writing]") -> None:
        """Begin an answer.

        Args:
            prompt: the ids after the prompt's last added token, with which the answer's first ids are one text.
            before: that token; None if the prompt has none.
            ended: where the answer goes when it is complete.
        """
        self.prompt, self.before, self.tokens, self.unshown = prompt, before, array("I"), ""
        self._ended = ended

    def end(self, unshown: str) -> None:
        """The answer is complete; `unshown` is the end of its text that nobody has seen, as of a stop string."""
        if self.tokens:
            self.unshown = unshown
            self._ended.append(self)


class AnswerIds:
    """Finds the ids of texts that were written by the model. Several threads may use it.

    A text is what stands between two added tokens of a prompt, since it is encoded as a whole. An answer that has ended
    is only stored; the first look-up after it does the work.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        added: Set[int],
        first: Callable[[str], Iterable[int]],
        later: Callable[[str], Iterable[int]],
    ) -> None:
        """Remember nothing yet.

        Args:
            tokenizer: decodes.
            added: the ids of added tokens, between which texts are.
            first, later: the tokenizer's own ids of a text that a prompt begins with, and of any other.
        """
        self._tokenizer, self._added, self._own = tokenizer, added, {True: first, False: later}
        self._ended: deque[Writing] = deque(maxlen=WAITING)
        self._known: OrderedDict[tuple[bool, str], array[int]] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def begin(self, prompt: Sequence[int]) -> Writing:
        """Begin an answer to a prompt of these ids."""
        start = next((at for at in range(len(prompt), 0, -1) if prompt[at - 1] in self._added), 0)
        before = prompt[start - 1] if start else None
        return Writing(array("I", islice(prompt, start, None)), before, self._ended)

    def note(self, tokens: Iterable[int]) -> None:
        """Remember the texts of a whole conversation, which was computed in these tokens."""
        writing = self.begin([])
        writing.tokens.extend(tokens)
        writing.end("")

    def find(self, text: str, *, first: bool) -> "array[int] | None":
        """The ids in which the model wrote a text; None if it did not, or if they are the tokenizer's own.

        `first`: whether the prompt begins with the text.
        """
        with self._lock:
            while self._ended:
                self._learn(self._ended.popleft())
            key = first, text
            if ids := self._known.get(key):
                self._known.move_to_end(key)
            return ids

    def _learn(self, answer: Writing) -> None:
        tokens = answer.tokens
        places = [at for at, token in enumerate(tokens) if token in self._added]
        before = answer.before
        for start, end in zip([0, *(at + 1 for at in places)], [*places, len(tokens)], strict=True):
            ids = tokens[start:end] if start else answer.prompt + tokens[:end]
            for text, written in self._texts(ids, before, answer.unshown if end == len(tokens) else ""):
                self._remember(text, written, before)
            before = tokens[end] if end < len(tokens) else None

    def _texts(self, ids: "array[int]", before: int | None, unshown: str) -> Iterator[tuple[str, "array[int]"]]:
        """The text of some ids without what was not shown, and the same without white space at its end, which clients
        and templates may remove; each if it ends where a token does, with its own ids."""
        text = self._text(ids, before)
        if not text.endswith(unshown):
            return
        shown = text[: len(text) - len(unshown)]
        for wanted in dict.fromkeys((shown, shown.rstrip())):
            written = ids
            if wanted != text:
                ends = range(max(0, len(ids) - AT_THE_END), len(ids))
                at = bisect_left(ends, len(wanted), key=lambda end: len(self._text(ids[:end], before)))
                written = ids[: ends[at]] if at < len(ends) else ids
            if wanted and REPLACEMENT not in wanted and self._text(written, before) == wanted:
                yield wanted, written

    def _text(self, ids: "array[int]", before: int | None) -> str:
        """The text of ids that follow this added token, with U+FFFD for bytes that are no character."""
        head = [] if before is None else [before]
        begun = self._tokenizer.decode(head, skip_special_tokens=False)
        text: str = self._tokenizer.decode([*head, *ids], skip_special_tokens=False)
        return text[len(begun) :]

    def _remember(self, text: str, ids: "array[int]", before: int | None) -> None:
        """Keep the ids of a text in place of what was known of it, unless they are the tokenizer's own."""
        first = before is None
        key = first, text
        if self._known.pop(key, None):
            self._size -= len(text)
        own = array("I", self._own[first](text))
        if own == ids or self._text(own, before) != text or len(text) > REMEMBERED:
            return
        self._known[key] = ids
        self._size += len(text)
        while self._size > REMEMBERED:
            (_, oldest), _ = self._known.popitem(last=False)
            self._size -= len(oldest)

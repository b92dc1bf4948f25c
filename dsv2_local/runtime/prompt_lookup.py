"""Speculative decoding without a draft model: draft tokens are looked up in the text itself (prompt lookup decoding).

Quotations, edited code and summaries repeat what was read, so what followed the latest tokens when they occurred before
is a good draft. The model verifies a draft in one step, which takes less time than a step per token; tokens that are
rejected cost that time in vain. A draft changes no answer: every token is still drawn from the model's own
distribution, and a draft only decides which distributions are computed ahead (A. Saxena, Prompt Lookup Decoding, 2023).

While a text repeats a passage, the position in the earlier passage is followed, so that n-grams which occur in many
places do not lead elsewhere; and the longer the match, the longer the draft.
"""

from collections import defaultdict, deque
from collections.abc import Iterable

NGRAM = 4  # tokens that must match, and the shortest draft
MAX_DRAFT = 32  # tokens
WINDOW, WARM_UP = 32, 3  # steps of each draft length whose times are compared, at most and at least
RETRY_AFTER = 64  # proposals of a length that are skipped while it does not pay, before it is tried again


class PromptLookup:
    """A text, and where every n-gram of `NGRAM` tokens in it occurred last.

    Attributes:
        drafted, accepted: draft tokens so far, and those that the sampler chose.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.drafted, self.accepted = 0, 0
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # of each n-gram's last occurrence
        self._next: int | None = None  # the position that the text continues with if it goes on repeating itself
        self._matched = 0  # tokens before `_next` that are also the latest tokens of the text
        self._times = defaultdict[int, _StepTimes](_StepTimes)  # by the bit length of the draft's length: 0, 4 to 7, …
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add the next token of the text."""
        repeats = self._next is not None and self._tokens[self._next] == token
        self._tokens.append(token)
        ngram = tuple(self._tokens[-NGRAM:])
        if self._next is not None and repeats:
            self._next, self._matched = self._next + 1, self._matched + 1
        else:
            self._next, self._matched = self._ends.get(ngram), NGRAM
        self._ends[ngram] = len(self._tokens)

    def propose(self, max_tokens: int = MAX_DRAFT) -> list[int]:
        """A draft of the next tokens: a power of two of them, or none where nothing matches or no draft pays.

        `max_tokens` is at least `NGRAM`.
        """
        if self._next is None:
            return []
        count = 1 << (min(max_tokens, self._matched).bit_length() - 1)
        if not self._pays(count):
            return []
        period = len(self._tokens) - self._next  # of a text that repeats its very end
        return [self._tokens[self._next + i % period] for i in range(count)]

    def observe(self, seconds: float, drafted: int, accepted: int) -> None:
        """Record a step that took `seconds` and verified `drafted` draft tokens, of which `accepted` were chosen."""
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted
        self._times[drafted.bit_length()].add(seconds, 1 + accepted)

    def _pays(self, count: int) -> bool:
        plain, drafted = self._times[0].seconds_per_token, self._times[count.bit_length()]
        if plain is None or drafted.seconds_per_token is None or drafted.seconds_per_token < plain:
            return True
        drafted.skipped += 1
        return drafted.skipped % RETRY_AFTER == 0


class _StepTimes:
    """The latest steps of one draft length."""

    def __init__(self) -> None:
        self.skipped = 0  # proposals, because they would not pay
        self._latest = deque[tuple[float, int]](maxlen=WINDOW)

    def add(self, seconds: float, tokens: int) -> None:
        self._latest.append((seconds, tokens))

    @property
    def seconds_per_token(self) -> float | None:
        """None while there are too few steps to tell."""
        if len(self._latest) < WARM_UP:
            return None
        return sum(seconds for seconds, _ in self._latest) / sum(tokens for _, tokens in self._latest)

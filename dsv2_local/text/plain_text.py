"""Plain text to token ids, in time and memory proportionate to the text, and at once for what was encoded before."""

import re
import threading
from array import array
from collections.abc import Iterator
from itertools import islice

from tokenizers import Tokenizer as FastTokenizer

SLICE = 1 << 18
"""Characters that are encoded at once if a text is longer; the library takes 500 bytes of memory for each token."""
REMEMBERED = 1 << 25
"""Characters of texts whose ids are kept, so that only what is new in a long conversation is encoded."""
_CUT = re.compile(r"(?<=\w)(?=\s)|(?<=[\n。！？])")
_TRIES = 16  # cuts that the pre-tokenizer is asked about
_AROUND = 64  # characters on both sides of a cut that the pre-tokenizer is asked about


class PlainText:
    """Encodes plain text with one tokenizer. Several threads may use it."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, array[int]] = {}
        self._size = 0
        self._lock = threading.Lock()

    def encode(self, text: str) -> Iterator[int]:
        """The ids of a text; the same, however long it is."""
        for part in self._slices(text):
            yield from self._ids(part)

    def _ids(self, text: str) -> "array[int]":
        with self._lock:
            ids = self._known.get(text)
        if ids is None:
            # Other threads go on meanwhile, as with `encode` they would not.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            ids = array("I", encoding.ids)
            self._remember(text, ids)
        return ids

    def _remember(self, text: str, ids: "array[int]") -> None:
        with self._lock:
            if text not in self._known:
                self._known[text] = ids
                self._size += len(text)
            while self._size > REMEMBERED:
                oldest = next(iter(self._known))
                del self._known[oldest]
                self._size -= len(oldest)

    def _slices(self, text: str) -> Iterator[str]:
        """Cut a long text between words, where the tokenizer cuts it too."""
        start = 0
        while len(text) - start > SLICE:
            found = islice(_CUT.finditer(text, start + SLICE // 2, start + SLICE), _TRIES)
            end = next((cut.start() for cut in found if self._is_cut(text, cut.start())), None)
            if end is None:
                break
            yield text[start:end]
            start = end
        yield text[start:]

    def _is_cut(self, text: str, place: int) -> bool:
        """Whether the pre-tokenizer cuts the text here, and what follows the same as if nothing came before it.

        What it cuts is encoded part by part.
        """
        splitter = self._tokenizer.pre_tokenizer
        if splitter is None:
            return False
        begin, end = max(0, place - _AROUND), place + _AROUND
        inside = splitter.pre_tokenize_str(text[begin:end])
        after = [part for part, span in inside if span[0] >= place - begin]
        alone = [part for part, _ in splitter.pre_tokenize_str(text[place:end])]
        return after == alone and any(span[1] == place - begin for _, span in inside)

"""The text of an answer, as its tokens arrive."""

from dsv2_local.errors import InputError
from dsv2_local.text.detokenizer import Detokenizer, StopFilter
from dsv2_local.text.tokenizer import Tokenizer


class TextStream:
    """Turns generated tokens into the text to show: detokenised, cut at stop strings, without end tokens."""

    def __init__(self, tokenizer: Tokenizer | None, end: frozenset[int], stops: list[str], strip: bool) -> None:
        if stops and tokenizer is None:
            raise InputError("stop strings need a tokenizer, and this checkpoint has none")
        self._detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self._filter = StopFilter(stops)
        self._end = end
        self._at_start = strip

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self._filter.stopped

    def push(self, token: int) -> str:
        """Return the text that is final with this token; always empty without a tokenizer."""
        if self._detokenizer is None or token in self._end:
            return ""
        return self._strip(self._filter.push(self._detokenizer.push(token)))

    def flush(self) -> str:
        """Return the text that is still held back, after the last token."""
        if self._detokenizer is None:
            return ""
        return self._strip(self._filter.push(self._detokenizer.flush()) + self._filter.flush())

    def _strip(self, text: str) -> str:
        """Remove white space before the first visible character of the answer."""
        if self._at_start:
            text = text.lstrip()
            self._at_start = not text
        return text

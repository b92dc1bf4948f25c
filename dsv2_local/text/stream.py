"""The text and the calls of an answer, as its tokens arrive."""

from typing import NamedTuple

from dsv2_local.chunk import CallDelta
from dsv2_local.errors import InputError
from dsv2_local.text.answer_ids import Writing
from dsv2_local.text.detokenizer import Detokenizer, StopFilter
from dsv2_local.text.tokenizer import Tokenizer
from dsv2_local.text.tools.calls import AnswerParser, Event, PlainText


class Piece(NamedTuple):
    """What is final with a token."""

    text: str = ""
    calls: tuple[CallDelta, ...] = ()


class TextStream:
    """Turns generated tokens into text to show (cut at stop strings, without end tokens) and calls of functions.

    Stop strings are looked for in the text alone: neither in calls nor across one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        end: frozenset[int],
        stops: list[str],
        strip: bool,
        parser: AnswerParser | None = None,
        writing: Writing | None = None,
    ) -> None:
        """Begin an answer. `parser` finds its calls; without one there are none. `writing` remembers its tokens."""
        if stops and tokenizer is None:
            raise InputError("stop strings need a tokenizer, and this checkpoint has none")
        self._parser = parser or (PlainText(Detokenizer(tokenizer)) if tokenizer else None)
        self._filter = StopFilter(stops)
        self._end, self._writing = end, writing
        self._at_start = strip

    @property
    def stopped(self) -> bool:
        """Whether the answer ends here: a stop string has appeared, or it has all the calls that it may have."""
        return self._filter.stopped or (self._parser is not None and self._parser.ended)

    @property
    def stop_string(self) -> str | None:
        """The stop string that has appeared."""
        return self._filter.found

    def push(self, token: int) -> Piece:
        """Return what is final with this token; always empty without a tokenizer."""
        if self._parser is None or token in self._end:
            return Piece()
        if self._writing:
            self._writing.tokens.append(token)
        return self._piece(self._parser.push(token))

    def flush(self) -> Piece:
        """Return what is still held back, after the last token; the answer is complete."""
        if self._writing:
            self._writing.end(self._filter.dropped)
            self._writing = None
        if self._parser is None or self.stopped:
            return Piece()
        piece = self._piece(self._parser.flush())
        return piece._replace(text=piece.text + self._strip(self._filter.flush()))

    def _piece(self, events: list[Event]) -> Piece:
        text, calls = "", list[CallDelta]()
        for event in events:
            if self._filter.stopped:
                break
            if isinstance(event, str):
                text += self._strip(self._filter.push(event))
            else:
                text += self._strip(self._filter.flush())
                calls.append(event)
        return Piece(text, tuple(calls))

    def _strip(self, text: str) -> str:
        """Remove white space before the first visible character of the answer."""
        if self._at_start:
            text = text.lstrip()
            self._at_start = not text
        return text

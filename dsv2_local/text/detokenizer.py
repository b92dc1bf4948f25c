"""Turns streamed tokens into text: never part of a character, and nothing after a stop string."""

from collections.abc import Sequence

from dsv2_local.errors import InputError
from dsv2_local.text.tokenizer import Tokenizer


class Detokenizer:
    """Decodes token by token, and never returns part of a character.

    The text of a token may depend on its neighbours, so new tokens are decoded together with those whose text was
    returned last. Text is held back while it ends in an incomplete UTF-8 sequence.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = self._emitted = 0  # where the tokens returned last begin, and where they end

    def push(self, token: int) -> str:
        """Add a token; returns the text that is final with it."""
        self._ids.append(token)
        return self._emit(final=False)

    def flush(self) -> str:
        """Return the rest of the text, with U+FFFD for bytes that did not complete a character."""
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        known = self._tokenizer.decode(self._ids[self._context : self._emitted])
        text = self._tokenizer.decode(self._ids[self._context :])
        if text.endswith("\ufffd") and not final:
            return ""
        self._context, self._emitted = self._emitted, len(self._ids)
        return text[len(known) :]


class StopFilter:
    """Cuts a stream of text at the first stop string; holds back text that may be the beginning of one.

    Attributes:
        found: the stop string that has appeared, if one has.
        dropped: that and what came after it, as far as it was pushed.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise InputError("a stop string must not be empty")
        self._stops = stops
        self._held = self.dropped = ""
        self.found: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self.found is not None

    def push(self, text: str) -> str:
        """Add text; returns what cannot be part of a stop string. Nothing follows once one has appeared."""
        self._held += text
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            first, self.found = min(found)
            self.dropped = self._held[first:]
            return self._take(first, drop_rest=True)
        return self._take(len(self._held) - possible_beginning(self._held, self._stops))

    def flush(self) -> str:
        """Return the text that is still held back, at the end of the stream."""
        return self._take(len(self._held))

    def _take(self, length: int, drop_rest: bool = False) -> str:
        taken, self._held = self._held[:length], "" if drop_rest else self._held[length:]
        return taken


def possible_beginning(text: str, strings: Sequence[str]) -> int:
    """Length of the longest suffix of a text that one of these strings begins with, and is longer than."""
    longest = max(map(len, strings), default=0) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(string.startswith(text[-n:]) for string in strings)), 0)

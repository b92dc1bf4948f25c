"""Generated tokens to text as it streams: never half a character, and nothing after a stop string."""

from collections.abc import Sequence

from dsv2_local.errors import InputError
from dsv2_local.text.tokenizer import Tokenizer


class Detokenizer:
    """Token by token to text, never emitting part of a character.

    It decodes the tokens since the last emission together with those of the one before, since a token's text may
    depend on its neighbour, and holds back while the end is an unfinished UTF-8 sequence.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = self._emitted = 0

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        self._ids.append(token)
        return self._emit(final=False)

    def flush(self) -> str:
        """Whatever is left at the end, U+FFFD for bytes that never became a character."""
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        known = self._tokenizer.decode(self._ids[self._context : self._emitted])
        text = self._tokenizer.decode(self._ids[self._context :])
        if text.endswith("\ufffd") and not final:
            return ""
        self._context, self._emitted = self._emitted, len(self._ids)
        return text[len(known) :]


class StopFilter:
    """Cuts a stream of text at the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise InputError("a stop string must not be empty")
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string; after one, nothing."""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found), drop_rest=True)
        return self._take(len(self._held) - self._possible_beginning())

    def flush(self) -> str:
        """What was held back when the stream ended."""
        return self._take(len(self._held))

    def _take(self, length: int, drop_rest: bool = False) -> str:
        taken, self._held = self._held[:length], "" if drop_rest else self._held[length:]
        return taken

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max(map(len, self._stops), default=0) - 1
        sizes = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)

"""Calls of functions in an answer, as they come out of it piece by piece."""

import secrets
from collections.abc import Iterable
from typing import Protocol

from dsv2_local.chunk import CallDelta, ToolCall
from dsv2_local.text.detokenizer import Detokenizer

Event = str | CallDelta
"""A piece of an answer: text, or a piece of a call."""


class AnswerParser(Protocol):
    """Turns generated tokens into text and calls. Whatever the model writes, nothing is raised or lost.

    Attributes:
        ended: whether the answer has all the calls that it may have, and ends here.
    """

    ended: bool

    def push(self, token: int) -> list[Event]:
        """Add a token; returns what is final with it."""
        ...

    def flush(self) -> list[Event]:
        """Return what was held back, after the last token."""
        ...


class PlainText:
    """An `AnswerParser` of answers without calls; tokens in `dropped` are no part of the text."""

    ended = False

    def __init__(self, detokenizer: Detokenizer, dropped: Iterable[int] = ()) -> None:
        self._detokenizer, self._dropped = detokenizer, frozenset(dropped)

    def push(self, token: int) -> list[Event]:
        """See `AnswerParser`."""
        return [] if token in self._dropped else _events(self._detokenizer.push(token))

    def flush(self) -> list[Event]:
        """See `AnswerParser`."""
        return _events(self._detokenizer.flush())


class CallCounter:
    """Numbers the calls of an answer, and makes their pieces."""

    def __init__(self, most: int | None) -> None:
        """`most`: after how many calls the answer ends."""
        self._most, self._count = most, 0

    @property
    def full(self) -> bool:
        """Whether there are as many calls as there may be."""
        return self._most is not None and self._count >= self._most

    def begin(self, name: str) -> CallDelta:
        """The first piece of the next call."""
        self._count += 1
        return CallDelta(self._count - 1, f"call_{secrets.token_hex(12)}", name)

    def arguments(self, text: str) -> list[Event]:
        """A piece of the newest call's arguments; none if the text is empty."""
        return [CallDelta(self._count - 1, arguments=text)] if text else []


def joined(deltas: Iterable[CallDelta]) -> list[ToolCall]:
    """The calls that some pieces make up."""
    calls = dict[int, ToolCall]()
    for delta in deltas:
        known = calls.get(delta.index, ToolCall("", "", ""))
        calls[delta.index] = ToolCall(known.id or delta.id, known.name or delta.name, known.arguments + delta.arguments)
    return [calls[index] for index in sorted(calls)]


def _events(text: str) -> list[Event]:
    return [text] if text else []

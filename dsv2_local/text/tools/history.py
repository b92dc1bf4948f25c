"""Calls and results in the messages of a conversation."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from dsv2_local.chunk import ToolCall
from dsv2_local.errors import InputError
from dsv2_local.text.chat_template import Message
from dsv2_local.text.tools.functions import as_json, check_json
from dsv2_local.values import Text, checked, shown


@dataclass(frozen=True)
class Calls:
    """A turn in which the assistant calls functions, after some text or none."""

    text: str
    calls: list[ToolCall]


@dataclass(frozen=True)
class Results:
    """The results of calls, in the order of the calls."""

    texts: list[str]


@dataclass(frozen=True)
class Turn:
    """Any other message; `text` is its content if that is the assistant's, and text."""

    message: Message
    text: str | None = field(default=None)


def read_history(messages: Sequence[Any]) -> Iterator[Calls | Results | Turn]:
    """A conversation in which calls and results are told apart from other messages.

    Raises:
        InputError: a call lacks its name or its arguments, or a result its text.
    """
    called: list[ToolCall] = []
    for is_result, group in groupby(messages, lambda message: _role(message) == "tool"):
        if is_result:
            yield Results(_in_order(group, called))
            called = []
            continue
        for message in group:
            assistant = _role(message) == "assistant"
            if assistant and message.get("tool_calls"):
                called = [_call(call) for call in _list_of_calls(message["tool_calls"])]
                yield Calls(text_of(message.get("content"), "an assistant's message"), called)
            elif assistant and isinstance(message.get("content"), str):
                yield Turn(message, message["content"])
            else:
                yield Turn(message)


def text_of(content: Any, where: str) -> str:
    """The text of a content: nothing, text, or parts of type text, which are joined by line feeds.

    Raises:
        InputError: it is none of these.
    """
    if content is None:
        return ""
    if isinstance(content, list | tuple):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        return "\n".join(checked(f"a part of {where}", part, Text(), InputError) for part in parts)
    return str(checked(where, content, Text(), InputError))


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _list_of_calls(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise InputError(f"tool_calls must be a list, not {shown(value)}")
    return list(value)


def _call(call: Any) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InputError(f"a tool call needs a function with its name and arguments: {shown(call)}")
    name = checked("the name in a tool call", function.get("name"), Text(), InputError)
    arguments, id = function.get("arguments"), call.get("id")
    if isinstance(arguments, Mapping):  # as some programs pass them, which read the JSON text themselves
        check_json(arguments, "the arguments of a tool call")
        arguments = as_json(arguments)
    arguments = checked("the arguments of a tool call", arguments or "{}", Text(), InputError)
    return ToolCall(id if isinstance(id, str) else "", name, arguments)


def _in_order(messages: Iterable[Any], called: Sequence[ToolCall]) -> list[str]:
    """Texts of results in the order of the calls that they belong to; those that belong to none come last."""
    places = {call.id: place for place, call in reversed(list(enumerate(called))) if call.id}
    results = list(messages)
    results.sort(key=lambda message: places.get(_hashable(message.get("tool_call_id")), len(called)))
    return [text_of(message.get("content"), "the result of a tool call") for message in results]


def _hashable(id: Any) -> str:
    return id if isinstance(id, str) else ""

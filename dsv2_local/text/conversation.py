"""Roles of messages, in the form that chat templates know."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any


def with_known_roles(messages: Sequence[Any]) -> list[Any]:
    """The messages of a conversation with one system message at most, the first.

    A developer's message is a system message. Those at the beginning are joined by empty lines. A later one stays where
    it is, as the user's, because some templates would move it to the front: agents insert such reminders anew with
    every request, and would change the beginning of each prompt.
    """
    renamed = [_renamed(message, "developer", "system") for message in messages]
    leading = list(takewhile(_is_system, renamed))
    rest = [_renamed(message, "system", "user") for message in renamed[len(leading) :]]
    return [*_joined(leading), *rest]


def _joined(messages: list[Any]) -> list[Any]:
    texts = [message.get("content") for message in messages]
    if len(messages) < 2 or not all(isinstance(text, str) for text in texts):
        return messages
    return [{**messages[0], "content": "\n\n".join(filter(None, texts))}]


def _renamed(message: Any, old: str, new: str) -> Any:
    return {**message, "role": new} if isinstance(message, Mapping) and message.get("role") == old else message


def _is_system(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "system"

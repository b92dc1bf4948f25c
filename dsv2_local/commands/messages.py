"""Which lines of a chat are commands and which are messages to the model."""

import re

COMMAND = re.compile(r"/([A-Za-z?]+(?=\s|$)|$)")
"""A slash and one word. A path or a comment in C is text."""
ESCAPED = re.compile(r"/{2,}([^\s/]|\s*$)")
"""Text of which one slash is taken off, so that a message can begin with what looks like a command."""


def is_command(text: str) -> bool:
    """Whether the text is a command of the chat."""
    return COMMAND.match(text) is not None


def as_message(text: str) -> str:
    """The message that is sent when the user types `text`: without the line ends at its end, and unescaped."""
    return (text[1:] if ESCAPED.match(text) else text).rstrip("\r\n")


def as_typed(message: str) -> str:
    """What the user would type to send `message`: with a slash before it if it would not be sent as it is."""
    return f"/{message}" if is_command(message) or ESCAPED.match(message) else message

"""What a format of tools must be able to do. Formats know the prompt and the answer, not the model."""

from collections.abc import Callable, Sequence
from typing import Protocol

from dsv2_local.text.chat_template import Message
from dsv2_local.text.tools.calls import AnswerParser
from dsv2_local.text.tools.functions import Function

ANY_TEXT = "/(.|\\n)*/"
"""A term of a Lark grammar."""


class ToolFormat(Protocol):
    """How definitions, calls and results are written in a prompt, and how calls are found in an answer."""

    def definitions(self, functions: Sequence[Function], system: str) -> str:
        """The system message: what the conversation's own (or an empty text) says, and the functions."""
        ...

    def turns(self, messages: Sequence[Message]) -> tuple[list[Message], bool]:
        """A conversation without calls and results, which have become text of messages; and whether the answer goes on
        in its last message.

        Raises:
            InputError: a call lacks its name or its arguments, or a result its text.
        """
        ...

    def parser(self, most_calls: int | None) -> AnswerParser:
        """A parser for one answer, which ends after so many calls."""
        ...

    def grammar(
        self,
        functions: Sequence[Function],
        *,
        answer: str | None,
        parallel: bool,
        schema: Callable[[Function], str],
        lead: str | None,
    ) -> str:
        """The grammar of answers, in Lark.

        Args:
            functions: those that may be called.
            answer: what the answer may be instead of a call, as a term of a Lark grammar; `ANY_TEXT`, which may also
                come before a call; None: it must be a call.
            parallel: whether there may be several calls.
            schema: writes a function's arguments as a term of a Lark grammar.
            lead: white space that a call begins with if nothing else comes before it; None: a space or nothing.
        """
        ...

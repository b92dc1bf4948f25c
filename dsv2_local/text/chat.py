"""What a chat sends to the model: the conversation and its tools as token ids, and how its answer is to be read."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv2_local.errors import InputError
from dsv2_local.text.chat_template import Message
from dsv2_local.text.conversation import with_known_roles
from dsv2_local.text.detokenizer import Detokenizer
from dsv2_local.text.grammar import embedded_schema
from dsv2_local.text.tokenizer import Tokenizer
from dsv2_local.text.tools.calls import AnswerParser, PlainText
from dsv2_local.text.tools.format import ANY_TEXT, ToolFormat
from dsv2_local.text.tools.functions import Function, read_choice, read_functions
from dsv2_local.text.tools.history import text_of
from dsv2_local.text.tools.prompt_format import PromptFormat
from dsv2_local.text.tools.token_format import Markers, TokenFormat
from dsv2_local.values import Flag, checked, shown


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt, and what is known of the answer.

    Attributes:
        ids: the token ids.
        strip: whether white space before the first word of the answer is left out.
        functions: those that the answer may call; empty if it may call none.
        forced: whether it must begin with a call.
        parallel: whether it may have several calls.
        lead: the white space that the next prompt has before the answer, if that is known.
    """

    ids: list[int]
    strip: bool
    functions: tuple[Function, ...]
    forced: bool
    parallel: bool
    lead: str | None


class Chats:
    """Writes conversations for one tokenizer, in the format that its checkpoint has for tools.

    Attributes:
        format: how tools are written and calls are read.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._markers = Markers.of(tokenizer)
        self.format: ToolFormat = TokenFormat(tokenizer, self._markers) if self._markers else PromptFormat(tokenizer)

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        tool_choice: str | None = None,
        parallel_tool_calls: bool | None = None,
        documents: Sequence[Any] | None = None,
        continue_final: bool = False,
        context: int | None = None,
    ) -> ChatPrompt:
        """Encode a conversation; see `LLM.chat` for arguments and errors, and `Tokenizer.encode` for `context`."""
        functions = read_functions(tools)
        choice = read_choice(tool_choice, functions)
        parallel = parallel_tool_calls is None or checked(
            "parallel_tool_calls", parallel_tool_calls, Flag(), InputError
        )
        continue_final = checked("continue_final", continue_final, Flag(), InputError)
        if isinstance(messages, Sequence) and not isinstance(messages, str | bytes):
            messages = with_known_roles(messages)
            if continue_final and not _final_text(messages).strip():
                messages, continue_final = messages[:-1], False
        if choice == "none":
            tools, functions = None, []
        goes_on = continue_final
        if not self._tokenizer.knows_tools and isinstance(messages, list):
            if functions:
                messages = self._with_definitions(messages, functions)
            messages, after_results = self.format.turns(messages)
            goes_on = goes_on or after_results
            tools = None
        ids = self._tokenizer.encode_chat(
            messages, tools=tools, documents=documents, continue_final=goes_on, context=context
        )
        named = [function for function in functions if function.name == choice]
        return ChatPrompt(
            ids,
            strip=not continue_final,
            functions=tuple(named or functions),
            forced=bool(named) or choice == "required",
            parallel=parallel and not named,
            lead=None if goes_on else self._tokenizer.lead,
        )

    def parser(self, prompt: ChatPrompt) -> AnswerParser:
        """A parser of the answer to a prompt. Without functions, what would be a call is text, without markers."""
        if prompt.functions:
            return self.format.parser(None if prompt.parallel else 1)
        return PlainText(Detokenizer(self._tokenizer), self._markers.ids.values() if self._markers else ())

    def grammar(self, prompt: ChatPrompt, answer: str | None = None, free: Collection[str] = ()) -> str:
        """The grammar of answers to a prompt that has functions, whose arguments follow their schemas.

        Args:
            prompt: what is answered.
            answer: answers without a call, as a term of a Lark grammar; None: any text.
            free: names of functions whose arguments are any object.

        Raises:
            InputError: a schema cannot be written as a grammar.
        """

        def schema(function: Function) -> str:
            if function.name in free:
                return embedded_schema({"type": "object"})
            return embedded_schema(function.arguments, function.strict)

        start = None if prompt.forced else answer or ANY_TEXT
        return self.format.grammar(
            prompt.functions, answer=start, parallel=prompt.parallel, schema=schema, lead=prompt.lead
        )

    def _with_definitions(self, messages: list[Any], functions: Sequence[Function]) -> list[Any]:
        first = messages[0] if messages else None
        if isinstance(first, Mapping) and first.get("role") == "system":
            system = text_of(first.get("content"), "the system message")
            return [{**first, "content": self.format.definitions(functions, system)}, *messages[1:]]
        return [{"role": "system", "content": self.format.definitions(functions, "")}, *messages]


def _final_text(messages: Sequence[Any]) -> str:
    """The text of the last message, which the answer continues. Raises InputError if that is not the assistant's."""
    last = messages[-1] if messages else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant" or last.get("tool_calls"):
        raise InputError(f"continue_final needs a text of the assistant as the last message, not {shown(last)}")
    return text_of(last.get("content"), "the last message")

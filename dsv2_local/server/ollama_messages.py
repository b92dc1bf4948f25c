"""Requests of Ollama's API as `LLM.chat` and `LLM.generate` take them: messages in OpenAI's shape, and options."""

from collections.abc import Callable, Mapping
from typing import Any

from dsv2_local.errors import InputError
from dsv2_local.server import openai_format, openai_tools
from dsv2_local.values import Flag, Number, Object, Text, checked, shown

Arguments = Callable[[str, dict[str, Any]], str]
"""Writes the arguments of a call of a function, by its name, as text."""

_OPTIONS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed",
    "repeat_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}  # fmt: skip
_ROLES = "system", "developer", "user", "assistant", "tool"
_NULL = {"type": "null"}
_CALL = {
    "type": "object", "required": ["function"],
    "properties": {
        "function": {
            "type": "object", "required": ["name"],
            "properties": {"name": {"type": "string"}, "arguments": {"type": "object"}},
        }
    },
}  # fmt: skip
_MESSAGE = {
    "type": "object", "required": ["role"],
    "properties": {
        "role": {"enum": list(_ROLES)}, "content": {"type": "string"}, "tool_name": {"type": "string"},
        "tool_calls": {"type": "array", "items": _CALL},
    },
}  # fmt: skip
_COMMON: dict[str, Any] = {
    "model": {"type": "string"}, "stream": {"anyOf": [{"type": "boolean"}, _NULL]},
    "format": {"anyOf": [{"enum": ["", "json"]}, {"type": "object"}, _NULL]},
    "options": {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    **{theirs: openai_format.OPTION_SCHEMAS[ours] for theirs, ours in _OPTIONS.items()},
                    "num_predict": {"type": "integer", "minimum": -2}, "stop": openai_format.OPTION_SCHEMAS["stop"],
                },
            },
            _NULL,
        ]
    },
    "logprobs": {"anyOf": [{"type": "boolean"}, _NULL]},
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": openai_format.MOST_LOGPROBS},
}  # fmt: skip
CHAT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        **_COMMON, "messages": {"anyOf": [{"type": "array", "items": _MESSAGE}, _NULL]},
        "tools": {"anyOf": [{"type": "array", "items": {"type": "object"}}, _NULL]},
    },
}  # fmt: skip
GENERATE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        **_COMMON, "prompt": {"type": "string"}, "system": {"type": "string"}, "suffix": {"type": "string"},
        "raw": {"type": "boolean"},
    },
}  # fmt: skip


def streamed(body: Mapping[str, Any]) -> bool:
    """Whether an answer comes in pieces: yes, unless the body says no."""
    value = body.get("stream")
    return value is None or bool(checked("stream", value, Flag(), InputError))


def messages(body: Mapping[str, Any], arguments: Arguments) -> list[dict[str, Any]]:
    """The conversation in OpenAI's shape; empty if there is none, which asks for the model to be loaded.

    Calls have ids there, which results refer to. Where a client sends none, results belong to the calls before them in
    their order.

    Raises:
        InputError: it is no list of messages, or has images.
    """
    given = body.get("messages")
    if given is not None and not isinstance(given, list):
        raise InputError(f"messages must be a list, not {shown(given)}")
    found: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []  # (id, function's name)
    for each in given or []:
        message = checked("a message", each, Object(), InputError)
        if (role := message.get("role")) not in _ROLES:
            raise InputError(f"the role of a message must be one of {', '.join(_ROLES)}, not {shown(role)}")
        refuse_images(message)
        content = message.get("content")
        turn = {"role": role, "content": "" if content is None else _text("the content of a message", content)}
        if role == "assistant" and message.get("tool_calls"):
            calls = _calls(message["tool_calls"], arguments, len(found))
            turn |= {"content": turn["content"] or None, "tool_calls": calls}
            open_calls = [(call["id"], call["function"]["name"]) for call in calls]
        elif role == "tool":
            turn["tool_call_id"] = _result_id(message, open_calls)
        found.append(turn)
    return found


def chat_options(body: Mapping[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The options of `LLM.chat` for these messages. Raises InputError if one is impossible."""
    found = options(body)
    if tools := openai_tools.listed("tools", body.get("tools")):
        found["tools"] = tools
    if messages and messages[-1]["role"] == "assistant":
        found["continue_final"] = True
    return found


def options(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options that chats and completions share.

    Settings of Ollama's runner (num_ctx, num_gpu, mirostat, …) are ignored; a template is refused, as no request may
    bring one.

    Raises:
        InputError: one is impossible.
    """
    if body.get("template"):
        raise InputError("a template is not taken from requests; with raw: true the prompt is used as it is")
    given = body.get("options")
    values = {} if given is None else checked("options", given, Object(), InputError)
    found = {ours: values[theirs] for theirs, ours in _OPTIONS.items() if values.get(theirs) is not None}
    if values.get("stop") is not None:
        found["stop"] = values["stop"]
    if (most := values.get("num_predict")) is not None:
        most = checked("num_predict", most, Number(-2, whole=True), InputError)
        found["max_tokens"] = max(most, -1)  # -1: no limit, -2: to the end of the context
    wanted = body.get("format")
    if wanted == "json":
        found["schema"] = {"type": "object"}
    elif isinstance(wanted, dict):
        found["schema"] = wanted
    elif wanted not in (None, ""):
        raise InputError(f'format must be "json" or a JSON schema, not {shown(wanted)}')
    return found | openai_format.chat_logprobs(body)


def refuse_images(body: Mapping[str, Any]) -> None:
    """Refuse a message or a body with images. Raises InputError if it has some."""
    if body.get("images"):
        raise InputError("there are images, and the model reads text alone")


def text_of(body: Mapping[str, Any], name: str) -> str:
    """A field that is text; empty if it is missing. Raises InputError if it is none."""
    value = body.get(name)
    return "" if value is None else _text(name, value)


def _text(name: str, value: Any) -> str:
    return checked(name, value, Text(), InputError)  # type: ignore[no-any-return]


def _calls(given: Any, arguments: Arguments, turn: int) -> list[dict[str, Any]]:
    found = []
    for index, each in enumerate(openai_format.list_of("tool_calls", given)):
        call = checked("a tool call", each, Object(), InputError)
        function = checked("the function of a tool call", call.get("function"), Object(), InputError)
        name = _text("the name of a tool call", function.get("name"))
        values = function.get("arguments")
        if not isinstance(values, str):
            values = {} if values is None else checked("the arguments of a tool call", values, Object(), InputError)
            values = arguments(name, values)
        id = _text("the id of a tool call", call["id"]) if call.get("id") else f"call_{turn}_{index}"
        found.append({"id": id, "type": "function", "function": {"name": name, "arguments": values}})
    return found


def _result_id(message: Mapping[str, Any], open_calls: list[tuple[str, str]]) -> str:
    """The id of the call that a message has the result of; it is no longer open then."""
    if message.get("tool_call_id"):
        id = _text("the tool_call_id of a message", message["tool_call_id"])
        open_calls[:] = [call for call in open_calls if call[0] != id]
        return id
    if not open_calls:
        return "call"
    named = message.get("tool_name") or message.get("name")
    index = next((i for i, (_, name) in enumerate(open_calls) if name == named), 0)
    return open_calls.pop(index)[0]

"""Requests of Anthropic's API as `LLM.chat` takes them: messages in OpenAI's shape, and options.

What only Anthropic's own servers can do (thinking, caching hints, tools that they run) is left out, as a model without
it would; images and documents are refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dsv2_local.errors import InputError
from dsv2_local.server import openai_format, openai_tools
from dsv2_local.values import Number, Object, Text, checked, shown

Arguments = Callable[[str, dict[str, Any]], str]
"""Writes the arguments of a call of a function, by its name, as text."""

BILLING = "x-anthropic-billing-header"
"""Begins a first system block of Claude Code that differs each time, so that no prompt would have a known beginning."""
_UNREADABLE = "image", "document"
_SAMPLING = "temperature", "top_p", "top_k", "min_p", "seed"
_OUR_TOOLS = None, "custom"
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_NULL = {"type": "null"}
_BLOCK: dict[str, Any] = {
    "type": "object", "required": ["type"],
    "properties": {
        "type": {"enum": ["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]},
        "text": {"type": "string"}, "id": {"type": "string"}, "name": {"type": "string"}, "input": {"type": "object"},
        "tool_use_id": {"type": "string"}, "is_error": {"type": "boolean"},
    },
}  # fmt: skip
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _BLOCK}]}
_MESSAGE = {
    "type": "object", "required": ["role", "content"],
    "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": _CONTENT},
}  # fmt: skip
_TOOL = {
    "type": "object", "required": ["name", "input_schema"],
    "properties": {
        "type": {"const": "custom"}, "name": {"type": "string"}, "description": {"type": "string"},
        "input_schema": {"type": "object"},
    },
}  # fmt: skip
_FORMAT = {
    "type": "object", "required": ["type", "schema"],
    "properties": {"type": {"const": "json_schema"}, "schema": {"type": "object"}},
}  # fmt: skip
COUNT_SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["messages"],
    "properties": {
        "model": {"type": "string"}, "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
        "system": {"anyOf": [*_CONTENT["anyOf"], _NULL]},
        "tools": {"anyOf": [{"type": "array", "items": _TOOL}, _NULL]},
        "tool_choice": {
            "anyOf": [
                {
                    "type": "object", "required": ["type"],
                    "properties": {
                        "type": {"enum": [*_CHOICES, "tool"]}, "name": {"type": "string"},
                        "disable_parallel_tool_use": {"type": "boolean"},
                    },
                },
                _NULL,
            ]
        },
        "output_config": {"anyOf": [{"type": "object", "properties": {"format": {"anyOf": [_FORMAT, _NULL]}}}, _NULL]},
    },
}  # fmt: skip
MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["messages", "max_tokens"],
    "properties": {
        **COUNT_SCHEMA["properties"], "max_tokens": {"type": "integer", "minimum": 0}, "stream": {"type": "boolean"},
        "stop_sequences": {"anyOf": [{"type": "array", "items": {"type": "string"}}, _NULL]},
        **{name: openai_format.OPTION_SCHEMAS[name] for name in _SAMPLING},
    },
}  # fmt: skip


def messages(body: Mapping[str, Any], arguments: Arguments) -> list[dict[str, Any]]:
    """The conversation in OpenAI's shape. Several results of tools become as many messages, before the turn's text.

    Raises:
        InputError: it is no list of messages, or holds what the model cannot read.
    """
    system = _system(body.get("system"))
    found = [{"role": "system", "content": system}] if system else []
    for each in openai_format.list_of("messages", body.get("messages")):
        found += _turn(checked("a message", each, Object(), InputError), arguments)
    return found


def conversation_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `LLM.chat` that belong to the conversation: tools, their choice, the format, the last turn's role.

    Raises:
        InputError: one of them is impossible.
    """
    found: dict[str, Any] = _tool_options(body)
    last = body["messages"][-1]
    if last.get("role") == "assistant":
        found["continue_final"] = True
    if (schema := _schema(body)) is not None:
        found |= {"schema": schema, "strict": True}
    return found


def sampling_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """The other options of `LLM.chat`.

    Raises:
        InputError: `max_tokens` is missing, or a value is impossible.
    """
    if body.get("max_tokens") is None:
        raise InputError("max_tokens is missing; Anthropic's API requires it")
    found = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    found["max_tokens"] = checked("max_tokens", body["max_tokens"], Number(0, whole=True), InputError)
    if (stops := body.get("stop_sequences")) is not None:
        if not isinstance(stops, list):
            raise InputError(f"stop_sequences must be a list of texts, not {shown(stops)}")
        found["stop"] = [checked("a stop sequence", each, Text(), InputError) for each in stops]
    return found


def _system(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise InputError(f"system must be text or a list of blocks, not {shown(value)}")
    texts = [_text(block, "system") for block in value]
    if texts and texts[0].lstrip().startswith(BILLING):
        del texts[0]
    return "\n".join(filter(None, texts))


def _turn(message: Mapping[str, Any], arguments: Arguments) -> list[dict[str, Any]]:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise InputError(f"the role of a message must be user, assistant or system, not {shown(role)}")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise InputError(f"the content of a message must be text or a list of blocks, not {shown(content)}")
    blocks = [checked("a block of a message", block, Object(), InputError) for block in content]
    for block in blocks:
        _check_readable(block)
    if role == "assistant":
        return [_answer(blocks, arguments)]
    results = [_result(block) for block in blocks if block.get("type") == "tool_result"]
    texts = [_text(block, "a message") for block in blocks if block.get("type") != "tool_result"]
    text = "\n".join(filter(None, texts))
    return [*results, {"role": role, "content": text}] if text or not results else results


def _answer(blocks: list[dict[str, Any]], arguments: Arguments) -> dict[str, Any]:
    """A turn of the model. Blocks of other servers (thinking, tools that they ran) are left out."""
    text = "".join(_text(block, "a message") for block in blocks if block.get("type") == "text")
    calls = [_call(block, arguments) for block in blocks if block.get("type") == "tool_use"]
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": text or None, "tool_calls": calls}


def _call(block: Mapping[str, Any], arguments: Arguments) -> dict[str, Any]:
    name = checked("the name of a tool_use block", block.get("name"), Text(), InputError)
    given = checked("the input of a tool_use block", block.get("input"), Object(), InputError)
    id = checked("the id of a tool_use block", block.get("id"), Text(), InputError)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments(name, given)}}


def _result(block: Mapping[str, Any]) -> dict[str, Any]:
    id = checked("the tool_use_id of a tool_result block", block.get("tool_use_id"), Text(), InputError)
    content = block.get("content")
    if isinstance(content, list):
        parts = [checked("a block of a tool_result", each, Object(), InputError) for each in content]
        for part in parts:
            _check_readable(part)
        content = "\n".join(_text(part, "a tool_result") for part in parts)
    elif content is not None and not isinstance(content, str):
        raise InputError(f"the content of a tool_result block must be text or a list of blocks, not {shown(content)}")
    text = content or ""
    if openai_format.flag(block, "is_error") and not text.lstrip("<").lower().startswith(("error", "tool_use_error")):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": id, "content": text}


def _check_readable(block: Mapping[str, Any]) -> None:
    if (kind := block.get("type")) in _UNREADABLE:
        raise InputError(f"a message has a block of type {kind}, and the model reads text alone")


def _text(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "tool_reference":  # a tool that a search has found; its definition is among the tools
        return checked("the tool_name of a block", block.get("tool_name"), Text(), InputError)  # type: ignore[no-any-return]
    if kind != "text":
        raise InputError(f"a block of {where} must be of type text, not {shown(block if kind is None else kind)}")
    return checked(f"the text of a block of {where}", block.get("text"), Text(), InputError)  # type: ignore[no-any-return]


def _tool_options(body: Mapping[str, Any]) -> dict[str, Any]:
    tools, choice = openai_tools.listed("tools", body.get("tools")), body.get("tool_choice")
    given = [checked("a tool", tool, Object(), InputError) for tool in tools]
    functions = [_function(tool) for tool in given if tool.get("type") in _OUR_TOOLS]
    found: dict[str, Any] = {"tools": functions} if functions else {}
    if choice is None:
        return found
    choice = checked("tool_choice", choice, Object(), InputError)
    kind = choice.get("type")
    if kind == "tool":
        name = checked("the name of tool_choice", choice.get("name"), Text(), InputError)
        if name not in [function["function"]["name"] for function in functions]:
            raise InputError(f"tool_choice names {shown(name)}, which is none of the tools")
        found["tool_choice"] = name
    elif not isinstance(kind, str) or kind not in _CHOICES:
        raise InputError(f"the type of tool_choice must be auto, any, tool or none, not {shown(kind)}")
    elif functions:
        found["tool_choice"] = _CHOICES[kind]
    elif kind == "any":
        raise InputError("tool_choice asks for a call, and there are no tools that this server can offer")
    if openai_format.flag(choice, "disable_parallel_tool_use") and functions:
        found["parallel_tool_calls"] = False
    return found


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    name = checked("the name of a tool", tool.get("name"), Text(), InputError)
    function: dict[str, Any] = {"name": name}
    if (description := tool.get("description")) is not None:
        function["description"] = checked(f"the description of tool {name!r}", description, Text(), InputError)
    function["parameters"] = checked(
        f"the input_schema of tool {shown(name)}", tool.get("input_schema"), Object(), InputError
    )
    if tool.get("strict") is not None:
        function["strict"] = openai_format.flag(tool, "strict")
    return {"type": "function", "function": function}


def _schema(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON schema that the answer must follow, from `output_config.format` or the older `output_format`."""
    config = body.get("output_config")
    wanted = None if config is None else checked("output_config", config, Object(), InputError).get("format")
    wanted = body.get("output_format") if wanted is None else wanted
    if wanted is None:
        return None
    wanted = checked("output_config.format", wanted, Object(), InputError)
    if wanted.get("type") != "json_schema":
        raise InputError(f"the type of output_config.format must be json_schema, not {shown(wanted.get('type'))}")
    return checked("the schema of output_config.format", wanted.get("schema"), Object(), InputError)  # type: ignore[no-any-return]

"""Requests and answers in the shapes of OpenAI's /v1/responses."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dsv2_local.errors import InputError
from dsv2_local.server import openai_format, openai_tools
from dsv2_local.server.openai_tools import CUSTOM_ARGUMENT, Tools
from dsv2_local.server.written_arguments import WrittenArguments
from dsv2_local.values import Flag, Object, Text, checked, shown

if TYPE_CHECKING:
    from dsv2_local.chunk import CallDelta, Chunk
    from dsv2_local.generation import Generation

STATEFUL = "previous_response_id", "conversation", "prompt"
"""Fields that name something that a server has kept."""
_TOOLS = "function", "custom"
Event = tuple[str, dict[str, Any]]
"""The name of an event, without "response." before it, and its fields."""

_ITEM_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"type": "string"}, "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
        "call_id": {"type": "string"}, "name": {"type": "string"}, "arguments": {"type": "string"},
    },
}  # fmt: skip
SCHEMA: dict[str, Any] = {
    "type": "object", "required": ["input"],
    "properties": {
        "model": {"type": "string"},
        "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM_SCHEMA, "minItems": 1}]},
        "instructions": {"type": ["string", "null"]}, "max_output_tokens": {"type": ["integer", "null"], "minimum": 1},
        **{
            name: openai_format.OPTION_SCHEMAS[name]
            for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream")
        },
        "tools": {
            "type": ["array", "null"],
            "items": {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}},
        },
        "tool_choice": openai_tools.TOOL_SCHEMAS["tool_choice"],
        "parallel_tool_calls": openai_tools.TOOL_SCHEMAS["parallel_tool_calls"],
        "text": {"type": ["object", "null"], "properties": {"format": {"type": ["object", "null"]}}},
    },
}  # fmt: skip
"""The body, as a JSON schema for the documentation."""


def refuse_state(body: Mapping[str, Any]) -> None:
    """Refuse what a server that keeps no answers cannot do.

    Raises:
        InputError: the body names an earlier response, a conversation or a kept prompt, or asks for work in the
            background.
    """
    for name in STATEFUL:
        if body.get(name) is not None:
            raise InputError(f"{name} is not supported: this server keeps no responses; send the whole conversation")
    if openai_format.flag(body, "background"):
        raise InputError("background is not supported: this server keeps no responses; use stream")


def messages(body: Mapping[str, Any], written: WrittenArguments) -> list[dict[str, Any]]:
    """The conversation as `LLM.chat` takes it; items that only OpenAI's servers can read are left out.

    Args:
        body: of the request.
        written: remembers how the model wrote the calls of custom tools.

    Raises:
        InputError: an item is malformed, of an unknown type, or refers to what the server has not kept.
    """
    found: list[dict[str, Any]] = []
    if body.get("instructions") is not None:
        text = checked("instructions", body["instructions"], Text(), InputError)
        found.append({"role": "system", "content": text})
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else openai_format.list_of("input", given)
    for item in items:
        _add(found, checked("an item of input", item, Object(), InputError), written)
    return openai_format.messages(found)


def _add(messages: list[dict[str, Any]], item: dict[str, Any], written: WrittenArguments) -> None:
    """Append an item to the messages, or to the last of them if it is a part of the same turn."""
    kind = item.get("type", "message")
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if kind == "message":
        if item.get("role") == "assistant" and last and last.get("tool_calls"):  # words after a call
            texts = [openai_format.text_of(each) for each in (last["content"], item.get("content")) if each]
            last["content"] = "\n".join(texts)
        else:
            messages.append({"role": item.get("role"), "content": item.get("content")})
    elif kind in ("function_call", "custom_tool_call"):
        arguments = item.get("arguments")
        if kind == "custom_tool_call":
            text = checked("the input of a call", item.get("input"), Text(), InputError)
            name = checked("the name of a call", item.get("name"), Text(), InputError)
            arguments = written.text(name, {CUSTOM_ARGUMENT: text})
        call = openai_tools.call(_call_id(item), item.get("name"), arguments)
        if last is None:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        else:
            last.setdefault("tool_calls", []).append(call)
    elif kind in ("function_call_output", "custom_tool_call_output"):
        messages.append({"role": "tool", "tool_call_id": _call_id(item), "content": item.get("output")})
    elif kind == "item_reference":
        raise InputError("item_reference is not supported: this server keeps no items; send the item itself")
    elif not (kind in ("reasoning", "compaction") or str(kind).endswith(("_call", "_call_output"))):
        raise InputError(f"an item of input has the unknown type {shown(kind)}")


def _call_id(item: Mapping[str, Any]) -> str:
    return checked("call_id", item.get("call_id", ""), Text(), InputError)  # type: ignore[no-any-return]


def tools(body: Mapping[str, Any]) -> Tools:
    """What a body says of tools. A tool of the type custom is a function of one text; tools of other types than this
    and function are left out: they run on OpenAI's servers, and agents send them to all.

    Raises:
        InputError: a tool is malformed, or the choice is none of them.
    """
    given = [checked("a tool", each, Object(), InputError) for each in openai_tools.listed("tools", body.get("tools"))]
    known = [each for each in given if each.get("type") in _TOOLS]
    definitions = [_custom(each) if each["type"] == "custom" else openai_tools.function(each) for each in known]
    custom = frozenset(each["name"] for each in known if each["type"] == "custom")
    parallel = body.get("parallel_tool_calls")
    if parallel is not None:
        checked("parallel_tool_calls", parallel, Flag(), InputError)
    found = Tools(openai_tools.distinct(definitions), parallel=parallel, custom=custom)
    choice = body.get("tool_choice")
    if not isinstance(choice, dict):
        return found.chosen(openai_tools.word("tool_choice", choice))
    if choice.get("type") == "allowed_tools":
        allowed = openai_tools.listed("tool_choice.tools", choice.get("tools"))
        names = [
            openai_tools.name_of(each) for each in allowed if isinstance(each, dict) and each.get("type") in _TOOLS
        ]
        return found.allowed(names).chosen(openai_tools.word("tool_choice.mode", choice.get("mode")))
    if choice.get("type") not in _TOOLS:
        raise InputError(f"tool_choice must name a tool of type function or custom, not {shown(choice.get('type'))}")
    return found.chosen(openai_tools.name_of(choice))


def _custom(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function that takes the text of a custom tool; a grammar for this text becomes a part of its description."""
    described = [tool["description"]] if tool.get("description") is not None else []
    if isinstance(format := tool.get("format"), dict) and format.get("type") == "grammar":
        described.append(f"{CUSTOM_ARGUMENT} follows this {format.get('syntax')} grammar:\n{format.get('definition')}")
    found = openai_tools.function({"name": tool.get("name")})
    found["function"] |= {"description": "\n\n".join(map(str, described))} if described else {}
    found["function"]["parameters"] = {
        "type": "object", "properties": {CUSTOM_ARGUMENT: {"type": "string"}}, "required": [CUSTOM_ARGUMENT],
        "additionalProperties": False,
    }  # fmt: skip
    return found


def options(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `LLM.chat` for sampling and for the form of the answer. Raises InputError if one is impossible."""
    found = openai_format.sampling({**body, "max_tokens": None, "max_completion_tokens": body.get("max_output_tokens")})
    text = body.get("text")
    format = None if text is None else checked("text", text, Object(), InputError).get("format")
    return found | openai_tools.text_format(format, "text.format", schema_in=None)


def response(body: Mapping[str, Any], id: str, created: int, model: str, **rest: Any) -> dict[str, Any]:
    """The object of a response to a body; `rest` is what has been computed."""
    echoed: dict[str, Any] = {
        "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True,
        "temperature": None, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": None,
        "user": None,
    }  # fmt: skip
    given = {name: default if body.get(name) is None else body[name] for name, default in echoed.items()}
    return {
        "id": f"resp_{id}", "object": "response", "created_at": created, "model": model, "status": "in_progress",
        "background": False, "error": None, "incomplete_details": None, "previous_response_id": None, "store": False,
        "reasoning": {"effort": None, "summary": None}, "service_tier": "default", "truncation": "disabled",
        "output": [], "usage": None, **given, **rest,
    }  # fmt: skip


def result(generation: "Generation", items: list[dict[str, Any]]) -> dict[str, Any]:
    """What `response` has more when an answer is complete: its status, its items and its usage."""
    whole = generation.stats.finish_reason == "stop"
    return {
        "status": "completed" if whole else "incomplete", "output": items, "usage": _usage(generation),
        "incomplete_details": None if whole else {"reason": "max_output_tokens"},
    }  # fmt: skip


def _usage(generation: "Generation") -> dict[str, Any]:
    stats = generation.stats
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.reused_tokens, "cache_write_tokens": 0},
        "output_tokens": stats.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
    }  # fmt: skip


class Output:
    """The items of an answer, and the events that tell of them, while its chunks come.

    Attributes:
        items: the items so far; the last one may be unfinished.
    """

    def __init__(self, id: str, custom: frozenset[str]) -> None:
        """For the answer of a job with this id; `custom` has the names of tools that take text."""
        self.items: list[dict[str, Any]] = []
        self._id, self._custom = id, custom
        self._open = False
        self._white_space, self._text, self._arguments = "", "", ""

    def push(self, chunk: "Chunk") -> Iterator[Event]:
        """Add a chunk; yields the events of it."""
        if chunk.text:
            yield from self._push_text(chunk.text)
        for delta in chunk.calls:
            yield from self._push_call(delta)

    def end(self, whole: bool) -> Iterator[Event]:
        """Yield the last events; `whole`: the answer was not cut off."""
        if not self.items:
            yield from self._begin_message()
        if self._open:
            yield from self._close("completed" if whole else "incomplete")

    def _push_text(self, text: str) -> Iterator[Event]:
        if not (self._open and self._is_message):
            # White space alone, before a call or after it, is no message.
            self._white_space += text
            if self._white_space.isspace():
                return
            text, self._white_space = self._white_space, ""
            yield from self._begin_message()
        self._text += text
        yield "output_text.delta", {**self._place, "content_index": 0, "delta": text, "logprobs": []}

    def _begin_message(self) -> Iterator[Event]:
        yield from self._begin("msg", {"type": "message", "role": "assistant", "content": []})
        self._text = ""
        yield "content_part.added", {**self._place, "content_index": 0, "part": _part("")}

    def _push_call(self, delta: "CallDelta") -> Iterator[Event]:
        if delta.id:
            self._white_space = ""
            custom = delta.name in self._custom
            kind, field = ("custom_tool_call", "input") if custom else ("function_call", "arguments")
            item = {"type": kind, "call_id": delta.id, "name": delta.name, field: ""}
            yield from self._begin("ctc" if custom else "fc", item)
            self._arguments = ""
        if delta.arguments:
            self._arguments += delta.arguments
            if self.items[-1]["type"] == "function_call":  # else its text is known at its end
                yield "function_call_arguments.delta", {**self._place, "delta": delta.arguments}

    @property
    def _is_message(self) -> bool:
        return bool(self.items) and self.items[-1]["type"] == "message"

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _begin(self, prefix: str, item: dict[str, Any]) -> Iterator[Event]:
        if self._open:
            yield from self._close("completed")
        index, self._open = len(self.items), True
        self.items.append({"id": f"{prefix}_{self._id}{index:02x}", **item, "status": "in_progress"})
        yield "output_item.added", {"output_index": index, "item": dict(self.items[-1])}

    def _close(self, status: str) -> Iterator[Event]:
        item, self._open = self.items[-1], False
        item["status"] = status
        if item["type"] == "message":
            part = _part(self._text)
            item["content"] = [part]
            place = {**self._place, "content_index": 0}
            yield "output_text.done", {**place, "text": self._text, "logprobs": []}
            yield "content_part.done", {**place, "part": part}
        elif item["type"] == "function_call":
            item["arguments"] = self._arguments
            yield "function_call_arguments.done", {**self._place, "name": item["name"], "arguments": self._arguments}
        else:
            item["input"] = _custom_text(self._arguments)
            yield "custom_tool_call_input.delta", {**self._place, "delta": item["input"]}
            yield "custom_tool_call_input.done", {**self._place, "input": item["input"]}
        yield "output_item.done", {"output_index": len(self.items) - 1, "item": dict(item)}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _custom_text(arguments: str) -> str:
    """The text for a custom tool in the arguments of its function; what is no such object is the text itself."""
    try:
        text = json.loads(arguments)[CUSTOM_ARGUMENT]
    except (ValueError, KeyError, TypeError, RecursionError):
        return arguments
    return text if isinstance(text, str) else arguments


def output(id: str, custom: frozenset[str], chunks: Iterable["Chunk"], whole: bool) -> list[dict[str, Any]]:
    """The items of an answer that is complete."""
    found = Output(id, custom)
    for chunk in chunks:
        for _ in found.push(chunk):
            pass
    for _ in found.end(whole):
        pass
    return found.items

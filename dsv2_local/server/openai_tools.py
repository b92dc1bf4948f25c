"""Tools, and the form that an answer must have, in requests of OpenAI's APIs; calls of tools in their answers."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv2_local.errors import InputError
from dsv2_local.values import Flag, Object, Text, checked, shown

_LEGACY_ID = "call_{}"
"""What an old `function_call`, which has no id, is called: by its number in the conversation."""
_TEMPLATE_SWITCHES = ("thinking", "enable_thinking")
"""What other models' templates ask for, and clients send to all: DeepSeek-V2 does not think."""
_FORMS = "json", "json_object", "regex", "choice", "grammar"
"""What vLLM's `structured_outputs` may have, and `guided_...` before it."""

FUNCTION_SCHEMA = {
    "type": "object", "required": ["name"],
    "properties": {
        "name": {"type": "string"}, "description": {"type": "string"}, "parameters": {"type": "object"},
        "strict": {"type": ["boolean", "null"]},
    },
}  # fmt: skip
TOOL_SCHEMAS: dict[str, Any] = {
    "tools": {
        "type": ["array", "null"],
        "items": {
            "type": "object", "required": ["type", "function"],
            "properties": {"type": {"const": "function"}, "function": FUNCTION_SCHEMA},
        },
    },
    "tool_choice": {"anyOf": [{"enum": ["auto", "none", "required", None]}, {"type": "object"}]},
    "parallel_tool_calls": {"type": ["boolean", "null"]},
    "functions": {"type": ["array", "null"], "items": FUNCTION_SCHEMA},
    "function_call": {"anyOf": [{"enum": ["auto", "none", None]}, {"type": "object"}]},
    "response_format": {
        "anyOf": [
            {"type": "null"},
            {
                "type": "object", "required": ["type"],
                "properties": {
                    "type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": {"type": "object"},
                },
            },
        ],
    },
    "structured_outputs": {"type": ["object", "null"]}, "grammar": {"type": ["string", "null"]},
    "regex": {"type": ["string", "null"]}, "chat_template_kwargs": {"type": ["object", "null"]},
}  # fmt: skip
"""The fields of /v1/chat/completions that are read here, as JSON schemas for the documentation."""


@dataclass(frozen=True)
class Tools:
    """What a request says of tools.

    Attributes:
        definitions: `{"type": "function", "function": {...}}` of each.
        choice: "auto", "none", "required" or the name of the one to call; None: not said.
        parallel: whether one answer may have several calls; None: not said.
        legacy: whether they were `functions`: the answer then has one `function_call`.
        custom: names of tools that take text instead of JSON: here functions with one argument, `CUSTOM_ARGUMENT`.
    """

    definitions: tuple[dict[str, Any], ...] = ()
    choice: str | None = None
    parallel: bool | None = None
    legacy: bool = False
    custom: frozenset[str] = frozenset()

    @property
    def options(self) -> dict[str, Any]:
        """The options of `LLM.chat`."""
        if not self.definitions:
            return {}
        given: dict[str, Any] = {"tools": list(self.definitions)}
        if self.choice is not None:
            given["tool_choice"] = self.choice
        if self.legacy or self.parallel is not None:
            given["parallel_tool_calls"] = bool(self.parallel) and not self.legacy
        return given

    def chosen(self, choice: str | None) -> "Tools":
        """These tools with a choice among them. Raises InputError if it names none of them."""
        names = [each["function"]["name"] for each in self.definitions]
        if choice not in (None, "auto", "none", "required") and choice not in names:
            raise InputError(f"tool_choice names {shown(choice)}, which is none of the tools")
        if choice == "required" and not names:
            raise InputError("tool_choice is required, and there are no tools")
        return replace(self, choice=choice)

    def allowed(self, names: Iterable[Any]) -> "Tools":
        """Those of these tools that have one of the names. Raises InputError if there is none of that name."""
        wanted = list(names)
        for name in wanted:
            self.chosen(checked("a tool of tool_choice", name, Text(), InputError))
        return replace(self, definitions=tuple(each for each in self.definitions if each["function"]["name"] in wanted))


CUSTOM_ARGUMENT = "input"


def function(value: Any) -> dict[str, Any]:
    """The definition of a function as `LLM.chat` takes it. Raises InputError if it has no name or is malformed."""
    given = checked("a function", value, Object(), InputError)
    name = checked("the name of a function", given.get("name"), Text(), InputError)
    if not name:
        raise InputError("the name of a function must not be empty")
    found = {"name": name}
    if given.get("description") is not None:
        found["description"] = checked(f"the description of {name}", given["description"], Text(), InputError)
    if given.get("parameters") is not None:
        found["parameters"] = checked(f"the parameters of {name}", given["parameters"], Object(), InputError)
    return {"type": "function", "function": found}


def distinct(definitions: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The definitions. Raises InputError if two have one name."""
    found = tuple(definitions)
    names = Counter(each["function"]["name"] for each in found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(f"there are two tools with the name {shown(twice[0])}")
    return found


def listed(name: str, value: Any) -> list[Any]:
    """A list, which may be missing. Raises InputError if it is something else."""
    if value is not None and not isinstance(value, list):
        raise InputError(f"{name} must be a list, not {shown(value)}")
    return value or []


def chat_tools(body: Mapping[str, Any]) -> Tools:
    """What a body of /v1/chat/completions says of tools, in its new or its old fields.

    Raises:
        InputError: a tool is malformed or of another type than function, or the choice is none of them.
    """
    if not body.get("tools") and body.get("functions"):
        found = Tools(distinct(map(function, listed("functions", body["functions"]))), legacy=True)
        choice = body.get("function_call")
        return found.chosen(name_of(choice) if isinstance(choice, dict) else word("function_call", choice))
    definitions = distinct(map(_tool, listed("tools", body.get("tools"))))
    parallel = body.get("parallel_tool_calls")
    if parallel is not None:
        checked("parallel_tool_calls", parallel, Flag(), InputError)
    found, choice = Tools(definitions, parallel=parallel), body.get("tool_choice")
    if not isinstance(choice, dict):
        return found.chosen(word("tool_choice", choice))
    kind = choice.get("type")
    if kind == "allowed_tools":
        allowed = checked("allowed_tools", choice.get("allowed_tools"), Object(), InputError)
        names = [name_of(_function_of(each)) for each in listed("allowed_tools.tools", allowed.get("tools"))]
        return found.allowed(names).chosen(word("allowed_tools.mode", allowed.get("mode")))
    return found.chosen(name_of(_function_of(choice)))


def _tool(value: Any) -> dict[str, Any]:
    return function(_function_of(value))


def _function_of(value: Any) -> Any:
    if not isinstance(value, dict) or value.get("type", "function") != "function":
        raise InputError(f'a tool must be an object of type "function", not {shown(value)}')
    return value.get("function")


def name_of(value: Any) -> str:
    """The name in a function of `tool_choice`. Raises InputError if there is none."""
    given = checked("the function of tool_choice", value, Object(), InputError)
    return checked("the name of a function", given.get("name"), Text(), InputError)  # type: ignore[no-any-return]


def word(name: str, value: Any) -> str | None:
    """A choice of tools that names none of them; None if it is missing. Raises InputError if it is something else."""
    if value not in (None, "auto", "none", "required"):
        raise InputError(f"{name} must be auto, none, required or an object, not {shown(value)}")
    return value  # type: ignore[no-any-return]


def answer_form(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `LLM.chat` that say what an answer must look like: `schema` with `strict`, `regex` or `grammar`.

    They come from `response_format`; or from `structured_outputs` ({json, json_object, regex, choice, grammar}) or
    `guided_json`, `guided_regex`, ..., as vLLM has them; or from `regex` or `grammar` themselves. Grammars are in
    llguidance's dialect of Lark.

    Raises:
        InputError: two of them exclude each other, or one is malformed.
    """
    asked = body.get("response_format")
    found = [form for form in (text_format(asked), *_vllm_forms(body), *_own_forms(body)) if form]
    if len(found) > 1:
        raise InputError(
            "an answer has one form: response_format, structured_outputs, guided_..., regex and grammar exclude each "
            "other"
        )
    if not found:
        return {} if asked is None else {"schema": None}  # text, whatever else is usual
    return found[0]


def text_format(value: Any, name: str = "response_format", schema_in: str | None = "json_schema") -> dict[str, Any]:
    """The options of `LLM.chat` of a `response_format`, or of the `text.format` of /v1/responses, which is flat."""
    if value is None:
        return {}
    given = checked(name, value, Object(), InputError)
    kind = given.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        schema = given.get("schema")  # llama.cpp and others allow one
        return {"schema": {"type": "object"} if schema is None else _schema(schema)}
    if kind != "json_schema":
        raise InputError(f"the type of {name} must be text, json_object or json_schema, not {shown(kind)}")
    described = checked(f"{schema_in} of {name}", given.get(schema_in), Object(), InputError) if schema_in else given
    strict = described.get("strict")
    return {
        "schema": _schema(
            described.get("schema"), f"schema of {name}'s {schema_in}" if schema_in else f"schema of {name}"
        ),
        "strict": strict is not None and checked("strict", strict, Flag(), InputError),
    }


def _schema(value: Any, name: str = "a JSON schema") -> Any:
    """A JSON schema, which is text in some programs."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InputError("the JSON schema is no JSON") from None
    return checked(name, value, Object(), InputError)


def _vllm_forms(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    outputs = body.get("structured_outputs")
    given = {} if outputs is None else dict(checked("structured_outputs", outputs, Object(), InputError))
    for name in _FORMS:
        if body.get(f"guided_{name}") is not None:
            given.setdefault(name, body[f"guided_{name}"])
    if unknown := [name for name in given if name not in _FORMS and given[name] not in (None, False)]:
        raise InputError(f"structured_outputs has {shown(unknown[0])}; it may have {', '.join(_FORMS)}")
    return [_vllm_form(name, value) for name, value in given.items() if value not in (None, False)]


def _vllm_form(name: str, value: Any) -> dict[str, Any]:
    if name == "json":
        return {"schema": _schema(value)}
    if name == "json_object":
        checked("json_object", value, Flag(), InputError)
        return {"schema": {"type": "object"}}
    if name == "choice":
        if not isinstance(value, list) or not value:
            raise InputError(f"choice must be a list of texts that is not empty, not {shown(value)}")
        texts = [checked("one of choice", each, Text(), InputError) for each in value]
        return {"grammar": "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)}
    return {name: checked(name, value, Text(), InputError)}


def _own_forms(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {name: checked(name, body[name], Text(), InputError)} for name in ("regex", "grammar") if body.get(name)
    ]  # fmt: skip


def template_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `LLM.chat` for the prompt: `continue_final_message`, as vLLM has it, and of all that
    `chat_template_kwargs` may have, `documents`.

    Raises:
        InputError: `chat_template_kwargs` has something else than documents and the switches that this model has no use
            for.
    """
    given = body.get("chat_template_kwargs")
    options = {} if given is None else dict(checked("chat_template_kwargs", given, Object(), InputError))
    for name in _TEMPLATE_SWITCHES:
        options.pop(name, None)
    documents = options.pop("documents", None)
    if options:
        names = ", ".join(("documents", *_TEMPLATE_SWITCHES))
        raise InputError(f"chat_template_kwargs has {shown(next(iter(options)))}; it may have {names}")
    found: dict[str, Any] = {} if documents is None else {"documents": listed("documents", documents)}
    final = body.get("continue_final_message")
    if final is not None and checked("continue_final_message", final, Flag(), InputError):
        found["continue_final"] = True
    return found


def call(id: str, name: Any, arguments: Any) -> dict[str, Any]:
    """A call in a message of the assistant, as `LLM.chat` takes it. Raises InputError if it is malformed."""
    name = checked("the name of a call", name, Text(), InputError)
    if isinstance(arguments, dict):  # some programs forget that they are text
        arguments = json.dumps(arguments, ensure_ascii=False)
    arguments = checked(f"the arguments of the call of {shown(name)}", arguments or "{}", Text(), InputError)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def message_calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `tool_calls` of a message of the assistant. Raises InputError if they are malformed."""
    found = []
    for each in listed("tool_calls", message.get("tool_calls")):
        given = checked("a tool call", _function_of(each), Object(), InputError)
        id = each.get("id")
        id = "" if id is None else checked("the id of a tool call", id, Text(), InputError)
        found.append(call(id, given.get("name"), given.get("arguments")))
    return found


def modern(messages: Sequence[Any]) -> list[Any]:
    """Messages with `function_call`, and of the role function, as messages with `tool_calls`, and of the role tool."""
    found, calls = [], 0
    for each in messages:
        if isinstance(each, dict) and each.get("role") == "function":
            each = {**each, "role": "tool", "tool_call_id": _LEGACY_ID.format(calls)}
        elif isinstance(each, dict) and each.get("function_call") is not None and not each.get("tool_calls"):
            calls += 1
            made = {"id": _LEGACY_ID.format(calls), "type": "function", "function": each["function_call"]}
            each = {name: value for name, value in each.items() if name != "function_call"} | {"tool_calls": [made]}
        found.append(each)
    return found

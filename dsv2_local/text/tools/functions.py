"""The functions that a model may call, as a caller defines them, and which of them it must call."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv2_local import inlet
from dsv2_local.errors import InputError
from dsv2_local.values import Flag, Text, checked, shown

MODES = ("auto", "none", "required")
MAX_DEPTH = 100
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_OPEN_SCHEMA = ("additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf")


@dataclass(frozen=True)
class Function:
    """A function that the model may call.

    Attributes:
        name: 1 to 64 letters, digits, underscores and hyphens.
        description: what it does.
        parameters: the JSON schema of its arguments, an object.
        strict: whether keywords of the schema that a grammar cannot express are an error.
    """

    name: str
    description: str | None
    parameters: Mapping[str, Any]
    strict: bool = False

    @property
    def definition(self) -> dict[str, Any]:
        """What the model is told of it, in the order in which it is told."""
        described = {} if self.description is None else {"description": self.description}
        return {"name": self.name, **described, "parameters": self.parameters}

    @property
    def arguments(self) -> dict[str, Any]:
        """The schema that arguments are held to: that of the parameters, without properties that it does not list.

        JSON schemas allow further properties unless they exclude them, which a caller rarely means.
        """
        closed = "properties" in self.parameters and not any(key in self.parameters for key in _OPEN_SCHEMA)
        return {**self.parameters, "type": "object", **({"additionalProperties": False} if closed else {})}


def read_functions(tools: Any) -> list[Function]:
    """Functions as in OpenAI's API: `{"type": "function", "function": {name, description, parameters, strict}}`.

    They are sorted by name: some programs list theirs in a new order every time, and prompts begin with them.

    Raises:
        InputError: something is no function, or two have one name.
    """
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise InputError(f"tools must be a list, not {shown(tools)}")
    found = dict[str, Function]()
    for tool in tools:
        function = _function(tool)
        if function.name in found:
            raise InputError(f"two tools have the name {function.name}")
        found[function.name] = function
    return [found[name] for name in sorted(found)]


def read_choice(choice: Any, functions: Sequence[Function]) -> str:
    """`tool_choice`: one of `MODES`, or a function's name.

    Raises:
        InputError: it is none of these, or there is nothing to call.
    """
    if choice is None:
        return "auto"
    choice = checked("tool_choice", choice, Text(), InputError)
    names = [function.name for function in functions]
    if choice in ("auto", "none") or choice in names or (choice == "required" and names):
        return str(choice)
    if not names:
        raise InputError(f"tool_choice {shown(choice)} needs tools, and there are none")
    raise InputError(f"tool_choice must be {', '.join(MODES)} or the name of a tool, not {shown(choice)}")


def check_json(value: Any, where: str, depth: int = 0) -> None:
    """Check that a value is one of JSON, with Unicode text, and not too deep; `where` is what errors call it.

    Raises:
        InputError: it is not.
    """
    if depth > MAX_DEPTH:
        raise InputError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        if inlet.well_formed(value, where) != value:
            raise InputError(f"{where} is not Unicode text: {shown(value)}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_json(checked(f"a key of {where}", key, Text(), InputError), where, depth + 1)
            check_json(item, where, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_json(item, where, depth + 1)
    elif not (value is None or isinstance(value, bool | int | float)) or value != value or abs(value or 0) == 1e999:
        raise InputError(f"{where} holds {shown(value)}, which is no value of JSON")


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON text of a value that `check_json` has passed; the same for the same value."""
    return json.dumps(value, ensure_ascii=False, indent=indent, default=dict)


def _function(tool: Any) -> Function:
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise InputError(f"a tool must be of type function, not {shown(tool)}")
    given = tool.get("function")
    if not isinstance(given, Mapping):
        raise InputError(f"a tool needs a function, an object with a name: {shown(dict(tool))}")
    name = given.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"a tool's name must be 1 to 64 letters, digits, _ and -, not {shown(name)}")
    where = f"the tool {name}"
    description, strict = given.get("description"), given.get("strict")
    if description is not None:
        description = inlet.well_formed(checked(f"{where}: description", description, Text(), InputError), where)
    parameters = given.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise InputError(f"{where}: parameters must be a JSON schema of an object, not {shown(parameters)}")
    kind = parameters.get("type", "object")
    if kind != "object":
        raise InputError(f"{where}: parameters must be a JSON schema of an object, not of type {shown(kind)}")
    check_json(parameters, where)
    return Function(
        name, description, parameters, strict is not None and checked(f"{where}: strict", strict, Flag(), InputError)
    )

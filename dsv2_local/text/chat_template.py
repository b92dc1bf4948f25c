"""Renders a conversation with a checkpoint's chat template, as the text format that the model was trained on.

Templates find what transformers gives them: the same variables, filters, functions and tags.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace

from dsv2_local.errors import TemplateError
from dsv2_local.text.bounded_jinja import BoundedEnvironment, Budget, TooMuchError, within
from dsv2_local.text.quoting import Quoter, on_plain_text

Message = Mapping[str, Any]
"""A message with the keys `role` (system, user, assistant or what else the template knows) and `content`."""


class ChatTemplates:
    """The chat templates of a checkpoint by their names; "default" is used unless there are tools."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._compiled: dict[str, Any] = {}

    @property
    def default(self) -> str | None:
        """The source of the default template; None if there is none."""
        return self._sources.get("default")

    def require(self) -> None:
        """Check that there is a template.

        Raises:
            TemplateError: there is none.
        """
        if not self._sources:
            raise TemplateError(
                "this checkpoint has no chat template; `dsv2 run --raw` and LLM.generate() continue text without one"
            )

    @cached_property
    def know_tools(self) -> bool:
        """Whether the templates write the definitions of tools: one is for them, or reads them."""
        if "tool_use" in self._sources:
            return True
        try:
            return "tools" in meta.find_undeclared_variables(_environment().parse(self._sources.get("default", "")))
        except (JinjaError, TooMuchError, RecursionError):  # whoever renders it is told
            return False

    def render(self, quoter: Quoter, *, tools: list[Any] | None, **variables: Any) -> str:
        """Render a conversation, as text in which what was quoted still is.

        Args:
            quoter: has quoted the special tokens in all that follows; its size bounds the template's work.
            tools: descriptions of the functions that the model may call; a template named "tool_use" is for them.
            variables: the other names that the template may use.

        Raises:
            TemplateError: there is no template, it is damaged, it rejects the messages, or it does not end.
        """
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        self.require()
        if name not in self._sources:
            raise TemplateError(f"none of the chat templates is the default one; they are {', '.join(self._sources)}")
        try:
            with within(Budget(quoter.size, quoter.seen)):
                if name not in self._compiled:
                    self._compiled[name] = _environment().from_string(self._sources[name])
                rendered: str = self._compiled[name].render(tools=tools, **variables)
                return str.__str__(rendered)
        except TooMuchError as error:
            raise TemplateError(f"the chat template is refused: {error}") from None
        except RecursionError:
            raise TemplateError("the chat template is refused: it is nested too deeply") from None
        except Exception as error:  # whatever the expressions of a template raise
            what = str(error) if isinstance(error, JinjaError) else f"{type(error).__name__}: {error}"
            raise TemplateError(f"the chat template rejects these messages: {quoter.remove(what)}") from None


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the assistant's words for training; here its content is just written."""

    tags = {"generation"}  # noqa: RUF012 (as in jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # Like a macro, so that names set inside do not leave it, as in transformers.
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Any) -> Any:
        return caller()


class _Namespace(Namespace):
    """`namespace(...)`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_attribute(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    for name in environment.filters:
        environment.filters[name] = on_plain_text(environment.filters[name])
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`: plain JSON, where jinja2's own is for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise JinjaError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)

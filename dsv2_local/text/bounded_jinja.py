"""A Jinja environment whose templates end: bounded in steps, in seconds and in the size of what they make.

A chat template comes with a model, from wherever that came. Jinja's sandbox keeps it away from Python, but not from
`{% for i in range(99999) %}` within another one, nor from doubling a string a hundred times. Here every iteration, call
and filter is a step, and everything that makes text or lists is charged for their size, before it is made where it can
grow at once. An interrupt (Ctrl-C) takes effect between two steps.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from itertools import chain
from typing import Any, cast

from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000
MAX_SECONDS = 10.0
"""Seconds of this thread's processor time, however busy the machine is."""
MAX_MADE = 2**27
"""Characters and list entries that a rendering may make in all, besides `PER_INPUT` for each character of its input."""
PER_INPUT = 64
MAX_SOURCE = 2**20
"""The longest template in characters; those of released models have up to 20,000."""
MAX_NUMBER = 10**6
"""The largest width, count or exponent that is passed to an operation which may make something of this size."""
MAX_BITS = 2**12
LAZY = {"length", "count", "list", "first", "last", "map", "select", "reject", "selectattr", "rejectattr", "items"}
"""Filters that look at the entries of a list, but not into them."""


class TooMuchError(Exception):
    """A template has taken more steps, time or memory than a conversation needs."""


class Budget:
    """What a rendering may still use."""

    def __init__(self, size: int, seen: Callable[[str], str]) -> None:
        """Begin with everything.

        Args:
            size: the number of characters of the messages and of whatever else the template is given.
            seen: what the template is to see of a text that it has made.
        """
        self.seen = seen
        self.steps, self.room = MAX_STEPS, MAX_MADE + PER_INPUT * size
        self._end = time.thread_time() + MAX_SECONDS

    def step(self) -> None:
        """Count one step."""
        self.steps -= 1
        if self.steps < 0:
            raise TooMuchError(f"it takes more than {MAX_STEPS:,} steps")
        if time.thread_time() > self._end:
            raise TooMuchError(f"it takes more than {MAX_SECONDS:.0f} seconds")

    def make(self, size: int) -> None:
        """Count characters or entries that are about to be made, or have been."""
        self.room -= size
        if self.room < 0:
            raise TooMuchError("what it makes is too large")

    def check_expanded(self, *values: Any) -> None:
        """Refuse lists in lists that are small, as they share their entries, but not once they are written out."""
        known: dict[int, int] = {}
        if sum(_expanded(value, known) for value in values) > self.room:
            raise TooMuchError("what it makes is too large")


def _expanded(value: Any, known: dict[int, int]) -> int:
    """Characters and entries of a value when it is written out; `known` has those of its lists and objects, by id."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 1
    if id(value) not in known:
        parts = chain(value, value.values()) if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(value)]


_budget: ContextVar[Budget] = ContextVar("_budget")


@contextmanager
def within(budget: Budget) -> Iterator[None]:
    """Charge the templates that this thread renders to `budget`, until the end of the block."""
    token = _budget.set(budget)
    try:
        yield
    finally:
        _budget.reset(token)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox in which all that is said at the top of this file is counted.

    Constants are not folded when a template is compiled, since folding is not counted.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, finalize=_written, **options)
        self.globals.pop("lipsum", None)
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.add_filter("_iterated", _iterated)
        self.add_filter("_joined", _joined)
        self.add_filter("_written", _written)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Register a filter that counts as a step, and whose result is charged."""

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            passed = 1 if hasattr(function, "jinja_pass_arg") else 0
            if name not in LAZY:
                _budget.get().check_expanded(*args[passed:], *kwargs.values())
            _check_growth(name, args[passed:], kwargs)
            return _charged(function(*args, **kwargs))

        self.filters[name] = function if name.startswith("_") else counted

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_SOURCE:
            raise TooMuchError(f"it has more than {MAX_SOURCE:,} characters")
        template: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return template

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as in jinja2)
        """Call what a template calls: a method, a macro, a function, or a recursive loop."""
        if isinstance(__obj, LoopContext) and args:
            args = (_iterated(args[0]), *args[1:])
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        _check_growth(getattr(method, "__name__", ""), (getattr(method, "__self__", None), *args), kwargs)
        return _charged(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute left + right, left * right, left ** right or left % right."""
        _budget.get().step()
        if operator == "*" and isinstance(left, Sized) != isinstance(right, Sized):
            text, count = (left, right) if isinstance(left, Sized) else (right, left)
            _budget.get().make(len(text) * max(0, count) if isinstance(count, int) else 0)
        elif operator == "%" and isinstance(left, str):
            _written(right)
            _check_format(left, right)
        elif operator == "**":
            _check_numbers((right,))
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MAX_BITS:
                raise TooMuchError("a number in it is too large")
        result = _charged(super().call_binop(context, operator, left, right))
        if isinstance(result, int) and result.bit_length() > MAX_BITS:
            raise TooMuchError("a number in it is too large")
        return result

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join what a block, a macro or the template itself has written."""
        budget, kept = _budget.get(), list[str]()
        for part in parts:
            budget.step()
            budget.make(len(part))
            kept.append(part)
        return budget.seen("".join(kept))


class _Counting(NodeTransformer):
    """Puts the counting filters into a parsed template.

    They are around what loops iterate over and what is compared, and in place of `~`.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (as in jinja2)
        self.generic_visit(node)
        node.iter = _filter(cast(nodes.Expr, node.iter), "_iterated")
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802 (as in jinja2)
        self.generic_visit(node)
        node.expr = _filter(node.expr, "_written")
        for operand in node.ops:
            operand.expr = _filter(operand.expr, "_written")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 (as in jinja2)
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_joined")


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _iterated(values: Any) -> Any:
    """`values`, each of which is a step when a loop takes it. Lists stay lists: loops ask for their length."""
    if isinstance(values, Sized):
        return _Counted(values)
    return _steps(values)  # an Undefined, too, or what cannot be iterated: jinja2's own error follows


def _written(value: Any) -> Any:
    """`value`, which is about to be written out or compared."""
    if isinstance(value, list | tuple | dict):
        _budget.get().check_expanded(value)
    return value


def _steps(values: Any) -> Iterator[Any]:
    for value in values:
        _budget.get().step()
        yield value


class _Counted:
    """A sized iterable whose entries are steps."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return _steps(self._values)


def _joined(parts: list[Any]) -> str:
    """The operator `~`."""
    _budget.get().step()
    texts = [str(_written(part)) for part in parts]
    _budget.get().make(sum(map(len, texts)))
    return _budget.get().seen("".join(texts))


def _charged(result: Any) -> Any:
    """Count a step, and the size of what it made."""
    budget = _budget.get()
    budget.step()
    if isinstance(result, Sized):
        budget.make(len(result))
    return budget.seen(result) if type(result) is str else result


def _check_growth(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a call or a filter whose result would be far larger than what it is given."""
    first, *others = [*args, *kwargs.values()] or [None]
    _check_numbers(tuple(others))
    if name in ("format", "format_map") and isinstance(first, str):
        _check_format(first, tuple(others))
        _budget.get().check_expanded(*others)
    if not isinstance(first, Sized):
        return
    sizes = [len(other) if isinstance(other, str) else other for other in others if isinstance(other, str | int)]
    if name == "replace" and isinstance(first, str) and len(others) >= 2:
        _budget.get().make(first.count(str(others[0])) * len(str(others[1])))
    elif name == "join":  # of a list by the filter, with a string by the method
        lists = [len(other) for other in others if isinstance(other, Sized) and not isinstance(other, str)]
        _budget.get().make(len(first) * max(sizes + lists, default=0))
        _budget.get().check_expanded(*others)
    elif name == "translate" and isinstance(others[0], dict):
        _budget.get().make(len(first) * max((len(str(text)) for text in others[0].values()), default=0))
    elif name in ("indent", "wordwrap", "expandtabs", "center", "ljust", "rjust", "zfill"):
        lines = first.count("\n") + first.count("\t") + 1 if isinstance(first, str) else 1
        _budget.get().make(lines * max(sizes, default=0))


def _check_numbers(values: tuple[Any, ...]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TooMuchError("a number in it is too large")
        if isinstance(value, tuple):
            _check_numbers(value)


def _check_format(text: str, values: Any) -> None:
    """Refuse a format string that asks for a width of a million and more, in itself or by its values."""
    if re.search(r"[%{:.][^%{}]*\d{6}", text):
        raise TooMuchError("a width in it is too large")
    if "*" in text or "{" in text:
        _check_numbers(values if isinstance(values, tuple) else (values,))

"""Quotes special tokens in the text of messages, so that a message cannot forge a turn.

A quoted token has a secret mark behind its first character. It goes through the template unseen, and whoever encodes
the result removes it: the letters of the token then stay letters.
"""

import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, wraps
from itertools import repeat
from types import MappingProxyType
from typing import Any

from dsv2_local import inlet
from dsv2_local.errors import InputError
from dsv2_local.values import shown


class Own(str):
    """A part of a composed text that the program itself has written: special tokens in it are meant."""


class Composed(tuple[str, ...]):
    """A text in parts, which are joined; special tokens are quoted in those that are not `Own`."""


class Quoter:
    """Quotes the special tokens of one tokenizer, with a mark of its own.

    Attributes:
        size: characters of all texts that were quoted.
    """

    def __init__(self, tokens: Iterable[str], *, ignore_case: bool = False) -> None:
        """White space is never quoted: some tokenizers have added tokens for it, which forge nothing.

        `ignore_case`: whether the tokenizer finds special tokens in normalised text.
        """
        quotable = (token for token in tokens if len(token) > 1 and not token.isspace())
        longest_first = sorted(quotable, key=len, reverse=True)
        flags = re.IGNORECASE if ignore_case else 0
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)", flags)
        # Digits survive what templates do to text: upper case, JSON, HTML, white space removed.
        self._mark = str(secrets.randbelow(10**24) + 10**24)
        either = (f"{re.escape(token[0])}(?:{self._mark})?{re.escape(token[1:])}" for token in longest_first)
        self._marked_or_not = re.compile("|".join(either) or "(?!)", flags)
        self.size = 0

    def data(self, value: Any, depth: int = 0) -> Any:
        """A copy of a value of JSON, as templates expect it, with all texts in it quoted.

        Raises:
            InputError: something in it is not a value of JSON or not Unicode, or it is nested too deeply.
        """
        if depth > 100:
            raise InputError("a message is nested too deeply")
        if isinstance(value, str):
            value = inlet.text(value, "a message")
            self.size += len(value)
            return self.text(value)
        if isinstance(value, Composed):
            return self.seen("".join(part if isinstance(part, Own) else self.data(part) for part in value))
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {self.data(key, depth + 1): self.data(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.data(item, depth + 1) for item in value]
        raise InputError(f"a message holds {shown(value)}; only text, numbers, lists and objects can be in one")

    def text(self, text: str, own: Mapping[str, Sequence[bool]] = MappingProxyType({})) -> str:
        """The text with its special tokens quoted; the same text if it has none.

        Args:
            text: without marks.
            own: for special tokens in a text that this one was made of, in their order, whether the template itself
                has put them there. They are not quoted, unless it is unclear which of them these are.
        """
        plain = str.__str__(text)
        found = Counter(self._tokens.findall(plain))
        if not found:
            return plain
        flags = {token: own.get(token, (False,)) for token in found}
        left = {
            token: iter(known if len(known) == found[token] else repeat(all(known))) for token, known in flags.items()
        }

        def quoted(token: re.Match[str]) -> str:
            return token[0] if next(left[token[0]]) else token[0][0] + self._mark + token[0][1:]

        return self.seen(self._tokens.sub(quoted, plain))

    def seen(self, text: str) -> str:
        """A text that a template has put together, as the template is to see it: its marks are hidden."""
        return _Quoted(text, self) if self._mark in text else text

    def remove(self, text: str) -> str:
        """Remove the marks."""
        return str.__str__(text).replace(self._mark, "")

    def own(self, text: str) -> dict[str, list[bool]]:
        """For each special token in a text with marks, in their order, whether it is not quoted."""
        own: dict[str, list[bool]] = {}
        for found in self._marked_or_not.findall(text):
            own.setdefault(self.remove(found), []).append(self._mark not in found)
        return own


class _Quoted(str):
    """Text with marks, whose methods see it without them and return text that is quoted again.

    So a template may search for a special token in a message, split at it or remove it, as some do with "</think>",
    also after it has put the message together with text of its own. What C code does to the text as a whole (joining,
    adding, formatting) keeps the marks.
    """

    _quoter: Quoter

    def __new__(cls, quoted: str, quoter: Quoter | None = None) -> str:  # type: ignore[misc]
        if quoter is None:  # from jinja2, which gives a text that it has formatted the type of the format
            return quoted
        self = super().__new__(cls, quoted)
        self._quoter = quoter
        return self

    @cached_property
    def _plain(self) -> str:
        return self._quoter.remove(self)

    @cached_property
    def _own(self) -> dict[str, list[bool]]:
        return self._quoter.own(str.__str__(self))

    def __str__(self) -> str:
        return self

    def __hash__(self) -> int:
        return hash(self._plain)


def on_plain_text(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of jinja2 or method of text that sees its text without marks; what it returns is quoted again."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        text = args[place] if len(args) > place else None
        if not isinstance(text, _Quoted):
            return function(*args, **kwargs)
        alone = sum(isinstance(arg, _Quoted) for arg in args) == 1
        plain = [arg._plain if isinstance(arg, _Quoted) else arg for arg in args]
        value = function(*plain, **kwargs)
        if not isinstance(value, str | list | tuple):
            return value
        return _requoted(value, text._quoter, text._own if alone else {})

    return wrapped


def _requoted(value: Any, quoter: Quoter, own: Mapping[str, Sequence[bool]]) -> Any:
    if isinstance(value, str):
        return quoter.text(value, own)
    return type(value)(_requoted(item, quoter, own) for item in value) if isinstance(value, list | tuple) else value


_AS_A_WHOLE = {"join", "format", "format_map", "encode", "translate", "maketrans"}
_OPERATORS = ["__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__", "__len__", "__getitem__"]
for _name in [*(name for name in dir(str) if name[0] != "_" and name not in _AS_A_WHOLE), *_OPERATORS, "__iter__"]:
    setattr(_Quoted, _name, on_plain_text(getattr(str, _name)))

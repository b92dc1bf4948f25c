"""Quotes special tokens in the text of messages, so that a message cannot forge a turn.

A quoted token has a secret mark behind its first character. It goes through the template unseen, and whoever encodes
the result removes it: the letters of the token then stay letters.
"""

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from dsv2_local import inlet
from dsv2_local.errors import InputError
from dsv2_local.values import shown


class Quoter:
    """Quotes the special tokens of one tokenizer, with a mark of its own.

    Attributes:
        size: characters of all texts that were quoted.
    """

    def __init__(self, tokens: Iterable[str], *, ignore_case: bool = False) -> None:
        """`ignore_case`: whether the tokenizer finds special tokens in normalised text."""
        longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
        flags = re.IGNORECASE if ignore_case else 0
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)", flags)
        # Digits survive what templates do to text: upper case, JSON, HTML, white space removed.
        self._mark = str(secrets.randbelow(10**24) + 10**24)
        self.size = 0

    def data(self, value: Any, depth: int = 0) -> Any:
        """A copy of a value of JSON, as templates expect it, with all texts in it quoted.

        Raises:
            InputError: something in it is not a value of JSON or not Unicode, or it is nested too deeply.
        """
        if depth > 100:
            raise InputError("a message is nested too deeply")
        if isinstance(value, str):
            return self.text(inlet.text(value, "a message"))
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {self.data(key, depth + 1): self.data(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.data(item, depth + 1) for item in value]
        raise InputError(f"a message holds {shown(value)}; only text, numbers, lists and objects can be in one")

    def text(self, text: str) -> str:
        """The text with its special tokens quoted; the same text if it has none."""
        self.size += len(text)
        quoted = self._tokens.sub(lambda found: found[0][0] + self._mark + found[0][1:], text)
        return str.__str__(text) if quoted == text else _Quoted(quoted, str.__str__(text), self)

    def remove(self, text: str) -> str:
        """Remove the marks."""
        return text.replace(self._mark, "")


class _Quoted(str):
    """Quoted text whose methods see the text without marks, and return text that is quoted again.

    So a template may search for a special token in a message, split at it or remove it, as some do with "</think>".
    What C code does to the text as a whole (joining, adding, formatting) keeps the marks.
    """

    _plain: str
    _quoter: Quoter

    def __new__(cls, quoted: str, plain: str, quoter: Quoter) -> "_Quoted":
        self = super().__new__(cls, quoted)
        self._plain, self._quoter = plain, quoter
        return self

    def __str__(self) -> str:
        return self

    def __hash__(self) -> int:
        return hash(self._plain)


def _on_plain_text(name: str) -> Any:
    def method(self: _Quoted, *args: Any, **kwargs: Any) -> Any:
        plain = [arg._plain if isinstance(arg, _Quoted) else arg for arg in args]
        return _requoted(getattr(self._plain, name)(*plain, **kwargs), self._quoter)

    method.__name__ = name
    return method


def _requoted(value: Any, quoter: Quoter) -> Any:
    if isinstance(value, str):
        return quoter.text(value)
    return type(value)(_requoted(item, quoter) for item in value) if isinstance(value, list | tuple) else value


_AS_A_WHOLE = {"join", "format", "format_map", "encode", "translate", "maketrans"}
_OPERATORS = ["__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__", "__len__", "__getitem__"]
for _name in [*(name for name in dir(str) if name[0] != "_" and name not in _AS_A_WHOLE), *_OPERATORS, "__iter__"]:
    setattr(_Quoted, _name, _on_plain_text(_name))

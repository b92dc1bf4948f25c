"""JSON from outside: the one object that a file, a line or a body of a request is."""

import json
from math import isfinite
from typing import Any

import numpy as np

from dsv2_local import inlet
from dsv2_local.errors import InputError
from dsv2_local.values import Object, checked, shown

DEPTH = 100
"""Objects and lists inside each other: more than JSON schemas and arguments of tools have, few enough for any code that
walks them."""
DIGITS = 100
"""Digits of a whole number: more than 128 bits have, few enough for any arithmetic."""
_REST = bytes(set(range(256)) - set(b'"[]{}'))


def read_object(data: bytes, where: str) -> dict[str, Any]:
    """The object that `data` is; `where` is what errors call it.

    Raises:
        InputError: it is no object of JSON; or a field stands in an object twice, a number is NaN, infinite
            or has over `DIGITS` digits, or it is nested more than `DEPTH` deep.
    """
    text = inlet.decoded(data, where)
    if not text.strip():
        raise InputError(f"{where} is empty")
    if _too_deep(text):
        raise InputError(f"{where} is nested too deeply, more than {DEPTH} objects and lists")
    try:
        value = json.loads(
            text, object_pairs_hook=_fields, parse_int=_integer, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError:
        raise InputError(f"{where} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error.msg} at character {error.pos:,}") from None
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    return checked(where, value, Object(), InputError)  # type: ignore[no-any-return]


def _too_deep(text: str) -> bool:
    """Whether more than `DEPTH` brackets are open somewhere; text that is no JSON may be either."""
    if text.count("[") + text.count("{") <= DEPTH:
        return False
    plain = text.encode().replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = np.frombuffer(plain.translate(None, _REST), np.uint8)
    outside = np.cumsum(marks == ord('"'), dtype=np.int32) & 1 == 0
    opening, closing = (marks == ord("[")) | (marks == ord("{")), (marks == ord("]")) | (marks == ord("}"))
    steps = (opening & outside).astype(np.int8) - (closing & outside).astype(np.int8)
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0)) > DEPTH


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {shown(next(name for name in names if names.count(name) > 1))} is given twice")
    return found


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number has {len(text):,} digits, and {DIGITS} are the most")
    return int(text)


def _finite(text: str) -> float:
    if not isfinite(number := float(text)):
        raise ValueError(f"{shown(text)} is no finite number")
    return number

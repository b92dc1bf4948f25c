"""Parsing of option values, for the command line, the Python API and the commands of a chat."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from enum import StrEnum
from typing import TypeVar

from dsv2_local.errors import InputError
from dsv2_local.values import shown

UNITS = {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)} | {"": 1}
UNITS |= {f"{letter}{rest}": 1024**power for power, letter in enumerate("KMGT", 1) for rest in ("", "iB")}

Choice = TypeVar("Choice", bound=StrEnum)

DRAW = -1
"""The seed that stands for one to be drawn."""


def drawn_seed() -> int:
    """A random seed, short enough to be typed again."""
    return int.from_bytes(os.urandom(4)) >> 1


def one_of(option: str, value: str, choices: Iterable[Choice]) -> Choice:
    """Return the choice that `value` names.

    Raises:
        InputError: `value` names none of them; the message lists all.
    """
    known = {str(choice): choice for choice in choices}
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{option} {shown(value)} is not one of {', '.join(known)}")
    return known[value]


def size(option: str, text: str) -> int:
    """Parse a size in bytes: "24GiB", "24GB" (decimal), "24G" (binary, as GPUs are sold) or a plain number.

    Raises:
        InputError: `text` is not a size.
    """
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]?(?:iB|B)?)", text.strip(), re.IGNORECASE)
    unit = found and next((scale for name, scale in UNITS.items() if name.lower() == found[2].lower()), None)
    with suppress(ValueError, OverflowError):  # 1.2.3, or so many digits that the number is infinite
        if found and unit:
            return int(float(found[1]) * unit)
    raise InputError(f"{option} {shown(text)} is not a size; write it like 24GiB, 24GB or 24G")

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


def tokens(option: str, text: str) -> int:
    """Parse a number of tokens: 8192, or 128K for 131,072.

    Raises:
        InputError: `text` is no such number.
    """
    found = re.fullmatch(r"(\d{1,12})\s*([kK]?)", text.strip())
    if not found:
        raise InputError(f"{option} {shown(text)} is no number of tokens; write it like 8192 or 128K")
    return int(found[1]) << (10 if found[2] else 0)


def duration(option: str, text: str) -> float:
    """Parse a duration in seconds: "90s", "10m", "2h", "1d" or a plain number of seconds.

    Raises:
        InputError: `text` is no duration.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if not found or len(found[1]) > 12:
        raise InputError(f"{option} {shown(text)} is not a duration; write it like 90s, 10m or 2h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]

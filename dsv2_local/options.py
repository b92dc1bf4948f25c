"""Values of options, wherever they come from: the command line, the Python API, a chat's commands."""

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import TypeVar

from dsv2_local.errors import InputError

UNITS = {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)} | {"": 1}
UNITS |= {f"{letter}{rest}": 1024**power for power, letter in enumerate("KMGT", 1) for rest in ("", "iB")}


Choice = TypeVar("Choice", bound=StrEnum)


def one_of(option: str, value: str, choices: Iterable[Choice]) -> Choice:
    """The choice that `value` names. InputError, which names them all, where it names none."""
    known = {str(choice): choice for choice in choices}
    if value not in known:
        raise InputError(f"{option} {value!r} is not one of {', '.join(known)}")
    return known[value]


def size(option: str, text: str) -> int:
    """Bytes from "24GiB", "24GB" (decimal), "24G" (binary, as cards are sold) or a plain number."""
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]?(?:iB|B)?)", text.strip(), re.IGNORECASE)
    unit = found and next((scale for name, scale in UNITS.items() if name.lower() == found[2].lower()), None)
    try:
        if found and unit:
            return int(float(found[1]) * unit)
    except ValueError:
        pass
    raise InputError(f"{option} {text!r} is no size; write 24GiB, 24GB or 24G")

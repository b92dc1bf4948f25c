"""What a value from a file, an option or a caller may be: its type and its range, and the words that refuse it.

Everything that the program reads goes through here, whether it comes from JSON, from the command line or from a caller
of the Python API, so that text in place of a number, NaN, a boolean or an integer of a thousand digits is refused by
name in one way.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite
from reprlib import Repr
from typing import Any, Protocol

from dsv2_local.errors import ConfigError, Dsv2Error

LARGEST_SHOWN = 10**20  # Python refuses to print integers of thousands of digits
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class RefusedError(ValueError):
    """A value is not of the kind that it should be; whoever knows where it stands makes a typed error of it."""


class Value(Protocol):
    """A kind of values."""

    def read(self, value: Any) -> Any:
        """The value in the type that the program uses.

        Raises:
            RefusedError: it is not of this kind; the text continues a sentence that begins with the value's name.
        """
        ...


@dataclass(frozen=True)
class Number:
    """Finite numbers in a range; booleans and text are none.

    Attributes:
        least, most: the range.
        whole: whether only integers are meant; 40.0 is one, as JSON knows but one type of numbers.
        above: whether `least` itself is excluded.
    """

    least: float = -inf
    most: float = inf
    whole: bool = False
    above: bool = False

    def read(self, value: Any) -> int | float:
        """See `Value`; returns an int if `whole`, else a float."""
        number = _integer(value) if self.whole else _number(value)
        if number is None:
            raise RefusedError(f"must be a {'whole number' if self.whole else 'number'}, not {shown(value)}")
        if not self.least <= number <= self.most or (self.above and number == self.least):
            raise RefusedError(f"must be {self._range}, not {shown(value)}")
        if self.whole:
            return number
        try:
            return float(number)
        except OverflowError:
            raise RefusedError(f"must be a number that a float can hold, not {shown(value)}") from None

    @property
    def _range(self) -> str:
        least, most = _plainly(self.least), _plainly(self.most)
        if self.most == inf:
            return f"{'above' if self.above else 'at least'} {least}"
        return f"above {least} and at most {most}" if self.above else f"between {least} and {most}"


@dataclass(frozen=True)
class Flag:
    """True or false; 0, 1 and text are neither."""

    def read(self, value: Any) -> bool:
        """See `Value`."""
        if not isinstance(value, bool):
            raise RefusedError(f"must be true or false, not {shown(value)}")
        return value


@dataclass(frozen=True)
class Text:
    """A string."""

    def read(self, value: Any) -> str:
        """See `Value`."""
        if not isinstance(value, str):
            raise RefusedError(f"must be text, not {shown(value)}")
        return value


@dataclass(frozen=True)
class Object:
    """An object of JSON."""

    def read(self, value: Any) -> dict[str, Any]:
        """See `Value`."""
        if not isinstance(value, dict):
            raise RefusedError(f"must be an object, not {shown(value)}")
        return value


@dataclass(frozen=True)
class Numbers:
    """A list of numbers."""

    each: Number

    def read(self, value: Any) -> tuple[Any, ...]:
        """See `Value`."""
        if not isinstance(value, list):
            raise RefusedError(f"must be a list, not {shown(value)}")
        return tuple(self.each.read(item) for item in value)


@dataclass(frozen=True)
class TokenIds:
    """A token id or a list of them, below the size of the vocabulary."""

    vocabulary: float = inf

    def read(self, value: Any) -> tuple[int, ...]:
        """See `Value`."""
        each = Number(0, whole=True)
        ids = [int(each.read(id)) for id in (value if isinstance(value, list | tuple) else [value])]
        if wrong := [id for id in ids if id >= self.vocabulary]:
            raise RefusedError(f"names token {shown(wrong[0])}, but vocab_size is {self.vocabulary:,}")
        return tuple(ids)


@dataclass(frozen=True)
class Fields:
    """Reads the values of an object by their names.

    Attributes:
        raw: the object.
        where: the file that has it, for errors.
        error: the type of these errors.
    """

    raw: Mapping[str, Any]
    where: str
    error: type[Dsv2Error] = ConfigError

    def get(self, name: str, kind: Value) -> Any:
        """The value of this name, of this kind; None if it is missing or null.

        Raises:
            Dsv2Error: it is not of this kind; of the type `error`, with the file and the name.
        """
        value = self.raw.get(name)
        return None if value is None else self.read(name, value, kind)

    def read(self, name: str, value: Any, kind: Value) -> Any:
        """Check a value that belongs to this name. Raises what `get` does."""
        try:
            return kind.read(value)
        except RefusedError as reason:
            raise self.error(f"{self.where}: {name} {reason}") from None


def checked(name: str, value: Any, kind: Value, error: type[Dsv2Error]) -> Any:
    """A value that a caller gave, of this kind. Raises `error`, with the value's name."""
    try:
        return kind.read(value)
    except RefusedError as reason:
        raise error(f"{name} {reason}") from None


def shown(value: Any) -> str:
    """A value for an error: short, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = int(abs(value).bit_length() * 0.30103)
        return str(value) if abs(value) < LARGEST_SHOWN else f"a number of about {size:,} digits"
    if isinstance(value, float):
        return f"{value:g}"
    try:
        return _SHORT.repr(value)
    except Exception:  # whatever a foreign object's __repr__ raises
        return f"a {type(value).__name__}"


def _plainly(number: float) -> str:
    return f"{int(number):,}" if abs(number) < LARGEST_SHOWN and number == int(number) else f"{number:g}"


def _integer(value: Any) -> int | None:
    """`value` as an int, if it is one in any type but bool."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    try:
        return operator.index(value)
    except Exception:  # whatever a foreign object's __index__ raises
        return None


def _number(value: Any) -> int | float | None:
    """`value` as a finite number, if it is one in any type but bool: of Python or, for instance, of numpy."""
    if (whole := _integer(value)) is not None:
        return whole
    if isinstance(value, bool | str | bytes | bytearray) or not hasattr(value, "__float__"):
        return None
    try:
        number = float(value)
    except Exception:  # whatever a foreign object's __float__ raises
        return None
    return number if isfinite(number) else None

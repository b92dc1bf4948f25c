"""What `dsv2 run --batch` is asked, checked before a model is loaded, and without importing torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from dsv2_local.commands.console import json_text
from dsv2_local.errors import InputError
from dsv2_local.machine.homes import expanded

STANDARD = "-"
"""The file name that stands for standard input and standard output."""
FORMAT = 1
"""Changes with the lines that are written, so that a run of a newer version does not continue older ones."""


class Order(StrEnum):
    """In which order results are written."""

    INPUT = "input"
    FINISHED = "finished"


@dataclass(frozen=True)
class BatchOptions:
    """Which requests to answer, and how.

    Attributes:
        source: the file with a request on every line; None: standard input.
        output: the file for the results; None: standard output.
        generation: options of `LLM.generate` for lines that do not have their own.
        system: the system message of conversations without one.
        model: what the user calls the model.
        order: in which order to write results.
        stats: whether to print statistics of the experts.
        drawn: whether the seed was drawn, so that the next run has another one.
    """

    source: Path | None
    output: Path | None
    generation: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    model: str | None = None
    order: Order = Order.INPUT
    stats: bool = False
    drawn: bool = False

    def fingerprint(self) -> bytes:
        """What decides the answers beside the lines themselves; what only decides where they are computed does not."""
        options = {name: value for name, value in self.generation.items() if not (name == "seed" and self.drawn)}
        known = [FORMAT, _name(self.model), self.system or None, dict(sorted(options.items()))]
        return json_text(known).encode()

    def output_name(self) -> str:
        """What errors call the place of the results."""
        return "standard output" if self.output is None else str(self.output)


def refuse(without_meaning: Mapping[str, bool], reason: str) -> None:
    """Refuse options that would have no effect.

    Args:
        without_meaning: names of such options, and whether they were given.
        reason: the rest of the sentence that begins with the name.

    Raises:
        InputError: one was given.
    """
    if names := [name for name, given in without_meaning.items() if given]:
        raise InputError(f"{names[0]} {reason}")


def place(name: str, option: str) -> Path | None:
    """The file that an option names; None for a standard stream.

    Raises:
        InputError: the name is empty, or has a home directory that does not exist.
    """
    if not name:
        raise InputError(f"the file of {option} has no name; is a variable not set?")
    return None if name == STANDARD else expanded(Path(name))


def _name(model: str | None) -> str | None:
    """A model's name, the same for every spelling of its directory."""
    if model is None:
        return None
    path = expanded(Path(model))
    return path.resolve().name if path.is_dir() else model

"""What `dsv2 run` is asked, and the prompt: checked before the model is loaded, and without importing torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dsv2_local import inlet
from dsv2_local.commands import streams
from dsv2_local.commands.console import notice
from dsv2_local.errors import InputError
from dsv2_local.machine.homes import expanded

LONGEST_NAME = 246
"""Bytes of a cache file's name: file systems allow 255, and the temporary name is longer."""


@dataclass(frozen=True)
class RunOptions:
    """What to ask, how, and what to print.

    Attributes:
        text: the prompt.
        generation: options of `LLM.generate`.
        system: the system message.
        raw: whether to continue the text itself, without the chat template.
        json: whether to print one JSON object instead of the answer's text.
        stream: whether to print the text while it is generated.
        stats: whether to print statistics on stderr.
        cache: the file in which the KV cache is saved from one run to the next.
        newline: whether to end the answer with a newline if it does not end with one itself.
    """

    text: str
    generation: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    raw: bool = False
    json: bool = False
    stream: bool = True
    stats: bool = False
    cache: Path | None = None
    newline: bool = True

    def __post_init__(self) -> None:
        """Check the options before the model is loaded.

        Raises:
            InputError: two options exclude each other, one has no effect, or the cache file cannot be written.
        """
        if self.raw and self.system:
            raise InputError("--system is part of the chat template, which --raw does not use; drop one of them")
        if self.generation.get("logprobs") is not None and not self.json:
            raise InputError("--logprobs needs --json, which prints the log probabilities")
        if self.cache and not _is_place_for_file(self.cache):
            raise InputError(f"--cache {self.cache} cannot be written: it is no file, or nothing can be written there")


def _is_place_for_file(path: Path) -> bool:
    """Whether a file is there, or could be (with the name of its directory while it is written)."""
    try:
        real = path.resolve()
        fits = len(os.fsencode(real.name)) <= LONGEST_NAME
        return path.is_file() or (fits and not path.exists() and os.access(real.parent, os.W_OK | os.X_OK))
    except (OSError, RuntimeError):  # a name that is too long, links in a circle
        return False


def gather_prompt(
    prompt: str | None, files: Sequence[Path], stdin: TextIO, raw: bool = False, *, read_stdin: bool | None = None
) -> str:
    """Join files, standard input and the prompt, in this order, with empty lines between.

    Line ends at the end of each part are removed, but not if `raw` is set: then every character is kept, and only the
    line ends that an empty line between two parts lacks are added.

    Args:
        prompt: the text that comes last.
        files: the files that come first.
        stdin: standard input.
        raw: whether to keep every character.
        read_stdin: whether to read it. None: unless it is a terminal, or a file that someone else has begun to read
            although there is a prompt or a file. (In `while read line; do dsv2 run "$line"; done < lines`, all lines
            but one would precede the first.) A line on stderr says what was done.

    Raises:
        InputError: all parts are empty, a part cannot be read, or it is not Unicode text.
    """
    parts = [inlet.decoded(_read(path), str(path)) for path in files]
    alone = prompt is None and not files
    if _wants_stdin(stdin, read_stdin, alone):
        text = _standard_input(stdin, alone)
        if text and not alone and read_stdin is None:
            notice(f"standard input was read, too ({len(text):,} characters); see --no-stdin")
        parts.append(text)
    if prompt is not None:
        parts.append(inlet.text(prompt, "the prompt"))
    text = _joined([part for part in parts if part]) if raw else _joined_without_line_ends(parts)
    if not (text if raw else text.strip()):
        raise InputError("there is no prompt; pass one as an argument, with -f FILE or on standard input")
    return text


def read_schema(path: Path) -> dict[str, Any]:
    """The options of `LLM.generate` for answers to the JSON schema in a file.

    Raises:
        InputError: the file cannot be read, is no JSON schema, or has what a grammar cannot express; or llguidance is
            not installed.
    """
    from dsv2_local.json_object import read_object
    from dsv2_local.text import grammar

    schema = read_object(_read(path), str(path))
    try:
        grammar.check(grammar.json_schema(schema, strict=True))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return {"schema": schema, "strict": True}


def _wants_stdin(stdin: TextIO, asked: bool | None, needed: bool) -> bool:
    if asked is not None:
        return asked
    if stdin.isatty():
        return False
    if needed or not (place := streams.shared(stdin.fileno())):
        return True
    notice(
        f"standard input is a file read elsewhere too (at byte {place[0]:,} of {place[1]:,}) and was left alone; "
        "see --stdin"
    )
    return False


def _standard_input(stdin: TextIO, alone: bool) -> str:
    where = "standard input"
    advice = "" if alone else "; --no-stdin answers without it"
    return inlet.decoded(streams.read_all(stdin.fileno(), where, advice), where)


def _joined(parts: Sequence[str]) -> str:
    """Join parts as they are, with an empty line between."""
    return "".join(part + _missing_line_ends(part) for part in parts[:-1]) + "".join(parts[-1:])


def _missing_line_ends(part: str) -> str:
    lines = part.replace("\r\n", "\n")
    return "\n" * (2 - (lines[-1:] == "\n") - (lines[-2:] == "\n\n"))


def _joined_without_line_ends(parts: Sequence[str]) -> str:
    stripped = [part.rstrip("\r\n") for part in parts]
    return "\n\n".join(part for part in stripped if part)


def _read(path: Path) -> bytes:
    try:
        with expanded(path).open("rb") as file:
            return streams.read_all(file.fileno(), str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None

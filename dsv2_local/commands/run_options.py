"""What `dsv2 run` is asked, and the prompt: checked before the model is loaded, and without importing torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dsv2_local.errors import InputError


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
        if self.cache and (self.cache.is_dir() or not self.cache.absolute().parent.is_dir()):
            raise InputError(
                f"--cache {self.cache} cannot be written: it is a directory, or its directory does not exist"
            )


def gather_prompt(prompt: str | None, files: Sequence[Path], stdin: TextIO, raw: bool = False) -> str:
    """Join files, standard input (unless it is a terminal) and the prompt, in this order, with empty lines between.

    Line ends at the end of each part are removed, but not if `raw` is set: then every character is kept, and only the
    line ends that an empty line between two parts lacks are added.

    Raises:
        InputError: all parts are empty, a file cannot be read, or a part is not UTF-8 text.
    """
    parts = [_text(_read(path), str(path)) for path in files]
    if not stdin.isatty():
        parts.append(_text(stdin.buffer.read(), "standard input"))
    if prompt is not None:
        parts.append(_text(os.fsencode(prompt), "the prompt"))
    text = _joined([part for part in parts if part]) if raw else _joined_without_line_ends(parts)
    if not (text if raw else text.strip()):
        raise InputError("there is no prompt; pass one as an argument, with -f FILE or on standard input")
    return text


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
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _text(data: bytes, where: str) -> str:
    """Decode UTF-8. NUL bytes are valid UTF-8, but they are a sign of a binary file.

    Raises:
        InputError: the data is not text; the message has `where` it is from, and the position.
    """
    if (at := data.find(b"\0")) >= 0:
        raise InputError(f"{where} is not text: byte {at:,} is NUL")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text: byte {error.start:,} is 0x{data[error.start]:02x}") from None

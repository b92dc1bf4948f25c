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
    """

    text: str
    generation: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    raw: bool = False
    json: bool = False
    stream: bool = True
    stats: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        """Check the options before the model is loaded.

        Raises:
            InputError: two options exclude each other, one has no effect, or the cache file cannot be written.
        """
        if self.raw and self.system is not None:
            raise InputError("--system is part of the chat template, which --raw does not use; drop one of them")
        if self.generation.get("logprobs") is not None and not self.json:
            raise InputError("--logprobs needs --json, which prints the log probabilities")
        if self.cache and (self.cache.is_dir() or not self.cache.absolute().parent.is_dir()):
            raise InputError(
                f"--cache {self.cache} cannot be written: it is a directory, or its directory does not exist"
            )


def gather_prompt(prompt: str | None, files: Sequence[Path], stdin: TextIO) -> str:
    """Join files, standard input (unless it is a terminal) and the prompt, in this order, with empty lines between.

    Line ends at the end of each part are removed.

    Raises:
        InputError: all parts are empty, a file cannot be read, or a part is not UTF-8 text.
    """
    parts = [_text(_read(path), str(path)) for path in files]
    if not stdin.isatty():
        parts.append(_text(stdin.buffer.read(), "standard input"))
    if prompt is not None:
        parts.append(_text(os.fsencode(prompt), "the prompt"))
    parts = [part.rstrip("\r\n") for part in parts]
    text = "\n\n".join(part for part in parts if part)
    if not text.strip():
        raise InputError("there is no prompt; pass one as an argument, with -f FILE or on standard input")
    return text


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

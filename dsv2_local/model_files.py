"""Reads the small files of a model (config.json, tokenizer files, manifest, index): whole, and never more than is sane.

Whatever they contain, the result is text or an object of JSON, or a typed error of one line: not UTF-8, nested too
deeply, an integer of thousands of digits, a pipe that would never end, a link to nowhere.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

from dsv2_local.errors import Dsv2Error

BEGINNING = 64
GGUF = "a GGUF file"
MAX_BYTES = 512 * 2**20
"""The largest small file that is read; the index of the 236B model has 3 MB, its tokenizer 5 MB."""


def read_text(path: Path, error: type[Dsv2Error]) -> str | None:
    """The text of a file, without a byte order mark; None if there is no such file.

    Raises:
        Dsv2Error: it cannot be read, of the type `error`, with the path.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if path.is_symlink():
            raise error(f"{path} is a link to a file that does not exist") from None
        return None
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read: {getattr(reason, 'strerror', None) or reason}") from None
    try:
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{path} is not a file that can be read (a directory, a pipe or a device)")
            if found.st_size > MAX_BYTES:
                raise error(f"{path} has {found.st_size:,} bytes, which is too many for such a file")
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not UTF-8 text: byte {reason.start:,} is 0x{reason.object[reason.start]:02x}") from None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}") from None


def read_object(path: Path, error: type[Dsv2Error]) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file. Raises what `read_text` and `parse_object` do."""
    text = read_text(path, error)
    return None if text is None else parse_object(text, str(path), error)


def what_begins(begin: bytes) -> str | None:
    """What a file is instead of the model's, by its first `BEGINNING` bytes; None: nothing that can be recognised."""
    if not begin.strip():
        return "an empty file"
    if begin.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself (git lfs pull)"
    if begin.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "a web page"
    return GGUF if begin.startswith(b"GGUF") else None


def parse_object(text: str | bytes, where: str, error: type[Dsv2Error]) -> dict[str, Any]:
    """The object in a JSON text.

    Raises:
        Dsv2Error: it is not JSON, or not an object; of the type `error`, with `where`.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as reason:
        if what := what_begins(text[:BEGINNING] if isinstance(text, bytes) else text[:BEGINNING].encode()):
            raise error(f"{where} is {what}; download it again") from None
        why = "it is nested too deeply" if isinstance(reason, RecursionError) else str(reason)
        raise error(f"{where} is not valid JSON: {why}") from None
    if not isinstance(raw, dict):
        raise error(f"{where} is not a JSON object")
    return raw

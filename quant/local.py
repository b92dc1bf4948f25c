"""What a local path holds that is not the model which was asked for, and what to do about it."""

import difflib
import os
from pathlib import Path

from dsv2_local.errors import CheckpointError, ConfigError
from dsv2_local.model_files import BEGINNING, GGUF, what_begins
from dsv2_local.quant.checkpoint import MANIFEST, is_checkpoint

PARTIAL = ".partial"
"""The directory inside a destination where an unfinished conversion lies."""

SAFETENSORS = "dsv2 converts a release's safetensors: dsv2 quantize RELEASE DIRECTORY"


def about_file(path: Path) -> str:
    """What a file is that was named in place of a model's directory, as the rest of a sentence that begins with it."""
    what = what_file(path) or "a file"
    if what == GGUF:
        return f"is {what}; {SAFETENSORS}"
    directory = path.absolute().parent
    return f"is {what}; a model is a directory" + (f": {directory}" if (directory / "config.json").is_file() else "")


def what_file(path: Path) -> str | None:
    """What a file is if it is not what its name says; None: nothing that can be recognised."""
    return GGUF if path.suffix == ".gguf" else what_begins(_beginning(path))


def _beginning(path: Path) -> bytes:
    """The first bytes of a file; none if it cannot be read, or is no regular file."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(BEGINNING)
    except OSError:
        return b""


def about_directory(directory: Path) -> str | None:
    """What a directory without a manifest holds, as the rest of a sentence that begins with it; None: nothing known."""
    names = sorted(path.name for path in directory.iterdir()) if os.access(directory, os.R_OK | os.X_OK) else []
    models = [name for name in names if is_checkpoint(directory / name)]
    if (directory / PARTIAL).is_dir():
        return "is a conversion that is not finished; run the same `dsv2 quantize` again"
    if models:
        return f"is not a model but holds {' and '.join(models[:3])}; name one of them"
    if "adapter_config.json" in names:
        return f"is a LoRA adapter, which dsv2 cannot apply; merge it into its model first, then {SAFETENSORS}"
    return f"holds GGUF files; {SAFETENSORS}" if any(name.endswith(".gguf") for name in names) else None


def require_config(directory: Path) -> None:
    """Check that a directory has a config.json.

    Raises:
        ConfigError: it has none; the message says what it holds.
    """
    if not (directory / "config.json").exists():
        about = about_directory(directory)
        raise ConfigError(f"{directory} has no config.json; {f'it {about}' if about else 'is it a model directory?'}")


def require_converted(directory: Path) -> None:
    """Check that a directory holds a converted model.

    Raises:
        CheckpointError: it does not; the message says what it holds.
    """
    if not is_checkpoint(directory):
        known = f"is not a converted checkpoint (no {MANIFEST}); convert it: dsv2 quantize {directory} DIRECTORY"
        raise CheckpointError(f"{directory} {about_directory(directory) or known}")


def near(path: Path) -> str:
    """The names that may be meant by a path that does not exist, as the end of a sentence; empty without any."""
    place = path.absolute().parent
    while not place.is_dir():
        path, place = place, place.parent
    try:
        names = [entry.name for entry in place.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, names, n=3)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in found)}?" if found else ""

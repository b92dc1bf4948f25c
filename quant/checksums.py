"""Compares the files of a converted checkpoint with the checksums in its manifest, without the source.

Opening a checkpoint checks sizes alone, since reading 130 GB takes minutes. `dsv2 inspect --verify` reads everything;
so does the first use of a downloaded checkpoint, once for each file until it changes.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from dsv2_local.errors import CheckpointError
from dsv2_local.machine import measurements
from dsv2_local.progress import Progress, no_progress
from dsv2_local.quant.checkpoint import Checkpoint, Manifest

CHUNK = 1 << 22  # bytes that are read at a time


def verify(directory: Path, progress: Progress = no_progress) -> Manifest:
    """Compare every file of a checkpoint with its manifest, which is returned.

    Args:
        directory: the checkpoint's.
        progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: the directory is no checkpoint, or files are missing, differ or are not listed; the text names
            them.
        ConfigError: config.json is not valid.
    """
    manifest = Manifest.load(directory)
    _verify(directory, manifest, manifest.files, progress)
    return Checkpoint(directory).manifest  # which has all files of the model


def verify_once(directory: Path, progress: Progress = no_progress) -> None:
    """Do as `verify` does, but skip files that it found right before and that have not changed since.

    Which these are is kept in the cache directory, by path, size and time of the last change.
    """
    manifest, known = Manifest.load(directory), _known()
    states = {name: _state(directory / name) for name in manifest.files}
    if new := [name for name, (path, state) in states.items() if known.get(path) != state]:
        _verify(directory, manifest, new, progress)
        measurements.keep(_file(), json.dumps(known | dict(states.values())))


def _verify(directory: Path, manifest: Manifest, names: Iterable[str], progress: Progress) -> None:
    names = list(names)
    done, total = 0, sum(manifest.files[name].bytes for name in names)
    wrong = []
    for name in names:
        record, path, digest, size = manifest.files[name], directory / name, hashlib.sha256(), 0
        if not path.is_file():
            wrong.append(f"{name} is missing")
            continue
        try:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    progress(min(done + size, total), total)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        done += record.bytes
        if size != record.bytes or digest.hexdigest() != record.sha256:
            wrong.append(f"{name} differs from its checksum")
    if wrong:
        more = f" and {len(wrong) - 3} more files" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{directory}: {', '.join(wrong[:3])}{more}; download or convert the model again, "
            "unless you edited a small file yourself"
        )


def _state(path: Path) -> tuple[str, str]:
    """A file's real path, and what changes when the file does: its size and the time of its last change."""
    try:
        found = path.stat()
    except OSError:
        return str(path), "missing"
    return str(path.resolve()), f"{found.st_size} bytes at {found.st_mtime_ns}"


def _file() -> Path:
    return measurements.file().with_name("verified.json")


def _known() -> dict[str, str]:
    """The states of files that `verify_once` found right; empty if the file is missing or damaged."""
    try:
        return {str(path): str(state) for path, state in json.loads(_file().read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}

"""Convert a release to a checkpoint directory: in bounded memory, on all cores, resumable after any interruption.

Worker threads read, quantise and write pieces of one output file at a time, each piece at its own offset. A finished
file is fsynced, hashed, renamed and recorded in `DST/.partial/progress.json`; when all are finished they move to DST,
the manifest last. So nothing outside DST is written, which may be a link, a mount point or the current directory.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_local import locks
from dsv2_local.architectures.config import read_config_json
from dsv2_local.architectures.families import parse_config
from dsv2_local.architectures.tensors import UNQUANTISED
from dsv2_local.errors import CheckpointError, ConversionError
from dsv2_local.kernels.format import BLOCK, Format
from dsv2_local.machine import homes
from dsv2_local.machine.resources import startable
from dsv2_local.model_files import read_object
from dsv2_local.quant.checkpoint import (
    MANIFEST,
    FileRecord,
    Manifest,
    file_sha256,
    is_checkpoint,
    safetensors_header,
)
from dsv2_local.quant.local import PARTIAL, require_config
from dsv2_local.quant.pieces import ConversionPlan, Piece, check_tensors
from dsv2_local.quant.quantize import quantize
from dsv2_local.quant.schema import FORMAT_VERSION, Recipe
from dsv2_local.quant.source import Source, inside

MAX_WORKERS = 16
FP16_MAX = 65504.0
PROGRESS, REPLACED = "progress.json", "replaced.json"
LOST = "lost+found"  # a directory that every new file system has
COPIED = (
    "tokenizer*",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE*",
    "NOTICE*",
    "README.md",
)
OWN = (PROGRESS, REPLACED, MANIFEST, "config.json", "*.safetensors", *COPIED)
"""What a conversion writes into its directory."""


@dataclass(frozen=True)
class ConversionProgress:
    """Progress of a conversion: tensors written, and bytes of the source read."""

    tensors: int
    total_tensors: int
    bytes: int
    total_bytes: int


Report = Callable[[ConversionProgress], None]


def convert(
    source_dir: Path,
    destination: Path,
    *,
    recipe: Recipe,
    force: bool = False,
    source_name: str = "",
    report: Report | None = None,
) -> Manifest:
    """Convert the release in `source_dir` to the checkpoint directory `destination`.

    An interrupted conversion resumes when called again, and the result has the same bytes.

    Args:
        source_dir: a release: config.json and safetensors files.
        destination: directory to create, or an empty one; partial results are in a directory inside it.
        recipe: format of each kind of tensor.
        force: replace an existing checkpoint (when the new one is finished), and discard a partial conversion of
            another source or recipe.
        source_name: name of the source in the manifest; the directory's name by default.
        report: called with the progress after every piece.

    Returns:
        The manifest of the finished checkpoint.

    Raises:
        ConversionError: the destination is in use, has too little space, or holds something else.
        CheckpointError: a tensor or file of the source is missing, unknown, truncated, corrupt or not finite.
        ConfigError: the model is not supported.
    """
    destination = place(destination)
    _check_source(source_dir)
    _check_outside(source_dir, destination)
    inside(source_dir, "config.json")
    raw = read_config_json(source_dir)
    config = parse_config(raw, str(source_dir / "config.json"))
    source = Source(source_dir)
    try:
        check_tensors(source, config)
        plan = ConversionPlan(source, config, recipe)
        if plan.fingerprint == _finish(destination):
            return Manifest.load(destination)
        if _is_leftover(destination, plan):
            with _partial_directory(destination) as directory:
                _clean_up(directory)
            return Manifest.load(destination)
        _check_destination(destination, force)
        with _partial_directory(destination) as directory:
            _check_destination(destination, force)
            done = _finished(directory, plan.fingerprint, force)
            _check_space(destination, sum(plan.nbytes(file) for file in plan.files if file not in done))
            _record(directory, plan.fingerprint, done)
            _discard_all_but(directory, done)
            _Writer(plan, directory, done, report).write_all()
            files = done | _write_small_files(source_dir, directory, raw, recipe)
            manifest = Manifest(recipe, source_name or source_dir.resolve().name, dict(sorted(files.items())))
            _write_durably(directory / MANIFEST, manifest.to_json().encode())
            return _put_in_place(directory, destination)
    finally:
        source.close()


def _check_source(directory: Path) -> None:
    """Raise a Dsv2Error for what is no release, with what it is, and for small files that are not there."""
    if is_checkpoint(directory):
        recipe = Manifest.load(directory).recipe
        raise ConversionError(f"{directory} is converted already (recipe {recipe}); load it with -m {directory}")
    require_config(directory)
    for path in _small_files(directory):
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path} is a link to {path.readlink()}, which is missing; download it again")
        inside(directory, path.name)


def _convert_piece(piece: Piece, recipe: Recipe, descriptor: int) -> Piece:
    """Read, quantise and write one piece, in a worker thread."""
    for offset, part in zip(piece.offsets, _parts(piece, recipe), strict=True):
        view, done = part.reshape(-1).view(torch.uint8).numpy().data, 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)
    return piece


def _parts(piece: Piece, recipe: Recipe) -> tuple[Tensor, ...]:
    """The planes to write for a piece."""
    weight = piece.load()
    format = None if piece.kind in UNQUANTISED else recipe.format_of(piece.kind)
    _check_numbers(piece.where, weight, scaled=format in (Format.NF4, Format.INT8))
    if format is None:
        return (weight,)
    if format is Format.BF16:
        return (weight.bfloat16(),)
    return quantize(weight, format).parts


def _check_numbers(where: str, weight: Tensor, scaled: bool) -> None:
    """Raise CheckpointError for values that are not finite or, with `scaled`, too large for an fp16 scale."""
    largest = float(weight.abs().max())
    if not math.isfinite(largest):
        raise CheckpointError(f"{where} has values that are not finite numbers; download the model again")
    if scaled and largest > FP16_MAX:
        raise CheckpointError(f"{where} has a value of {largest:.3g}; a scale holds at most {FP16_MAX:,.0f}")


class Tally:
    """Counts finished pieces and reports the progress."""

    def __init__(self, plan: ConversionPlan, report: Report | None) -> None:
        tensors, nbytes = plan.totals()
        self._progress = ConversionProgress(0, tensors, 0, nbytes)
        self._report = report

    def count(self, *pieces: Piece) -> None:
        """Count these pieces as finished."""
        p = self._progress
        tensors, nbytes = sum(piece.last for piece in pieces), sum(piece.nbytes for piece in pieces)
        self._progress = replace(p, tensors=p.tensors + tensors, bytes=p.bytes + nbytes)
        if self._report:
            self._report(self._progress)


class _Writer:
    """Writes the plan's files into the partial directory, except those that are recorded as finished."""

    def __init__(
        self, plan: ConversionPlan, directory: Path, done: dict[str, FileRecord], report: Report | None
    ) -> None:
        self.plan, self.directory, self.done = plan, directory, done
        self.tally = Tally(plan, report)

    def write_all(self) -> None:
        """Write and record every unfinished file."""
        threads = torch.get_num_threads()
        workers = startable(min(MAX_WORKERS, threads))
        torch.set_num_threads(1)  # OpenMP ends the process if it cannot start its threads
        # The workers use all cores; threads of torch inside each of them would only compete.
        with ThreadPoolExecutor(max(1, workers), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for file in self.plan.files:
                    if file in self.done:
                        self.tally.count(*self.plan.pieces(file))
                    else:
                        self.done[file] = self._write(file, pool.map if workers else map)
                        _record(self.directory, self.plan.fingerprint, self.done)
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(threads)

    def _write(self, file: str, in_parallel: Callable[..., Iterator[Piece]]) -> FileRecord:
        unfinished = self.directory / (file + ".tmp")
        with unfinished.open("w+b", buffering=0) as out:
            out.write(safetensors_header(self.plan.entries(file)))
            convert_piece = partial(_convert_piece, recipe=self.plan.recipe, descriptor=out.fileno())
            for piece in in_parallel(convert_piece, self.plan.pieces(file)):
                self.tally.count(piece)
            os.fsync(out.fileno())
        record = FileRecord(unfinished.stat().st_size, file_sha256(unfinished))
        unfinished.rename(self.directory / file)
        return record


def _record(directory: Path, fingerprint: str, done: dict[str, FileRecord]) -> None:
    """Record which files are finished, after making their renames durable."""
    _sync_directory(directory)
    records = {name: asdict(record) for name, record in done.items()}
    _write_durably(directory / PROGRESS, json.dumps({"fingerprint": fingerprint, "files": records}).encode())


def _recorded(directory: Path) -> tuple[str | None, dict[str, FileRecord]]:
    """The fingerprint of the conversion that `directory` holds, and the files that it has finished."""
    try:
        raw = read_object(directory / PROGRESS, ConversionError) or {}
        return str(raw["fingerprint"]), {name: FileRecord(**record) for name, record in raw["files"].items()}
    except (ConversionError, KeyError, TypeError, AttributeError):
        return None, {}


def _finished(directory: Path, fingerprint: str, force: bool) -> dict[str, FileRecord]:
    """The files that an interrupted conversion of the same source and recipe has finished."""
    known, records = _recorded(directory)
    same = known == fingerprint
    if not same and not force and (directory / PROGRESS).exists():
        raise ConversionError(
            f"{directory} holds a conversion of another source or recipe; delete it, or use --force to start over"
        )
    return {name: r for name, r in records.items() if same and _has_size(directory / name, r.bytes)}


def _discard_all_but(directory: Path, done: dict[str, FileRecord]) -> None:
    """Delete unfinished files and files of a discarded conversion, so that none of them becomes part of the result."""
    for path in directory.iterdir():
        if path.name not in done and path.name != PROGRESS:
            path.unlink()


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _write_small_files(source_dir: Path, directory: Path, raw: dict[str, Any], recipe: Recipe) -> dict[str, FileRecord]:
    """Write config.json with a `quantization_config`, and copy the tokenizer, chat template and notices."""
    quantisation = {
        "quant_method": "dsv2",
        "recipe": str(recipe),
        "block_size": BLOCK,
        "format_version": FORMAT_VERSION,
    }
    config = json.dumps({**raw, "quantization_config": quantisation}, indent=2) + "\n"
    contents = {"config.json": config.encode()}
    small = {path.name for path in _small_files(source_dir) if path.is_file()}
    contents |= {name: inside(source_dir, name).read_bytes() for name in small}
    for name, content in contents.items():
        _write_durably(directory / name, content)
    return {name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()}


def _small_files(source_dir: Path) -> list[Path]:
    """What is copied from the source as it is."""
    return [path for pattern in COPIED for path in source_dir.glob(pattern)]


def _write_durably(path: Path, content: bytes) -> None:
    """Write a small file atomically and flush it to disk."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def place(destination: Path) -> Path:
    """Where a destination is, as an absolute path without links: what is written there is on its disk.

    Raises:
        ConversionError: it cannot be told, as with links in a circle.
    """
    try:
        return homes.expanded(destination).resolve()
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"{destination} cannot be a destination: {error}") from None


def finished_files(destination: Path) -> int:
    """How many files an interrupted conversion to `destination` has finished."""
    return len(_recorded(place(destination) / PARTIAL)[1])


def _check_outside(source: Path, destination: Path) -> None:
    here, there = source.resolve(), destination
    if there in (here, *here.parents) or here in there.parents:
        raise ConversionError(f"{destination} is the source, contains it or is inside it; choose another destination")


def _check_destination(destination: Path, force: bool) -> None:
    """Raise ConversionError if the destination must not be written. Hidden files, as systems make them, may stay."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise ConversionError(f"{destination} is a file; choose another destination")
    if is_checkpoint(destination):
        if not force:
            raise ConversionError(f"{destination} exists; use --force to replace it")
    elif others := [path.name for path in destination.iterdir() if not path.name.startswith(".") and path.name != LOST]:
        raise ConversionError(f"{destination} is a directory with other files ({others[0]}); choose another one")


@contextmanager
def _partial_directory(destination: Path) -> Iterator[Path]:
    """Create and lock the directory inside the destination; errors of the operating system become ConversionError.

    Afterwards, directories that were made and are still empty are removed.
    """
    directory = destination / PARTIAL
    try:
        made = [path for path in (directory, destination, *destination.parents) if not path.exists()]
        if directory.is_symlink():
            raise ConversionError(f"{directory} is a link; remove it")
        try:
            lock = _lock(directory)
            try:
                _check_own(directory)
                yield directory
            finally:
                os.close(lock)
        finally:
            with suppress(OSError):
                for path in made:
                    path.rmdir()
    except BlockingIOError:
        raise ConversionError(f"another conversion is writing {destination}; wait for it or stop it") from None
    except OSError as error:
        what = f"{error.strerror} ({error.filename or directory})"
        raise ConversionError(f"{what}; fix that and run the same command again to resume") from None


def _lock(directory: Path) -> int:
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another conversion has ended since, and removed it
            return locks.take(directory, directory=True)


def _check_own(directory: Path) -> None:
    """Raise ConversionError if there is anything in the directory that a conversion does not write."""
    names = [path.name for path in directory.iterdir()]
    strange = [name for name in names if not any(fnmatch(name.removesuffix(".tmp"), own) for own in OWN)]
    if not strange and names and not {PROGRESS, PROGRESS + ".tmp"} & set(names):
        strange = names
    if strange:
        raise ConversionError(f"{directory} holds {strange[0]}, which no conversion has written; move it elsewhere")


def _check_space(destination: Path, needed: int) -> None:
    free = shutil.disk_usage(destination).free
    if needed > free:
        raise ConversionError(
            f"{destination} has {free / 1e9:,.2f} GB free and {needed / 1e9:,.2f} GB are needed; "
            "free some space or choose another destination"
        )


def _put_in_place(directory: Path, destination: Path) -> Manifest:
    """Move the finished files into the destination, the manifest last; delete what they replace.

    It may be stopped at any moment and called again: `directory` has the new manifest until everything is done, and
    the destination has none from the first move until then.
    """
    new, old = directory / MANIFEST, destination / MANIFEST
    content, replaced = new.read_bytes(), directory / REPLACED
    if old.is_file() and old.read_bytes() != content:
        old.replace(replaced)
        _sync_directory(destination)
    manifest = Manifest.load(directory)
    for name in manifest.files:
        if (directory / name).exists():
            (directory / name).replace(destination / name)
    for name in _listed(replaced) - set(manifest.files):
        (destination / name).unlink(missing_ok=True)
    _sync_directory(destination)
    _write_durably(old, content)
    _sync_directory(destination)
    _clean_up(directory)
    return manifest


def _listed(manifest: Path) -> set[str]:
    """The files that a replaced manifest lists, as far as they are names of files beside it."""
    try:
        files = (read_object(manifest, ConversionError) or {}).get("files")
    except ConversionError:
        return set()
    return {name for name in files or () if isinstance(name, str) and Path(name).name == name}


def _finish(destination: Path) -> str | None:
    """Finish a conversion that was stopped while its files were moved into place; returns its fingerprint."""
    if not (destination / PARTIAL / MANIFEST).is_file():
        return None
    with _partial_directory(destination) as directory:
        if not (directory / MANIFEST).is_file():
            return None
        fingerprint = _recorded(directory)[0]
        _put_in_place(directory, destination)
        return fingerprint


def _is_leftover(destination: Path, plan: ConversionPlan) -> bool:
    """Whether the destination is the finished result of this conversion and lacks only the clean-up."""
    fingerprint, records = _recorded(destination / PARTIAL)
    return (
        is_checkpoint(destination)
        and fingerprint == plan.fingerprint
        and set(records) == set(plan.files)
        and all(_has_size(destination / name, record.bytes) for name, record in records.items())
    )


def _clean_up(directory: Path) -> None:
    """Remove the directory of a finished conversion, the record of progress last."""
    for path in sorted(directory.iterdir(), key=lambda path: path.name == PROGRESS):
        path.unlink()
    directory.rmdir()

"""Convert a release to a checkpoint directory: in bounded memory, on all cores, resumable after any interruption.

Worker threads read, quantise and write pieces of one output file at a time, each piece at its own offset. A finished
file is fsynced, hashed, renamed and recorded in `DST.partial/progress.json`; the directory gets its final name when all
files are finished.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_local.architectures.config import read_config_json
from dsv2_local.architectures.families import parse_config
from dsv2_local.architectures.tensors import UNQUANTISED
from dsv2_local.errors import CheckpointError, ConversionError
from dsv2_local.kernels.format import BLOCK, Format
from dsv2_local.quant.checkpoint import (
    MANIFEST,
    FileRecord,
    Manifest,
    file_sha256,
    is_checkpoint,
    safetensors_header,
)
from dsv2_local.quant.pieces import ConversionPlan, Piece, check_tensors
from dsv2_local.quant.quantize import quantize
from dsv2_local.quant.schema import FORMAT_VERSION, Recipe
from dsv2_local.quant.source import Source

MAX_WORKERS = 16
FP16_MAX = 65504.0
PROGRESS = "progress.json"
COPIED = (
    "tokenizer*",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE*",
    "NOTICE*",
    "README.md",
)


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
        destination: directory to create; partial results are in a directory beside it.
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
    raw = read_config_json(source_dir)
    config = parse_config(raw, str(source_dir / "config.json"))
    _check_destination(source_dir, destination, force)
    source = Source(source_dir)
    try:
        check_tensors(source, config)
        plan = ConversionPlan(source, config, recipe)
        if _is_leftover(destination, plan, force):  # an earlier run was stopped after its last rename
            _clean_up(destination)
            return Manifest.load(destination)
        with _partial_directory(destination) as directory:
            done = _recorded(directory, plan.fingerprint, force)
            _discard_all_but(directory, done)
            _check_space(directory, sum(plan.nbytes(file) for file in plan.files if file not in done))
            _Writer(plan, directory, done, report).write_all()
            files = done | _write_small_files(source_dir, directory, raw, recipe)
            manifest = Manifest(recipe, source_name or source_dir.resolve().name, dict(sorted(files.items())))
            _write_durably(directory / MANIFEST, manifest.to_json().encode())
            _put_in_place(directory, destination)
    finally:
        source.close()
    return manifest


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
        # The workers use all cores; threads of torch inside each of them would only compete.
        with ThreadPoolExecutor(min(MAX_WORKERS, threads), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for file in self.plan.files:
                    if file in self.done:
                        self.tally.count(*self.plan.pieces(file))
                    else:
                        self.done[file] = self._write(file, pool)
                        _record(self.directory, self.plan.fingerprint, self.done)
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(threads)

    def _write(self, file: str, pool: ThreadPoolExecutor) -> FileRecord:
        unfinished = self.directory / (file + ".tmp")
        with unfinished.open("w+b", buffering=0) as out:
            out.write(safetensors_header(self.plan.entries(file)))
            convert_piece = partial(_convert_piece, recipe=self.plan.recipe, descriptor=out.fileno())
            for piece in pool.map(convert_piece, self.plan.pieces(file)):
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


def _recorded(directory: Path, fingerprint: str, force: bool) -> dict[str, FileRecord]:
    """The files that an interrupted conversion of the same source and recipe has finished."""
    path = directory / PROGRESS
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        records = {name: FileRecord(**record) for name, record in raw["files"].items()}
        same = raw["fingerprint"] == fingerprint
    except (ValueError, KeyError, TypeError, AttributeError):
        records, same = {}, False
    if not same and not force:
        raise ConversionError(
            f"{directory} holds a conversion of another source or recipe; delete it, or use --force to start over"
        )
    return {name: r for name, r in records.items() if same and _has_size(directory / name, r.bytes)}


def _discard_all_but(directory: Path, done: dict[str, FileRecord]) -> None:
    """Delete unfinished files and files of a discarded conversion, so that none of them becomes part of the result."""
    for path in directory.iterdir():
        if path.name not in done and not (done and path.name == PROGRESS):
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
    for pattern in COPIED:
        contents |= {path.name: path.read_bytes() for path in source_dir.glob(pattern) if path.is_file()}
    for name, content in contents.items():
        _write_durably(directory / name, content)
    return {name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()}


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


def _check_destination(source: Path, destination: Path, force: bool) -> None:
    """Raise ConversionError if the destination cannot or must not be written."""
    here, there = source.resolve(), destination.resolve()
    if there in (here, *here.parents) or here in there.parents:
        raise ConversionError(f"{destination} is the source, contains it or is inside it; choose another destination")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise ConversionError(f"{destination} is a file; choose another destination")
    if is_checkpoint(destination) and not (force or (destination / PROGRESS).is_file()):
        raise ConversionError(f"{destination} exists; use --force to replace it")
    if not is_checkpoint(destination) and any(destination.iterdir()):
        raise ConversionError(f"{destination} is a directory with other files; choose another destination")


def finished_files(destination: Path) -> int:
    """How many files an interrupted conversion to `destination` has finished."""
    directory = _partial(destination)
    return sum(1 for _ in directory.glob("*.safetensors")) if (directory / PROGRESS).is_file() else 0


def _partial(destination: Path) -> Path:
    return destination.with_name(destination.name + ".partial")


@contextmanager
def _partial_directory(destination: Path) -> Iterator[Path]:
    """Create and lock `DST.partial`; errors of the operating system become ConversionError."""
    directory = _partial(destination)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield directory
        finally:
            os.close(lock)
    except BlockingIOError:
        raise ConversionError(f"another conversion is writing {directory}; wait for it or stop it") from None
    except OSError as error:
        what = f"{error.strerror} ({error.filename or directory})"
        raise ConversionError(f"{what}; fix that and run the same command again to resume") from None


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ConversionError(
            f"{directory.parent} has {free / 1e9:,.2f} GB free and {needed / 1e9:,.2f} GB are needed; "
            "free some space or choose another destination"
        )


def _put_in_place(directory: Path, destination: Path) -> None:
    """Give the finished directory its final name, and then delete the checkpoint that it replaces."""
    replaced = destination.with_name(destination.name + ".replaced")
    if is_checkpoint(destination):
        shutil.rmtree(replaced, ignore_errors=True)
        destination.rename(replaced)
    directory.rename(destination)
    _sync_directory(destination.parent)
    _clean_up(destination)


def _is_leftover(destination: Path, plan: ConversionPlan, force: bool) -> bool:
    """Whether the destination is the finished result of this conversion and lacks only the clean-up."""
    if not (is_checkpoint(destination) and (destination / PROGRESS).is_file()):
        return False
    return len(_recorded(destination, plan.fingerprint, force)) == len(plan.files)


def _clean_up(destination: Path) -> None:
    """Remove what remains after the last rename: the replaced checkpoint, and the record of progress."""
    shutil.rmtree(destination.with_name(destination.name + ".replaced"), ignore_errors=True)
    (destination / PROGRESS).unlink(missing_ok=True)

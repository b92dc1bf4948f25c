"""Reads a source checkpoint's safetensors files piece by piece.

The files are read with `pread` into small buffers instead of being mapped: mapped pages count as resident memory, and
the memory of a conversion must not grow with the model.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv2_local.errors import CheckpointError
from dsv2_local.model_files import parse_object, read_object
from dsv2_local.quant.local import what_file
from dsv2_local.values import Fields, Number, Numbers, Object, Text, checked, shown

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
INDEX = "model.safetensors.index.json"
_SIZES = Numbers(Number(0, 2**50, whole=True))
MAX_HEADER = 100_000_000  # limit of the safetensors format


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a file; `start` is the offset of its first byte."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """Offset of the first byte after the tensor."""
        return self.start + prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize


class Source:
    """The tensors of a directory of safetensors files, by name."""

    def __init__(self, directory: Path) -> None:
        """Read and check every header.

        Raises:
            CheckpointError: there are no weights, a shard is missing, or a file is truncated or corrupt.
        """
        self.directory = directory
        self.files = _files(directory)
        self.tensors: dict[str, SourceTensor] = {}
        for file in self.files:
            for tensor in _read_header(file):
                if tensor.name in self.tensors:
                    raise CheckpointError(f"{tensor.name} is in both {self.tensors[tensor.name].file} and {file}")
                self.tensors[tensor.name] = tensor
        # All files are opened here, so that threads can read without a lock.
        self._descriptors = {file: os.open(file, os.O_RDONLY) for file in self.files}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` (exclusive) of a tensor, in its own type. Several threads may read at once."""
        tensor = self.tensors[name]
        rows = (tensor.shape[0] if stop is None else stop) - start
        buffer = torch.empty(rows * tensor.row_bytes, dtype=torch.uint8)
        self._fill(buffer, tensor, tensor.start + start * tensor.row_bytes)
        return buffer.view(tensor.dtype).view(rows, *tensor.shape[1:])

    def _fill(self, buffer: Tensor, tensor: SourceTensor, offset: int) -> None:
        view, done = buffer.numpy().data, 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptors[tensor.file], [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{tensor.file}: {tensor.name} cannot be read: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{tensor.file} ends inside {tensor.name}; download it again")
            done += count

    def fingerprint(self) -> str:
        """A digest of the configuration, of each file's size and time, and of each tensor's type, shape and offset."""
        parts: list[Any] = [(self.directory / "config.json").read_text(encoding="utf-8")]
        for file in self.files:
            stat = file.stat()
            parts.append([file.name, stat.st_size, stat.st_mtime_ns])
        parts += [[t.name, str(t.dtype), t.shape, t.start] for t in self.tensors.values()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def close(self) -> None:
        """Close the files; the source cannot be read afterwards."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _files(directory: Path) -> list[Path]:
    """The shards that the index lists, or all safetensors files if there is no index."""
    index = directory / INDEX
    raw = read_object(index, CheckpointError)
    if raw is None:
        files = [_shard(directory, path.name, "is") for path in sorted(directory.glob("[!.]*.safetensors"))]
        if not files:  # those that begin with a dot are another system's
            raise CheckpointError(f"{directory} has no *.safetensors files (other formats are not read)")
        return files
    found = Fields(raw, str(index), CheckpointError)
    weights = found.get("weight_map", Object())
    if not weights:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    names = {found.read(f"weight_map of {shown(tensor)}", name, Text()) for tensor, name in weights.items()}
    return [_shard(directory, name, f"is listed in {INDEX} but") for name in sorted(names)]


def _shard(directory: Path, name: str, listed: str) -> Path:
    """A file of weights, which must be there; `listed` says how it is known."""
    path = directory / name
    try:
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path} {listed} a link to {path.readlink()}, which is missing; download it again")
        if not inside(directory, name).is_file():
            raise CheckpointError(f"{path} {listed} missing; download it again")
    except (OSError, ValueError):  # a name that no file can have
        raise CheckpointError(f"{shown(name)} {listed} no name of a file; download {INDEX} again") from None
    return path


def inside(directory: Path, name: str) -> Path:
    """The path of a source's file, which must be in its directory, or in the hub cache that the directory is part of.

    Raises:
        CheckpointError: `name` or a link leads elsewhere, so that a conversion would copy what is not the model's.
    """
    path = directory / name
    real = path.resolve()
    in_blobs = real.parent.name == "blobs" and real.parent.parent.name.startswith(
        "models--"
    )  # huggingface_hub's layout
    if (
        Path(name).is_absolute()
        or ".." in Path(name).parts
        or not (in_blobs or real.is_relative_to(directory.resolve()))
    ):
        raise CheckpointError(
            f"{path} leads out of {directory}, to {real}; put the file itself there if it is the model's"
        )
    return path


def _read_header(file: Path) -> list[SourceTensor]:
    """The tensors of one file in the order of their offsets, checked against the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                what = what_file(file) or "truncated or not a safetensors file"
                raise CheckpointError(f"{file} is {what}; download it again")
            text = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    raw = parse_object(text, f"the header of {file}", CheckpointError)
    raw.pop("__metadata__", None)
    tensors = sorted((_tensor(file, 8 + length, *item) for item in raw.items()), key=lambda tensor: tensor.start)
    _check_offsets(file, tensors, size)
    return tensors


def _tensor(file: Path, data: int, name: str, entry: Any) -> SourceTensor:
    where = f"{file}: {name}"
    found = Fields(checked(where, entry, Object(), CheckpointError), where, CheckpointError)
    shape, offsets = found.get("shape", _SIZES), found.get("data_offsets", _SIZES)
    if shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{where} has no shape or no data_offsets; download the file again")
    start, end = offsets
    stored = found.get("dtype", Text())
    dtype = DTYPES.get(stored)
    if dtype is None:
        raise CheckpointError(f"{where} is {stored}, which is not supported (only {', '.join(DTYPES)})")
    if end - start != prod(shape) * dtype.itemsize or start < 0:
        raise CheckpointError(f"{file}: {name} has {end - start} bytes, which does not match its shape {shape}")
    return SourceTensor(name, file, dtype, shape, data + start)


def _check_offsets(file: Path, tensors: list[SourceTensor], size: int) -> None:
    """Raise CheckpointError if tensors overlap or reach beyond the end of the file."""
    for before, after in pairwise(tensors):
        if before.end > after.start:
            raise CheckpointError(f"{file}: {before.name} and {after.name} overlap; download it again")
    for tensor in tensors:
        if tensor.end > size:
            raise CheckpointError(f"{file} is truncated: {tensor.name} ends {tensor.end - size:,} bytes beyond its end")

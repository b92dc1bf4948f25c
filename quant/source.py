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
from dsv2_local.model_files import read_object
from dsv2_local.quant.local import what_file

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
INDEX = "model.safetensors.index.json"
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
        files = sorted(directory.glob("[!.]*.safetensors"))  # those with a dot are another system's
        if not files:
            raise CheckpointError(f"{directory} has no *.safetensors files (other formats are not read)")
    else:
        try:
            files = [directory / name for name in sorted(set(raw["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}") from None
    for file in files:
        if not file.is_file():
            listed = f"is listed in {INDEX} but" if raw is not None else "is"
            what = f"a link to {file.readlink()}, which is missing" if file.is_symlink() else "missing"
            raise CheckpointError(f"{file} {listed} {what}; download it again")
    return files


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
    try:
        raw = json.loads(text)
        raw.pop("__metadata__", None)
        tensors = sorted((_tensor(file, 8 + length, *item) for item in raw.items()), key=lambda tensor: tensor.start)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} has a corrupt header ({error!r}); download it again") from None
    _check_offsets(file, tensors, size)
    return tensors


def _tensor(file: Path, data: int, name: str, entry: dict[str, Any]) -> SourceTensor:
    shape, (start, end) = tuple(map(int, entry["shape"])), entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        supported = ", ".join(DTYPES)
        raise CheckpointError(f"{file}: {name} is {entry['dtype']}, which is not supported (only {supported})")
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

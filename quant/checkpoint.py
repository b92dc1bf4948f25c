"""The directory of a converted checkpoint: its files, its manifest, and how they are read.

    config.json             the model's config.json with a `quantization_config`
    manifest.json           format version, recipe, source, and size and sha256 of every other file
    dense.safetensors       embedding, final norm, LM head
    dense-LLL.safetensors   attention, norms, router, shared experts or dense MLP of layer LLL
    experts-LLL.safetensors one uint8 tensor `experts` [experts, record bytes] that starts at a 4096-byte boundary
    tokenizer.json, …       copied from the source

Matrices are stored as the planes of `kernels.layout`: `NAME.codes` and `NAME.scales`, or `NAME` alone in bf16. Any
safetensors reader opens the files. They are memory-mapped: nothing is read before it is used.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv2_local.architectures.families import load_config
from dsv2_local.architectures.tensors import TensorSpec
from dsv2_local.errors import CheckpointError
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.kernels.layout import Matrix, Plane, planes
from dsv2_local.model_files import read_object
from dsv2_local.quant.schema import EXPERTS, FORMAT_VERSION, Recipe, dense_files, expert_file, expert_layout
from dsv2_local.values import Fields, Number, Object, Text, shown

MANIFEST = "manifest.json"
ALIGNMENT = 4096
DTYPE_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


def safetensors_header(entries: list[Plane]) -> bytes:
    """The header of a file that holds `entries` back to back, padded so that the data starts at `ALIGNMENT`."""
    header: dict[str, Any] = {}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class FileRecord:
    """A file's entry in the manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. It is written last, so a directory without one is not a finished checkpoint."""

    recipe: Recipe
    source: str
    files: dict[str, FileRecord]
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read `directory/manifest.json`.

        Raises:
            CheckpointError: there is no manifest, it is not valid, or this program does not read its format version.
        """
        path = directory / MANIFEST
        raw = read_object(path, CheckpointError)
        if raw is None:
            raise CheckpointError(f"{directory} is not a converted checkpoint (no {MANIFEST}); run `dsv2 quantize`")
        found = Fields(raw, str(path), CheckpointError)
        version = found.get("format_version", Number(0, whole=True))
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {shown(version)} and this program reads {FORMAT_VERSION}; "
                "convert the model again"
            )
        recipe, files = found.get("recipe", Text()), found.get("files", Object())
        if recipe not in {*Recipe} or files is None:
            raise CheckpointError(f"{path} is damaged: recipe {shown(recipe)}, files {shown(files)}; convert again")
        records = {name: _record(f"{path}: {shown(name)}", name, entry) for name, entry in files.items()}
        return cls(Recipe(recipe), found.get("source", Text()) or "", records)


def _record(where: str, name: str, entry: Any) -> FileRecord:
    """A file's entry; the file is one of the checkpoint's directory itself."""
    found = Fields(entry if isinstance(entry, dict) else {}, where, CheckpointError)
    size, sha256 = found.get("bytes", Number(0, whole=True)), found.get("sha256", Text())
    if size is None or sha256 is None or Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(f"{where} is damaged: it is no file name with bytes and sha256; convert the model again")
    return FileRecord(size, sha256)


class Checkpoint:
    """An opened checkpoint directory; its tensors are views of the mapped files."""

    def __init__(self, directory: Path) -> None:
        """Open and check `directory`: manifest, configuration, and the size of every file of weights.

        The small files (chat template, sampling defaults) may be edited; only `verify_file` detects that.

        Raises:
            CheckpointError: a file of weights is missing, or its size is not the manifest's.
            ConfigError: config.json is not valid.
        """
        self.directory = directory
        self.manifest = Manifest.load(directory)
        self.config = load_config(directory)
        self.recipe = self.manifest.recipe
        for name in [*dense_files(self.config), *map(expert_file, self.config.moe_layers)]:
            self._check_size(name)

    def _check_size(self, name: str) -> None:
        record = self.manifest.files.get(name)
        if record is None:
            raise CheckpointError(f"{self.directory / MANIFEST} does not list {name}; convert the model again")
        path = self.directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; convert the model again")
        size = path.stat().st_size
        if size != record.bytes:
            raise CheckpointError(f"{path} has {size:,} bytes instead of {record.bytes:,}; convert the model again")

    def dense(self) -> dict[str, Matrix | Tensor]:
        """All tensors but the routed experts, by name; norms and routers are plain tensors."""
        tensors: dict[str, Matrix | Tensor] = {}
        for file, specs in dense_files(self.config).items():
            with self._open(file) as handle:
                for spec in specs:
                    tensors[spec.name] = self._read(handle, file, spec)
        return tensors

    def _read(self, handle: Any, file: str, spec: TensorSpec) -> Matrix | Tensor:
        if not spec.quantised:
            tensor = self._get(handle, file, spec.name, spec.shape)
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"{self.directory / file}: {spec.name} has NaN or infinity; convert the model again"
                )
            return tensor
        rows, cols = spec.shape
        format = self.recipe.format_of(spec.kind)
        parts = [self._get(handle, file, spec.name + p.name, p.shape, p.dtype) for p in planes(format, rows, cols)]
        return Matrix(format, rows, cols, *parts)

    @property
    def expert_layout(self) -> ExpertLayout:
        """The layout of one routed expert's record."""
        return expert_layout(self.config, self.recipe)

    def experts(self, layer: int) -> Tensor:
        """The routed experts of a MoE layer: uint8 [n_routed_experts, record bytes], mapped."""
        file = expert_file(layer)
        with self._open(file) as handle:
            shape = (self.config.n_routed_experts, self.expert_layout.nbytes)
            return self._get(handle, file, EXPERTS, shape, torch.uint8)

    def verify_file(self, name: str) -> None:
        """Compare a file's sha256 with the manifest's.

        Raises:
            CheckpointError: the file is missing or differs.
        """
        path = self.directory / name
        if not path.is_file() or file_sha256(path) != self.manifest.files[name].sha256:
            raise CheckpointError(f"{path} does not match its checksum; convert the model again")

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            with opened(self.directory / file) as handle:
                yield handle
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.directory / file} cannot be opened: {error}") from None

    def _get(
        self, handle: Any, file: str, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        try:
            tensor: Tensor = handle.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.directory / file}: tensor {name} cannot be read: {error}") from None
        if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
            raise CheckpointError(
                f"{self.directory / file}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {shape}"
            )
        return tensor


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file of any name. `safe_open` takes names in UTF-8 only, and waits for what is in a pipe.

    Raises:
        OSError: it is no regular file, or cannot be read.
        SafetensorError: it is not in this format.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a file (a directory, a pipe or a device)")
        try:
            name = os.fsencode(path).decode()
        except UnicodeDecodeError:
            name = f"/proc/self/fd/{descriptor}"
        with safe_open(name, framework="pt") as handle:
            yield handle
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_checkpoint(directory: Path) -> bool:
    """Whether `directory` holds a finished conversion."""
    return (directory / MANIFEST).is_file()

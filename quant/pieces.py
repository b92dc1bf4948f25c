"""What a conversion writes: the tensors of each file, cut into pieces that fit in the CPU's caches.

The converter writes these pieces, and the verifier reads the same pieces back.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.families import family_of
from dsv2_local.architectures.tensors import Kind, TensorSpec
from dsv2_local.errors import CheckpointError
from dsv2_local.kernels.format import ROWS
from dsv2_local.kernels.layout import Plane, planes
from dsv2_local.quant.checkpoint import safetensors_header
from dsv2_local.quant.schema import (
    EXPERTS,
    FORMAT_VERSION,
    Recipe,
    dense_files,
    expert_file,
    expert_layout,
    source_shapes,
)
from dsv2_local.quant.source import Source

SLICE = 1 << 19  # weights per piece: small enough for the caches, and for many workers at once


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a stored tensor: what one worker reads, quantises and writes at a time.

    Attributes:
        where: file and tensor of the source, for errors.
        kind: kind of the tensor.
        load: reads the rows from the source.
        offsets: offset in the output file of each plane of the rows.
        last: whether these are the last rows of the tensor.
        dtype, nbytes: type and bytes of the rows in the source.
    """

    where: str
    kind: Kind
    load: Callable[[], Tensor]
    offsets: tuple[int, ...]
    last: bool
    dtype: torch.dtype
    nbytes: int


class ConversionPlan:
    """All files to write: their tensors in the order in which they are stored, and the pieces that fill them."""

    def __init__(self, source: Source, config: ModelConfig, recipe: Recipe) -> None:
        self.source, self.config, self.recipe = source, config, recipe
        self.dense = dense_files(config)
        self.layout = expert_layout(config, recipe)
        self.layers = {expert_file(layer): layer for layer in config.moe_layers}

    @property
    def files(self) -> list[str]:
        """Names of the files of weights, in the order in which they are written."""
        return [*self.dense, *self.layers]

    @property
    def fingerprint(self) -> str:
        """Identifies source and recipe; a partial conversion is resumed only if its fingerprint is the same."""
        return f"{self.source.fingerprint()} {self.recipe} {FORMAT_VERSION}"

    def specs(self, file: str) -> list[TensorSpec]:
        """The matrices and norms of a file."""
        if file not in self.layers:
            return self.dense[file]
        experts, matrices = range(self.config.n_routed_experts), self.layout.shapes.items()
        name = partial(family_of(self.config).expert_tensor, self.layers[file])
        return [TensorSpec(name(e, matrix), Kind.ROUTED, shape) for e in experts for matrix, shape in matrices]

    def totals(self) -> tuple[int, int]:
        """Number of tensors, and their bytes in the source."""
        specs = [spec for file in self.files for spec in self.specs(file)]
        return len(specs), sum(math.prod(spec.shape) * self._dtype(spec).itemsize for spec in specs)

    def _dtype(self, spec: TensorSpec) -> torch.dtype:
        return self.source.tensors[spec.source_name].dtype

    def entries(self, file: str) -> list[Plane]:
        """The tensors of a file: codes first, then by descending item size, so that each is aligned."""
        if file in self.layers:
            return [Plane(EXPERTS, torch.uint8, (self.config.n_routed_experts, self.layout.nbytes))]
        entries = [entry for spec in self.dense[file] for entry in self._spec_entries(spec)]
        return sorted(entries, key=lambda entry: (entry.dtype.itemsize > 1, -entry.dtype.itemsize))

    def _spec_entries(self, spec: TensorSpec) -> list[Plane]:
        if not spec.quantised:
            return [Plane(spec.name, self._dtype(spec), spec.shape)]
        parts = planes(self.recipe.format_of(spec.kind), *spec.shape)
        return [replace(plane, name=spec.name + plane.name) for plane in parts]

    def nbytes(self, file: str) -> int:
        """The size of the finished file."""
        entries = self.entries(file)
        return len(safetensors_header(entries)) + sum(entry.nbytes for entry in entries)

    def pieces(self, file: str) -> Iterator[Piece]:
        """All pieces of a file."""
        entries = self.entries(file)
        offset, offsets = len(safetensors_header(entries)), {}
        for entry in entries:
            offsets[entry.name] = offset
            offset += entry.nbytes
        offset = offsets.get(EXPERTS, 0)
        for spec in self.specs(file):
            stored = self._spec_entries(spec)
            if spec.kind is Kind.ROUTED:  # a record has its planes back to back
                for plane in stored:
                    offsets[plane.name] = offset
                    offset += plane.nbytes
            yield from self._slices(spec, [offsets[plane.name] for plane in stored])

    def _slices(self, spec: TensorSpec, starts: list[int]) -> Iterator[Piece]:
        """Cut a tensor whose planes start at these offsets into pieces of whole groups of rows."""
        origin = self.source.tensors[spec.source_name]
        row_weights = math.prod(spec.shape[1:])
        step = self._rows_per_piece(spec, row_weights)
        for start in range(0, spec.shape[0], step):
            stop = min(start + step, spec.shape[0])
            yield Piece(
                f"{origin.file}: {origin.name}",
                spec.kind,
                partial(self._load, spec, start, stop),
                tuple(first + start * row for first, row in zip(starts, self._row_bytes(spec), strict=True)),
                last=stop == spec.shape[0],
                dtype=origin.dtype,
                nbytes=(stop - start) * row_weights * origin.dtype.itemsize,
            )

    def _rows_per_piece(self, spec: TensorSpec, row_weights: int) -> int:
        """A multiple of 8 rows; for kv_b, a multiple of the rows of 8 heads."""
        unit = ROWS * spec.shape[0] // self.config.num_attention_heads if spec.kind is Kind.KV_B else ROWS
        return max(unit, SLICE // row_weights // unit * unit)

    def _row_bytes(self, spec: TensorSpec) -> list[int]:
        """Bytes per row in each plane; rows are stored in groups of 8."""
        if not spec.quantised:
            return [self.source.tensors[spec.name].row_bytes]
        return [plane.nbytes // ROWS for plane in planes(self.recipe.format_of(spec.kind), ROWS, spec.shape[1])]

    def _load(self, spec: TensorSpec, start: int, stop: int) -> Tensor:
        """Read these rows of the stored tensor, in the source's type."""
        if spec.kind is not Kind.KV_B:
            return self.source.read(spec.name, start, stop)
        c = self.config
        stored, per_head = spec.shape[0] // c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim
        rows = self.source.read(spec.source_name, start // stored * per_head, stop // stored * per_head)
        heads = rows.view(-1, per_head, c.kv_lora_rank)  # a head's rows are [nope | v]
        nope, value = heads[:, : c.qk_nope_head_dim], heads[:, c.qk_nope_head_dim :]
        part = nope.transpose(1, 2) if spec.name.endswith("w_uk") else value
        return part.reshape(stop - start, spec.shape[1])


def check_tensors(source: Source, config: ModelConfig) -> None:
    """Check that the source has exactly the tensors that config.json implies, in their shapes.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is unknown.
    """
    shapes = source_shapes(config)
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, shape in shapes.items():
        found = source.tensors.get(name)
        if found is None:
            missing = sum(other not in source.tensors for other in shapes)
            raise CheckpointError(f"{source.directory} lacks the tensor {name} ({missing:,} missing in total)")
        if found.shape != shape:
            raise CheckpointError(f"{found.file}: {name} has shape {found.shape}, config.json implies {shape}")
    for name, tensor in source.tensors.items():
        if name not in shapes and name not in ignored and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(f"{tensor.file}: unknown tensor {name}; it is not part of DeepSeek-V2")

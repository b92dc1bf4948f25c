"""A model with random weights, built in memory in the stored format, to measure how fast a machine would run it.

The bytes have the layout of a converted checkpoint (`kernels.layout`), and every page of memory is written. The scale
of the weights keeps activations finite, attention neither uniform nor fixed on one token, and routing varied from
token to token. The model's output is noise.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

import torch
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.tensors import Kind, TensorSpec
from dsv2_local.errors import InputError
from dsv2_local.kernels.format import BLOCK, ROWS, CacheDtype, ExpertLayout, Format, matrix_nbytes
from dsv2_local.kernels.layout import NF4_LEVELS, Matrix, expert_matrices, pack_int8, pack_nf4, unpack_int8, unpack_nf4
from dsv2_local.machine.resources import memory_available
from dsv2_local.offload.pinned import PinnedArena
from dsv2_local.progress import Progress, no_progress
from dsv2_local.quant.schema import Recipe, dense_files, expert_layout, stored_bytes
from dsv2_local.runtime.cache import allocate_in_ram, bytes_per_token

# This many bytes of random numbers are drawn once, and all weights are copied from them: drawing 9 GB takes minutes.
DRAWN_BYTES = 16 << 20


Name = TypeVar("Name")
Value = TypeVar("Value")


class OnDemand(Mapping[Name, Value]):
    """A mapping that makes a value each time it is asked for one, and keeps none."""

    def __init__(self, names: Iterable[Name], make: Callable[[Name], Value]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: Name) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[Name]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class RandomModel:
    """Weights as `quant.checkpoint.Checkpoint` returns them.

    Attributes:
        weights: the dense weights by name.
        layout: layout of a routed expert's record.
        records: uint8 [E, layout.nbytes] by MoE layer.
    """

    weights: Mapping[str, Matrix | Tensor]
    layout: ExpertLayout
    records: Mapping[int, Tensor]


def first_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """The same architecture with only its first `layers` layers.

    Raises:
        InputError: more layers than the model has, or so few that a kind of layer (dense or MoE) is missing, from
            which the speed of the others is extrapolated.
    """
    least, most = _least_layers(config), config.num_hidden_layers
    if not least <= layers <= most:
        raise InputError(f"--layers must be between {least} (one layer of each kind) and {most}, not {layers:,}")
    return replace(config, num_hidden_layers=layers)


def _least_layers(config: ModelConfig) -> int:
    kinds = [config.is_moe(layer) for layer in range(config.num_hidden_layers)]
    return max(kinds.index(kind) for kind in set(kinds)) + 1


def weight_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """Bytes of all weights with scales and padding; routers and norms count 16 bits per weight."""
    dense = sum(stored_bytes(spec, recipe) for specs in dense_files(config).values() for spec in specs)
    return dense + len(config.moe_layers) * config.n_routed_experts * expert_layout(config, recipe).nbytes


def require_memory(config: ModelConfig, recipe: Recipe, *, context: int, cache_dtype: CacheDtype, other: int) -> None:
    """Check that the model, a KV cache of `context` tokens and `other` bytes fit in the available memory.

    Raises:
        InputError: they do not; the message has the bytes needed and available, and the number of layers that would
            fit.
    """
    available = memory_available()

    def needed(layers: int) -> int:
        cut = replace(config, num_hidden_layers=layers)
        return weight_bytes(cut, recipe) + context * bytes_per_token(cut, cache_dtype) + other

    layers = config.num_hidden_layers
    if needed(layers) <= available:
        return
    fitting = [n for n in range(_least_layers(config), layers) if needed(n) <= available]
    remedy = f"--layers {fitting[-1]} fits" if fitting else "free memory, or set a shorter --context"
    weights, latents = weight_bytes(config, recipe), context * bytes_per_token(config, cache_dtype)
    raise InputError(
        f"{layers} layers need {needed(layers) / 1e9:,.2f} GB (weights {weights / 1e9:,.2f}, KV cache of {context:,} "
        f"tokens {latents / 1e9:,.2f}, working memory {other / 1e9:,.2f}) and {available / 1e9:,.2f} GB are available; "
        f"{remedy}"
    )


def build(
    config: ModelConfig,
    recipe: Recipe,
    *,
    seed: int = 0,
    threads: int = 1,
    progress: Progress = no_progress,
) -> RandomModel:
    """Build the model in RAM; the same seed gives the same weights. `progress` is called with (parts done, all parts).

    Call `require_memory` first: every page of the allocated memory is written.
    """
    with Builder(config, recipe, seed, threads) as builder:
        parts = len(builder.specs) + len(config.moe_layers)
        weights: dict[str, Matrix | Tensor] = {}
        for done, name in enumerate(builder.specs):
            progress(done, parts)
            weights[name] = builder.tensor(name)
        records: dict[int, Tensor] = {}
        for done, layer in enumerate(config.moe_layers, len(builder.specs)):
            progress(done, parts)
            records[layer] = builder.records(layer)
    progress(parts, parts)
    return RandomModel(weights, builder.layout, records)


class Builder:
    """Makes the weights of a model with all threads, each weight by itself.

    A weight depends on the seed and on its name, but not on the number of threads or on what else was made.

    Attributes:
        config, recipe: the architecture, and the formats of the weights.
        layout: layout of a routed expert's record.
        specs: the dense tensors by name.
    """

    def __init__(self, config: ModelConfig, recipe: Recipe, seed: int = 0, threads: int = 1) -> None:
        """Draw the random numbers that all weights are copied from, and start the threads."""
        self.config, self.recipe, self.layout = config, recipe, expert_layout(config, recipe)
        self.specs = {spec.name: spec for specs in dense_files(config).values() for spec in specs}
        self._numbers = _RandomNumbers(seed)
        # Own threads, since a record is too small to be split among torch's, and page faults take most of the time.
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> "Builder":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def tensor(self, name: str) -> Matrix | Tensor:
        """A dense weight."""
        return _tensor(self.specs[name], self.recipe, self._numbers, self._pool)

    def records(self, layer: int) -> Tensor:
        """The routed experts of a layer: uint8 [E, layout.nbytes]."""
        return _wait(*self._start_records(layer, allocate_in_ram))

    def on_demand(self) -> RandomModel:
        """The model, of which every weight is made when it is asked for, and not kept."""
        return RandomModel(
            OnDemand(self.specs, self.tensor), self.layout, OnDemand(self.config.moe_layers, self.records)
        )

    def fill(self, arena: PinnedArena, progress: Progress = no_progress) -> None:
        """Build all routed experts in page-locked memory; `progress` is called with (bytes done, all bytes).

        One layer is locked while the threads fill the next.
        """
        whole = len(self.config.moe_layers) * self.config.n_routed_experts * self.layout.nbytes
        filled: tuple[int, Tensor] | None = None
        for layer in self.config.moe_layers:
            records, tasks = self._start_records(layer, arena.allocate)
            if filled:
                arena.lock(*filled)
            progress(arena.nbytes, whole)
            filled = layer, _wait(records, tasks)
        if filled:
            arena.lock(*filled)
        progress(whole, whole)

    def _start_records(self, layer: int, allocate: Callable[[int], Tensor]) -> tuple[Tensor, list[Future[None]]]:
        """Start to fill a layer's experts, one expert per task: uint8 [E, layout.nbytes], and the tasks."""
        experts, layout, numbers = self.config.n_routed_experts, self.layout, self._numbers
        records = allocate(experts * layout.nbytes).view(experts, layout.nbytes)

        def fill(expert: int) -> None:
            offsets = numbers.offsets(layer, expert)
            for matrix in expert_matrices(layout, records[expert]):
                _fill(matrix, matrix.cols**-0.5, numbers, offsets)

        return records, [self._pool.submit(fill, expert) for expert in range(experts)]


def _wait(records: Tensor, tasks: list[Future[None]]) -> Tensor:
    for task in tasks:
        task.result()
    return records


class _RandomNumbers:
    """Random numbers, drawn once for each type of plane; tensors are copied from offsets that depend on their names.

    Attributes:
        numbers: by type. uint8: two NF4 codes of normal weights per byte; int8: codes -127 … 127; float16: scales
            between 0.75 and 1.25; bfloat16: normal numbers.
        code_rms: root mean square of what the codes of a format decode to, before scaling.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        draws = torch.Generator().manual_seed(seed)
        levels = torch.tensor(NF4_LEVELS)
        # With a deviation of 0.35 the largest of 64 weights is about 0.9 of the outermost level, as in a real block.
        normal = torch.randn(2, DRAWN_BYTES, generator=draws) * 0.35
        low, high = torch.bucketize(normal, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
        int8 = torch.randint(-127, 128, (DRAWN_BYTES,), dtype=torch.int8, generator=draws)
        self.code_rms = {
            Format.NF4: float(levels[low.int()].square().mean().sqrt()),
            Format.INT8: float(int8.float().square().mean().sqrt()),
            Format.BF16: 1.0,
        }
        self.numbers: dict[torch.dtype, Tensor] = {
            torch.uint8: low | (high << 4),
            torch.int8: int8,
            torch.float16: (torch.rand(DRAWN_BYTES // 16, generator=draws) * 0.5 + 0.75).half(),
            torch.bfloat16: torch.randn(DRAWN_BYTES // 2, generator=draws).bfloat16(),
        }
        self._scaled: dict[tuple[torch.dtype, float], Tensor] = {}

    def fill(self, out: Tensor, offsets: Random, factor: float = 1.0, pool: ThreadPoolExecutor | None = None) -> None:
        """Fill `out` (contiguous, of a type in `numbers`) with numbers from random offsets, times `factor`.

        With a `pool` its threads copy, which pays for large tensors; the result is the same.
        """
        numbers = self._times(out.dtype, factor)
        half = len(numbers) // 2
        # numpy copies in the calling thread; torch would wake its thread pool for every piece.
        target, source = out.view(-1).view(_BITS[out.itemsize]).numpy(), numbers.view(_BITS[out.itemsize]).numpy()
        starts = [(begin, offsets.randrange(half)) for begin in range(0, len(target), half)]

        def copy(piece: tuple[int, int]) -> None:
            begin, start = piece
            part = target[begin : begin + half]
            part[:] = source[start : start + len(part)]

        for _ in (pool.map if pool else map)(copy, starts):
            pass

    def _times(self, dtype: torch.dtype, factor: float) -> Tensor:
        """The numbers of a type times `factor`; cached, since a model has few different factors."""
        if factor == 1.0:
            return self.numbers[dtype]
        if (dtype, factor) not in self._scaled:
            self._scaled[dtype, factor] = self.numbers[dtype].mul(factor)
        return self._scaled[dtype, factor]

    def offsets(self, *name: object) -> Random:
        """Draws the offsets for a tensor: the same for the same seed and name, in whatever order tensors are built."""
        return Random(f"{self.seed} {name}")


# Types to copy as, by item size: numpy has no bfloat16, and a copy needs only the size.
_BITS = {1: torch.uint8, 2: torch.int16}


def _tensor(spec: TensorSpec, recipe: Recipe, numbers: _RandomNumbers, pool: ThreadPoolExecutor) -> Matrix | Tensor:
    """Build a dense tensor: norms near 1, embeddings of rms 1, matrices that keep the rms of what they multiply."""
    offsets = numbers.offsets(spec.name)
    if not spec.quantised:
        tensor = torch.empty(spec.shape, dtype=torch.bfloat16)
        numbers.fill(tensor, offsets, 0.1 if spec.kind is Kind.NORM else spec.shape[1] ** -0.5)
        return tensor.add_(1) if spec.kind is Kind.NORM else tensor
    rows, cols = spec.shape
    format = recipe.format_of(spec.kind)
    matrix = Matrix.from_bytes(format, rows, cols, allocate_in_ram(matrix_nbytes(format, rows, cols)))
    _fill(matrix, 1.0 if spec.kind is Kind.EMBEDDING else cols**-0.5, numbers, offsets, pool)
    return matrix


def _fill(
    matrix: Matrix, rms: float, numbers: _RandomNumbers, offsets: Random, pool: ThreadPoolExecutor | None = None
) -> None:
    """Fill a matrix's planes, so that its weights have about this root mean square and its padding is zero."""
    factor = rms / numbers.code_rms[matrix.format]
    if matrix.scales is None:
        numbers.fill(matrix.codes, offsets, factor, pool)
        return
    numbers.fill(matrix.codes, offsets, 1.0, pool)
    numbers.fill(matrix.scales, offsets, factor)
    if matrix.rows % ROWS:
        matrix.scales[-1, :, matrix.rows % ROWS :] = 0
    if matrix.cols % BLOCK:
        _zero_last_columns(matrix)


def _zero_last_columns(matrix: Matrix) -> None:
    """Set the padding columns of the last block to the code of zero."""
    nf4 = matrix.format is Format.NF4
    unpack, pack, zero = (unpack_nf4, pack_nf4, NF4_LEVELS.index(0.0)) if nf4 else (unpack_int8, pack_int8, 0)
    tail = unpack(matrix.codes[:, -1:].contiguous())  # [G, 8, 1, 64]
    tail[..., matrix.cols % BLOCK :] = zero
    matrix.codes[:, -1:] = pack(tail)

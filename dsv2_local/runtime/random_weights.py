"""A model of random weights, made in memory in the stored format: how fast a machine would run it, without it.

The bytes are laid out as a converted checkpoint's (`kernels.layout`), every page is written, and the sizes of the
weights keep activations finite, attention neither flat nor fixed on one token, and the choice of experts different
from token to token. What the model says is noise.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.errors import InputError
from dsv2_local.kernels.format import BLOCK, ROWS, CacheDtype, ExpertLayout, Format, matrix_nbytes
from dsv2_local.kernels.layout import NF4_LEVELS, Matrix, expert_matrices, pack_int8, pack_nf4, unpack_int8, unpack_nf4
from dsv2_local.machine.resources import memory_available
from dsv2_local.progress import Progress, no_progress
from dsv2_local.architectures.tensors import Kind, TensorSpec
from dsv2_local.quant.schema import Recipe, dense_files, expert_layout, stored_bytes
from dsv2_local.runtime.cache import allocate_in_ram, bytes_per_token

# Random numbers are drawn once in this many bytes and copied from there: drawing 9 GB would take minutes.
DRAWN_BYTES = 16 << 20


@dataclass(frozen=True)
class RandomModel:
    """Weights as `quant.checkpoint.Checkpoint` would give them; `records` are uint8 [E, layout.nbytes] by MoE layer."""

    weights: dict[str, Matrix | Tensor]
    layout: ExpertLayout
    records: dict[int, Tensor]


def first_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """The same architecture with its first `layers` layers only.

    Raises:
        InputError: fewer than have a layer of each kind of the model (so that the rest can be judged from them), or
            more than the model has.
    """
    least, most = _least_layers(config), config.num_hidden_layers
    if not least <= layers <= most:
        raise InputError(f"--layers must lie between {least} (one layer of each kind) and {most}, not {layers:,}")
    return replace(config, num_hidden_layers=layers)


def _least_layers(config: ModelConfig) -> int:
    kinds = [config.is_moe(layer) for layer in range(config.num_hidden_layers)]
    return max(kinds.index(kind) for kind in set(kinds)) + 1


def weight_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """Bytes of all weights with scales and padding; routers and norms at 16 bits."""
    dense = sum(stored_bytes(spec, recipe) for specs in dense_files(config).values() for spec in specs)
    return dense + len(config.moe_layers) * config.n_routed_experts * expert_layout(config, recipe).nbytes


def require_memory(config: ModelConfig, recipe: Recipe, *, context: int, cache_dtype: CacheDtype, other: int) -> None:
    """Refuse a model that does not fit beside a cache of `context` tokens and `other` bytes.

    Raises:
        InputError: with the bytes needed and available, and the number of layers that would fit.
    """
    available = memory_available()

    def needed(layers: int) -> int:
        cut = replace(config, num_hidden_layers=layers)
        return weight_bytes(cut, recipe) + context * bytes_per_token(cut, cache_dtype) + other

    layers = config.num_hidden_layers
    if needed(layers) <= available:
        return
    fitting = [n for n in range(_least_layers(config), layers) if needed(n) <= available]
    remedy = f"--layers {fitting[-1]} fits" if fitting else "free memory or ask for a shorter --context"
    weights, latents = weight_bytes(config, recipe), context * bytes_per_token(config, cache_dtype)
    raise InputError(
        f"{layers} layers need {needed(layers) / 1e9:,.2f} GB (weights {weights / 1e9:,.2f}, cache of {context:,} "
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
    """Make the model; the same seed makes the same. `progress` is called with (parts done, parts in all).

    Ask `require_memory` first: what is allocated is written, to the last page.
    """
    numbers = _RandomNumbers(seed)
    files, layout = dense_files(config), expert_layout(config, recipe)
    parts = len(files) + len(config.moe_layers)
    weights: dict[str, Matrix | Tensor] = {}
    for done, specs in enumerate(files.values()):
        progress(done, parts)
        weights |= {spec.name: _tensor(spec, recipe, numbers) for spec in specs}
    records: dict[int, Tensor] = {}
    # Threads of our own: a record is too small for torch's to share, and most of the time goes into fresh pages.
    with ThreadPoolExecutor(threads) as pool:
        for done, layer in enumerate(config.moe_layers, len(files)):
            progress(done, parts)
            records[layer] = _records(config.n_routed_experts, layout, numbers, layer, pool)
    progress(parts, parts)
    return RandomModel(weights, layout, records)


class _RandomNumbers:
    """Random numbers, drawn once for each type of plane and copied from places that a tensor's name decides.

    uint8: two NF4 codes a byte, of normal weights; int8: codes -127..127; float16: scales between 0.75 and 1.25;
    bfloat16: normal numbers. `code_rms` is what a code stands for, before its scale, on average.
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

    def fill(self, out: Tensor, places: Random, factor: float = 1.0) -> None:
        """Write all of `out` (contiguous, of a type in `numbers`), times `factor`."""
        numbers = self._times(out.dtype, factor)
        half = len(numbers) // 2
        # numpy copies in the calling thread; torch would wake its own for every piece.
        target, found = out.view(-1).view(_BITS[out.itemsize]).numpy(), numbers.view(_BITS[out.itemsize]).numpy()
        for begin in range(0, len(target), half):
            piece = target[begin : begin + half]
            start = places.randrange(half)
            piece[:] = found[start : start + len(piece)]

    def _times(self, dtype: torch.dtype, factor: float) -> Tensor:
        """The numbers of a type times `factor`, kept: a model has few different ones."""
        if factor == 1.0:
            return self.numbers[dtype]
        if (dtype, factor) not in self._scaled:
            self._scaled[dtype, factor] = self.numbers[dtype].mul(factor)
        return self._scaled[dtype, factor]

    def places(self, *name: object) -> Random:
        """Where the numbers of a tensor begin: the same for the same seed and name, in whatever order they are made."""
        return Random(f"{self.seed} {name}")


# numpy has no bfloat16; a copy needs only the size.
_BITS = {1: torch.uint8, 2: torch.int16}


def _tensor(spec: TensorSpec, recipe: Recipe, numbers: _RandomNumbers) -> Matrix | Tensor:
    """One tensor of the dense files: norms around 1, embedded tokens of rms 1, products that keep the rms."""
    places = numbers.places(spec.name)
    if not spec.quantised:
        tensor = torch.empty(spec.shape, dtype=torch.bfloat16)
        numbers.fill(tensor, places, 0.1 if spec.kind is Kind.NORM else spec.shape[1] ** -0.5)
        return tensor.add_(1) if spec.kind is Kind.NORM else tensor
    rows, cols = spec.shape
    format = recipe.format_of(spec.kind)
    matrix = Matrix.from_bytes(format, rows, cols, allocate_in_ram(matrix_nbytes(format, rows, cols)))
    _fill(matrix, 1.0 if spec.kind is Kind.EMBEDDING else cols**-0.5, numbers, places)
    return matrix


def _records(
    experts: int, layout: ExpertLayout, numbers: _RandomNumbers, layer: int, pool: ThreadPoolExecutor
) -> Tensor:
    """A layer's routed experts: uint8 [E, layout.nbytes]."""
    records = allocate_in_ram(experts * layout.nbytes).view(experts, layout.nbytes)

    def fill(expert: int) -> None:
        places = numbers.places(layer, expert)
        for matrix in expert_matrices(layout, records[expert]):
            _fill(matrix, matrix.cols**-0.5, numbers, places)

    for _ in pool.map(fill, range(experts)):
        pass
    return records


def _fill(matrix: Matrix, rms: float, numbers: _RandomNumbers, places: Random) -> None:
    """Write a matrix's planes, so that its weights have about this rms and its padding is zero."""
    factor = rms / numbers.code_rms[matrix.format]
    if matrix.scales is None:
        numbers.fill(matrix.codes, places, factor)
        return
    numbers.fill(matrix.codes, places)
    numbers.fill(matrix.scales, places, factor)
    if matrix.rows % ROWS:
        matrix.scales[-1, :, matrix.rows % ROWS :] = 0
    if matrix.cols % BLOCK:
        _zero_last_columns(matrix)


def _zero_last_columns(matrix: Matrix) -> None:
    """Give the columns that only fill up the last block the code of zero."""
    nf4 = matrix.format is Format.NF4
    unpack, pack, zero = (unpack_nf4, pack_nf4, NF4_LEVELS.index(0.0)) if nf4 else (unpack_int8, pack_int8, 0)
    tail = unpack(matrix.codes[:, -1:].contiguous())  # [G, 8, 1, 64]
    tail[..., matrix.cols % BLOCK :] = zero
    matrix.codes[:, -1:] = pack(tail)

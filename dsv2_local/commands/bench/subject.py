"""The model to measure, converted or with random weights, and the bytes that decoding one token reads."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dsv2_local import llm
from dsv2_local.architectures import released
from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.tensors import Kind
from dsv2_local.commands.bench.hardware import last_level_cache_bytes
from dsv2_local.commands.bench.settings import DTYPE, BenchPlan
from dsv2_local.commands.bench.timing import StatusLine
from dsv2_local.commands.console import format_bytes, notice
from dsv2_local.commands.inspect import KindSummary, summarise
from dsv2_local.kernels.format import ROWS, matrix_nbytes
from dsv2_local.machine.resources import memory_available
from dsv2_local.offload.resident_experts import ResidentExperts
from dsv2_local.quant.schema import Recipe, active_weights, expert_layout
from dsv2_local.runtime import random_weights
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.placement import ModelWeights, place_in_ram


@dataclass(frozen=True)
class Subject:
    """The model to measure.

    Attributes:
        name: the model's name, to be shown.
        recipe: formats of its weights.
        model: the model itself.
        kinds: number and size of its tensors by kind.
        records: the routed experts of each MoE layer.
    """

    name: str
    recipe: Recipe
    model: Transformer
    kinds: dict[Kind, KindSummary]
    records: list[Tensor]

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def weight_bytes(self) -> int:
        return sum(kind.bytes for kind in self.kinds.values())

    @property
    def active_weights(self) -> int:
        """Number of weights that are used to compute one token."""
        return active_weights(self.config)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding one token reads: all active weights, and one row of the embedding."""
        return round(self.step_bytes(1, self.config.num_experts_per_tok))

    def step_bytes(self, tokens: int, experts: float) -> float:
        """Bytes of weights that a step of so many tokens reads, which use so many different experts in each layer."""
        c = self.config
        row = matrix_nbytes(self.recipe.format_of(Kind.EMBEDDING), ROWS, c.hidden_size) // ROWS
        every = sum(kind.bytes for kind in self._every_token())
        expert = expert_layout(c, self.recipe).nbytes if c.moe_layers else 0
        return every + tokens * row + len(c.moe_layers) * experts * expert

    def _every_token(self) -> list[KindSummary]:
        """The kinds of tensors that every token reads as a whole; the embedding if it is also the head."""
        partly = (Kind.ROUTED,) if self.config.tie_word_embeddings else (Kind.ROUTED, Kind.EMBEDDING)
        return [summary for kind, summary in self.kinds.items() if kind not in partly]


def prepare(plan: BenchPlan, threads: int, status: StatusLine) -> Subject:
    """Load or build the model, and print a notice if the results will be misleading."""
    subject = _load(plan, plan.directory) if plan.directory else _make(plan, threads, status)
    if plan.config != plan.whole and subject.bytes_per_token < 2 * last_level_cache_bytes():
        notice(
            f"these layers read {format_bytes(subject.bytes_per_token)} per token, part of which stays in the CPU's "
            "caches: the whole model will be slower than extrapolated; use more --layers"
        )
    return subject


def _make(plan: BenchPlan, threads: int, status: StatusLine) -> Subject:
    """Build a model with random weights; its name is that of the model whose architecture it has."""
    config, recipe, name = plan.config, plan.recipe, plan.options.random_weights or ""

    def progress(done: int, parts: int) -> None:
        status(f"building random weights: {done}/{parts} parts")

    built = random_weights.build(config, recipe, threads=threads, progress=progress)
    placed = place_in_ram(ModelWeights(config, built.weights, built.layout, built.records), DTYPE)
    kinds = summarise(config, recipe)
    return Subject(random_name(name), recipe, placed.model, kinds, list(built.records.values()))


def random_name(name: str) -> str:
    """What to call random weights of the architecture that --random-weights names."""
    if name not in released.RELEASED:
        path = Path(name).resolve()
        name = path.name if path.is_dir() else path.parent.name
    return f"random {name}"


def _load(plan: BenchPlan, directory: Path) -> Subject:
    """Load a converted model, and remove the layers that --layers leaves out."""
    loaded = llm.load(directory, device="cpu", context=2, threads=plan.options.threads)  # its own cache stays unused
    model = loaded.engine.model
    model.config, model.layers = plan.config, model.layers[: plan.config.num_hidden_layers]
    assert isinstance(loaded.experts, ResidentExperts)
    records = [loaded.experts.records[layer] for layer in plan.config.moe_layers]
    subject = Subject(loaded.name, loaded.recipe, model, summarise(plan.config, loaded.recipe), records)
    if subject.weight_bytes > (available := memory_available()):
        notice(
            f"the weights take {format_bytes(subject.weight_bytes)}, but only {format_bytes(available)} of memory are "
            "available: the results will depend on the disk; use fewer --layers"
        )
    return subject

"""Which tensors a checkpoint holds, in which file, and in which format each recipe stores them.

Converter and loader both walk this table, so that a name or a shape is written down once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.kernels.format import ExpertLayout, Format, matrix_nbytes

FORMAT_VERSION = 1


class Kind(StrEnum):
    """What a tensor is for; a recipe gives each kind its format."""

    EMBEDDING = "embedding"
    HEAD = "lm_head"
    ATTENTION = "attention"
    KV_B = "kv_b"
    DENSE = "dense MLP"
    SHARED = "shared experts"
    ROUTED = "routed experts"
    ROUTER = "router"
    NORM = "norm"


UNQUANTISED = (Kind.ROUTER, Kind.NORM)


class Recipe(StrEnum):
    """A choice of format for each kind of tensor."""

    NF4 = "nf4"
    MIXED = "mixed"
    INT8 = "int8"
    BF16 = "bf16"

    def format_of(self, kind: Kind) -> Format:
        """The format of a matrix of this kind; routers and norms are never quantised and have none."""
        if self is Recipe.BF16:
            return Format.BF16
        if self is Recipe.INT8 or kind in (Kind.EMBEDDING, Kind.HEAD, Kind.KV_B):
            return Format.INT8
        return Format.NF4 if self is Recipe.NF4 or kind is Kind.ROUTED else Format.INT8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the dense files. `shape` is [rows, cols] of a matrix, or a norm's [size].

    `source` is the hub's name where it differs: both halves of kv_b come from one tensor.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    source: str = ""

    @property
    def source_name(self) -> str:
        return self.source or self.name

    @property
    def quantised(self) -> bool:
        return self.kind not in UNQUANTISED


def expert_layout(config: ModelConfig, recipe: Recipe) -> ExpertLayout:
    """The record of one routed expert."""
    return ExpertLayout(recipe.format_of(Kind.ROUTED), config.hidden_size, config.moe_intermediate_size)


def expert_file(layer: int) -> str:
    """The file of a MoE layer's routed experts: one uint8 tensor `EXPERTS` [experts, record bytes]."""
    return f"experts-{layer:03d}.safetensors"


EXPERTS = "experts"


def expert_source(layer: int, expert: int, matrix: str) -> str:
    """The hub's name of one matrix of one routed expert."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"


def dense_files(config: ModelConfig) -> dict[str, list[TensorSpec]]:
    """File name to the tensors in it: one file for embedding, last norm and head, and one per layer."""
    files = {"dense.safetensors": list(_outer(config))}
    for layer in range(config.num_hidden_layers):
        files[f"dense-{layer:03d}.safetensors"] = list(_layer(config, layer))
    return files


def source_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a source checkpoint must hold, with its shape."""
    shapes = {spec.source_name: spec.shape for specs in dense_files(config).values() for spec in specs}
    kv_b = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank
    shapes |= {spec.source: kv_b for specs in dense_files(config).values() for spec in specs if spec.source}
    record = expert_layout(config, Recipe.BF16)
    for layer in config.moe_layers:
        for expert in range(config.n_routed_experts):
            shapes |= {expert_source(layer, expert, matrix): shape for matrix, shape in record.shapes.items()}
    return shapes


def stored_bytes(spec: TensorSpec, recipe: Recipe) -> int:
    """Bytes of a tensor in a checkpoint, with scales and padding; routers and norms at 16 bits."""
    if not spec.quantised:
        return 2 * math.prod(spec.shape)
    rows, cols = spec.shape
    return matrix_nbytes(recipe.format_of(spec.kind), rows, cols)


def parameters(config: ModelConfig) -> int:
    """How many weights the model has."""
    return sum(math.prod(shape) for shape in source_shapes(config).values())


def active_weights(config: ModelConfig) -> int:
    """Weights that take part in computing a token: all but the embedding's rows and the experts not chosen."""
    specs = (spec for specs in dense_files(config).values() for spec in specs)
    every = sum(
        math.prod(spec.shape) for spec in specs if spec.kind is not Kind.EMBEDDING or config.tie_word_embeddings
    )
    chosen = len(config.moe_layers) * config.num_experts_per_tok
    return every + chosen * 3 * config.hidden_size * config.moe_intermediate_size


def _outer(c: ModelConfig) -> Iterator[TensorSpec]:
    yield TensorSpec("model.embed_tokens.weight", Kind.EMBEDDING, (c.vocab_size, c.hidden_size))
    if not c.tie_word_embeddings:
        yield TensorSpec("lm_head.weight", Kind.HEAD, (c.vocab_size, c.hidden_size))
    yield TensorSpec("model.norm.weight", Kind.NORM, (c.hidden_size,))


def _layer(c: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    prefix = f"model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(f"{prefix}.{norm}.weight", Kind.NORM, (c.hidden_size,))
    yield from _attention(c, f"{prefix}.self_attn")
    if not c.is_moe(layer):
        yield from _mlp(f"{prefix}.mlp", Kind.DENSE, c.hidden_size, c.intermediate_size)
        return
    yield TensorSpec(f"{prefix}.mlp.gate.weight", Kind.ROUTER, (c.n_routed_experts, c.hidden_size))
    if c.n_shared_experts:
        width = c.n_shared_experts * c.moe_intermediate_size
        yield from _mlp(f"{prefix}.mlp.shared_experts", Kind.SHARED, c.hidden_size, width)


def _attention(c: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    heads, latent = c.num_attention_heads, c.kv_lora_rank
    queries = heads * c.qk_head_dim
    if c.q_lora_rank is None:
        yield TensorSpec(f"{prefix}.q_proj.weight", Kind.ATTENTION, (queries, c.hidden_size))
    else:
        yield TensorSpec(f"{prefix}.q_a_proj.weight", Kind.ATTENTION, (c.q_lora_rank, c.hidden_size))
        yield TensorSpec(f"{prefix}.q_a_layernorm.weight", Kind.NORM, (c.q_lora_rank,))
        yield TensorSpec(f"{prefix}.q_b_proj.weight", Kind.ATTENTION, (queries, c.q_lora_rank))
    yield TensorSpec(f"{prefix}.kv_a_proj_with_mqa.weight", Kind.ATTENTION, (c.latent_dim, c.hidden_size))
    yield TensorSpec(f"{prefix}.kv_a_layernorm.weight", Kind.NORM, (latent,))
    # W_UK is stored transposed per head, [H·C, nope], so that the absorbed product q·W_UK reads along its blocks.
    kv_b = f"{prefix}.kv_b_proj.weight"
    yield TensorSpec(f"{prefix}.kv_b_proj.w_uk", Kind.KV_B, (heads * latent, c.qk_nope_head_dim), kv_b)
    yield TensorSpec(f"{prefix}.kv_b_proj.w_uv", Kind.KV_B, (heads * c.v_head_dim, latent), kv_b)
    yield TensorSpec(f"{prefix}.o_proj.weight", Kind.ATTENTION, (c.hidden_size, heads * c.v_head_dim))


def _mlp(prefix: str, kind: Kind, hidden: int, intermediate: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}.gate_proj.weight", kind, (intermediate, hidden))
    yield TensorSpec(f"{prefix}.up_proj.weight", kind, (intermediate, hidden))
    yield TensorSpec(f"{prefix}.down_proj.weight", kind, (hidden, intermediate))

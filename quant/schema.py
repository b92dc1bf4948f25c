"""Which tensors a checkpoint holds, in which file, and in which format each recipe stores them.

Converter and loader both walk this table, so that a name or a shape is written down once.
"""

import math
from enum import StrEnum

from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.families import family_of
from dsv2_local.architectures.tensors import Kind, TensorSpec
from dsv2_local.kernels.format import ExpertLayout, Format, matrix_nbytes

FORMAT_VERSION = 1


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


def expert_layout(config: ModelConfig, recipe: Recipe) -> ExpertLayout:
    """The record of one routed expert."""
    return ExpertLayout(recipe.format_of(Kind.ROUTED), config.hidden_size, config.moe_intermediate_size)


def expert_file(layer: int) -> str:
    """The file of a MoE layer's routed experts: one uint8 tensor `EXPERTS` [experts, record bytes]."""
    return f"experts-{layer:03d}.safetensors"


EXPERTS = "experts"


def dense_files(config: ModelConfig) -> dict[str, list[TensorSpec]]:
    """File name to the tensors in it: one file for embedding, last norm and head, and one per layer."""
    family = family_of(config)
    files = {"dense.safetensors": list(family.outer_tensors(config))}
    for layer in range(config.num_hidden_layers):
        files[f"dense-{layer:03d}.safetensors"] = list(family.layer_tensors(config, layer))
    return files


def source_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a source checkpoint must hold, with its shape."""
    shapes = {spec.source_name: spec.shape for specs in dense_files(config).values() for spec in specs}
    kv_b = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank
    shapes |= {spec.source: kv_b for specs in dense_files(config).values() for spec in specs if spec.source}
    record, name_of = expert_layout(config, Recipe.BF16), family_of(config).expert_tensor
    for layer in config.moe_layers:
        for expert in range(config.n_routed_experts):
            shapes |= {name_of(layer, expert, matrix): shape for matrix, shape in record.shapes.items()}
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

"""DeepSeek-V2 and its kin (V2, V2-Lite, Coder-V2, V2.5): what their `config.json` says, and their tensors.

Both shapes of `config.json` are read: the hub's (`rope_scaling` beside `rope_theta`) and the one that transformers 5
writes (`rope_parameters`). What is not supported is refused here, by name.
"""

from collections.abc import Iterator
from typing import Any

from dsv2_local.architectures.config import VALUES, YARN_VALUES, ModelConfig, Yarn
from dsv2_local.architectures.tensors import Kind, TensorSpec
from dsv2_local.errors import ConfigError, UnsupportedModelError
from dsv2_local.values import Fields, Object, Text, shown


def parse(raw: dict[str, Any], where: str) -> ModelConfig:
    """Check a parsed `config.json`, and keep what the architecture needs.

    Raises:
        UnsupportedModelError: the model needs something that is not implemented; the text names it.
        ConfigError: a value is missing, of the wrong type or impossible.
    """
    _refuse_unsupported(raw, where)
    yarn, rope_theta = _rope(raw, where)
    return ModelConfig.read(raw, where, yarn=yarn, rope_theta=rope_theta)


def expert_tensor(layer: int, expert: int, matrix: str) -> str:
    """The name of one matrix ("gate_proj", "up_proj", "down_proj") of one routed expert."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"


def outer_tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    """Embedding, head and last norm."""
    yield TensorSpec("model.embed_tokens.weight", Kind.EMBEDDING, (c.vocab_size, c.hidden_size))
    if not c.tie_word_embeddings:
        yield TensorSpec("lm_head.weight", Kind.HEAD, (c.vocab_size, c.hidden_size))
    yield TensorSpec("model.norm.weight", Kind.NORM, (c.hidden_size,))


def layer_tensors(c: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """All of a layer but its routed experts."""
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


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    """Name the first feature that this runtime does not implement."""
    expected: dict[str, tuple[Any, ...]] = {
        "scoring_func": ("softmax", None),
        "topk_method": ("greedy", "group_limited_greedy", None),
        "hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
    }
    for key, allowed in expected.items():
        if raw.get(key) not in allowed:
            supported = " or ".join(repr(value) for value in allowed if value is not None)
            raise UnsupportedModelError(f"{where}: {key} {shown(raw.get(key))} is not supported (only {supported})")
    source = Fields(raw, where)
    quantisation = Fields(source.get("quantization_config", Object()) or {}, f"{where}: quantization_config")
    method = quantisation.get("quant_method", Text())
    if method not in (None, "dsv2"):
        raise UnsupportedModelError(
            f"{where}: weights quantised as {method!r} are not supported; convert from the bf16, fp16 or fp32 release"
        )
    heads = source.get("num_attention_heads", VALUES["num_attention_heads"])
    kv_heads = source.get("num_key_value_heads", VALUES["num_attention_heads"])
    if kv_heads is not None and kv_heads != heads:
        raise UnsupportedModelError(f"{where}: num_key_value_heads {kv_heads} differs from num_attention_heads {heads}")


def _rope(raw: dict[str, Any], where: str) -> tuple[Yarn | None, float]:
    """YaRN's parameters (None for plain RoPE) and rope_theta, from either shape of the file."""
    source = Fields(raw, where)
    key = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    rope = Fields(source.get(key, Object()) or {}, f"{where}: {key}")
    theta = rope.get("rope_theta", VALUES["rope_theta"]) or source.get("rope_theta", VALUES["rope_theta"]) or 10000.0
    kind = rope.get("rope_type", Text()) or rope.get("type", Text()) or "default"
    if kind == "default":
        return None, theta
    if kind != "yarn":
        raise UnsupportedModelError(f"{where}: RoPE scaling {kind!r} is not supported (only 'yarn' or none)")
    if rope.raw.get("attention_factor") is not None:
        raise UnsupportedModelError(f"{where}: YaRN's attention_factor is not supported; use mscale")
    given = {name: rope.get(name, allowed) for name, allowed in YARN_VALUES.items()}
    if given["factor"] is None:
        raise ConfigError(f"{where}: YaRN needs a factor")
    if given["original_max_position_embeddings"] is None:
        limit = source.get("max_position_embeddings", VALUES["max_position_embeddings"])
        given["original_max_position_embeddings"] = limit or 1  # without one the file is refused later
    return Yarn(**{name: value for name, value in given.items() if value is not None}), theta

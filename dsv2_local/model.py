"""DeepSeek-V2: multi-head latent attention and a mixture of experts, over one sequence.

Shapes: `T` tokens of this step, `H` heads, `N` qk_nope_head_dim, `P` qk_rope_head_dim, `V` v_head_dim,
`C` kv_lora_rank, `D` hidden_size, `E` routed experts, `K` experts per token, `S` tokens in the cache.

Names are those of the checkpoint. The mathematics is that of arXiv 2405.04434 and of the model's own code.
"""

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from dsv2_local.cache import LatentCache
from dsv2_local.config import ModelConfig
from dsv2_local.kernels import ops
from dsv2_local.kernels.layout import Matrix
from dsv2_local.rope import Rope

# The two norms inside the attention ignore rms_norm_eps.
LATENT_NORM_EPS = 1e-6

Weights = dict[str, Matrix | Tensor]


class Experts(Protocol):
    """Whoever holds the routed experts, wherever they are."""

    def experts(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Σₖ weights[t, k] · expert[ids[t, k]](x[t]): x [T, D], ids int64 and weights fp32 [T, K] -> [T, D]."""
        ...


@dataclass(frozen=True)
class WeightView:
    """The weights under a prefix, so that a module names only its own."""

    weights: Weights
    prefix: str

    def matrix(self, name: str) -> Matrix:
        return cast(Matrix, self.weights[self.prefix + name])

    def tensor(self, name: str) -> Tensor:
        """A norm or router, in fp32."""
        return cast(Tensor, self.weights[self.prefix + name]).float()

    def under(self, prefix: str) -> "WeightView":
        return WeightView(self.weights, self.prefix + prefix)


class Attention:
    """Multi-head latent attention; the cache holds the normed latent and the rotated rope key, nothing else."""

    def __init__(self, config: ModelConfig, weights: WeightView, layer: int) -> None:
        self.config, self.layer = config, layer
        self.low_rank_query = config.q_lora_rank is not None
        if self.low_rank_query:
            self.q_a_proj = weights.matrix("q_a_proj.weight")
            self.q_a_layernorm = weights.tensor("q_a_layernorm.weight")
            self.q_b_proj = weights.matrix("q_b_proj.weight")
        else:
            self.q_proj = weights.matrix("q_proj.weight")
        self.kv_a_proj_with_mqa = weights.matrix("kv_a_proj_with_mqa.weight")
        self.kv_a_layernorm = weights.tensor("kv_a_layernorm.weight")
        self.w_uk = weights.matrix("kv_b_proj.w_uk")
        self.w_uv = weights.matrix("kv_b_proj.w_uv")
        self.o_proj = weights.matrix("o_proj.weight")

    def forward(self, x: Tensor, rotation: Tensor, cache: LatentCache) -> Tensor:
        """x [T, D] at the positions after `cache.length` -> [T, D]."""
        c, T = self.config, x.shape[0]
        q = self.query(x).view(T, c.num_attention_heads, c.qk_head_dim)  # [T, H, N + P]
        kv_a = ops.linear(x, self.kv_a_proj_with_mqa)  # [T, C + P]
        ops.write_latents(cache.rows(self.layer, T), kv_a, self.kv_a_layernorm, LATENT_NORM_EPS, rotation)
        latents = cache.upto(self.layer, T)  # [S, C + P]
        out = ops.attention(q, rotation, latents, self.w_uk, self.w_uv, c.softmax_scale)  # [T, H·V]
        return ops.linear(out, self.o_proj)

    def query(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, H·(N + P)], with or without the low-rank step."""
        if not self.low_rank_query:
            return ops.linear(x, self.q_proj)
        return ops.linear(
            ops.rms_norm(ops.linear(x, self.q_a_proj), self.q_a_layernorm, LATENT_NORM_EPS), self.q_b_proj
        )


class MLP:
    """down(silu(gate(x)) · up(x)): the dense layers and the shared experts."""

    def __init__(self, weights: WeightView) -> None:
        self.gate_proj = weights.matrix("gate_proj.weight")
        self.up_proj = weights.matrix("up_proj.weight")
        self.down_proj = weights.matrix("down_proj.weight")

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        return ops.swiglu(x, self.gate_proj, self.up_proj, self.down_proj)


class MoE:
    """Routed experts, chosen per token, and the shared experts that every token takes."""

    def __init__(self, config: ModelConfig, weights: WeightView, layer: int, experts: Experts) -> None:
        self.config, self.layer = config, layer
        self.gate = weights.tensor("gate.weight")  # [E, D]
        self.shared_experts = MLP(weights.under("shared_experts.")) if config.n_shared_experts else None
        self.routed_experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        ids, weights = ops.route(x, self.gate, self.config)
        y = self.routed_experts.experts(self.layer, x, ids, weights)
        return y + self.shared_experts.forward(x) if self.shared_experts else y


class Block:
    """One layer: attention, then MLP or mixture, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, weights: WeightView, layer: int, experts: Experts) -> None:
        self.eps = config.rms_norm_eps
        self.input_layernorm = weights.tensor("input_layernorm.weight")
        self.post_attention_layernorm = weights.tensor("post_attention_layernorm.weight")
        self.self_attn = Attention(config, weights.under("self_attn."), layer)
        mlp = weights.under("mlp.")
        self.mlp: MLP | MoE = MoE(config, mlp, layer, experts) if config.is_moe(layer) else MLP(mlp)

    def forward(self, x: Tensor, rotation: Tensor, cache: LatentCache) -> Tensor:
        """x [T, D] -> [T, D]."""
        x = x + self.self_attn.forward(ops.rms_norm(x, self.input_layernorm, self.eps), rotation, cache)
        return x + self.mlp.forward(ops.rms_norm(x, self.post_attention_layernorm, self.eps))


class Transformer:
    """The whole model."""

    def __init__(self, config: ModelConfig, weights: Weights, experts: Experts, dtype: torch.dtype) -> None:
        """`dtype` is the type of the activations: float32 or bfloat16."""
        view = WeightView(weights, "")
        self.config, self.dtype = config, dtype
        self.rope = Rope(config)
        self.embed_tokens = view.matrix("model.embed_tokens.weight")
        self.lm_head = self.embed_tokens if config.tie_word_embeddings else view.matrix("lm_head.weight")
        self.norm = view.tensor("model.norm.weight")
        layers = range(config.num_hidden_layers)
        self.layers = [Block(config, view.under(f"model.layers.{layer}."), layer, experts) for layer in layers]

    @property
    def cache_dtype(self) -> torch.dtype:
        """The type of the latents in the cache."""
        return ops.cache_dtype(self.layers[0].self_attn.w_uk, self.dtype)

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: LatentCache) -> Tensor:
        """Run tokens ids (int64 [T]) after those in the cache, and add them to it -> hidden states [T, D]."""
        rotation = self.rope.rotation(torch.arange(cache.length, cache.length + len(ids)))
        x = ops.embedding(ids, self.embed_tokens, self.dtype)
        for layer in self.layers:
            x = layer.forward(x, rotation, cache)
        cache.advance(len(ids))
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, D] -> fp32 logits [T, vocab_size]."""
        return ops.linear(ops.rms_norm(hidden, self.norm, self.config.rms_norm_eps), self.lm_head).float()

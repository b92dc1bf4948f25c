"""DeepSeek-V2: multi-head latent attention and a mixture of experts, over one sequence.

Shapes: `T` tokens of this step, `H` heads, `N` qk_nope_head_dim, `P` qk_rope_head_dim, `V` v_head_dim,
`C` kv_lora_rank, `D` hidden_size, `E` routed experts, `K` experts per token, `G` groups of experts.

Names are those of the checkpoint. The mathematics is that of arXiv 2405.04434 and of the model's own code; the
router follows the latter where they differ (a group scores its maximum, and scores outside the kept groups are 0).
"""

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from dsv2_local.cache import LatentCache
from dsv2_local.config import ModelConfig
from dsv2_local.kernels import ops
from dsv2_local.kernels.layout import Matrix
from dsv2_local.rope import Rope, rotate

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
        return cast(Tensor, self.weights[self.prefix + name])

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
        c = self.config
        q = self.query(x).view(len(x), c.num_attention_heads, c.qk_head_dim)  # [T, H, N + P]
        q_nope, q_rope = torch.split(q, [c.qk_nope_head_dim, c.qk_rope_head_dim], dim=2)
        kv_a = ops.linear(x, self.kv_a_proj_with_mqa)
        latent, k_rope = torch.split(kv_a, [c.kv_lora_rank, c.qk_rope_head_dim], dim=1)
        latent = ops.rms_norm(latent, self.kv_a_layernorm, LATENT_NORM_EPS)
        latents = cache.write(self.layer, latent, rotate(k_rope, rotation))  # [S, C + P]
        q_rope = rotate(q_rope, rotation)
        out = ops.attention(q_nope, q_rope, latents, self.w_uk, self.w_uv, c.softmax_scale)  # [T, H·V]
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


def route(scores: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Choose the experts: scores (softmax over all experts, fp32 [T, E]) -> ids int64 [T, K], weights fp32 [T, K].

    With norm_topk_prob the weights are normalised *instead of* being multiplied by routed_scaling_factor.
    """
    if config.topk_method == "group_limited_greedy":
        groups = scores.view(len(scores), config.n_group, -1)  # [T, G, E/G]
        kept = groups.amax(2).topk(config.topk_group, dim=1).indices
        outside = torch.ones(groups.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, kept, False)
        scores = groups.masked_fill(outside[..., None], 0.0).flatten(1)
    weights, ids = scores.topk(config.num_experts_per_tok, dim=1)
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        return ids, weights / (weights.sum(1, keepdim=True) + 1e-20)
    return ids, weights * config.routed_scaling_factor


class MoE:
    """Routed experts, chosen per token, and the shared experts that every token takes."""

    def __init__(self, config: ModelConfig, weights: WeightView, layer: int, experts: Experts) -> None:
        self.config, self.layer = config, layer
        self.gate = weights.tensor("gate.weight").float()  # [E, D]
        self.shared_experts = MLP(weights.under("shared_experts.")) if config.n_shared_experts else None
        self.routed_experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        scores = torch.softmax(x.float() @ self.gate.T, dim=1)  # [T, E]
        ids, weights = route(scores, self.config)
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

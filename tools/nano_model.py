"""The training implementation of dsv2-nano: DeepSeek-V2 with the hub's tensor names, and only what training needs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


@dataclass(frozen=True)
class NanoConfig:
    """The architecture, with the field names of DeepSeek-V2's config.json."""

    vocab_size: int = 8192
    hidden_size: int = 256
    num_hidden_layers: int = 6
    first_k_dense_replace: int = 1
    intermediate_size: int = 768
    moe_intermediate_size: int = 128
    n_routed_experts: int = 24
    n_shared_experts: int = 2
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 4.0
    aux_loss_alpha: float = 0.01
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 64
    v_head_dim: int = 64
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048

    @property
    def rope_scaling(self) -> dict[str, Any]:
        """YaRN from the training length of 512; used from the first step of training."""
        return {
            "type": "yarn",
            "factor": 4,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 512,
        }

    def hub(self) -> dict[str, Any]:
        """The config.json of a DeepSeek-V2 checkpoint on the hub."""
        return asdict(self) | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "ep_size": 1,
            "initializer_range": 0.02,
            "moe_layer_freq": 1,
            "norm_topk_prob": False,
            "pretraining_tp": 1,
            "rope_scaling": self.rope_scaling,
            "scoring_func": "softmax",
            "seq_aux": False,
            "tie_word_embeddings": True,
            "topk_method": "group_limited_greedy",
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


class RMSNorm(nn.Module):
    """RMS norm in float32. The released code has a fixed ``eps`` in the latent norms; here all norms use the same."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A projection without bias, like all projections of DeepSeek-V2."""
    return nn.Linear(inputs, outputs, bias=False)


def yarn_frequencies(config: NanoConfig) -> Tensor:
    """Angular frequencies [rope/2]: low ones are divided by YaRN's factor, high ones stay, with a ramp between."""
    size, yarn = config.qk_rope_head_dim, config.rope_scaling

    def dimension(rotations: float) -> float:
        wavelength = yarn["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension(yarn["beta_fast"])), 0)
    high = min(math.ceil(dimension(yarn["beta_slow"])), size - 1)
    ramp = ((torch.arange(size // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    fast = config.rope_theta ** (-torch.arange(0, size, 2) / size)
    frequencies: Tensor = fast / yarn["factor"] * ramp + fast * (1 - ramp)
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the neighbouring pairs of ``x`` [B, H, T, rope] by the angles of ``cos`` and ``sin`` [B, 1, T, rope/2]."""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return turned.view(x.shape).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention, with keys and values computed from the latent (not absorbed)."""

    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.config, heads = c, c.num_attention_heads
        self.q_a_proj = linear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = linear(c.q_lora_rank, heads * (c.qk_nope_head_dim + c.qk_rope_head_dim))
        self.kv_a_proj_with_mqa = linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = linear(heads * c.v_head_dim, c.hidden_size)
        mscale = 0.1 * c.rope_scaling["mscale_all_dim"] * math.log(c.rope_scaling["factor"]) + 1.0
        self.scale = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5 * mscale * mscale

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """``x`` [B, T, D] -> [B, T, D]; ``mask`` [B, 1, T, T] is 0 where a token may attend, -inf elsewhere."""
        c = self.config
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(*x.shape[:2], c.num_attention_heads, -1).transpose(1, 2)  # [B, H, T, nope + rope]
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(*x.shape[:2], c.num_attention_heads, -1)
        k_nope, v = kv.transpose(1, 2).split([c.qk_nope_head_dim, c.v_head_dim], -1)  # [B, H, T, .]
        k_rope = rotate(k_rope.unsqueeze(1), cos, sin).expand(-1, c.num_attention_heads, -1, -1)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin)), -1)
        out = F.scaled_dot_product_attention(q, torch.cat((k_nope, k_rope), -1), v, mask.to(q.dtype), scale=self.scale)
        merged: Tensor = self.o_proj(out.transpose(1, 2).flatten(-2))
        return merged


class MLP(nn.Module):
    """A gated feed-forward network: of a dense layer, of the shared experts, or of a routed expert."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, inner), linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Permute(torch.autograd.Function):
    """Permutes rows; the backward pass permutes back, which is faster than the usual scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[order]``, for a permutation ``order`` and its inverse."""
    rows: Tensor = Permute.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return rows


class MoE(nn.Module):
    """Group-limited routing to K of E experts, plus the shared experts."""

    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.config = c
        self.gate = linear(c.hidden_size, c.n_routed_experts)
        self.experts = nn.ModuleList(MLP(c.hidden_size, c.moe_intermediate_size) for _ in range(c.n_routed_experts))
        self.shared_experts = MLP(c.hidden_size, c.n_shared_experts * c.moe_intermediate_size)
        self.balance_loss = torch.zeros(())  # of the last forward
        self.load = torch.zeros(c.n_routed_experts)  # [E] tokens sent to each expert in the last forward

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` [T, D] -> weights and indices [T, K] of the chosen experts, in float32 throughout."""
        c = self.config
        with torch.autocast("cpu", enabled=False):
            scores = F.linear(x.float(), self.gate.weight).softmax(-1)  # [T, E]
        groups = scores.view(len(x), c.n_group, -1)  # [T, groups, E / groups]
        best = groups.amax(-1).topk(c.topk_group, -1).indices
        allowed = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        masked = groups.masked_fill(~allowed.unsqueeze(-1), 0.0).flatten(1)
        weights, chosen = masked.topk(c.num_experts_per_tok, -1)
        self.load = torch.bincount(chosen.flatten(), minlength=c.n_routed_experts)
        share = self.load / chosen.numel()
        self.balance_loss = c.n_routed_experts * (share * scores.mean(0)).sum()  # 1 if perfectly even
        return weights * c.routed_scaling_factor, chosen

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, T, D] -> [B, T, D]. Tokens are sorted by expert, so that each expert runs only once."""
        flat, active = x.flatten(0, 1), self.config.num_experts_per_tok
        weights, chosen = self.route(flat)
        order = chosen.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        copies = flat.unsqueeze(1).expand(-1, active, -1).flatten(0, 1)  # [T * K, D]
        parts = torch.split(permute(copies, order, inverse), self.load.tolist())
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        routed = permute(torch.cat(outputs), inverse, order).view(-1, active, x.shape[-1])  # [T, K, D]
        shared: Tensor = self.shared_experts(x)
        return (routed * weights.unsqueeze(-1)).sum(1).view_as(x) + shared


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, c: NanoConfig, index: int) -> None:
        super().__init__()
        dense = index < c.first_k_dense_replace
        self.self_attn = Attention(c)
        self.mlp = MLP(c.hidden_size, c.intermediate_size) if dense else MoE(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        x = x + self.self_attn(self.input_layernorm(x).to(dtype), cos, sin, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x).to(dtype))
        return out


class Nano(nn.Module):
    """DeepSeek-V2 with the hub's tensor names (under ``model.``) and the output tied to the embedding."""

    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.frequencies = yarn_frequencies(c)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        """Arguments [B, T] -> last hidden states [B, T, D]; a token attends only to its own document."""
        angles = positions[:, None, :, None] * self.frequencies  # [B, 1, T, rope/2]
        same = documents[:, :, None] == documents[:, None, :]
        mask = torch.zeros(same.shape).masked_fill(~same.tril(), -math.inf).unsqueeze(1)
        x, cos, sin = self.embed_tokens(tokens), angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        out: Tensor = self.norm(x)
        return out

    def mixtures(self) -> list[MoE]:
        """The mixture-of-experts layers."""
        return [layer.mlp for layer in self.layers if isinstance(layer, Layer) and isinstance(layer.mlp, MoE)]

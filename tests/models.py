"""Small random DeepSeek-V2 models, built by transformers and saved like a release, and a naive implementation."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 199, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 64,
    "q_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 48, "n_routed_experts": 8,
    "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "topk_method": "greedy",
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    "initializer_range": 0.15, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def heed_signals() -> None:
    """For `preexec_fn`: reset SIGINT and SIGHUP, which child processes of a background test run would ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def kill_half_way(script: str) -> None:
    """Run a Python script until it prints "half way", and kill it."""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, preexec_fn=heed_signals,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"half way\n"
        process.send_signal(signal.SIGKILL)


def yarn(mscale: float | None, all_dim: float | None, factor: float = 40.0, original: int = 4096) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": factor, "beta_fast": 32, "beta_slow": 1}
    rope["original_max_position_embeddings"] = original
    return {**rope, **{k: v for k, v in (("mscale", mscale), ("mscale_all_dim", all_dim)) if v is not None}}


def save_random(directory: Path, seed: int = 0, *, hub_shape: bool = False, **changes: Any) -> Path:
    """Save a random bf16 model with transformers; `hub_shape` rewrites config.json to the layout of the releases."""
    torch.manual_seed(seed)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**{**TINY, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("mlp.gate.weight"):
                parameter.normal_(
                    std=0.15
                )  # transformers initialises routers with zeros, so that all experts would tie
    model.to(torch.bfloat16).save_pretrained(directory)
    if hub_shape:
        rewrite_config(directory, _as_released)
    return directory


def _as_released(raw: dict[str, Any]) -> None:
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}


def rewrite_config(directory: Path, change: Any) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def transformers_logits(directory: Path, ids: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of transformers' implementation: [T, vocab]."""
    model = DeepseekV2ForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


class Naive:
    """DeepSeek-V2 straight from the paper: keys and values of every head, no cache, one expert after the other."""

    def __init__(self, directory: Path) -> None:
        self.c = json.loads((directory / "config.json").read_text())
        self.w = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}

    def logits(self, ids: list[int]) -> Tensor:
        x = self.w["model.embed_tokens.weight"][ids]
        for layer in range(self.c["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self.attention(self.norm(x, prefix + "input_layernorm"), prefix + "self_attn.")
            x = x + self.mlp(self.norm(x, prefix + "post_attention_layernorm"), layer, prefix + "mlp.")
        head = "model.embed_tokens" if self.c["tie_word_embeddings"] else "lm_head"
        return self.norm(x, "model.norm") @ self.w[head + ".weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[name + ".weight"]

    def attention(self, x: Tensor, p: str) -> Tensor:
        c, T = self.c, len(x)
        H, N, P, V = (c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        if c["q_lora_rank"]:
            q = self.norm(x @ self.w[p + "q_a_proj.weight"].T, p + "q_a_layernorm") @ self.w[p + "q_b_proj.weight"].T
        else:
            q = x @ self.w[p + "q_proj.weight"].T
        q = q.view(T, H, N + P)
        kv_a = x @ self.w[p + "kv_a_proj_with_mqa.weight"].T
        latent = self.norm(kv_a[:, :-P], p + "kv_a_layernorm")
        kv = (latent @ self.w[p + "kv_b_proj.weight"].T).view(T, H, N + V)
        k_rope = self.rope(kv_a[:, None, -P:]).expand(T, H, P)
        k = torch.cat((kv[..., :N], k_rope), 2)
        q = torch.cat((q[..., :N], self.rope(q[..., N:])), 2)
        scores = torch.einsum("thd,shd->hts", q, k) * self.scale()
        scores = scores + torch.full((T, T), float("-inf")).triu(1)
        out = torch.einsum("hts,shv->thv", scores.softmax(2), kv[..., N:]).reshape(T, -1)
        return out @ self.w[p + "o_proj.weight"].T

    def scale(self) -> float:
        rope, dim = self.c["rope_parameters"], self.c["qk_nope_head_dim"] + self.c["qk_rope_head_dim"]
        m = 0.1 * rope.get("mscale_all_dim", 0) * math.log(rope.get("factor", 1)) + 1
        return dim**-0.5 * m * m

    def rope(self, x: Tensor) -> Tensor:
        """x [T, H, P] -> the same shape, by plain RoPE without YaRN, pair by pair; angles in double precision."""
        assert self.c["rope_parameters"]["rope_type"] == "default"
        out = torch.empty_like(x)
        for i in range(x.shape[2] // 2):
            angle = torch.arange(len(x)).double() * 10000.0 ** (-2 * i / x.shape[2])
            cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
            even, odd = x[..., 2 * i], x[..., 2 * i + 1]
            out[..., 2 * i], out[..., 2 * i + 1] = even * cos - odd * sin, even * sin + odd * cos
        return out

    def mlp(self, x: Tensor, layer: int, p: str) -> Tensor:
        c = self.c
        if layer < c["first_k_dense_replace"] or layer % c.get("moe_layer_freq", 1):
            return self.swiglu(x, p)
        out = self.swiglu(x, p + "shared_experts.") if c["n_shared_experts"] else torch.zeros_like(x)
        for t, token in enumerate(x):
            for expert, weight in self.route((self.w[p + "gate.weight"] @ token).softmax(0)):
                out[t] += weight * self.swiglu(token, f"{p}experts.{expert}.")
        return out

    def route(self, scores: Tensor) -> list[tuple[int, float]]:
        c, s = self.c, scores.tolist()
        allowed = range(len(s))
        if c["topk_method"] == "group_limited_greedy":
            size = len(s) // c["n_group"]
            best = sorted(range(c["n_group"]), key=lambda g: -max(s[g * size : (g + 1) * size]))
            kept = best[: c["topk_group"]]
            allowed = [e for e in allowed if e // size in kept]
        top = sorted(allowed, key=lambda e: -s[e])[: c["num_experts_per_tok"]]
        scale = 1 / sum(s[e] for e in top) if c["norm_topk_prob"] else c["routed_scaling_factor"]
        return [(e, s[e] * scale) for e in top]

    def swiglu(self, x: Tensor, p: str) -> Tensor:
        gate, up = x @ self.w[p + "gate_proj.weight"].T, x @ self.w[p + "up_proj.weight"].T
        return (gate * gate.sigmoid() * up) @ self.w[p + "down_proj.weight"].T

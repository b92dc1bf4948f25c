"""The Triton kernels for CUDA GPUs of compute capability 8.0 and above; importing this imports Triton.

Same functions as `kernels.reference`, which explains the shapes. Activations are bf16 or fp32, sums fp32. No launch
waits for a value from the GPU, so all kernels can be captured in a CUDA graph, after a first run that compiles and
tunes them. With TRITON_INTERPRET=1, set before the import, everything runs on the CPU, slowly.
"""

import os

import torch

# Allow fused multiply-add, the default of Triton before 3.10; if this is unset, Triton 3.9 warns of that change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from dsv2_local.kernels.triton.attention import attention
from dsv2_local.kernels.triton.experts import combine, expert_outputs, experts, sorted_expert_outputs
from dsv2_local.kernels.triton.latents import write_latents
from dsv2_local.kernels.triton.linear import dequantize, linear, swiglu
from dsv2_local.kernels.triton.rows import add, add_rms_norm, embedding, rms_norm, route, to_host
from dsv2_local.kernels.triton.top_candidates import top_candidates

CACHES = (torch.bfloat16, torch.float32, torch.uint8)  # types of a KV cache that `attention` reads

__all__ = [
    "CACHES",
    "add",
    "add_rms_norm",
    "attention",
    "combine",
    "dequantize",
    "embedding",
    "expert_outputs",
    "experts",
    "linear",
    "rms_norm",
    "route",
    "sorted_expert_outputs",
    "swiglu",
    "to_host",
    "top_candidates",
    "write_latents",
]  # fmt: skip

"""The Triton kernels for CUDA GPUs of compute capability 8.0 and above; importing this imports Triton.

Signatures and meaning are those of `kernels.reference`, which names the shapes. Activations are bf16 or fp32, sums
fp32. Nothing here asks the device for a number, so that all can be captured in a CUDA graph once it has run (and been
tuned) before.
With TRITON_INTERPRET=1, set before the import, all runs on the CPU, slowly.
"""

import os

import torch

# Multiplication and addition may become one instruction, as in every Triton before 3.10, and without a notice.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from dsv2_local.kernels.triton.attention import attention
from dsv2_local.kernels.triton.experts import combine, expert_outputs, experts
from dsv2_local.kernels.triton.latents import write_latents
from dsv2_local.kernels.triton.linear import dequantize, linear, swiglu
from dsv2_local.kernels.triton.rows import add, add_rms_norm, embedding, rms_norm, route
from dsv2_local.kernels.triton.top_candidates import top_candidates

CACHES = (torch.bfloat16, torch.float32, torch.uint8)  # types of latents that `attention` reads

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
    "swiglu",
    "top_candidates",
    "write_latents",
]  # fmt: skip

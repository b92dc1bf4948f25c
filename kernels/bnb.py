"""Kernels for GPUs without Triton: bitsandbytes for products with nf4 weights, `kernels.reference` for everything else.

Importing this module imports bitsandbytes. The functions are those of `kernels.reference`. bitsandbytes stores the same
nf4 codes in another order, so a matrix is rearranged for each product and the copy is discarded. A product therefore
needs memory for two more copies of its weight, and with many tokens for a dequantised one too.
"""

from functools import cache, partial

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's own name for it

from dsv2_local.kernels import reference
from dsv2_local.kernels.format import BLOCK, ROWS, Format
from dsv2_local.kernels.layout import NF4_LEVELS, Matrix
from dsv2_local.kernels.reference import (
    CACHES,
    add,
    add_rms_norm,
    attention,
    combine,
    embedding,
    rms_norm,
    route,
    to_host,
    top_candidates,
    write_latents,
)

__all__ = [
    "CACHES",
    "add",
    "add_rms_norm",
    "attention",
    "combine",
    "embedding",
    "expert_outputs",
    "experts",
    "linear",
    "rearranged",
    "rms_norm",
    "route",
    "sorted_expert_outputs",
    "swiglu",
    "to_host",
    "top_candidates",
    "write_latents",
]  # fmt: skip


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(NF4_LEVELS, device=device)


def rearranged(weight: Matrix, dtype: torch.dtype) -> tuple[Tensor, QuantState]:
    """Rearrange an nf4 matrix [R, C] into bitsandbytes' layout of [R, 64·B]: uint8 [R·32·B, 1] and its QuantState.

    That layout is row-major, with the first of two columns in the high nibble; columns past C are padding. `dtype` is
    the type of the activations.
    """
    assert weight.scales is not None
    groups, blocks = weight.codes.shape[:2]
    even, odd = weight.codes[..., ::2], weight.codes[..., 1::2]  # columns 0, 2 in low nibbles, 4, 6 in high
    octets = torch.cat(((even << 4) | (odd & 0x0F), (even & 0xF0) | (odd >> 4)), dim=4)  # [G, B, 8o, 8r, 4]
    words = octets.view(torch.int32)[..., 0].permute(0, 3, 1, 2).contiguous()  # [G, 8r, B, 8o]
    codes = words.view(torch.uint8).view(groups * ROWS, -1)[: weight.rows]
    absmax = weight.scales.transpose(1, 2).reshape(groups * ROWS, -1)[: weight.rows].float()  # [R, B]
    state = QuantState(  # type: ignore[no-untyped-call]
        absmax=absmax.flatten(), shape=torch.Size((weight.rows, blocks * BLOCK)), code=_levels(absmax.device),
        blocksize=BLOCK, quant_type="nf4", dtype=dtype,
    )  # fmt: skip
    return codes.view(-1, 1), state


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [T, C] · weightᵀ -> [T, R]."""
    if weight.format is not Format.NF4:
        return reference.linear(x, weight)
    codes, state = rearranged(weight, x.dtype)
    padded = F.pad(x, (0, state.shape[1] - weight.cols))
    return bitsandbytes.matmul_4bit(padded, codes.t(), quant_state=state)  # type: ignore[attr-defined, no-any-return]


swiglu = partial(reference.swiglu, linear=linear)
experts = partial(reference.experts, linear=linear)
expert_outputs = partial(reference.expert_outputs, linear=linear)
sorted_expert_outputs = partial(reference.sorted_expert_outputs, linear=linear)

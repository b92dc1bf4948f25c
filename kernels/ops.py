"""The one place that chooses an implementation of each kernel; the model calls these and nothing below.

Only the torch reference exists so far; native CPU and Triton kernels join here, with the same signatures.
"""

from torch import Tensor

from dsv2_local.kernels import reference
from dsv2_local.kernels.layout import Matrix
from dsv2_local.kernels.reference import embedding, experts, linear, rms_norm, swiglu

__all__ = ["attention", "embedding", "experts", "linear", "rms_norm", "swiglu"]


def attention(q_nope: Tensor, q_rope: Tensor, latents: Tensor, w_uk: Matrix, w_uv: Matrix, scale: float) -> Tensor:
    """Latent attention in the form that takes fewer operations; see `reference.absorbed_attention` for the shapes.

    Per head and cached position, absorbed attention does T·(2C + P) multiplications; the materialised form
    T·(N + P + V) and C·(N + V) once to rebuild key and value.
    """
    T, _, N = q_nope.shape
    P = q_rope.shape[2]
    C = latents.shape[1] - P
    V = w_uv.rows // q_nope.shape[1]
    absorbed = T * (2 * C + P) <= T * (N + P + V) + C * (N + V)
    form = reference.absorbed_attention if absorbed else reference.materialized_attention
    return form(q_nope, q_rope, latents, w_uk, w_uv, scale)

"""The 8-bit KV cache: its format, and the native kernels that read and write it against the PyTorch reference."""

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dsv2_local
from dsv2_local.architectures.families import parse_config
from dsv2_local.errors import InputError
from dsv2_local.kernels import cpu, ops, reference
from dsv2_local.kernels.format import CacheDtype, Format, latent_nbytes
from dsv2_local.kernels.latents import dequantize_latents, quantize_latents
from dsv2_local.kernels.metadata import AttentionMetadata
from dsv2_local.machine import resources
from dsv2_local.quant import int8
from dsv2_local.runtime.cache import LatentCache, bytes_per_token
from tests.conftest import kernels
from tests.models import TINY
from tests.paging import gathered, paged, scattered

SHAPES = [(512, 64), (64, 16), (40, 6), (130, 8), (24, 0)]  # C, P
# The tolerance of `test_kernels` for a bf16 cache; with VNNI, queries are quantised to 8 bits too.
TOLERANCE, VNNI_TOLERANCE = 0.02, 0.025


@pytest.fixture(scope="module", params=cpu.usable())
def native(request) -> Iterator[cpu.Kernels]:
    with kernels(request.param):
        found = cpu.kernels()
        assert found is not None
        found.set_threads(resources.Threads(3, ()))
        yield found


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def scales_of(rows: Tensor, rank: int) -> Tensor:
    """The scale of each latent: [T, C]."""
    halves = rows[:, rank:].contiguous().view(torch.bfloat16).float()
    return halves[:, : -(-rank // 64)].repeat_interleave(64, 1)[:, :rank]


@pytest.mark.parametrize(("rank", "rope"), SHAPES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_quantised_latents_are_within_half_a_scale(rank, rope, data):
    size = data.draw(st.floats(1e-30, 1e30))
    tokens = data.draw(st.integers(1, 4))
    torch.manual_seed(data.draw(st.integers(0, 1 << 16)))
    latents = torch.distributions.StudentT(2.0).sample((tokens, rank + rope)) * size
    latents[:, data.draw(st.integers(0, rank - 1))] = 0
    rows = quantize_latents(latents, rank)
    assert rows.shape == (tokens, latent_nbytes(rank, rope))
    back, half = dequantize_latents(rows, rank), scales_of(rows, rank) / 2
    assert ((back - latents)[:, :rank].abs() <= half * 1.0001).all()
    assert torch.equal(back[:, rank:], latents[:, rank:].bfloat16().float())
    largest = torch.nn.functional.pad(latents[:, :rank], (0, -rank % 64)).view(tokens, -1, 64).abs().amax(2)
    assert (scales_of(rows, rank)[:, ::64] <= largest / 127 * (1 + 2**-7)).all()  # rounded up to bf16


def test_the_error_of_gaussian_latents():
    latents = torch.randn(2000, 576)
    back = dequantize_latents(quantize_latents(latents, 512), 512)
    assert float((back - latents)[:, :512].norm() / latents[:, :512].norm()) < 0.0065


def test_zeros_infinities_and_nan():
    latents = torch.zeros(4, 130 + 8)
    latents[1, 3], latents[2, 70], latents[3, 129] = 3e38, float("inf"), float("nan")
    back = dequantize_latents(quantize_latents(latents, 130), 130)
    assert torch.equal(back[0], latents[0])
    assert back[1, 3] == pytest.approx(3e38, rel=0.01)
    assert not back[2, 64:128].isfinite().any()
    assert back[3, 128:130].isnan().all()
    assert back[2:, :64].eq(0).all()


@pytest.mark.parametrize(("rank", "rope"), [shape for shape in SHAPES if shape[1]])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_native_rows_are_those_of_the_reference(native, rank, rope, tokens):
    kv_a, weight = torch.randn(tokens, rank + rope), torch.rand(rank) + 0.5
    kv_a[1:2] = 0
    rotation = torch.polar(torch.ones(tokens, rope // 2), torch.randn(tokens, rope // 2))
    blocks, metadata = paged(torch.zeros(60 + tokens, latent_nbytes(rank, rope), dtype=torch.uint8), 60, True)
    ours, theirs = blocks.clone(), blocks.clone()
    native.write_latents(ours, metadata, kv_a, weight, 1e-6, rotation)
    reference.write_latents(theirs, metadata, kv_a, weight, 1e-6, rotation)
    ours, theirs = (gathered(written, metadata.block_tables[0], 60 + tokens) for written in (ours, theirs))
    assert torch.equal(ours[:60], torch.zeros_like(ours[:60]))
    codes = (ours[:, :rank].view(torch.int8).int() - theirs[:, :rank].view(torch.int8)).abs()
    assert codes.max() <= 1  # a norm that differs in its last bit can be rounded to the next code
    assert codes.float().mean() < 0.001
    assert (dequantize_latents(ours, rank) - dequantize_latents(theirs, rank)).norm() < 1e-3 * kv_a.norm()


def test_native_rows_of_nan_stay_nan(native):
    kv_a, rotation = torch.full((2, 72), float("nan")), torch.ones(2, 4, dtype=torch.complex64)
    blocks, metadata = paged(torch.zeros(2, latent_nbytes(64, 8), dtype=torch.uint8), 0, True)
    native.write_latents(blocks, metadata, kv_a, torch.ones(64), 1e-6, rotation)
    assert dequantize_latents(gathered(blocks, metadata.block_tables[0], 2), 64).isnan().all()


class Case:
    """Attention over random 8-bit rows."""

    def __init__(self, heads: int, N: int, P: int, C: int, V: int, tokens: int, cached: int, sharpness: float = 1.0):
        w_uk, w_uv = torch.randn(heads * C, N) / N**0.5, torch.randn(heads * V, C) / C**0.5
        self.w_uk, self.w_uv = int8.quantize(w_uk), int8.quantize(w_uv)
        self.q = torch.randn(tokens, heads, N + P) * sharpness
        self.rows = quantize_latents(torch.randn(cached + tokens, C + P), C)
        self.rotation = torch.polar(torch.ones(tokens, P // 2), torch.randn(tokens, P // 2))
        self.cached = cached

    def run(self, kernel, absorb: bool) -> Tensor:
        blocks, block_table = scattered(self.rows, self.cached)
        metadata = AttentionMetadata.of(block_table[None], [len(self.q)], [absorb])
        return kernel.attention(self.q, self.rotation, blocks, metadata, self.w_uk, self.w_uv, 0.11)

    def tokens(self, start: int, end: int) -> "Case":
        """The queries of some tokens alone, over what they may see."""
        cut = copy.copy(self)
        cut.q, cut.rotation = self.q[start:end], self.rotation[start:end]
        cut.rows, cut.cached = self.rows[: self.cached + end], self.cached + start
        return cut


def error(ours: Tensor, exact: Tensor) -> float:
    """The largest relative error of a token's result, in norm."""
    return float(((ours - exact).norm(dim=1) / exact.norm(dim=1)).max())


def tolerance(native: cpu.Kernels) -> float:
    return VNNI_TOLERANCE if native.variant.startswith("avx512") else TOLERANCE


@pytest.mark.parametrize(
    ("heads", "N", "P", "C", "V"),
    [(16, 128, 64, 512, 128), (128, 128, 64, 512, 128), (4, 32, 16, 64, 48), (3, 16, 8, 40, 24), (5, 16, 6, 136, 16)],
)
@pytest.mark.parametrize(("tokens", "cached"), [(1, 0), (1, 6), (1, 255), (1, 800), (3, 257), (70, 0), (70, 300)])
def test_attention_in_both_forms(native, heads, N, P, C, V, tokens, cached):
    if heads == 128 and tokens == 70 and native.variant == "portable":
        pytest.skip("slow")
    case = Case(heads, N, P, C, V, tokens, cached)
    exact = case.run(reference, True)
    assert error(case.run(native, True), exact) < tolerance(native), "absorbed"
    assert error(case.run(native, False), exact) < 1e-4, "materialised"


def test_the_error_of_8_bit_queries():
    """What the VNNI kernels add to the error by quantising absorbed queries in blocks of 64: 0.6 % of their norm."""
    H, N, P, C, V = 16, 128, 64, 512, 128
    case = Case(H, N, P, C, V, 1, 4095)
    latents = dequantize_latents(case.rows, C)
    w_uk = reference.dequantize(case.w_uk).view(H, C, N)
    query = torch.einsum("thn,hcn->htc", case.q[..., :N], w_uk)
    blocks = query.view(H, 1, C // 64, 64)
    scale = blocks.abs().amax(3, keepdim=True) / 127
    rounded = ((blocks / scale).round() * scale).view_as(query)
    assert float((rounded - query).norm() / query.norm()) < 0.0065
    rope = reference.rotate(case.q[..., N:], case.rotation).transpose(0, 1) @ latents[:, C:].T

    def mixed(query: Tensor) -> Tensor:
        return ((query @ latents[:, :C].T + rope) * 0.11).softmax(2) @ latents[:, :C]

    assert float((mixed(rounded) - mixed(query)).norm() / mixed(query).norm()) < 0.012


def test_sharp_attention(native):
    """One position has nearly all the weight: it must be found, and small weights must not be lost."""
    case = Case(4, 32, 16, 64, 48, 1, 600, sharpness=30.0)
    assert error(case.run(native, True), case.run(reference, True)) < 0.2  # 0.6 % of scores of 100
    case = Case(4, 32, 16, 64, 48, 1, 600, sharpness=0.0)  # all weights are equal
    assert error(case.run(native, True), case.run(reference, True)) < 0.01


def test_a_position_of_large_latents_does_not_coarsen_the_others(native):
    """Quantised softmax weights share a step over 256 positions of a block of latents; 15 bits are enough even if one
    of these positions has 50 times larger latents and no weight."""
    case = Case(4, 32, 16, 64, 48, 1, 200)
    latents = dequantize_latents(case.rows, 64)
    latents[7, :64] *= 50
    case.rows = quantize_latents(latents, 64)
    case.q[..., :] *= 0.05
    assert error(case.run(native, True), case.run(reference, True)) < tolerance(native)


def test_attention_ignores_cache_rows_past_the_last_position(native):
    case = Case(4, 32, 16, 64, 48, 2, 7)
    expected = [case.run(native, absorb) for absorb in (True, False)]
    case.rows = torch.cat((case.rows, torch.full((40, case.rows.shape[1]), 0xFF, dtype=torch.uint8)))  # scales are NaN
    for absorb, result in zip((True, False), expected, strict=True):
        assert torch.equal(case.run(native, absorb), result)


@pytest.mark.parametrize("tokens", [12, 40])
def test_a_token_does_not_depend_on_other_tokens(native, tokens):
    """Prefill in any chunks gives the same as token by token, as with a bf16 cache."""
    case = Case(16, 32, 16, 64, 48, tokens, 500)
    whole = case.run(native, True)
    for start, end in ((0, 1), (3, 8), (11, 12)):
        part = case.tokens(start, end).run(native, True)
        assert torch.equal(part, whole[start:end]) or native.variant == "portable"
        assert error(part, whole[start:end]) < 1e-6


def test_the_memory_of_the_cache():
    config = parse_config({"model_type": "deepseek_v2", **TINY})
    for kind, row in ((CacheDtype.BF16, 2 * 80), (CacheDtype.FP32, 4 * 80), (CacheDtype.INT8, 64 + 2 + 32)):
        cache = LatentCache(config, 70, kind)
        assert cache.nbytes == 128 * bytes_per_token(config, kind) == 128 * 3 * row  # in whole blocks


@pytest.mark.parametrize("variant", [*cpu.usable(), cpu.REFERENCE])
def test_nano_with_an_8_bit_cache(variant):
    """Its best token is that of the bf16 cache unless the two best are close; the plan accounts for the cache."""
    with kernels(variant):
        exact, ours = dsv2_local.load(context=256), dsv2_local.load(context=256, cache_dtype="int8")
        assert ours.plan.ram.parts["KV cache"] == ours.engine.cache.nbytes == 256 * 6 * (128 + 4 + 128)
        ids = exact.tokenizer.encode_chat([{"role": "user", "content": "What is a violin?"}])
        ids += [c.token_id for c in exact.generate(ids, max_tokens=24, temperature=0) if c.token_id is not None]
        theirs, logits = exact.logits(ids), ours.logits(ids)
        best = theirs.topk(2, dim=1).values
        clear = best[:, 0] - best[:, 1] > 0.5
        assert clear.sum() > 10
        assert torch.equal(logits.argmax(1)[clear], theirs.argmax(1)[clear])
        assert 0 < (logits - theirs).norm() / theirs.norm() < 0.08
        never_end = dict.fromkeys(ours._end_tokens, -100.0)
        steps = list(ours.generate(ids[:9], max_tokens=12, temperature=0, logit_bias=never_end))  # replays, if recorded
        assert len([step for step in steps if step.token_id is not None]) == 12


def test_unknown_cache_types_are_refused():
    with pytest.raises(InputError, match="cache type 'fp8' is not one of bf16, int8"):
        dsv2_local.load(cache_dtype="fp8")


def test_the_reference_in_fp32_stores_fp32_instead_of_bf16():
    assert ops.cache_dtype(Format.INT8, torch.float32, CacheDtype.INT8) is CacheDtype.INT8
    with kernels(cpu.REFERENCE):
        assert ops.cache_dtype(Format.INT8, torch.float32, CacheDtype.BF16) is CacheDtype.FP32
        assert ops.cache_dtype(Format.INT8, torch.bfloat16, CacheDtype.BF16) is CacheDtype.BF16

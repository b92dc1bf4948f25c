"""The Triton kernels on a GPU with the shapes of V2 and V2-Lite, and what needs a GPU: warp shuffles, CUDA graphs."""

import pytest
import torch

from dsv2_local.kernels.format import CacheDtype, ExpertLayout, Format
from dsv2_local.kernels.metadata import AttentionMetadata

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
triton = pytest.importorskip("triton")

from dsv2_local.kernels import triton as kernels  # noqa: E402 - may be missing
from dsv2_local.kernels.triton.dequantize import GATHER, SHUFFLE, level_table  # noqa: E402
from tests import triton_checks as check  # noqa: E402
from tests.test_triton import _all_codes  # noqa: E402

FP32, BF16 = torch.float32, torch.bfloat16
FORMATS = [Format.NF4, Format.INT8]
LITE, V2 = (16, 128, 64, 512, 128), (128, 128, 64, 512, 128)  # H, N, P, C, V


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("lookup", [GATHER, SHUFFLE])
def test_every_way_of_looking_up_a_level_is_exact(lookup):
    codes = torch.arange(32) % 16
    shifts = torch.tensor([0, 8, 16, 24, 4, 12, 20, 28])
    words = (codes.view(4, 8) << shifts).sum(1).to(torch.int32).cuda()
    table, out = level_table(words.device), torch.full((32,), float("nan"), device="cuda")
    _all_codes[(1,)](words, table, out, lookup)
    assert torch.equal(out, table[codes.cuda()])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(576, 2048), (2048, 1408), (1536, 5120), (5120, 16384), (10944, 2048)])
@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 300])
def test_linear(format, rows, cols, tokens):
    check.linear("cuda", BF16, format, rows, cols, tokens)


@pytest.mark.parametrize("tokens", [1, 40])
def test_linear_in_fp32(tokens):
    check.linear("cuda", FP32, Format.NF4, 576, 2048, tokens)


@pytest.mark.parametrize("format", FORMATS)
def test_dequantised_weights_are_exact(format):
    check.dequantized_and_embedded("cuda", format, 1408, 2048)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("hidden", "inner"), [(2048, 2816), (5120, 3072)])
@pytest.mark.parametrize("tokens", [1, 100])
def test_swiglu(format, hidden, inner, tokens):
    check.swiglu("cuda", BF16, format, hidden, inner, tokens)


@pytest.mark.parametrize("format", [*FORMATS, Format.BF16])
@pytest.mark.parametrize(("hidden", "inner"), [(2048, 1408), (5120, 1536)])
@pytest.mark.parametrize("tokens", [1, 5, 16, 200])
def test_experts(format, hidden, inner, tokens):
    check.experts("cuda", BF16, format, hidden, inner, tokens, slots=10, chosen=6)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_combine(dtype):
    check.combined("cuda", dtype, 300, 5120)


@pytest.mark.parametrize("shape", [LITE, V2])
@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize(("tokens", "cached"), [(1, 0), (1, 4000), (4, 800), (130, 500)])
def test_attention(shape, absorb, tokens, cached):
    check.attention("cuda", BF16, (Format.INT8, Format.INT8), shape, [(tokens, cached, absorb)])


@pytest.mark.parametrize("shape", [LITE, V2])
@pytest.mark.parametrize("absorb", [True, False])
def test_attention_over_8_bit_latents(shape, absorb):
    sequences = [(1 if absorb else 200, 1000, absorb)]
    check.attention("cuda", BF16, (Format.INT8, Format.INT8), shape, sequences, CacheDtype.INT8)


@pytest.mark.parametrize("shape", [LITE, V2])
@pytest.mark.parametrize("kind", [CacheDtype.BF16, CacheDtype.INT8])
def test_attention_of_several_sequences(shape, kind):
    formats = (Format.INT8, Format.INT8)
    check.attention("cuda", BF16, formats, shape, [(1, 100 + 301 * i, True) for i in range(16)], kind)
    check.attention("cuda", BF16, formats, shape, [(5, 900, True), (1, 63, True), (2, 0, True)], kind)
    check.attention("cuda", BF16, formats, shape, [(1, 3000, True), (1, 5, True), (150, 500, False)], kind)


@pytest.mark.parametrize("shape", [LITE, V2])
def test_company_changes_no_bit_of_a_sequence(shape):
    check.attention_in_company("cuda", BF16, shape, 1, alone=False)


def test_latents_are_written_in_8_bits():
    check.bytes_of_latents("cuda", 512, 64)


@pytest.mark.parametrize("absorb", [True, False])
def test_attention_in_fp32(absorb):
    check.attention("cuda", FP32, (Format.INT8, Format.INT8), LITE, [(3, 100, absorb)])


def test_rows():
    check.rows("cuda", [40], 5120, 512, 64)
    check.rows("cuda", [1] * 16, 5120, 512, 64)


def test_route():
    check.route("cuda", 300, 160, 6, topk_method="group_limited_greedy", n_group=8, topk_group=3)
    check.route("cuda", 300, 64, 6)


def test_a_captured_step_is_replayed_at_the_next_position():
    """Slots, tokens and the block table are read on the device: they may change after the capture."""
    H, N, P, C, V = LITE
    layout = ExpertLayout(Format.NF4, 512, 256)
    records = torch.stack([check.record(layout) for _ in range(6)]).cuda()
    w_uk, w_uv = (check.on("cuda", check.matrix(Format.INT8, *shape)) for shape in ((H * C, N), (H * V, C)))
    x, q = torch.randn(1, 512).cuda().bfloat16(), torch.randn(1, H, N + P).cuda().bfloat16()
    latents, kv_a = torch.randn(2, 64, C + P).cuda().bfloat16(), torch.randn(1, C + P).cuda().bfloat16()
    norm, rotation = torch.ones(C).cuda(), torch.ones(1, P // 2, dtype=torch.complex64).cuda()
    ids, weights = torch.arange(3).cuda()[None], torch.rand(1, 3).cuda()
    metadata = AttentionMetadata.of(torch.tensor([[63, 1, 0]]).cuda(), [1], [True])

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        kernels.write_latents(latents, metadata, kv_a, norm, 1e-6, rotation)
        attended = kernels.attention(q, rotation, latents, metadata, w_uk, w_uv, 0.1)
        return attended, kernels.experts(x, records, layout, ids, weights)

    step()  # compiles and tunes the kernels, which is not possible during capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    metadata.block_tables[0, 0] += 1
    ids += 3
    graph.replay()
    torch.cuda.synchronize()
    for ours, exact in zip(captured, step(), strict=True):
        assert torch.equal(ours, exact)


@pytest.mark.parametrize(("temperature", "margin"), [(1.0, 0.0), (0.7, 5.0), (2.0, 60.0)])
def test_top_candidates(temperature, margin):
    check.top_candidates("cuda", 102_400, temperature, margin)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("rows", [1, 16])
def test_the_input_of_experts_reaches_ram(dtype, rows):
    check.sent_to_host("cuda", dtype, rows, 5120, 6)

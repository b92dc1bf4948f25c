"""The Triton kernels, interpreted on the CPU, against the PyTorch reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv2_local.kernels.format import CacheDtype, Format

tl = pytest.importorskip("triton.language")

from dsv2_local.kernels.triton.dequantize import GATHER, level_table, unpack  # noqa: E402 - may be missing
from dsv2_local.kernels.triton.experts import group_pairs  # noqa: E402
from dsv2_local.kernels.triton.linear import _STREAM_CONFIGS, _configs_to_try  # noqa: E402
from tests import triton_checks as check  # noqa: E402

import triton  # noqa: E402 isort: skip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16 = torch.float32, torch.bfloat16
FORMATS = [Format.NF4, Format.INT8]


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    """Fill new tensors with NaN, so that a number which a kernel failed to write shows."""
    torch.manual_seed(0)

    def poisoned(make):
        def made(*args, **kwargs) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    level_table.cache_clear()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(40, 100), (8, 2048), (13, 70)])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_linear(format, rows, cols, tokens):
    check.linear(DEVICE, FP32, format, rows, cols, tokens)


@pytest.mark.parametrize("format", [*FORMATS, Format.BF16])
@pytest.mark.parametrize("tokens", [1, 20])
def test_linear_in_bf16(format, tokens):
    check.linear(DEVICE, BF16, format, 40, 200, tokens)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (13, 300)])
def test_dequantised_weights_are_exact(format, rows, cols):
    check.dequantized_and_embedded(DEVICE, format, rows, cols)


@triton.jit
def _all_codes(words, table, out, LOOKUP: tl.constexpr):
    i = tl.arange(0, 4)
    values = unpack(tl.load(words + i), table, True, LOOKUP)
    for column in tl.static_range(8):
        tl.store(out + i * 8 + column, values[column])


@pytest.mark.parametrize("lookup", [GATHER])
def test_every_way_of_looking_up_a_level_is_exact(lookup):
    """The interpreter cannot run SHUFFLE; tests/gpu tests it."""
    codes = torch.arange(32) % 16
    shifts = torch.tensor([0, 8, 16, 24, 4, 12, 20, 28])  # of columns 0 to 7, kernels/layout.py
    words = (codes.view(4, 8) << shifts).sum(1).to(torch.int32).to(DEVICE)
    table = level_table(words.device)
    out = torch.empty(32, device=DEVICE)
    _all_codes[(1,)](words, table, out, lookup)
    assert torch.equal(out, table[codes])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_swiglu(format, tokens):
    check.swiglu(DEVICE, FP32, format, 100, 44, tokens)


@pytest.mark.parametrize(("nf4", "pair", "blocks"), [(True, True, 32), (False, False, 32), (False, True, 16)])
def test_short_prompts_take_a_configuration_that_fits_in_registers(nf4, pair, blocks):
    """What `tools/compile_triton.py` shows: with 32 blocks, int8 pairs need 3 KB of local memory per thread."""
    given = {"rows": 2816, "cols": 2048, "COUNT": 1, "BT": 4, "NF4": nf4, "slots": None}
    given["up_words"] = torch.empty(0) if pair else None
    (config,) = _configs_to_try(_STREAM_CONFIGS, given)
    assert config.kwargs == {"BG": 1, "KB": blocks}


@pytest.mark.parametrize("format", [*FORMATS, Format.BF16])
@pytest.mark.parametrize("tokens", [1, 25, 60])
def test_experts(format, tokens):
    check.experts(DEVICE, FP32, format, 100, 44, tokens, 5)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 25])
def test_experts_in_bf16(tokens):
    check.experts(DEVICE, BF16, Format.NF4, 100, 44, tokens, 5)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("skipped", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("pairs", "count", "block"),
    [(1, 1, 16), (200, 7, 16), (33, 90, 16), (64, 2, 64), (96, 3, 16), (128, 40, 16), (40, 1, 16)],
)
def test_grouped_pairs(pairs, count, block, skipped, known):
    """Every pair is in exactly one piece, that of its slot, unless it has none; no piece is larger than a block."""
    slots = torch.where(torch.rand(pairs) < skipped, -1, torch.randint(0, count, (pairs,)) // 2)
    distinct = max(1, len(slots[slots >= 0].unique())) if known else min(pairs, count)
    tokens = torch.randint(0, 9, (pairs,))
    sources, order, pieces = group_pairs(tokens.to(DEVICE), slots.to(DEVICE), count, block, distinct)
    assert torch.equal(sources.cpu(), tokens[order.cpu()])
    found = [(slot, int(order[place])) for slot, first, last in pieces.tolist() for place in range(first, last)]
    assert sorted(found) == sorted((slot, pair) for pair, slot in enumerate(slots.tolist()) if slot >= 0)
    assert sorted(order.tolist()) == list(range(pairs))
    assert (pieces[:, 2] - pieces[:, 1]).max() <= block
    assert (pieces[:, 0] >= 0).all()
    assert (pieces[:, 0] < count).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("rows", "hidden", "chosen"), [(1, 1100, 6), (3, 1100, 6), (16, 8, 70)])
def test_the_input_of_experts_reaches_ram(dtype, rows, hidden, chosen):
    check.sent_to_host(DEVICE, dtype, rows, hidden, chosen)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_combine(dtype):
    check.combined(DEVICE, dtype, 5, 100)


SMALL, MANY_HEADS = (16, 8, 8, 40, 24), (128, 8, 4, 16, 8)  # H, N, P, C, V


@pytest.mark.slow
@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize(("tokens", "cached"), [(1, 70), (3, 100), (5, 0)])
def test_attention(tokens, cached, absorb):
    check.attention(DEVICE, FP32, (Format.INT8, Format.NF4), SMALL, [(tokens, cached, absorb)])


@pytest.mark.parametrize(
    "sequences",
    [
        [(1, 70, True), (1, 0, True), (1, 131, True)],
        [(5, 3, True), (1, 64, True), (0, 9, True), (2, 60, True)],  # with drafts, and one without tokens
        [(1, 20, True), (1, 66, True), (9, 61, False), (7, 0, False), (2, 5, True)],
    ],
)
@pytest.mark.parametrize("kind", [CacheDtype.BF16, CacheDtype.INT8])
def test_attention_of_several_sequences(sequences, kind):
    check.attention(DEVICE, FP32, (Format.INT8, Format.INT8), SMALL, sequences, kind)


def test_company_changes_no_bit_of_a_sequence():
    check.attention_in_company(DEVICE, FP32, SMALL, 1, alone=True)
    check.attention_in_company(DEVICE, FP32, SMALL, 3, alone=False)


@pytest.mark.slow
def test_attention_of_128_heads():
    check.attention(DEVICE, FP32, (Format.INT8, Format.BF16), MANY_HEADS, [(1, 40, True)])


@pytest.mark.parametrize("absorb", [True, False])
def test_attention_in_bf16(absorb):
    check.attention(DEVICE, BF16, (Format.INT8, Format.INT8), SMALL, [(2, 40, absorb)])


@pytest.mark.parametrize("absorb", [True, False])
def test_attention_over_8_bit_latents(absorb):
    check.attention(DEVICE, FP32, (Format.INT8, Format.INT8), SMALL, [(3, 70, absorb)], CacheDtype.INT8)


@pytest.mark.parametrize("C", [32, 192])
def test_latents_are_written_in_8_bits(C):
    check.bytes_of_latents(DEVICE, C, 16)


def test_attention_by_groups_of_heads(monkeypatch):
    monkeypatch.setattr(sys.modules["dsv2_local.kernels.triton.attention"], "REBUILT_NUMBERS", 20_000)
    check.attention(DEVICE, FP32, (Format.INT8, Format.INT8), SMALL, [(2, 20, False)])


@pytest.mark.parametrize("counts", [[1], [6], [1, 0, 5, 1], [1] * 17])
def test_rows(counts):
    check.rows(DEVICE, counts, 100, 72, 16)


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": True}])
@pytest.mark.parametrize("grouped", [{}, {"topk_method": "group_limited_greedy", "n_group": 6, "topk_group": 2}])
def test_route(changes, grouped):
    check.route(DEVICE, 7, 30, 5, **changes, **grouped)


@pytest.mark.slow
def test_all_kernels_compile_for_a_gpu():
    """The interpreter accepts code that the compiler rejects; compiling needs no GPU."""
    tool = Path(__file__).parent.parent / "tools/compile_triton.py"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, tool, "--quick"], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stream" in done.stdout


@pytest.mark.parametrize(("vocab", "temperature", "margin"), [(100, 1.0, 0.0), (5000, 0.7, 6.0), (5000, 2.0, 60.0)])
def test_top_candidates(vocab, temperature, margin):
    check.top_candidates(DEVICE, vocab, temperature, margin)

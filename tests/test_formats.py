"""nf4 and int8: the layout of stored matrices, the quantisation error, and a comparison with bitsandbytes."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from dsv2_local.kernels.format import ExpertLayout, Format, matrix_nbytes
from dsv2_local.kernels.layout import NF4_LEVELS, Matrix, expert_matrices, pack_int8, pack_nf4, unpack_int8, unpack_nf4
from dsv2_local.kernels.reference import dequantize, embedding, linear
from dsv2_local.quant import int8, nf4

SHAPES = [(64, 128), (8, 64), (1, 1), (13, 100), (130, 65)]


def gaussian(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    return float((approximate - exact).norm() / exact.norm())


def dequantize_by_definition(matrix: Matrix) -> Tensor:
    """Dequantise weight by weight, in Python, as the docstring of `kernels.layout` describes."""
    assert matrix.scales is not None
    out = torch.empty(matrix.rows, matrix.cols)
    for r in range(matrix.rows):
        for c in range(matrix.cols):
            group, lane, block, k = r // 8, r % 8, c // 64, c % 64
            if matrix.format is Format.NF4:
                byte = int(matrix.codes[group, block, k // 8, lane, k % 4])
                value = NF4_LEVELS[byte >> 4 if k % 8 >= 4 else byte & 15]
            else:
                value = float(matrix.codes[group, block, k // 4, lane, k % 4])
            out[r, c] = value * float(matrix.scales[group, block, lane])
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", [nf4, int8])
def test_stored_matrices_follow_the_layout(format, shape):
    matrix = format.quantize(gaussian(*shape))
    assert torch.equal(dequantize(matrix), dequantize_by_definition(matrix))
    assert sum(part.nbytes for part in matrix.parts) == matrix_nbytes(matrix.format, *shape)


def test_unpacking_inverts_packing():
    codes = torch.randint(0, 16, (3, 8, 2, 64), dtype=torch.uint8)
    assert torch.equal(unpack_nf4(pack_nf4(codes)), codes)
    signed = torch.randint(-127, 128, (3, 8, 2, 64), dtype=torch.int8)
    assert torch.equal(unpack_int8(pack_int8(signed)), signed)


def test_bitsandbytes_reads_our_codes_as_the_same_numbers():
    matrix = nf4.quantize(gaussian(64, 256))
    assert matrix.scales is not None
    codes = unpack_nf4(matrix.codes).reshape(-1, 2)  # bitsandbytes: row-major, the first code in the high nibble
    absmax = matrix.scales.transpose(1, 2).reshape(-1).float()
    state = bnb.QuantState(
        absmax=absmax, shape=torch.Size((64, 256)), dtype=torch.float32, blocksize=64, quant_type="nf4",
        code=bnb.get_4bit_type("nf4", device="cpu"),
    )  # fmt: skip
    theirs = bnb.dequantize_4bit((codes[:, 0] << 4 | codes[:, 1])[:, None].contiguous(), state)
    torch.testing.assert_close(dequantize(matrix), theirs, rtol=1e-6, atol=0)


def test_searched_scales_beat_absmax_scales_on_gaussian_weights():
    weight = gaussian(1024, 1024)
    ours = relative_error(dequantize(nf4.quantize(weight)), weight)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = relative_error(bnb.dequantize_4bit(codes, state), weight)
    assert ours <= 0.0855
    assert theirs == pytest.approx(0.092, abs=0.001)


def test_searched_scales_beat_absmax_scales_on_heavy_tails():
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((512, 512))
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = relative_error(dequantize(nf4.quantize(weight)), weight)
    assert ours < 0.97 * relative_error(bnb.dequantize_4bit(codes, state), weight)


def test_int8_error():
    weight = gaussian(256, 512)
    assert relative_error(dequantize(int8.quantize(weight)), weight) < 0.0062


@pytest.mark.parametrize("format", [nf4, int8])
def test_zero_blocks_and_tiny_weights_stay_finite(format):
    weight = gaussian(16, 128)
    weight[0, :64] = 0
    weight[1, :64] *= 1e-30
    weight[2, :64] = 0.0
    weight[2, 5] = 3.0
    values = dequantize(format.quantize(weight))
    assert values.isfinite().all()
    assert (values[0, :64] == 0).all()
    assert values[2, 5] == pytest.approx(3.0, rel=1e-3)
    assert (values[2, :5] == 0).all()


@pytest.mark.parametrize("format", [nf4, int8])
def test_quantising_slices_of_rows_gives_the_same_bytes(format):
    weight = gaussian(64, 192).bfloat16()
    whole = format.quantize(weight)
    slices = [format.quantize(piece) for piece in weight.split(24)]
    for part, pieces in zip(whole.parts, zip(*(s.parts for s in slices), strict=True), strict=True):
        assert torch.equal(part, torch.cat(pieces))


@pytest.mark.parametrize("format", [nf4, int8])
def test_linear_and_embedding_use_the_dequantised_weights(format):
    matrix = format.quantize(gaussian(40, 72))
    x = torch.randn(5, 72)
    torch.testing.assert_close(linear(x, matrix), x @ dequantize_by_definition(matrix).T)
    ids = torch.tensor([0, 39, 7, 8, 8])
    assert torch.equal(embedding(ids, matrix, torch.float32), dequantize_by_definition(matrix)[ids])


def test_an_expert_record_is_its_three_matrices_end_to_end():
    layout = ExpertLayout(Format.NF4, hidden_size=128, moe_intermediate_size=64)
    matrices = [nf4.quantize(gaussian(*shape, seed=i)) for i, shape in enumerate(layout.shapes.values())]
    record = torch.cat([part.reshape(-1).view(torch.uint8) for matrix in matrices for part in matrix.parts])
    assert len(record) == layout.nbytes
    for viewed, original in zip(expert_matrices(layout, record), matrices, strict=True):
        assert torch.equal(dequantize(viewed), dequantize(original))


def test_bits_per_weight_are_those_of_large_matrices():
    for format in Format:
        assert matrix_nbytes(format, 1536, 5120) * 8 / (1536 * 5120) == format.bits

"""bitsandbytes' kernels on our nf4 layout against the PyTorch reference, and when they are chosen.

Without a GPU bitsandbytes computes on the CPU: other kernels behind the same calls.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator

import bitsandbytes.functional
import pytest
import torch
from torch import Tensor

import dsv2_local
from dsv2_local import llm, workstation
from dsv2_local.kernels import bnb, cpu, ops, reference
from dsv2_local.kernels.format import ExpertLayout, Format
from dsv2_local.kernels.layout import Matrix, pack_nf4
from dsv2_local.offload.simulated_device import SimulatedDevice
from dsv2_local.quant import int8, nf4
from dsv2_local.runtime.cpu_step import CpuStep
from tests.conftest import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16 = torch.float32, torch.bfloat16
GPU = torch.device("cuda")
IDS = list(range(100, 140))
TOLERANCE = {FP32: 1e-5, BF16: 1e-2}  # of one product


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def on_device(matrix: Matrix) -> Matrix:
    return matrix.placed(lambda part: part.to(DEVICE))


def matrix(rows: int, cols: int) -> Matrix:
    return nf4.quantize(torch.randn(rows, cols) / cols**0.5)


def records(layout: ExpertLayout, experts: int) -> Tensor:
    made = [[matrix(*shape) for shape in layout.shapes.values()] for _ in range(experts)]
    parts = [[part.view(-1).view(torch.uint8) for m in expert for part in m.parts] for expert in made]
    return torch.stack([torch.cat(expert) for expert in parts])


def off(ours: Tensor, exact: Tensor) -> float:
    return float((ours.cpu().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (8, 64), (1, 1), (13, 100), (130, 65), (16, 320)])
def test_bitsandbytes_reads_rearranged_matrices_as_the_same_numbers(rows, cols):
    """With random codes everywhere, padding included; large matrices have every code at every place of a tile."""
    groups, blocks = -(-rows // 8), -(-cols // 64)
    codes = torch.randint(0, 16, (groups, 8, blocks, 64), dtype=torch.uint8)
    weight = Matrix(Format.NF4, rows, cols, pack_nf4(codes), torch.rand(groups, blocks, 8).half() + 0.5)
    theirs = bitsandbytes.functional.dequantize_4bit(*bnb.rearranged(on_device(weight), FP32)).cpu()
    assert theirs.shape == (rows, 64 * blocks)
    torch.testing.assert_close(theirs[:, :cols], reference.dequantize(weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("tokens", [1, 2, 70])
@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (13, 100), (576, 1024)])
def test_linear_is_the_product_with_the_dequantised_weights(rows, cols, tokens, dtype):
    weight, x = matrix(rows, cols), torch.randn(tokens, cols).to(dtype)
    ours = bnb.linear(x.to(DEVICE), on_device(weight))
    assert ours.dtype == dtype
    assert off(ours, x.double() @ reference.dequantize(weight).double().T) < TOLERANCE[dtype]


def test_other_formats_are_left_to_the_reference():
    values, x = torch.randn(40, 100), torch.randn(3, 100)
    for weight in (int8.quantize(values), Matrix(Format.BF16, 40, 100, values.bfloat16())):
        assert torch.equal(bnb.linear(x, weight), reference.linear(x, weight))


@pytest.mark.parametrize("tokens", [1, 9])
def test_swiglu(tokens):
    gate, up, down = matrix(44, 100), matrix(44, 100), matrix(100, 44)
    x = torch.randn(tokens, 100)
    ours = bnb.swiglu(x.to(DEVICE), *map(on_device, (gate, up, down)))
    assert off(ours, reference.swiglu(x, gate, up, down)) < 2 * TOLERANCE[FP32]


@pytest.mark.parametrize("tokens", [1, 9])
def test_experts(tokens, monkeypatch):
    layout = ExpertLayout(Format.NF4, 100, 44)
    data, x, weights = records(layout, 6), torch.randn(tokens, 100), torch.rand(tokens, 3)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(tokens)])
    pairs = torch.arange(tokens).repeat_interleave(3), ids.flatten()
    exact, outputs = reference.experts(x, data, layout, ids, weights), torch.empty(3 * tokens, 100)
    reference.expert_outputs(x, data, layout, *pairs, outputs)
    monkeypatch.setattr(reference, "unpack_nf4", None)  # no product may use the reference
    ours, single = bnb.experts(*on(x, data), layout, *on(ids, weights)), torch.empty_like(outputs, device=DEVICE)
    bnb.expert_outputs(*on(x, data), layout, *on(*pairs), single)
    assert off(ours, exact) < 2 * TOLERANCE[FP32]
    assert off(single, outputs) < 2 * TOLERANCE[FP32]


def on(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def test_nano_computes_the_same_as_on_the_reference(monkeypatch):
    with kernels(cpu.REFERENCE):
        exact = dsv2_local.load(device="cpu").logits(IDS)
    monkeypatch.setattr(reference, "unpack_nf4", None)
    with kernels(cpu.BITSANDBYTES):
        assert ops.variant() == cpu.BITSANDBYTES
        model = dsv2_local.load(device="cpu")
        read = model.logits(IDS)
        step = model.engine.decode_step
        assert isinstance(step, CpuStep)
        sequence = model.engine.cache.new_sequence()
        stepped = torch.cat([step.run([(sequence, [token])]).clone() for token in IDS])
    assert off(read, exact) < 1e-4
    assert off(stepped, exact) < 1e-4


@pytest.fixture
def without(monkeypatch) -> Iterator[Callable[..., None]]:
    """A function that makes the named packages look as if they were not installed."""

    def hide(*missing: str) -> None:
        monkeypatch.setattr(ops, "find_spec", lambda name: None if name in missing else object())
        ops._installed.cache_clear()

    yield hide
    monkeypatch.undo()
    ops._installed.cache_clear()


def test_bitsandbytes_is_chosen_on_gpus_without_triton(without):
    x = torch.empty(1, 64, device="meta")
    without()
    assert ops._on_gpus() == cpu.TRITON
    assert ops.capturable(GPU)
    without("triton")
    assert ops._kernels(x, Format.NF4) is bnb
    assert not ops.capturable(GPU)
    without("triton", "bitsandbytes")
    assert ops._kernels(x, Format.NF4) is reference
    with kernels(cpu.BITSANDBYTES):
        assert ops._kernels(x) is bnb
        assert ops._kernels(torch.empty(1, 64)) is bnb


def test_a_notice_names_the_kernels_that_replace_triton(without):
    without()
    assert ops.gpu_notice(GPU) is None
    without("triton")
    assert "bitsandbytes' 4-bit kernels" in (ops.gpu_notice(GPU) or "")
    without("triton", "bitsandbytes")
    assert "plain PyTorch computes" in (ops.gpu_notice(GPU) or "")
    assert ops.gpu_notice(ops.RAM) is None


def test_a_model_on_gpus_has_the_notice_once(monkeypatch):
    monkeypatch.setattr(workstation, "find_devices", lambda names: [SimulatedDevice(capacity=2 << 30)])
    monkeypatch.setattr(ops, "gpu_notice", lambda device: f"slow on {device}")
    with dsv2_local.load(device="cuda") as model:
        assert model.notes.count("slow on cpu") == 1


TOO_OLD = "its compute capability is 7.5"


@pytest.mark.parametrize(
    ("missing", "capability", "reason"),
    [((), (8, 0), None), (("triton",), (9, 0), "Triton is not installed"), ((), (7, 5), TOO_OLD)],
)
def test_auto_skips_gpus_that_triton_cannot_use_with_a_notice(monkeypatch, without, missing, capability, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capability)
    without(*missing)
    assert (workstation.passed_over() or "").startswith(reason or "")
    if reason:
        (note,) = llm.load().notes
        assert note.startswith(f"the GPU is not used: {reason}")
    else:
        assert workstation.passed_over() is None


@pytest.mark.slow
def test_the_cpu_needs_no_bitsandbytes():
    code = "import sys, dsv2_local; dsv2_local.load(device='cpu').logits([1]); sys.exit('bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

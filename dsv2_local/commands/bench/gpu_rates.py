"""The limits of a machine with GPUs: RAM, the PCIe link, GPU memory, and matrix products on both sides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean, median
from time import perf_counter

import torch
from torch import Tensor

from dsv2_local.commands.bench import hardware
from dsv2_local.commands.bench.hardware import Reader
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import Format, matrix_nbytes
from dsv2_local.kernels.layout import Matrix
from dsv2_local.offload.device import Device
from dsv2_local.offload.plan_request import Rates

LINK_BYTES = 256 << 20  # of one copy over the PCIe link
MEMORY_BYTES = 1 << 30  # that a pass over GPU memory reads, and that it writes
MATRIX = 8192  # rows and columns of the GPU's matrix product
CPU_MATRIX, CPU_TOKENS = 4096, 512  # rows and columns of the nf4 matrix that the CPU multiplies, and by how many tokens
REPEATS = 10  # of each measurement on the GPU


@dataclass(frozen=True)
class MachineRates:
    """What the machine's parts reach by themselves; they correspond to `offload.plan_request.Rates`.

    Attributes:
        read_gb_s: reading RAM with the threads of the CPU kernels.
        link_gb_s: copies from page-locked RAM to GPU memory.
        gpu_gb_s: a GPU kernel that adds 1 to a large tensor, bytes read and written.
        matmul_gflops: the CPU kernels' product of a prompt and an nf4 matrix.
        gpu_matmul_gflops: torch's bf16 matrix product on the GPU.
        threads, kernels: of the CPU.
    """

    read_gb_s: float
    link_gb_s: float
    gpu_gb_s: float
    matmul_gflops: float
    gpu_matmul_gflops: float
    threads: int
    kernels: str

    def known_to(self, rates: Rates) -> Rates:
        """`rates` with what was measured here; matrix products only if they were not known from a model's prefill."""
        return Rates(
            ram=self.read_gb_s, link=self.link_gb_s, vram=self.gpu_gb_s, disk=rates.disk,
            cpu_gflops=self.matmul_gflops, gpu_gflops=self.gpu_matmul_gflops,
        )  # fmt: skip


def measure(device: Device, threads: int, records: Sequence[Tensor], locked: bool, read_bytes: int) -> MachineRates:
    """Measure the machine before a model is placed, while the GPU's memory is free.

    Args:
        device: the GPU.
        threads: threads of the CPU kernels.
        records: experts in RAM, uint8 [E, record bytes]; empty: there are none, and buffers are read and copied.
        locked: whether they are page-locked.
        read_bytes: minimum bytes of a pass over RAM, more than the caches hold.
    """
    reader = Reader(records, read_bytes, threads)
    reader.gb_s()
    passes, start = list[float](), perf_counter()
    while not passes or perf_counter() - start < hardware.FILLED_SECONDS:
        passes.append(reader.gb_s())
    del reader
    source = records[0].view(-1) if locked else device.page_locked((LINK_BYTES,), torch.uint8)
    measured = MachineRates(
        harmonic_mean(passes), _link(device, source[:LINK_BYTES]), _memory(device),
        _cpu_product(), _matmul(device), threads, ops.variant(),
    )  # fmt: skip
    free_cached(device)
    return measured


def seconds_of(device: Device, work: Callable[[], object], repeats: int) -> float:
    """Mean seconds of `work`, which launches kernels on the device, when it is launched `repeats` times in a row."""
    device.synchronize()
    start = perf_counter()
    for _ in range(repeats):
        work()
    device.synchronize()
    return (perf_counter() - start) / repeats


def free_cached(device: Device) -> None:
    """Return the memory of freed tensors, and the workspace of matrix products, which torch keeps, to the GPU."""
    if device.torch_device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _link(device: Device, source: Tensor) -> float:
    target, seconds = torch.empty_like(source, device=device.torch_device), list[float]()
    for _ in range(REPEATS):
        event = device.copy([target], [source])
        event.wait()
        seconds.append(event.seconds)
    return source.nbytes / 1e9 / median(seconds)


def _memory(device: Device) -> float:
    a = torch.ones(min(MEMORY_BYTES, device.free // 8) // 4, device=device.torch_device)
    b = torch.empty_like(a)
    torch.add(a, 1, out=b)
    return 2 * a.nbytes / 1e9 / seconds_of(device, lambda: torch.add(a, 1, out=b), REPEATS)


def _cpu_product() -> float:
    nbytes = matrix_nbytes(Format.NF4, CPU_MATRIX, CPU_MATRIX)
    matrix = Matrix.from_bytes(Format.NF4, CPU_MATRIX, CPU_MATRIX, torch.randint(256, (nbytes,), dtype=torch.uint8))
    assert matrix.scales is not None
    matrix.scales.uniform_(0.75, 1.25)
    x = torch.randn(CPU_TOKENS, CPU_MATRIX)
    return 2 * CPU_TOKENS * CPU_MATRIX**2 / 1e9 / hardware.best_seconds(lambda: ops.linear(x, matrix))


def _matmul(device: Device) -> float:
    a, b = torch.rand(2, MATRIX, MATRIX, device=device.torch_device, dtype=torch.bfloat16)
    torch.mm(a, b)
    return 2 * MATRIX**3 / 1e9 / seconds_of(device, lambda: torch.mm(a, b), REPEATS)

"""What the machine can do at best, measured with the threads that the kernels use: read memory, multiply matrices."""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import torch

from dsv2_local import random_weights
from dsv2_local.kernels import cpu

FILLED_SECONDS = 1.0  # what takes less is repeated until it took this
MATMUL_SIZE = 2048


def last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of all caches of the highest level together; 0 where the system does not tell."""
    found: dict[int, dict[str, int]] = defaultdict(dict)  # level -> the CPUs that share a cache -> its bytes
    for index in root.glob("cpu[0-9]*/cache/index*"):
        with suppress(OSError, ValueError):
            size = int((index / "size").read_text().strip().removesuffix("K")) << 10
            found[int((index / "level").read_text())][(index / "shared_cpu_list").read_text()] = size
    return sum(found[max(found)].values()) if found else 0


class Reader:
    """A buffer in memory that no cache holds, to be read and nothing done with it: what decoding could reach."""

    def __init__(self, nbytes: int, threads: int) -> None:
        """`nbytes` should be several times the caches' size; all of them are written."""
        self._buffer = random_weights.empty(nbytes)
        # Written by as many threads as read it, as weights are: on two NUMA nodes one would put all of it on its own.
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda piece: piece.fill_(1), self._buffer.chunk(threads)))

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def seconds(self) -> float:
        """Read the whole buffer once, with the threads of the kernels."""
        native, start = cpu.kernels(), perf_counter()
        if native:
            native.read(self._buffer)
        else:
            self._buffer.view(torch.int64).sum()
        return perf_counter() - start


def matmul_rate(threads: int) -> float:
    """GFLOP/s of torch's product of square fp32 matrices, the best of several."""
    a, b = torch.rand(2, MATMUL_SIZE, MATMUL_SIZE)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return 2 * MATMUL_SIZE**3 / 1e9 / _best_seconds(lambda: torch.mm(a, b))
    finally:
        torch.set_num_threads(before)


def _best_seconds(work: Callable[[], object]) -> float:
    """The shortest time of three runs or more, until they have filled `FILLED_SECONDS`; the first does not count."""
    work()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < FILLED_SECONDS:
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return min(seconds)


def forget_peak() -> None:
    """Make `peak_bytes` begin anew; an old kernel may refuse."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that this process held (VmHWM; ru_maxrss would begin with the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0

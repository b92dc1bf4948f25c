"""The limits of the machine, measured with the kernels' threads: memory bandwidth and matrix multiplication."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from dsv2_local.kernels import ops
from dsv2_local.runtime.cache import allocate_in_ram

FILLED_SECONDS = 1.0  # a shorter measurement is repeated until all runs together have taken this long
MATMUL_SIZE = 2048  # rows and columns


def last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Total bytes of all CPU caches of the highest level; 0 if the system does not report them."""
    found: dict[int, dict[str, int]] = defaultdict(dict)  # by level and by the CPUs that share the cache: its bytes
    for index in root.glob("cpu[0-9]*/cache/index*"):
        with suppress(OSError, ValueError):
            size = int((index / "size").read_text().strip().removesuffix("K")) << 10
            found[int((index / "level").read_text())][(index / "shared_cpu_list").read_text()] = size
    return sum(found[max(found)].values()) if found else 0


class Reader:
    """Measures memory bandwidth, the limit of decoding, by reading memory with the kernels' threads.

    It reads the weights themselves if they are too large for the caches, since two buffers of one machine may be in
    memory of different speed.

    Attributes:
        buffer_bytes: size of the buffer that is read instead of the weights; 0 if there is none.
    """

    def __init__(self, weights: Sequence[Tensor], nbytes: int, threads: int) -> None:
        """Read at least `nbytes` per pass: from `weights` if they have as many, else from a new buffer."""
        self.buffer_bytes = 0 if sum(part.nbytes for part in weights) >= nbytes else nbytes
        if self.buffer_bytes:
            buffer = allocate_in_ram(nbytes)
            # Written by as many threads as read it, like weights: one thread would put it all on its own NUMA node.
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda piece: piece.fill_(1), buffer.chunk(threads)))
            weights = [buffer]
        self._parts, self._least = cycle(weights), nbytes

    def gb_s(self) -> float:
        """Make a pass, which begins where the last one ended; returns its bandwidth in GB/s."""
        done, start = 0, perf_counter()
        while done < self._least:
            part = next(self._parts)
            ops.read(part.view(-1))
            done += part.nbytes
        return done / 1e9 / (perf_counter() - start)


def matmul_rate(threads: int) -> float:
    """GFLOP/s of torch's product of square fp32 matrices; the best of several runs."""
    a, b = torch.rand(2, MATMUL_SIZE, MATMUL_SIZE)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return 2 * MATMUL_SIZE**3 / 1e9 / best_seconds(lambda: torch.mm(a, b))
    finally:
        torch.set_num_threads(before)


def best_seconds(work: Callable[[], object]) -> float:
    """The shortest of at least three runs, which together take `FILLED_SECONDS`; a first run does not count."""
    work()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < FILLED_SECONDS:
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return min(seconds)


def forget_peak() -> None:
    """Reset the peak that `peak_bytes` returns; old Linux kernels may refuse."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak resident memory of this process in bytes (VmHWM; ru_maxrss would include the parent's peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0

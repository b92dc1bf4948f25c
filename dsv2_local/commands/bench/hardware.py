"""What the machine can do at best, measured with the threads that the kernels use: read memory, multiply matrices."""

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
    """Reads memory with the threads of the kernels and does nothing with it: what decoding could reach.

    It reads the weights where that is enough memory for no cache to hold: two buffers of one machine may lie in memory
    of different speed.
    """

    def __init__(self, weights: Sequence[Tensor], nbytes: int, threads: int) -> None:
        """A pass reads at least `nbytes`: of `weights` if they have as many, else of a buffer, which is written."""
        self.buffer_bytes = 0 if sum(part.nbytes for part in weights) >= nbytes else nbytes
        if self.buffer_bytes:
            buffer = allocate_in_ram(nbytes)
            # By as many threads as read it, as weights are: on two NUMA nodes one would put all of it on its own.
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda piece: piece.fill_(1), buffer.chunk(threads)))
            weights = [buffer]
        self._parts, self._least = cycle(weights), nbytes

    def gb_s(self) -> float:
        """Bandwidth of a pass; the next one goes on where it ended."""
        done, start = 0, perf_counter()
        while done < self._least:
            part = next(self._parts)
            ops.read(part.view(-1))
            done += part.nbytes
        return done / 1e9 / (perf_counter() - start)


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

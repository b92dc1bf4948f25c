"""What kernels are told of the GPU they run on, and the choice among their configurations."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TRIALS, SWEEPS = 10, 10  # of a configuration when it is tuned, and of the L2 cache before each of them


@cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few where kernels are interpreted, so that work is split there too."""
    return 8 if device.type == "cpu" else int(_properties(device).multi_processor_count)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    return 0 if device.type == "cpu" else int(_properties(device).shared_memory_per_block_optin)


Candidates = Callable[..., list[triton.Config]]
"""Configurations, arguments by position and by name -> the configurations to try."""


def tuned(configs: list[triton.Config], key: list[str], candidates: Candidates) -> Any:
    """`triton.autotune` among the candidates for a shape, remembered on disk; interpreted, the first of them."""

    def chosen(*given: Any, **more: Any) -> list[triton.Config]:
        found = candidates(*given, **more)
        return found[:1] if INTERPRETED else found

    prune = {"early_config_prune": chosen}
    return triton.autotune(configs, key, prune, cache_results=not INTERPRETED, do_bench=_cold_times)


def _cold_times(call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    """Quantiles of the milliseconds of a few calls, each of which finds its weights in memory, as a step does.

    The cache is swept so often that the call is queued before its turn comes: Python takes longer to launch a kernel
    than many take to run. Triton's own way takes an eighth of a second for each configuration.
    """
    if INTERPRETED:
        return [0.0 for _ in quantiles]
    device = torch.device("cuda", torch.cuda.current_device())
    sweep = torch.empty(2 * int(_properties(device).L2_cache_size), dtype=torch.uint8, device=device)
    times = []
    for _ in range(TRIALS + 1):
        for _ in range(SWEEPS):
            sweep.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return torch.tensor(times[1:]).quantile(torch.tensor(quantiles)).tolist()


@cache
def early(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch that may begin before the kernel before it has ended (compute capability 9.0 and above)."""
    able = device.type != "cpu" and not INTERPRETED and _properties(device).major >= 9
    return {"EARLY": True, "launch_pdl": True} if able else {"EARLY": False}


@triton.jit
def wait_for_earlier(EARLY: tl.constexpr):
    """Wait for the kernel before this one; only weights may be read, and nothing written, before.

    The next kernel may be launched from then on, so that it in turn waits with its weights at hand.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()

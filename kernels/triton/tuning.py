"""Properties of the GPU, launch options, and autotuning."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TRIALS, SWEEPS = 10, 10  # timed calls per configuration, and times that the L2 cache is overwritten before each call


@cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def processors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU; a few for the interpreter, so that it splits work too."""
    return 8 if device.type == "cpu" else int(_properties(device).multi_processor_count)


def shared_memory(device: torch.device) -> int:
    """The largest number of bytes of shared memory per program."""
    return 0 if device.type == "cpu" else int(_properties(device).shared_memory_per_block_optin)


Candidates = Callable[..., list[triton.Config]]
"""(all configurations, arguments of the launch) -> the configurations to try."""


def tuned(configs: list[triton.Config], key: list[str], candidates: Candidates) -> Any:
    """`triton.autotune` among the candidates for a shape, cached on disk; the interpreter takes the first candidate."""

    def chosen(*given: Any, **more: Any) -> list[triton.Config]:
        found = candidates(*given, **more)
        return found[:1] if INTERPRETED else found

    prune = {"early_config_prune": chosen}
    return triton.autotune(configs, key, prune, cache_results=not INTERPRETED, do_bench=_cold_times)


def _cold_times(call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    """Quantiles of the milliseconds of a few calls with a cold L2 cache, as in a decode step.

    The cache is overwritten several times before each call, so that the call is queued before the GPU gets to it:
    Python takes longer to launch a kernel than many kernels take to run. Triton's own benchmark would take an eighth of
    a second per configuration.
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
def pdl_arguments(device: torch.device) -> dict[str, bool]:
    """Launch arguments for programmatic dependent launch (PDL; compute capability 9.0 and above).

    With PDL a kernel is launched before the previous kernel has ended; see `wait_for_previous_kernel`.
    """
    supported = device.type != "cpu" and not INTERPRETED and _properties(device).major >= 9
    return {"PDL": True, "launch_pdl": True} if supported else {"PDL": False}


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait until the previous kernel has ended; before this, a kernel may read only weights and write nothing.

    From here on the next kernel may be launched, so that it can load its weights while it waits in turn.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

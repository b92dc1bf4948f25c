"""Loads a model for a command, with progress bars and notices about its speed on stderr."""

from pathlib import Path

from dsv2_local import llm
from dsv2_local.commands import process
from dsv2_local.commands.console import ProgressBar, notice
from dsv2_local.kernels import ops
from dsv2_local.llm import LLM
from dsv2_local.options import size


def load(
    model: str | None,
    *,
    context: int | None,
    dtype: str,
    device: str,
    experts: str,
    vram: str | None,
    cache_type: str,
    threads: int | None,
    parallel: int | None = None,
    batch_invariant: bool = False,
    cache_ram: int | None = 0,
    cache_dir: Path | None = None,
    cache_disk: int | None = None,
) -> LLM:
    """Load a model as `llm.load` does; `vram` is a size such as "8GiB", or one per GPU, separated by commas."""
    process.explain_lost_files()
    limits = vram_limits(vram)
    pinning = ProgressBar("copying experts to page-locked RAM")
    compiling = ProgressBar("compiling GPU kernels", unit="steps")
    checking = ProgressBar("comparing files with their checksums")
    with pinning as progress, compiling as preparing, checking as verifying:
        loaded = llm.load(
            model, context=context, dtype=dtype, device=device, experts=experts, vram=limits, cache_dtype=cache_type,
            threads=threads, parallel=parallel, batch_invariant=batch_invariant, progress=progress,
            preparing=preparing, verifying=verifying, cache_ram=cache_ram,
            cache_dir=cache_dir, cache_disk=cache_disk, cache_notice=notice,
        )  # fmt: skip
    for warning in (ops.slow_notice(), loaded.threads.warning, *loaded.notes):
        if warning:
            notice(warning)
    return loaded


def vram_limits(text: str | None) -> list[int] | None:
    """The sizes of --vram in bytes, one per GPU; None: no limit.

    Raises:
        InputError: a part of `text` is not a size.
    """
    return None if text is None else [size("--vram", part) for part in text.split(",")]

"""`dsv2 quantize`: downloads a release if needed, converts it with progress on stderr, and reports the result."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from dsv2_local.architectures.families import load_config
from dsv2_local.architectures.tensors import Kind
from dsv2_local.commands.console import notice
from dsv2_local.machine.homes import expanded
from dsv2_local.machine.numa import spread_memory
from dsv2_local.machine.resources import startable
from dsv2_local.quant.checkpoint import Manifest
from dsv2_local.quant.convert import ConversionProgress, Report, convert, finished_files, place
from dsv2_local.quant.hub import resolve
from dsv2_local.quant.local import require_config
from dsv2_local.quant.schema import Recipe, parameters
from dsv2_local.quant.verify import verify
from dsv2_local.runtime.sampling_params import GenerationConfig
from dsv2_local.text.tokenizer import Tokenizer

SECONDS_A_LINE = 10.0  # between two lines of progress if stderr is not a terminal


def run(
    src: str, dst: Path, *, recipe: Recipe, check: bool, force: bool, revision: str | None, token: str | None
) -> None:
    """Convert `src`, a directory or a hub repository, to the checkpoint directory `dst`.

    Progress goes to stderr. `check` compares the result with the source, and prints a table of errors on stdout.

    Raises:
        Dsv2Error: any kind of error; finished files are kept, and the same call continues from there.
    """
    local = expanded(Path(src)).is_dir()
    source = resolve(src, revision=revision, token=token)
    # The hub's cache names a snapshot's directory after its commit.
    name = source.resolve().name if local else f"{src}@{source.name}"
    dst = place(dst)
    require_config(source)
    _check_small_files(source, dst)
    spread_memory(os.sched_getaffinity(0))  # over the NUMA nodes, since inference reads it from the page cache next
    start = time.perf_counter()
    if finished := finished_files(dst):
        notice(f"continuing an interrupted conversion: {finished} files are finished")
    try:
        with _reporting("converting") as report:
            manifest = convert(source, dst, recipe=recipe, force=force, source_name=name, report=report)
    except KeyboardInterrupt:
        notice("interrupted; the same command continues from here")
        raise
    notice(_closing(dst, manifest, parameters(load_config(dst)), time.perf_counter() - start))
    if check:
        with _reporting("verifying") as report:
            errors = verify(source, dst, report)
        Console().print(_error_table(errors))


def _check_small_files(source: Path, dst: Path) -> None:
    """Read what loading the result will read, so that an error in it is told before hours of work.

    Raises:
        ConfigError: config.json or generation_config.json has an impossible value.
        CheckpointError: a file of the tokenizer does.
    """
    GenerationConfig.load(source, load_config(source).vocab_size)
    if os.path.lexists(source / "tokenizer.json"):
        Tokenizer(source)
    else:
        notice(f"{source} has no tokenizer.json; without it {dst} will take token ids only, not text")


def _closing(dst: Path, manifest: Manifest, weights: int, seconds: float) -> str:
    """The last line of output; bits per weight include scales, padding and file headers."""
    total = sum(record.bytes for record in manifest.files.values())
    stored = sum(record.bytes for name, record in manifest.files.items() if name.endswith(".safetensors"))
    return f"{dst}: {total / 1e9:,.2f} GB, {8 * stored / weights:.2f} bits per weight, {seconds:,.0f} s"


def _error_table(errors: dict[Kind, float]) -> Table:
    table = Table("tensors", title="relative error against the source")
    table.add_column("‖q - w‖ / ‖w‖", justify="right")
    for kind, error in errors.items():
        table.add_row(str(kind), f"{error:.5f}")
    return table


@contextmanager
def _reporting(what: str) -> Iterator[Report]:
    """Report progress on stderr: a bar if it is a terminal, else a line every `SECONDS_A_LINE`."""
    if not sys.stderr.isatty() or not startable(1):
        yield _plain_lines(what)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), DownloadColumn())
    with Bar(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)

        def report(p: ConversionProgress) -> None:
            text = f"{what} {p.tensors:,}/{p.total_tensors:,} tensors"
            bar.update(task, description=text, completed=p.bytes, total=p.total_bytes)

        yield report


def _plain_lines(what: str) -> Report:
    begun = last = time.monotonic()

    def report(p: ConversionProgress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_A_LINE:
            return
        last, rate = now, p.bytes / (now - begun)
        left = (p.total_bytes - p.bytes) / rate if rate else 0.0
        text = f"{what}: {p.tensors:,}/{p.total_tensors:,} tensors, {rate / 1e6:,.0f} MB/s, {left:,.0f} s left"
        notice(text)

    return report

"""`dsv2 bench`: measures how fast this machine runs a model, and the limits of the machine itself.

Decoding a token reads every active weight once, so memory bandwidth limits it; prefill uses each weight for many
tokens, so arithmetic limits it. Both limits are measured in the same run, with the same threads.
"""

import sys
from pathlib import Path
from typing import Any

from dsv2_local import workstation
from dsv2_local.commands.bench import gpu, gpu_report, parallel, report, timing, tracing
from dsv2_local.commands.bench.hardware import Reader, forget_peak, last_level_cache_bytes, matmul_rate, peak_bytes
from dsv2_local.commands.bench.settings import BenchOptions, BenchPlan, settle, use_threads
from dsv2_local.commands.bench.subject import prepare
from dsv2_local.commands.bench.timing import StatusLine
from dsv2_local.commands.console import json_text, notice
from dsv2_local.commands.run_options import gather_prompt
from dsv2_local.errors import InputError, PlanError
from dsv2_local.machine import measurements
from dsv2_local.offload.plan_request import Mode
from dsv2_local.runtime.engine import Engine

__all__ = ["BenchOptions", "measure", "record_trace", "run"]


def run(options: BenchOptions, as_json: bool) -> None:
    """Measure on the GPUs that the options ask for, else on the CPU, and print the result on stdout.

    Raises:
        InputError: an option is not valid, or exceeds the model's context or this machine's memory.
        Dsv2Error: any error of loading the model.
    """
    with StatusLine() as status:
        result, on_gpus = _measured(options, status)
    if on_gpus:
        rates, show = gpu_report.rates(result), gpu_report.show
    else:
        rates, show = report.rates(result, last_level_cache_bytes()), report.show
    measurements.save(rates)
    if as_json:
        sys.stdout.write(json_text(result, indent=2) + "\n")
    else:
        show(result)
    sys.stdout.flush()


def _measured(options: BenchOptions, status: StatusLine) -> tuple[dict[str, Any], bool]:
    """The results, and whether they are those of GPUs; like `llm.load`, a GPU that is too small is not used."""
    if devices := workstation.find_devices(options.device):
        try:
            return gpu.run(options, devices, status), True
        except PlanError as error:
            if options.device != "auto" or options.vram is not None or options.experts is not Mode.AUTO:
                raise
            notice(f"the GPU is not used: {error}")
    return measure(settle(options), status), False


def record_trace(options: BenchOptions, file: Path, text: Path | None) -> None:
    """Write the experts that the tokens of a text (None: standard input) are routed to.

    Raises:
        InputError: there is no text, or the options ask for random weights, whose routing is random too.
    """
    if options.random_weights is not None:
        raise InputError("--record-trace needs a trained model (-m): the routing of --random-weights is random")
    if options.trace is not None:
        raise InputError("--record-trace writes a trace and --trace replays one; drop one of them")
    words = gather_prompt(None, [text] if text else [], sys.stdin)
    with StatusLine() as status:
        tracing.record(options, words, file, status)


def measure(plan: BenchPlan, status: StatusLine) -> dict[str, Any]:
    """All results as plain values: the object that --json prints."""
    threads = use_threads(plan.options.threads, plan.recipe)
    status("measuring the machine")
    matmul = matmul_rate(threads)
    forget_peak()
    subject = prepare(plan, threads, status)
    reader = Reader(subject.records, plan.read_bytes, threads)
    steps, contexts = plan.lengths.decode, plan.lengths.contexts
    context = max(plan.lengths.cache, plan.warm_up_tokens + 1)
    engine = Engine(subject.model, context, plan.cache_dtype)
    timing.prefill(engine, plan.warm_up_tokens, status)
    prefill = [timing.measure_prefill(engine, tokens, status) for tokens in plan.lengths.prompts]
    decode = [timing.measure_decode(engine, context, steps, reader, status) for context in contexts]
    together = parallel.measure_parallel(
        engine, plan.lengths.parallel, contexts[0], plan.lengths.parallel_steps, reader, status
    )
    parts = timing.measure_parts(engine, contexts[0], steps, status)
    machine = report.machine_facts(decode, matmul, threads)
    return {
        "machine": machine,
        "model": report.model_facts(subject, plan.cache_dtype),
        "prefill": [report.prefill_facts(run, subject) for run in prefill],
        "decode": [report.decode_facts(run, subject) for run in decode],
        "parallel": [report.parallel_facts(run, subject) for run in together],
        "predicted": report.prediction(subject, plan.lengths.cache, machine),
        "parts": report.part_facts(parts, steps),
        "peak_rss_bytes": peak_bytes() - reader.buffer_bytes,
        "weight_bytes": subject.weight_bytes,
        **report.cut_facts(plan, decode[0].seconds, parts),
    }

"""What users see when many answers are computed in common steps, on the CPU.

    python benchmarks/batching.py [MODEL] [--only answers,prefix,pause,engine] [--json FILE]
    python benchmarks/batching.py --random-weights deepseek-v2-lite --layers 6

answers  64 chat prompts, all asked at once, with steps of 1, 4 and 16 sequences: tokens per second of all together, and
         the time from asking to the first token. The numbers of sequences take turns; answers must be the same in all.
prefix   16 prompts with a common prefix of 2,000 tokens, asked at once: how many tokens of prompts are computed
pause    the longest time between two tokens of an answer while a prompt of 4,096 tokens is read
engine   the engine's own time for a step of 16 sequences: the model is replaced by logits that are there already

Random weights have random prompts, and no end token.
"""

import argparse
import json
import random
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import dsv2_local
from dsv2_local.architectures import released
from dsv2_local.commands.bench.timing import Stopwatch
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.progress import no_progress
from dsv2_local.quant.schema import Recipe
from dsv2_local.runtime import placement
from dsv2_local.runtime.answer import Answer, GeneratedToken, Request
from dsv2_local.runtime.batch import Part
from dsv2_local.runtime.engine import Engine
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.random_weights import build, first_layers
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.stats import Stats
from dsv2_local.runtime.step import StepResult

WORDS = """
violin river hammer bread piano dog water house tree stone king doctor boat bridge candle carpet chair clock cloud coat
coin cow desert door drum eagle farm feather fish flag flower forest garden glass guitar hat hill horse island jacket
key kitchen ladder lake lamp leaf letter lion market mirror moon mountain needle ocean paper pencil queen rope ship
spoon sun table train window
"""
THINGS = WORDS.split()
GREEDY = SamplingParams(temperature=0)
CONTEXT = 8_192  # tokens of the KV cache, longer than nano was trained for: speed does not depend on the text
PREFIX, PREFIX_PROMPTS, OWN = 2_000, 16, 20  # tokens in common, prompts, and tokens of each prompt after the prefix
LONG_PROMPT = 4_096
RUNNING = 50  # tokens of an answer before the long prompt is asked
STEPS = 300  # of the engine without a model


@dataclass
class Clock:
    """A reader that notes when each token came."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def receive(self, token: GeneratedToken) -> bool:
        self.tokens.append(token.token)
        self.times.append(perf_counter())
        return False

    def end(self, error: BaseException | None) -> None:
        if error:
            raise error


@dataclass(frozen=True)
class Subject:
    """A model, and what to ask it: prompts of token ids, and the tokens that end an answer."""

    name: str
    model: Transformer
    prompts: list[list[int]]
    end_tokens: frozenset[int]

    def engine(self, rows: int = PREFIX_PROMPTS) -> Engine:
        kv_b = self.model.layers[0].self_attn.w_uk.format
        return Engine(self.model, CONTEXT, ops.cache_dtype(kv_b, torch.float32, CacheDtype.BF16), rows=rows)

    def random_prompt(self, tokens: int) -> list[int]:
        return random.choices(range(3, self.model.config.vocab_size), k=tokens)


def converted(model: str | None) -> Subject:
    """A converted model, asked what things are."""
    llm = dsv2_local.load(model, device="cpu", context=2)
    prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": f"What is a {thing}?"}]) for thing in THINGS]
    eos = llm.tokenizer.eos_id
    return Subject(
        llm.name, llm.engine.model, prompts, frozenset({*llm.config.eos_token_id, *([] if eos is None else [eos])})
    )


def made(name: str, layers: int | None) -> Subject:
    """Random weights, asked 32 random tokens at a time."""
    whole = released.read_config(name)
    config = first_layers(whole, layers or whole.num_hidden_layers)
    weights = build(config, Recipe.NF4)
    ops.set_threads(None, weights.layout.format)
    placed = placement.place_in_ram(
        placement.ModelWeights(config, weights.weights, weights.layout, weights.records), torch.float32
    )
    subject = Subject(f"random {name}, {config.num_hidden_layers} layers", placed.model, [], frozenset())
    subject.prompts.extend(subject.random_prompt(32) for _ in THINGS)
    return subject


def ask(engine: Engine, prompt: list[int], most: int, ends: frozenset[int] = frozenset()) -> tuple[Answer, Clock]:
    """Submit a prompt to be answered greedily with at most `most` tokens."""
    clock = Clock()
    return engine.submit(Request(prompt, GREEDY, most, ends), Stats(), clock, no_progress), clock


def finish(engine: Engine, asked: list[tuple[Answer, Clock]]) -> None:
    """Compute these answers to their ends."""
    engine.drive(lambda: all(answer.ended for answer, _ in asked))


def answers(subject: Subject, parallel: list[int], prompts: int, most: int, rounds: int) -> list[dict[str, Any]]:
    """Answer the prompts with steps of so many sequences.

    Raises:
        ValueError: answers differ between numbers of sequences.
    """
    engines = {rows: subject.engine(rows) for rows in parallel}
    runs: dict[int, list[tuple[float, list[float]]]] = {rows: [] for rows in parallel}
    texts: list[list[int]] | None = None
    for _ in range(rounds):
        for rows, engine in engines.items():
            engine.clear()
            start = perf_counter()
            asked = [ask(engine, prompt, most, subject.end_tokens) for prompt in subject.prompts[:prompts]]
            finish(engine, asked)
            seconds = perf_counter() - start
            found = [clock.tokens for _, clock in asked]
            texts = texts or found
            if found != texts:
                raise ValueError(
                    f"{sum(a != b for a, b in zip(found, texts, strict=True))} answers of {rows} rows differ"
                )
            runs[rows].append((sum(map(len, found)) / seconds, [clock.times[0] - start for _, clock in asked]))
    return [
        {
            "parallel": rows,
            "prompts": prompts,
            "tokens": sum(map(len, texts or [])),
            "tok_s": median(speed for speed, _ in of),
            "tok_s_runs": [speed for speed, _ in of],
            "first_token_median_seconds": median(median(first) for _, first in of),
            "first_token_max_seconds": median(max(first) for _, first in of),
        }
        for rows, of in runs.items()
    ]


def prefix(subject: Subject) -> dict[str, Any]:
    """Ask prompts with a common prefix at once."""
    engine, common = subject.engine(), subject.random_prompt(PREFIX)
    start = perf_counter()
    asked = [ask(engine, common + subject.random_prompt(OWN), 16) for _ in range(PREFIX_PROMPTS)]
    finish(engine, asked)
    seconds = perf_counter() - start
    stats = [answer.stats for answer, _ in asked]
    return {
        "prompts": PREFIX_PROMPTS,
        "prompt_tokens": sum(each.prompt_tokens for each in stats),
        "computed_tokens": sum(each.prompt_tokens - each.reused_tokens for each in stats),
        "seconds": seconds,
        "seconds_of_one": asked[0][1].times[0] - start,
    }


def pause(subject: Subject) -> dict[str, Any]:
    """Ask a long prompt while an answer runs, and again while none does."""
    engine, long = subject.engine(), subject.random_prompt(LONG_PROMPT)
    running = ask(engine, subject.prompts[0], CONTEXT // 4)
    engine.drive(lambda: len(running[1].times) >= RUNNING)
    start = perf_counter()
    reading = ask(engine, long, 1)
    finish(engine, [reading])
    times = running[1].times
    engine.drive(
        lambda: len(times) > 2 + sum(time < reading[1].times[0] for time in times)
    )  # the pause at the end, too
    engine.cancel(running[0])
    gaps = [(after, after - before) for before, after in pairwise(times)]
    engine.clear()
    alone_start = perf_counter()
    alone = ask(engine, long, 1)
    finish(engine, [alone])
    during = [gap for after, gap in gaps if after > start]
    return {
        "prompt": LONG_PROMPT,
        "longest_pause_seconds": max(during),
        "tokens_meanwhile": len(during),
        "seconds_per_token_before": median(gap for after, gap in gaps if after <= start),
        "first_token_seconds": reading[1].times[0] - start,
        "first_token_alone_seconds": alone[1].times[0] - alone_start,
    }


class Ready:
    """A decode step that computes nothing."""

    asynchronous, max_draft, drafts_together, max_rows = False, 0, True, 256

    def __init__(self, vocab: int) -> None:
        self._logits = torch.randn(1, vocab)

    def launch(self, parts: list[Part], params: list[SamplingParams]) -> list[StepResult]:
        for sequence, tokens in parts:
            sequence.reserve(len(tokens))
            sequence.advance(len(tokens))
        return [StepResult(self._logits) for _ in parts]


def own_time(subject: Subject) -> dict[str, float]:
    """Seconds of a step of 16 sequences: all, of the scheduler, and of the samplers. The rest delivers tokens."""
    engine = subject.engine()
    asked = [ask(engine, prompt, CONTEXT // 32) for prompt in subject.prompts[:PREFIX_PROMPTS]]
    engine.drive(lambda: all(clock.times for _, clock in asked))
    engine.decode_step = Ready(subject.model.config.vocab_size)  # type: ignore[assignment]
    watch, steps = Stopwatch(perf_counter), [len(clock.times) for _, clock in asked]
    start = perf_counter()
    with watch.on([(engine.scheduler, "decode", "scheduler"), (Answer, "draw", "sampler")]):
        finish(engine, asked)
    seconds, count = perf_counter() - start, CONTEXT // 32 - min(steps)
    parts = {
        name: sum(end - begin for part, begin, end in watch.spans if part == name) for name in ("scheduler", "sampler")
    }
    return {"step_seconds": seconds / count, **{f"{name}_seconds": total / count for name, total in parts.items()}}


def show(name: str, result: dict[str, Any]) -> None:
    """Print the results."""
    console = Console(highlight=False, width=120)
    console.print(f"{name}: {ops.variant()} kernels")
    if runs := result.get("answers"):
        table = Table("sequences in a step", "tok/s", "of all runs", "first token: median", "longest")
        for run in runs:
            every = ", ".join(f"{speed:,.1f}" for speed in run["tok_s_runs"])
            first = (f"{run[f'first_token_{which}_seconds']:,.3f} s" for which in ("median", "max"))
            table.add_row(str(run["parallel"]), f"{run['tok_s']:,.1f}", every, *first)
        console.print(table)
    if found := result.get("prefix"):
        console.print(
            f"{found['prompts']} prompts of {found['prompt_tokens']:,} tokens with a prefix of {PREFIX:,} in common: "
            f"{found['computed_tokens']:,} tokens computed, {found['seconds']:.2f} s (the first prompt "
            f"{found['seconds_of_one']:.2f} s)"
        )
    if found := result.get("pause"):
        console.print(
            f"longest pause of an answer while {found['prompt']:,} tokens are read: "
            f"{found['longest_pause_seconds'] * 1e3:,.0f} ms ({found['tokens_meanwhile']} tokens meanwhile; before, "
            f"{found['seconds_per_token_before'] * 1e3:,.1f} ms per token); first token of the prompt after "
            f"{found['first_token_seconds']:.2f} s, alone {found['first_token_alone_seconds']:.2f} s"
        )
    if found := result.get("engine"):
        micro = {name: f"{seconds * 1e6:,.0f} µs" for name, seconds in found.items()}
        console.print(
            f"engine without a model, {PREFIX_PROMPTS} sequences: {micro['step_seconds']} per step, of which scheduler "
            f"{micro['scheduler_seconds']}, samplers {micro['sampler_seconds']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="directory of a converted model (default: dsv2-nano)")
    parser.add_argument(
        "--random-weights", metavar="NAME", help="random weights instead: an architecture, or config.json"
    )
    parser.add_argument("--layers", type=int, help="layers of random weights (default: all)")
    parser.add_argument("--only", default="answers,prefix,pause,engine", help="what to measure (default: all)")
    parser.add_argument("--parallel", default="1,4,16", help="sequences in a step (default: 1,4,16)")
    parser.add_argument("--prompts", type=int, default=len(THINGS), help=f"prompts to answer (default: {len(THINGS)})")
    parser.add_argument("--answer", type=int, default=64, help="most tokens of an answer (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="runs with each number of sequences (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    args = parser.parse_args()
    random.seed(0)
    subject = made(args.random_weights, args.layers) if args.random_weights else converted(args.model)
    result: dict[str, Any] = {"model": subject.name, "kernels": ops.variant()}
    work = {
        "answers": lambda: answers(
            subject, [int(count) for count in args.parallel.split(",")], args.prompts, args.answer, args.rounds
        ),
        "prefix": lambda: prefix(subject),
        "pause": lambda: pause(subject),
        "engine": lambda: own_time(subject),
    }
    for name in args.only.split(","):
        result[name] = work[name]()
    show(subject.name, result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

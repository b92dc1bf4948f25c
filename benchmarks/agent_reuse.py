"""What of an agent's prompts is computed, and what is reused: simulated traces with dsv2-nano, on the CPU.

    python benchmarks/agent_reuse.py [--context 2048] [--turns 10] [--json FILE]

Each trace is a list of prompts, as a client sends them again and again while a conversation grows. Beside the tokens
that were computed stand the fewest that any prefix cache must compute: those after the longest beginning that a prompt
has in common with an earlier prompt and its answer, and its last one, which is computed for its logits.

tools      one conversation with tools: a system prompt, then calls and results
header     the same, but the first 12 tokens, a client's header, are others in each turn
reminder   the same, but a reminder of 40 tokens stands before the newest message and nowhere else
retry      every turn is asked a second time, with its newest message changed half way
two        two agents with their own system prompts, in turns, and a pool of blocks that is smaller than both together
two, RAM   the same with `cache_ram`
two, files the same with `cache_dir`
restart    `tools`, with the model closed and loaded again after each turn, and `cache_dir`
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import dsv2_local

SYSTEM, MESSAGE, ANSWER = 500, (40, 160), 24  # tokens of a system prompt, a message or result, and an answer
HEADER, REMINDER = 12, 40
RAM = 1 << 28  # bytes; room for everything


@dataclass
class Reuse:
    """A trace, and what was computed of it: numbers of prompts and tokens."""

    trace: str
    prompts: int = 0
    tokens: int = 0
    computed: int = 0
    restored: int = 0
    least: int = 0

    @property
    def share(self) -> float:
        """The part of all prompts' tokens that was computed."""
        return self.computed / self.tokens


class Conversation:
    """An agent's conversation: the tokens that every prompt begins with, and messages and answers in turns."""

    def __init__(self, draw: random.Random) -> None:
        self._draw, self.tokens = draw, drawn(draw, SYSTEM)

    def message(self) -> list[int]:
        return drawn(self._draw, self._draw.randint(*MESSAGE))


def drawn(draw: random.Random, count: int) -> list[int]:
    """Random tokens."""
    return [draw.randrange(2, 4000) for _ in range(count)]


class Trace:
    """Sends prompts to a model, and counts.

    Raises:
        ContextLengthError: the conversations outgrow the context.
    """

    def __init__(self, name: str, context: int, **options: Any) -> None:
        self.reuse, self._options, self._known = Reuse(name), {"context": context, **options}, list[list[int]]()
        self.llm = self._load()

    def _load(self) -> dsv2_local.LLM:
        return dsv2_local.load(device="cpu", **self._options)

    def restart(self) -> None:
        """Close the model and load it again."""
        self.llm.close()
        self.llm = self._load()

    def send(self, prompt: list[int]) -> list[int]:
        """Ask for an answer; returns its tokens."""
        answer = self.llm.generate(prompt, max_tokens=ANSWER, temperature=0, logit_bias={1: -100})
        said = [chunk.token_id for chunk in answer if chunk.token_id is not None]
        stats, reuse = answer.stats, self.reuse
        reuse.prompts += 1
        reuse.tokens += stats.prompt_tokens
        reuse.computed += stats.prompt_tokens - stats.reused_tokens
        reuse.restored += stats.restored_tokens
        alike = max((common(prompt, known) for known in self._known), default=0)
        reuse.least += len(prompt) - min(alike, len(prompt) - 1)
        self._known.append([*prompt, *said[:-1]])  # the last token of an answer is never computed
        return said


def common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def measure(context: int, turns: int) -> Iterator[Reuse]:
    """Run all traces."""
    for name in ("tools", "header", "reminder", "retry"):
        yield one_agent(Trace(name, context), turns)
    with tempfile.TemporaryDirectory() as directory:
        yield one_agent(Trace("restart", context, cache_dir=Path(directory) / "restart"), turns)
        both = {"two": {}, "two, RAM": {"cache_ram": RAM}, "two, files": {"cache_dir": Path(directory) / "two"}}
        for name, options in both.items():
            yield two_agents(Trace(name, context * 3 // 4, **options), turns)


def one_agent(trace: Trace, turns: int) -> Reuse:
    """A conversation that grows, as the trace's name says."""
    draw = random.Random(0)
    agent, kind = Conversation(draw), trace.reuse.trace
    for _ in range(turns):
        message = agent.message()
        head = drawn(draw, HEADER) if kind == "header" else []
        reminder = list(range(100, 100 + REMINDER)) if kind == "reminder" else []
        if kind == "retry":
            trace.send([*agent.tokens, *message])
            message = message[: len(message) // 2] + agent.message()[: len(message) // 2]
        said = trace.send([*head, *agent.tokens, *reminder, *message])
        agent.tokens += [*message, *said]
        if kind == "restart":
            trace.restart()
    trace.llm.close()
    return trace.reuse


def two_agents(trace: Trace, turns: int) -> Reuse:
    """Two conversations in turns."""
    draw = random.Random(0)
    agents = [Conversation(draw), Conversation(draw)]
    for _ in range(turns * 2 // 3):
        for agent in agents:
            message = agent.message()
            agent.tokens += [*message, *trace.send([*agent.tokens, *message])]
    trace.llm.close()
    return trace.reuse


def main() -> None:
    """Measure all traces, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = Table("trace", "prompts", "tokens", "computed", "of all", "the least", "restored")
    found = []
    for reuse in measure(options.context, options.turns):
        found.append(asdict(reuse))
        table.add_row(
            reuse.trace, f"{reuse.prompts}", f"{reuse.tokens:,}", f"{reuse.computed:,}", f"{reuse.share:.1%}",
            f"{reuse.least:,}", f"{reuse.restored:,}",
        )  # fmt: skip
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

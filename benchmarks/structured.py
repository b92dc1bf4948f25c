"""Structured output of dsv2-nano: are answers valid, and what does a constrained token cost?

    python benchmarks/structured.py [--answers 500] [--rounds 5]

Answers at temperature 1, 16 at once, to schemas of ten kinds are checked by the package jsonschema. Then free and
constrained answers of the same length are computed in turns by one thread, whose time on the processor for each token
is compared: other programs disturb it little.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from time import perf_counter, process_time
from typing import Any

from jsonschema import Draft202012Validator

import dsv2_local
from dsv2_local.llm import LLM
from dsv2_local.runtime.answer import GeneratedToken, Request
from dsv2_local.runtime.stats import Stats
from dsv2_local.text.grammar import json_schema

PROMPT = "The violin is a wooden chordophone, and the smallest of its family."
TOKENS = 200  # of each answer whose time is measured
LIMIT = 600  # of each answer that is checked
Schema = dict[str, Any]


def closed(required: list[str] | None = None, **properties: Schema) -> Schema:
    """An object with these fields and no others; all of them are required if `required` is not given."""
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def text(longest: int) -> Schema:
    """A string."""
    return {"type": "string", "maxLength": longest}


def whole(least: int, most: int) -> Schema:
    """A whole number."""
    return {"type": "integer", "minimum": least, "maximum": most}


def items(schema: Schema, least: int, most: int) -> Schema:
    """An array."""
    return {"type": "array", "items": schema, "minItems": least, "maxItems": most}


HERTZ = {"type": "number", "minimum": 20, "maximum": 20000, "multipleOf": 0.5}
SCHEMAS: dict[str, Schema] = {
    "record": closed(name=text(40), strings=whole(1, 12)),
    "optional fields": closed(["name"], name=text(40), year=whole(1500, 2100), old={"type": "boolean"}),
    "nested": closed(title=text(40), maker=closed(name=text(40), city={**text(20), "type": ["string", "null"]})),
    "array of objects": items(closed(key={"enum": ["G", "D", "A", "E"]}, hertz=HERTZ), 1, 4),
    "enum": {"enum": ["violin", "viola", "violoncello", 4, None, {"double": "bass"}]},
    "anyOf": {"anyOf": [whole(-5, 500), text(10), items({"type": "boolean"}, 0, 3)]},
    "patterns": closed(
        id={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}, date={"type": "string", "format": "date"}
    ),
    "references": {
        "$defs": {
            "tree": closed(name=text(12), left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"}),
            "leaf": closed(value=whole(0, 99)),
        },
        "$ref": "#/$defs/tree",
    },
    "tuple": {"type": "array", "prefixItems": [text(8), whole(0, 9), {"const": "end"}], "items": False, "minItems": 3},
    "allOf": {"allOf": [closed(a=whole(0, 1000), b=text(16)), {"properties": {"a": {"multipleOf": 5}}}]},
}
LONG = items(closed(name=text(40), age=whole(0, 150), tags=items({"enum": ["old", "new", "red"]}, 0, 3)), 1000, 1000)
"""A schema whose answers have more than `TOKENS` tokens."""
SAMPLING = {
    "temperature 1": {"temperature": 1.0},
    "top_p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "greedy": {"temperature": 0.0},
}


def main() -> None:
    """Run both parts, and fail if an answer is not valid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    llm = dsv2_local.load(parallel=16, threads=1)
    valid = check(llm, options.answers)
    compare(llm, options.rounds)
    sys.exit(not valid)


def check(llm: LLM, answers: int) -> bool:
    """Generate answers to all schemas in turn; returns whether all are valid."""
    kinds = [list(SCHEMAS)[at % len(SCHEMAS)] for at in range(answers)]
    generations = (
        llm.generate(PROMPT, schema=SCHEMAS[kind], strict=True, temperature=1.0, seed=seed, max_tokens=LIMIT)
        for seed, kind in enumerate(kinds)
    )
    wrong, cut, tokens, start = Counter[str](), Counter[str](), 0, perf_counter()
    for kind, answer in zip(kinds, llm.batch(generations), strict=True):
        if answer.error:
            raise answer.error
        tokens += answer.stats.completion_tokens
        if answer.stats.finish_reason != "stop":
            cut[kind] += 1
            print(f"{kind}: cut: {answer.text[-100:]!r}")
            continue
        try:
            errors = list(Draft202012Validator(SCHEMAS[kind]).iter_errors(json.loads(answer.text)))
        except ValueError as error:
            errors = [error]
        if errors:
            wrong[kind] += 1
            print(f"{kind}: {answer.text!r}: {errors[0]}")
    good = answers - wrong.total() - cut.total()
    seconds = perf_counter() - start
    print(
        f"{good} of {answers} valid, {cut.total()} cut at {LIMIT} tokens; {tokens / answers:.0f} tokens each, "
        f"{tokens / seconds:.0f} tok/s"
    )
    return good == answers


class _Reader:
    def receive(self, token: GeneratedToken) -> bool:
        return False

    def end(self, error: BaseException | None) -> None:
        if error:
            raise error


def compare(llm: LLM, rounds: int) -> None:
    """Compare the time per token of free and constrained answers of `TOKENS` tokens."""
    grammar = json_schema(LONG)
    for rows in (1, 4, 16):
        for name, sampling in SAMPLING.items():
            times: dict[bool, list[float]] = {False: [], True: []}
            for round in range(rounds + 1):
                for constrained in (False, True):
                    seconds = seconds_per_token(llm, rows, sampling, round, grammar if constrained else None)
                    if round:  # the first one warms up
                        times[constrained].append(seconds)
            ratios = [one / other for one, other in zip(times[True], times[False], strict=True)]
            print(
                f"{rows:2} at once, {name}: free {statistics.median(times[False]) * 1e6:.0f} µs a token, "
                f"constrained {statistics.median(times[True]) * 1e6:.0f} µs, ratio {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )


def seconds_per_token(llm: LLM, rows: int, sampling: dict[str, Any], seed: int, grammar: str | None) -> float:
    """The time for each of `TOKENS` tokens of `rows` answers at once."""
    prompt = llm.tokenizer.encode(PROMPT)
    requests = [
        Request(
            prompt, llm.defaults.override(**sampling, seed=seed * rows + row), TOKENS,
            constraint=llm.grammars.constraint(grammar) if grammar else None,
        )
        for row in range(rows)
    ]  # fmt: skip
    start = process_time()
    stats = [Stats() for _ in requests]
    answers = [llm.engine.submit(request, own, _Reader()) for request, own in zip(requests, stats, strict=True)]
    llm.engine.drive(lambda: all(answer.ended for answer in answers))
    assert all(own.completion_tokens == TOKENS for own in stats), [own.completion_tokens for own in stats]
    return (process_time() - start) / TOKENS / rows


if __name__ == "__main__":
    main()

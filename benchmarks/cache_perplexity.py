"""Perplexity of dsv2-nano's own answers with a bf16 and with an int8 KV cache.

    python benchmarks/cache_perplexity.py [--conversations 400] [--json FILE]

The model answers conversations of one to eight questions at temperature 1 with the bf16 cache. Then the probability of
every answer token is computed with both caches, in two ways: with prefill ("at once") and with decode steps ("token by
token"), which use different forms of attention. ± is the standard error of the paired difference over conversations.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from needle import FILLING, KEYS, SMALL_TALK, chat, what_is
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dsv2_local
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.runtime.cpu_step import CpuStep

QUESTIONS = (*map(what_is, KEYS + FILLING), *SMALL_TALK)
LONGEST = 480  # tokens: nano was trained on 512


@dataclass(frozen=True)
class Conversation:
    """Token ids of a conversation, and the positions of the tokens that the model generated."""

    ids: list[int]
    answers: list[int]


@dataclass(frozen=True)
class Result:
    """Perplexities over `tokens` answer tokens, and by how many per cent that of int8 is larger, with its error."""

    how: str
    tokens: int
    conversations: int
    bf16: float
    int8: float
    difference: float
    se: float


def converse(llm: dsv2_local.LLM, random: Random) -> Conversation:
    """Sample one conversation."""
    ids: list[int] = []
    answers: list[int] = []
    for question in random.sample(QUESTIONS, random.randint(1, 8)):
        asked = chat(llm, question)
        ids += asked[1:] if ids else asked  # BOS only once
        if len(ids) >= LONGEST - 64:
            break
        reply = [c.token_id for c in llm.generate(ids, temperature=1.0, seed=random.randrange(1 << 30), max_tokens=64)]
        chosen = [token for token in reply if token is not None]
        answers += range(len(ids), len(ids) + len(chosen))
        ids += chosen
    return Conversation(ids, answers)


def at_once(llm: dsv2_local.LLM, ids: list[int]) -> Tensor:
    """Logits [T, vocab] after each token, by prefill."""
    return llm.logits(ids)


def token_by_token(llm: dsv2_local.LLM, ids: list[int]) -> Tensor:
    """Logits [T, vocab] after each token, by decode steps."""
    step = llm.engine.decode_step
    assert isinstance(step, CpuStep)
    with llm.engine.new_sequence(ids) as sequence:
        return torch.cat([step.run([(sequence, [token])]).clone() for token in ids])


def log_probabilities(logits: Tensor, talk: Conversation) -> Tensor:
    """Log-probabilities of the answer tokens in nats."""
    at = torch.tensor(talk.answers)
    return logits[at - 1].double().log_softmax(1)[torch.arange(len(at)), torch.tensor(talk.ids)[at]]


def compare(how: str, bf16: list[Tensor], int8: list[Tensor]) -> Result:
    """Compare the log-probabilities of each conversation's answer tokens."""
    tokens = sum(map(len, bf16))
    sums = torch.tensor([float((a - b).sum()) for a, b in zip(bf16, int8, strict=True)])
    sizes = torch.tensor([float(len(a)) for a in bf16])
    mean = float(sums.sum() / tokens)
    spread = (sums - mean * sizes).square().sum().sqrt() * math.sqrt(len(bf16) / max(1, len(bf16) - 1)) / tokens
    perplexities = [math.exp(-sum(float(a.sum()) for a in parts) / tokens) for parts in (bf16, int8)]
    return Result(how, tokens, len(bf16), *perplexities, 100 * math.expm1(mean), 100 * float(spread))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=400, help="number of conversations (default: 400)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    args = parser.parse_args()
    models = {kind: dsv2_local.load(device="cpu", cache_dtype=kind) for kind in (CacheDtype.BF16, CacheDtype.INT8)}
    random = Random(0)
    talks = [converse(models[CacheDtype.BF16], random) for _ in range(args.conversations)]
    results = []
    for how, logits_of in (("at once", at_once), ("token by token", token_by_token)):
        log_probs = {
            kind: [log_probabilities(logits_of(llm, talk.ids), talk) for talk in talks] for kind, llm in models.items()
        }
        results.append(compare(how, log_probs[CacheDtype.BF16], log_probs[CacheDtype.INT8]))
    table = Table("read", "answer tokens", "bf16", "int8", "difference", title=f"kernels: {ops.variant()}")
    for f in results:
        table.add_row(
            f.how, f"{f.tokens:,}", f"{f.bf16:.4f}", f"{f.int8:.4f}", f"{f.difference:+.2f} ± {f.se:.2f} %"
        )  # fmt: skip
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()

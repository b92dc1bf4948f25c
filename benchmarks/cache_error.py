"""Error of the logits after a long text with an int8 KV cache: V2-Lite's shape, few layers, random weights and tokens.

    python benchmarks/cache_error.py DIR [--tokens 32768] [--layers 2] [--cases bf16,int8,other,fp32]

Each case reads the text in its own process and saves the logits of the tokens that follow, at several lengths, in DIR;
cases that are saved there already are not run again.

    bf16, int8   the type of the KV cache
    other        bf16 with a different text before the same tokens, to see how much the context matters at all
    fp32         the torch reference, without rounding of activations; its cache is also rounded to bf16 and to int8, to
                 isolate the error of the latents. Takes many times as long.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv2_local.architectures import released
from dsv2_local.architectures.config import ModelConfig
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.kernels.latents import quantize_latents
from dsv2_local.quant.schema import Recipe
from dsv2_local.runtime import placement
from dsv2_local.runtime.batch import Part
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.model import LATENT_NORM_EPS, Transformer
from dsv2_local.runtime.random_weights import build, first_layers
from dsv2_local.runtime.sequence import Sequence

CASES = ("bf16", "int8", "other", "fp32")
PAIRS = (
    ("int8", "bf16"), ("fp32 rounded to int8", "fp32"), ("fp32 rounded to bf16", "fp32"), ("bf16", "fp32"),
    ("int8", "fp32"), ("other", "bf16"),
)  # fmt: skip
NEXT = 16  # tokens whose logits are compared at each length
CHUNK = 1024
Logits = dict[str, dict[int, Tensor]]
"""Logits fp32 [NEXT, vocab], by type of the cache and by length of the text."""


def lengths(tokens: int) -> list[int]:
    """Lengths at which logits are compared: `tokens`, a quarter of it, and so on down to 512."""
    return [length for power in range(8, -1, -1) if (length := tokens // 4**power) >= min(512, tokens)]


def relative_error(got: Tensor, wanted: Tensor) -> tuple[float, float, float]:
    """‖got - wanted‖ / ‖wanted‖ of logits [T, vocab] -> mean over tokens, standard error of the mean, maximum."""
    errors = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
    return float(errors.mean()), float(errors.std() / len(errors) ** 0.5), float(errors.max())


def text(seed: int, tokens: int, vocab: int) -> list[int]:
    """Random tokens."""
    return torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(case: str, layers: int, tokens: int, file: Path) -> None:
    """Run one case and save its logits to `file` after each length."""
    config = first_layers(released.read_config("deepseek-v2-lite"), layers)
    random_model = build(config, Recipe.NF4)
    ops.set_threads(None, random_model.layout.format)
    weights = placement.ModelWeights(config, random_model.weights, random_model.layout, random_model.records)
    model = placement.place_in_ram(weights, torch.float32).model
    cache = LatentCache(config, tokens + NEXT, CacheDtype.BF16 if case == "other" else CacheDtype(case))
    ids = text(1 if case == "other" else 0, tokens, config.vocab_size)
    following = text(2, NEXT, config.vocab_size)
    sequence, start = cache.new_sequence(), time.perf_counter()
    logits: Logits = defaultdict(dict)
    for begin, end in pairwise([0, *lengths(tokens)]):
        for at in range(begin, end, CHUNK):
            read(model, cache, (sequence, ids[at : min(at + CHUNK, end)]))
            print(f"{case}: {sequence.length:,} tokens, {time.perf_counter() - start:,.0f} s", file=sys.stderr)
        for kind in (CacheDtype.BF16, CacheDtype.INT8) if case == "fp32" else ():
            copy, again = rounded(cache, sequence, config, kind)
            logits[f"fp32 rounded to {kind}"][end] = model.logits(model.forward(copy, [(again, following)]))
        logits[case][end] = model.logits(model.forward(cache, [(sequence, following)]))
        sequence.truncate(end)
        torch.save(dict(logits), file)


@torch.inference_mode()
def read(model: Transformer, cache: LatentCache, part: Part) -> None:
    """Like `Transformer.forward`, but only to fill the cache: of the last layer it computes nothing but the latents."""
    batch = model.new_batch(cache, [len(part[1])])
    batch.fill([part])
    x = model.through_layers(model.embed(batch.ids), batch.rotation, batch, layers=-1)
    last, attention = model.layers[-1], model.layers[-1].self_attn
    kv_a = ops.linear(ops.rms_norm(x, last.input_layernorm, last.eps), attention.kv_a_proj_with_mqa)
    ops.write_latents(*batch.layers[-1], kv_a, attention.kv_a_layernorm, LATENT_NORM_EPS, batch.rotation)
    batch.advance()


def rounded(
    cache: LatentCache, sequence: Sequence, config: ModelConfig, kind: CacheDtype
) -> tuple[LatentCache, Sequence]:
    """A copy of a sequence in an fp32 cache, with its rows rounded to `kind`."""
    copy = LatentCache(config, sequence.length + NEXT, kind)
    again = copy.new_sequence()
    again.reserve(sequence.length)
    for layer in range(config.num_hidden_layers):
        rows = cache.rows(sequence, layer)
        rank = config.kv_lora_rank
        copy.write_rows(again, layer, quantize_latents(rows, rank) if kind is CacheDtype.INT8 else rows.bfloat16())
    again.advance(sequence.length)
    return copy, again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="directory for the logits of each case")
    parser.add_argument("--tokens", type=int, default=32_768, help="length of the text (default: 32768)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (default: 2)")
    parser.add_argument("--cases", default=",".join(CASES), help="cases separated by commas (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)  # given to the process of a case
    args = parser.parse_args()
    files = {case: args.directory / f"{case}-{args.layers}-{args.tokens}.pt" for case in CASES}
    if args.one:
        return run(args.one, args.layers, args.tokens, files[args.one])
    args.directory.mkdir(parents=True, exist_ok=True)
    for case in args.cases.split(","):
        if not (files[case].exists() and args.tokens in torch.load(files[case])[case]):
            kernels = {"DSV2_KERNELS": "reference"} if case == "fp32" else {}
            subprocess.run([sys.executable, *sys.argv, "--one", case], env=os.environ | kernels, check=True)
    show(files, args.json)
    return None


def show(files: dict[str, Path], out: Path | None) -> None:
    """Print a table of relative errors in per cent, by length."""
    logits: Logits = {}
    for file in files.values():
        logits |= torch.load(file) if file.exists() else {}
    pairs = [pair for pair in PAIRS if pair[0] in logits and pair[1] in logits]
    table = Table("logits of", "against", "tokens", "error %", "±", "largest", "same first token")
    results = []
    for got, wanted in pairs:
        for length in sorted(logits[wanted].keys() & logits[got].keys()):
            a, b = logits[got][length], logits[wanted][length]
            mean, deviation, most = relative_error(a, b)
            same = float((a.argmax(1) == b.argmax(1)).float().mean())
            results.append({"of": got, "against": wanted, "tokens": length, "error": mean, "se": deviation})
            results[-1] |= {"largest": most, "same_first": same}
            cells = (f"{100 * value:.2f}" for value in (mean, deviation, most))
            table.add_row(got, wanted, f"{length:,}", *cells, f"{same:.0%}")
    Console(highlight=False, width=120).print(table)
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a reused prefix changes in the answer, and what it would cost to compute every position in one fixed form.

A long prefill step rebuilds keys and values from the latents, a short one (as after a reused prefix) absorbs them into
the query: the same mathematics, rounded differently. First, dsv2-nano answers prompts of random tokens with and without
their prefix in the cache: the distance of the logits, and how many greedy answers differ. Then V2-Lite's shape, a few
layers of it, is prefilled as usual and in absorbed form alone, which would give a position the same bits in any step.

    python benchmarks/reuse.py [--prompts 300] [--answer 32] [--layers 3] [--tokens 512 2048]
"""

import argparse
import random
import statistics
from time import perf_counter

import torch

import dsv2_local
from dsv2_local.architectures import released
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.quant.schema import Recipe
from dsv2_local.runtime import placement
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.random_weights import build, first_layers


def compare(prompts: int, answer: int) -> None:
    """Print how logits and greedy answers differ between a fresh cache and a reused prefix."""
    llm, draw = dsv2_local.load(device="cpu"), random.Random(0)
    distances, different = [], 0
    for _ in range(prompts):
        ids = [draw.randrange(2, llm.config.vocab_size) for _ in range(draw.randrange(250, 500))]
        reused = len(ids) - draw.randrange(1, 60)
        answers = []
        for prefix in (0, reused):
            llm.engine.clear()
            if prefix:
                next(llm.generate(ids[:prefix], max_tokens=1))
            generation = llm.generate(ids, max_tokens=answer, temperature=0)
            answers.append([next(generation), *generation])
            assert generation.stats.reused_tokens in (0, prefix, prefix - 1)
        different += [chunk.token_id for chunk in answers[0]] != [chunk.token_id for chunk in answers[1]]
        distances.append(distance(llm, ids, reused))
    print(f"logits: {statistics.mean(distances):.3%} of their norm on average, {max(distances):.3%} at most")
    print(f"greedy answers of {answer} tokens that differ: {different} of {prompts}")


def distance(llm: dsv2_local.LLM, ids: list[int], reused: int) -> float:
    """The relative distance of the logits after `ids`, computed at once and after a step of `reused` tokens."""
    model, cache = llm.engine.model, llm.engine.cache
    found = []
    for parts in ([ids], [ids[:reused], ids[reused:]]):
        llm.engine.clear()
        sequence = cache.new_sequence()
        for part in parts:
            hidden = model.forward(cache, [(sequence, part)])
        found.append(model.logits(hidden[-1:]))
        sequence.release()
    return float((found[0] - found[1]).norm() / found[0].norm())


def fixed_form(layers: int, lengths: list[int]) -> None:
    """Print the time of a prefill with the form that is chosen for it, and in absorbed form."""
    config = first_layers(released.read_config("deepseek-v2-lite"), layers)
    random_model = build(config, Recipe.NF4)
    ops.set_threads(None, random_model.layout.format)
    weights = placement.ModelWeights(config, random_model.weights, random_model.layout, random_model.records)
    model = placement.place_in_ram(weights, torch.float32).model
    cache = LatentCache(config, max(lengths), CacheDtype.BF16)
    for length in lengths:
        chosen, absorbed = best(model, cache, length), best(model, cache, length, absorb=True)
        print(f"prefill of {length:,} tokens, {layers} layers: {chosen:.2f} s; absorbed {absorbed:.2f} s")


def best(model: Transformer, cache: LatentCache, length: int, *, absorb: bool = False) -> float:
    """The least seconds of three prefills in chunks of 512 tokens; `absorb`: in absorbed form, whatever is chosen."""
    ids, times = torch.randint(model.config.vocab_size, (length,)), []
    for _ in range(3):
        sequence = cache.new_sequence()
        start = perf_counter()
        for chunk in ids.split(512):
            batch = model.new_batch(cache, [len(chunk)], [1] if absorb else None)
            batch.fill([(sequence, chunk.tolist())])
            with torch.inference_mode():
                model.layers_of(batch)
            batch.advance()
        times.append(perf_counter() - start)
        sequence.release()
    return min(times)


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    options = parser.parse_args()
    compare(options.prompts, options.answer)
    fixed_form(options.layers, options.tokens)


if __name__ == "__main__":
    main()

"""What it takes to bring a conversation back from the block store, and to read it again: V2-Lite's shape, on the CPU.

    python benchmarks/restoring.py [--layers 9] [--tokens 2000] [--long 16384] [--cache-type bf16] [--rounds 3]

The time to the first token of a prompt that was asked before: computed; found in the prefix cache; brought back from
RAM, from files that the system still has in RAM, and from files that it has not (`posix_fadvise`). Then the time to
store it: the engine's, for copies in RAM, and until the disk has everything. Random weights; both prefill and restoring
grow with the number of layers. A long prefix of all layers is then stored and brought back without a model.
"""

import argparse
import os
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from dsv2_local.architectures import released
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import CACHE_BLOCK, CacheDtype
from dsv2_local.options import one_of
from dsv2_local.quant.schema import Recipe
from dsv2_local.runtime import placement
from dsv2_local.runtime.answer import Request, Stats
from dsv2_local.runtime.block_files import BlockFiles, BlockName
from dsv2_local.runtime.block_store import BlockStore
from dsv2_local.runtime.cache import LatentCache, block_bytes, key_of
from dsv2_local.runtime.engine import Engine
from dsv2_local.runtime.random_weights import build, first_layers
from dsv2_local.runtime.sampling_params import SamplingParams


def first_token(engine: Engine, prompt: list[int], reused: int) -> float:
    """Seconds from asking to the first token."""
    stats, start = Stats(), perf_counter()
    next(engine.generate(Request(prompt, SamplingParams(temperature=0), max_tokens=1), stats))
    seconds = perf_counter() - start
    assert stats.reused_tokens == reused, stats
    return seconds


def evict(engine: Engine) -> float:
    """Seconds until all blocks have left the pool for the store, as far as the engine waits."""
    start, pool = perf_counter(), engine.cache.pool
    pool.release([pool.allocate() for _ in range(pool.count)])
    return perf_counter() - start


def forget(directory: Path) -> None:
    """Let the system drop what it has of the files in RAM."""
    os.sync()
    for path in directory.rglob("*"):
        if BlockName.parse(path.name):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def long_prefix(tokens: int, kind: CacheDtype, rounds: int, disk: Path | None) -> None:
    """Store a prefix of so many tokens and all layers, and bring it back."""
    config = released.read_config("deepseek-v2-lite")
    key, nbytes, ids = key_of(config, kind, "random"), block_bytes(config, kind), list(range(tokens))
    source, target = LatentCache(config, tokens, kind), LatentCache(config, tokens, kind)
    for layer in (*source.layers, *target.layers):
        layer.view(torch.uint8).random_()
    sequence = source.new_sequence(ids)
    sequence.reserve(tokens)
    sequence.advance(tokens)
    sequence.insert_prefix()
    times = dict[str, list[float]]()
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=disk) as directory:
            store = add_files(source, key, Path(directory), nbytes)
            start = perf_counter()
            source.pool.set_aside()
            store.flush()
            times.setdefault("written", []).append(perf_counter() - start)
            store.close()
            for name in ("from files in RAM", "from files on the disk"):
                if name == "from files on the disk":
                    forget(Path(directory))
                target.pool.clear()
                store = add_files(target, key, Path(directory), nbytes)
                restored = target.new_sequence(ids)
                start = perf_counter()
                assert restored.match_prefix() == tokens
                times.setdefault(name, []).append(perf_counter() - start)
                assert target.rows(restored, 3).view(torch.uint8).equal(source.rows(sequence, 3).view(torch.uint8))
                restored.release()
                store.close()
    show(f"{tokens:,} tokens, all layers, {kind}: {-(-tokens // CACHE_BLOCK) * nbytes / 1e6:,.0f} MB", times)


def add_files(cache: LatentCache, key: bytes, directory: Path, nbytes: int) -> BlockStore:
    """Give a cache a block store of files."""
    cache.add_store(key, files=BlockFiles(directory, key.hex(), CACHE_BLOCK, nbytes, 1 << 36, print))
    assert cache.pool.store is not None
    return cache.pool.store


def show(title: str, times: dict[str, list[float]]) -> None:
    """Print medians, and the least and the most."""
    print(title)
    for name, seconds in times.items():
        least, most = min(seconds) * 1000, max(seconds) * 1000
        print(f"{name:<30}{median(seconds) * 1000:10,.1f} ms   ({least:,.1f} to {most:,.1f})")


def main() -> None:
    """Measure, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--long", type=int, default=16_384)
    parser.add_argument("--cache-type", default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    options = parser.parse_args()
    kind = one_of("--cache-type", options.cache_type, (CacheDtype.BF16, CacheDtype.INT8))
    config = first_layers(released.read_config("deepseek-v2-lite"), options.layers)
    random_model = build(config, Recipe.NF4)
    ops.set_threads(None, random_model.layout.format)
    weights = placement.ModelWeights(config, random_model.weights, random_model.layout, random_model.records)
    model = placement.place_in_ram(weights, torch.float32).model
    prompt = torch.randint(config.vocab_size, (options.tokens,)).tolist()
    engine = Engine(model, options.tokens + CACHE_BLOCK, kind)
    key, nbytes = key_of(config, kind, "random"), block_bytes(config, kind)
    times = dict[str, list[float]]()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for _ in range(options.rounds):
            engine.cache.pool.store = None
            engine.clear()
            times.setdefault("computed", []).append(first_token(engine, prompt, 0))
            times.setdefault("prefix cache", []).append(first_token(engine, prompt, options.tokens - 1))
            engine.cache.add_store(key, ram=1 << 34)
            times.setdefault("stored in RAM", []).append(evict(engine))
            times.setdefault("from RAM", []).append(first_token(engine, prompt, options.tokens - 1))
            store = add_files(engine.cache, key, Path(directory), nbytes)
            start = perf_counter()
            times.setdefault("put into the queue of files", []).append(evict(engine))
            store.flush()
            times.setdefault("written", []).append(perf_counter() - start)
            times.setdefault("from files in RAM", []).append(first_token(engine, prompt, options.tokens - 1))
            evict(engine)
            forget(Path(directory))
            times.setdefault("from files on the disk", []).append(first_token(engine, prompt, options.tokens - 1))
            store.clear()
            store.close()
    size = -(-options.tokens // CACHE_BLOCK) * nbytes
    show(f"{options.tokens:,} tokens, {options.layers} layers, {kind}: {size / 1e6:,.0f} MB", times)
    long_prefix(options.long, kind, options.rounds, options.directory)


if __name__ == "__main__":
    main()

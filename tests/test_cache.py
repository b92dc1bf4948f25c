"""The paged KV cache under a model: reuse changes no answer, and cached blocks are never overwritten."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv2_local
from dsv2_local.architectures.families import parse_config
from dsv2_local.errors import ContextLengthError
from dsv2_local.kernels import cpu
from dsv2_local.kernels.format import CACHE_BLOCK, CacheDtype
from dsv2_local.offload.resident_experts import ResidentExperts
from dsv2_local.quant.convert import convert
from dsv2_local.quant.schema import Recipe
from dsv2_local.runtime import random_weights
from dsv2_local.runtime.answer import GeneratedToken, Request
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.engine import Engine
from dsv2_local.runtime.model import Transformer
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.stats import Stats
from tests.conftest import kernels
from tests.models import TINY, save_random, transformers_logits, yarn
from tests.test_model import GROUPS

GREEDY = SamplingParams(temperature=0)
LATENTS = 3 * (64 + 16)  # numbers per token, over the layers of TINY
CONFIGS: list[dict[str, Any]] = [{}, {**GROUPS, "rope_parameters": yarn(0.707, 0.707)}]


def engine(context: int, kind: CacheDtype = CacheDtype.BF16, **changes: Any) -> Engine:
    """An engine whose prefill chunks are so short that they use the same form of attention, and bits, as decoding."""
    config = parse_config({"model_type": "deepseek_v2", **TINY, **changes})
    torch.manual_seed(0)
    built = random_weights.build(config, Recipe.NF4, threads=1)
    model = Transformer(config, built.weights, ResidentExperts(built.layout, built.records), torch.float32)
    return Engine(model, context, chunk=64, cache_dtype=kind)


def answer(of: Engine, prompt: list[int], tokens: int = 5) -> tuple[list[GeneratedToken], int]:
    stats = Stats()
    steps = list(of.generate(Request(prompt, GREEDY, max_tokens=tokens, logprobs=3), stats))
    return steps, stats.reused_tokens


def conversations(draw: random.Random, context: int) -> Iterator[list[int]]:
    """Prompts that continue an earlier prompt from its end or from a place in it, or begin from nothing."""
    known: list[list[int]] = [[]]
    while True:
        before = draw.choice(known[-6:])
        cut = draw.choice(
            [len(before), len(before), draw.randrange(len(before) + 1), len(before) // CACHE_BLOCK * CACHE_BLOCK]
        )
        prompt = before[:cut] + [draw.randrange(199) for _ in range(1 + draw.randrange(60))]
        if len(prompt) < context - 5:
            known.append(prompt)
            yield prompt


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.skipif(
    not {"avx2", "avx512"} & {*cpu.usable()}, reason="other kernels round one token and many differently"
)
@pytest.mark.parametrize("kind", [CacheDtype.BF16, CacheDtype.INT8])
@pytest.mark.parametrize("changes", CONFIGS)
def test_answers_with_reuse_are_those_without_to_the_last_bit(changes, kind):
    """In a cache that is too small for all prompts: blocks are evicted, copied and replayed over in any order."""
    ours, plain = engine(300, kind, **changes), engine(300, kind, **changes)
    said: list[list[int]] = []
    total = 0
    for _, prompt in zip(range(40), conversations(random.Random(1), 300), strict=False):
        steps, reused = answer(ours, prompt)
        plain.clear()
        expected, none = answer(plain, prompt)
        assert (steps, none) == (expected, 0)
        assert reused <= max((common(prompt, text) for text in said), default=0)
        last = [] if not said else said[-1]
        assert reused >= min(common(prompt, last), len(prompt) - 1)
        said.append(prompt + [step.token for step in steps[:-1]])
        total += reused
    assert total > 1000
    assert ours.decode_step.recording is not None


def test_earlier_conversations_are_found_again_and_documents_read_once():
    ours = engine(640)
    system, document = list(range(70)), [7 * i % 199 for i in range(200)]
    asked = [system + document + [question] * 3 for question in (11, 12, 13)]
    assert answer(ours, asked[0])[1] == 0
    assert answer(ours, asked[1])[1] == 270
    assert answer(ours, system + [5] * 50)[1] == 70
    first, reused = answer(ours, asked[0])
    assert reused == 272  # all but the last token, which must run for its logits
    more = [*asked[0], *(step.token for step in first), 3, 4]
    assert answer(ours, more)[1] == len(asked[0]) + 4
    assert answer(ours, [9] * 500)[1] == 0  # takes nearly all blocks
    assert answer(ours, asked[1])[1] < 270
    assert ours.cache.nbytes == 640 * LATENTS * 2


@pytest.mark.parametrize("length", [2 * CACHE_BLOCK, 2 * CACHE_BLOCK - 1, 2 * CACHE_BLOCK + 1, 3 * CACHE_BLOCK - 1])
def test_a_full_cache_goes_back_into_its_own_text(length):
    """The block that is copied on write is also the only one that could be evicted."""
    ours, plain = engine(length), engine(length)
    prompt = [5 * i % 199 for i in range(length - 1)]
    answer(ours, prompt)
    for cut in (length - 3, CACHE_BLOCK + 5, CACHE_BLOCK, CACHE_BLOCK - 1, 1):
        other = [*prompt[:cut], 3]
        expected = answer(plain, other, 1)[0]
        plain.clear()
        steps, reused = answer(ours, other, 1)
        assert reused == cut
        assert [step.token for step in steps] == [step.token for step in expected]


def test_every_block_can_be_allocated_again():
    """Whatever was interrupted, cached and shared, a prompt that needs the whole context finds room."""
    ours, draw = engine(200), random.Random(2)
    for _, prompt in zip(range(60), conversations(draw, 200), strict=False):
        steps = ours.generate(Request(prompt, GREEDY, max_tokens=8), Stats())
        for _ in range(draw.randrange(8)):
            next(steps, None)
        if draw.random() < 0.2:
            ours.logits(prompt)
        held = {block for item in ours.scheduler.running for block in item.sequence.blocks}
        held |= {*ours.sequence.blocks}
        assert len(ours.scheduler) <= 1
        assert ours.cache.pool.available == 4 - len(held)
    answer(ours, [1] * 199, 1)
    assert ours.sequence.length == 199
    with pytest.raises(ContextLengthError):
        ours.sequence.reserve(2)


def test_rows_are_read_and_written_wherever_they_lie():
    config = parse_config({"model_type": "deepseek_v2", **TINY})
    cache, other = (LatentCache(config, 3 * CACHE_BLOCK, CacheDtype.BF16) for _ in range(2))
    rows = torch.randn(CACHE_BLOCK + 9, 80).bfloat16()
    for tokens in ([1] * CACHE_BLOCK, [2] * CACHE_BLOCK, [3] * CACHE_BLOCK):
        sequence = cache.new_sequence(tokens)
        assert sequence.match_prefix() == 0
        sequence.reserve(CACHE_BLOCK)
        sequence.advance(CACHE_BLOCK)
        sequence.insert_prefix()
        sequence.release()
    used = cache.new_sequence([2] * CACHE_BLOCK)
    assert used.match_prefix() == CACHE_BLOCK
    used.release()
    scattered, whole = cache.new_sequence(), other.new_sequence()
    for made, sequence in ((cache, scattered), (other, whole)):
        sequence.reserve(len(rows))
        for layer in range(3):
            made.write_rows(sequence, layer, rows + layer)
        sequence.advance(len(rows))
    assert scattered.blocks == (0, 2)
    assert other.rows(whole, 1).data_ptr() == other.layers[1].data_ptr()  # a view, since the blocks are contiguous
    for layer in range(3):
        assert torch.equal(cache.rows(scattered, layer), rows + layer)
        assert torch.equal(other.rows(whole, layer), rows + layer)


def test_reuse_leaves_the_logits_those_of_transformers(tmp_path: Path):
    """With group-limited routing, YaRN, and the torch reference, which computes in fp32."""
    source = save_random(tmp_path / "source", **CONFIGS[1])
    convert(source, tmp_path / "converted", recipe=Recipe.BF16)
    with kernels(cpu.REFERENCE):
        llm, reused = dsv2_local.load(tmp_path / "converted", dtype="float32", context=300), 0
        for _, prompt in zip(range(12), conversations(random.Random(3), 300), strict=False):
            generation = llm.generate(prompt, max_tokens=1, temperature=0, logprobs=5)
            chunk = next(generation)
            reused += generation.stats.reused_tokens
            exact = transformers_logits(source, prompt)[-1].log_softmax(0)
            for token, logprob in chunk.top_logprobs:
                assert logprob == pytest.approx(float(exact[token]), abs=1e-3)
    assert reused > 100


@pytest.mark.skipif(
    not {"avx2", "avx512"} & {*cpu.usable()}, reason="other kernels round one token and many differently"
)
@pytest.mark.parametrize("context", [400, 140])
def test_generations_in_turns_give_what_they_give_alone(context):
    """To the last bit, even if the cache cannot hold both, or a third text is computed in between."""
    ours, draw = engine(context), random.Random(4)
    prompts = [[5] * 70 + [n * i % 199 for i in range(40)] for n in (3, 7)]
    expected = []
    for prompt in prompts:
        expected.append(answer(ours, prompt, 20)[0])
        ours.clear()
    turns = [ours.generate(Request(prompt, GREEDY, max_tokens=20, logprobs=3), Stats()) for prompt in prompts]
    steps: list[list[GeneratedToken]] = [[], []]
    while any(len(made) < 20 for made in steps):
        which = draw.randrange(2)
        steps[which] += [step for step in [next(turns[which], None)] if step]
        if draw.random() < 0.1:
            ours.logits([9] * draw.randrange(1, context))
    assert steps == expected

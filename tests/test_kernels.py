"""The native kernels, in every variant that this machine can run, against the PyTorch reference."""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv2_local
from dsv2_local.architectures.families import parse_config
from dsv2_local.errors import InputError
from dsv2_local.kernels import cpu, ops, reference
from dsv2_local.kernels.cpu.recording import CALL_ARGUMENTS
from dsv2_local.kernels.format import CacheDtype, ExpertLayout, Format
from dsv2_local.kernels.latents import quantize_latents
from dsv2_local.kernels.layout import Matrix
from dsv2_local.kernels.metadata import AttentionMetadata
from dsv2_local.machine import resources
from dsv2_local.quant import int8, nf4
from dsv2_local.quant.quantize import quantize
from tests.conftest import kernels
from tests.models import TINY
from tests.paging import alone, gathered, paged, scattered_together

# Relative error of a product in norm: 8-bit activations cost 0.6 %; nf4 levels rounded to 8 bits cost 0.3 %.
TOLERANCE = {Format.NF4: 0.008, Format.INT8: 0.007}
QUANTISERS = {Format.NF4: nf4.quantize, Format.INT8: int8.quantize}
FORMATS = list(QUANTISERS)

pytestmark = pytest.mark.skipif(not cpu.usable(), reason="the native kernels are not compiled")


@pytest.fixture(scope="module", params=cpu.usable())
def native(request) -> Iterator[cpu.Kernels]:
    with kernels(request.param):
        found = cpu.kernels()
        assert found is not None
        assert found.variant == request.param
        found.set_threads(resources.Threads(3, ()))  # more threads than there may be cores, so that some have to wait
        yield found


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def matrix(format: Format, rows: int, cols: int) -> Matrix:
    return QUANTISERS[format](torch.randn(rows, cols) / cols**0.5)


def records(layout: ExpertLayout, experts: int) -> Tensor:
    made = [[matrix(layout.format, *shape) for shape in layout.shapes.values()] for _ in range(experts)]
    parts = [[part.view(-1).view(torch.uint8) for m in expert for part in m.parts] for expert in made]
    return torch.stack([torch.cat(expert) for expert in parts])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (40, 100), (136, 1030), (576, 64), (8, 2048)])
def test_linear_is_the_product_with_the_dequantised_weights(native, format, rows, cols):
    weight = matrix(format, rows, cols)
    for tokens in (1, 2, 7, 300, 515):
        x = torch.randn(tokens, cols)
        whole = native.linear(x, weight)
        assert off(whole, reference.linear(x, weight)) < TOLERANCE[format] * (
            2 if tokens * min(rows, cols) < 200 else 1
        )
        # A token's result does not depend on the other tokens: prefill in any chunks and decoding agree.
        one = native.linear(x[tokens // 2, None], weight)[0]
        assert torch.equal(one, whole[tokens // 2]) or native.variant == "portable"
        assert off(one, whole[tokens // 2]) < 1e-6


@pytest.mark.parametrize("format", FORMATS)
def test_linear_on_extreme_numbers(native, format):
    weight = matrix(format, 72, 320)
    zeros = native.linear(torch.zeros(3, 320), weight)
    assert torch.equal(zeros, torch.zeros(3, 72))
    heavy = torch.distributions.StudentT(3.0).sample((50, 320)) * 1000
    assert off(native.linear(heavy, weight), reference.linear(heavy, weight)) < 0.02
    tiny, huge = torch.randn(2, 320) * 1e-20, torch.randn(2, 320) * 1e20
    for x in (tiny, huge):
        assert off(native.linear(x, weight), reference.linear(x, weight)) < 2 * TOLERANCE[format]
    one_block = torch.zeros(2, 320)
    one_block[:, 70] = 5.0
    assert off(native.linear(one_block, weight), reference.linear(one_block, weight)) < 0.005
    bf16 = torch.randn(4, 320).bfloat16()
    assert native.linear(bf16, weight).dtype == torch.bfloat16


def test_every_column_and_code_is_in_its_place(native):
    """One-hot inputs read the matrix back, which shows whether a nibble, lane or block is swapped with another."""
    for format, bound in ((Format.NF4, 0.02), (Format.INT8, 1e-6)):
        weight = matrix(format, 24, 192)
        back = native.linear(torch.eye(192), weight).T
        exact = reference.dequantize(weight)
        scale = exact.abs().amax()
        assert ((back - exact).abs() / scale).max() < bound


@pytest.mark.parametrize("format", FORMATS)
def test_swiglu(native, format):
    gate, up, down = matrix(format, 200, 128), matrix(format, 200, 128), matrix(format, 128, 200)
    for tokens in (1, 3, 300):
        x = torch.randn(tokens, 128)
        # Three products: the third adds its error to those of the other two.
        assert off(native.swiglu(x, gate, up, down), reference.swiglu(x, gate, up, down)) < 3 * TOLERANCE[format]


@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 64), (100, 44), (256, 200)])
@pytest.mark.parametrize("format", FORMATS)
def test_experts(native, format, hidden, intermediate):
    layout = ExpertLayout(format, hidden, intermediate)
    data = records(layout, 9)
    for tokens, choice in itertools.product((1, 2, 5, 33, 700), ("random", "one", "few")):
        pool = {"random": 9, "one": 1, "few": 3}[choice]
        count = min(3, pool)
        ids = torch.stack([torch.randperm(pool)[:count] + 9 - pool for _ in range(tokens)])
        weights, x = torch.rand(tokens, count), torch.randn(tokens, hidden)
        ours = native.experts(x, data, layout, ids, weights)
        assert off(ours, reference.experts(x, data, layout, ids, weights)) < 3 * TOLERANCE[format]


def test_the_experts_of_a_token_do_not_depend_on_other_tokens(native):
    layout = ExpertLayout(Format.NF4, 128, 64)
    data, x, weights = records(layout, 8), torch.randn(40, 128), torch.rand(40, 3)
    ids = torch.stack([torch.randperm(8)[:3] for _ in range(40)])
    whole = native.experts(x, data, layout, ids, weights)
    for t in (0, 17, 39):
        one = native.experts(x[t, None], data, layout, ids[t, None], weights[t, None])
        assert off(one[0], whole[t]) < 1e-6


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 64), (100, 72)])
@pytest.mark.parametrize("format", FORMATS)
def test_outputs_of_single_experts_add_up_to_the_mixture_bit_for_bit(native, format, hidden, intermediate, tokens):
    """For any order of the pairs, any slots, and any split into calls."""
    E, K = 8, 3
    layout = ExpertLayout(format, hidden, intermediate)
    data, x = records(layout, E), torch.randn(tokens, hidden)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(tokens)])
    weights, slot_of = torch.rand(tokens, K), torch.randperm(E)
    slots = torch.empty_like(data)
    slots[slot_of] = data
    shuffled = torch.randperm(tokens * K)
    owner = torch.arange(tokens).repeat_interleave(K)[shuffled]
    out, y, cut = torch.full((tokens * K, hidden), torch.nan), torch.zeros(tokens, hidden), tokens * K // 3
    for part in (slice(0, cut), slice(cut, tokens * K)):
        pairs = owner[part], slot_of[ids.flatten()[shuffled[part]]]
        native.expert_outputs(x, slots, layout, *pairs, out[part])
        wanted = torch.empty_like(out[part])
        reference.expert_outputs(x, slots, layout, *pairs, wanted)
        assert off(out[part], wanted) < 3 * TOLERANCE[format]
    rows = shuffled.argsort().view(tokens, K)
    native.combine(out, rows, ids, weights, y)
    assert torch.equal(y, native.experts(x, data, layout, ids, weights))
    half = torch.full((tokens, hidden), 2.0)
    native.combine(out, torch.where(rows < cut, rows, -1), ids, weights, half)
    expected = torch.full((tokens, hidden), 2.0)
    reference.combine(out, torch.where(rows < cut, rows, -1), ids, weights, expected)
    torch.testing.assert_close(half, expected)


SHAPES = [(16, 128, 64, 512, 128), (4, 32, 16, 64, 48), (3, 16, 8, 40, 24)]  # H, N, P, C, V


@pytest.mark.parametrize(("heads", "N", "P", "C", "V"), SHAPES)
@pytest.mark.parametrize(
    ("tokens", "cached"), [(1, 0), (1, 6), (1, 800), (3, 257), (5, 0), (70, 0), (66, 300), (130, 9)]
)
def test_attention_in_both_forms(native, heads, N, P, C, V, tokens, cached):
    w_uk, w_uv = int8.quantize(torch.randn(heads * C, N) / N**0.5), int8.quantize(torch.randn(heads * V, C) / C**0.5)
    q, latents = torch.randn(tokens, heads, N + P), torch.randn(cached + tokens, C + P).bfloat16()
    rotation = torch.polar(torch.ones(tokens, P // 2), torch.randn(tokens, P // 2))

    def run(kernel: Any, absorbed: bool) -> Tensor:
        return kernel.attention(q, rotation, *paged(latents, cached, absorbed), w_uk, w_uv, 0.11)

    exact = run(reference, True)
    absorbed, materialised = run(native, True), run(native, False)
    errors = [(ours - exact).norm(dim=1) / exact.norm(dim=1) for ours in (absorbed, materialised)]
    assert errors[0].max() < 0.02, "absorbed"  # two quantised products, and bf16 queries where the CPU has bf16
    assert errors[1].max() < 1e-4, "materialised"  # fp32 throughout


def test_attention_ignores_cache_rows_past_the_last_position(native):
    """They may contain anything, even NaN."""
    H, N, P, C, V = SHAPES[1]
    w_uk, w_uv = matrix(Format.INT8, H * C, N), matrix(Format.INT8, H * V, C)
    latents = torch.randn(9, C + P).bfloat16()
    q, rotation = torch.randn(2, H, N + P), torch.ones(2, P // 2, dtype=torch.complex64)
    for absorbed in (True, False):
        assert native.attention(q, rotation, *paged(latents, 7, absorbed), w_uk, w_uv, 0.1).isfinite().all()


@pytest.mark.parametrize("tokens", [12, 40])
def test_attention_of_a_token_does_not_depend_on_other_tokens(native, tokens):
    H, N, P, C, V = 16, 32, 16, 64, 48
    w_uk, w_uv = matrix(Format.INT8, H * C, N), matrix(Format.INT8, H * V, C)
    q, cached = torch.randn(tokens, H, N + P), 500
    latents = torch.randn(cached + tokens, C + P).bfloat16()
    rotation = torch.polar(torch.ones(tokens, P // 2), torch.randn(tokens, P // 2))
    whole = native.attention(q, rotation, *paged(latents, cached, True), w_uk, w_uv, 0.1)
    for start, end in ((0, 1), (3, 8), (tokens - 1, tokens)):
        seen = paged(latents[: cached + end], cached + start, True)
        part = native.attention(q[start:end], rotation[start:end], *seen, w_uk, w_uv, 0.1)
        assert torch.equal(part, whole[start:end]) or native.variant == "portable"
        assert off(part, whole[start:end]) < 1e-6


# The tokens in the cache and in the step of each sequence, in the forms of attention that follow.
RAGGED = [(0, 1), (63, 1), (500, 3), (64, 70), (7, 0), (1, 12), (300, 33), (129, 1)]
FORMS = [True, True, True, False, True, True, False, True]


def together(kind: CacheDtype, C: int, P: int) -> tuple[Tensor, AttentionMetadata]:
    """The sequences of `RAGGED` in one cache; the fourth and the seventh begin with the blocks of the third."""
    rows = [torch.randn(cached + tokens, C + P) for cached, tokens in RAGGED]
    stored = [quantize_latents(part, C) if kind is CacheDtype.INT8 else part.bfloat16() for part in rows]
    cache, metadata = scattered_together(stored, [cached for cached, _ in RAGGED], FORMS, room=2)
    tables = metadata.block_tables
    tables[3, 1:2], tables[6, 1:4] = tables[2, 1:2], tables[2, 1:4]
    return cache, metadata


@pytest.mark.parametrize("kind", [CacheDtype.BF16, CacheDtype.INT8])
@pytest.mark.parametrize(("heads", "N", "P", "C", "V"), [*SHAPES, (5, 16, 6, 136, 16)])
def test_attention_of_several_sequences_is_that_of_each_alone_to_the_bit(native, heads, N, P, C, V, kind):
    w_uk, w_uv = matrix(Format.INT8, heads * C, N), matrix(Format.INT8, heads * V, C)
    cache, metadata = together(kind, C, P)
    total = sum(metadata.counts)
    q, rotation = torch.randn(total, heads, N + P), torch.polar(torch.ones(total, P // 2), torch.randn(total, P // 2))
    whole = native.attention(q, rotation, cache, metadata, w_uk, w_uv, 0.11)
    exact = reference.attention(q, rotation, cache, metadata, w_uk, w_uv, 0.11)
    end = 0
    for index, count in enumerate(metadata.counts):
        rows, end = slice(end, end + count), end + count
        if not count:
            continue
        single = native.attention(q[rows], rotation[rows], cache, alone(metadata, index), w_uk, w_uv, 0.11)
        assert torch.equal(whole[rows], single), index
        assert off(single, exact[rows]) < 0.03, index


@pytest.mark.parametrize("kind", [CacheDtype.BF16, CacheDtype.INT8])
@pytest.mark.parametrize(("C", "P"), [(512, 64), (64, 16), (40, 6)])
def test_latents_of_several_sequences_are_those_of_each_alone_to_the_bit(native, C, P, kind):
    """Nothing else is written, neither to other rows nor to blocks of a sequence without tokens."""
    cache, metadata = together(kind, C, P)
    total = sum(metadata.counts)
    kv_a, weight = torch.randn(total, C + P), torch.rand(C) + 0.5
    rotation = torch.polar(torch.ones(total, P // 2), torch.randn(total, P // 2))
    ours, single, exact = cache.clone(), cache.clone(), cache.clone()
    native.write_latents(ours, metadata, kv_a, weight, 1e-6, rotation)
    reference.write_latents(exact, metadata, kv_a, weight, 1e-6, rotation)
    end = 0
    for index, count in enumerate(metadata.counts):
        rows, end = slice(end, end + count), end + count
        native.write_latents(single, alone(metadata, index), kv_a[rows], weight, 1e-6, rotation[rows])
    assert torch.equal(ours.view(torch.uint8), single.view(torch.uint8))
    changed = [(written.view(torch.uint8) != cache.view(torch.uint8)).any(2) for written in (ours, exact)]
    assert torch.equal(*changed)
    assert int(changed[0].sum()) == total


def test_sharp_attention(native):
    """With scores in the hundreds, the softmax must neither overflow nor miss the position with the highest score."""
    H, N, P, C, V = SHAPES[1]
    w_uk, w_uv = matrix(Format.INT8, H * C, N), matrix(Format.INT8, H * V, C)
    q, latents = torch.randn(1, H, N + P) * 100, torch.randn(600, C + P).bfloat16()
    rotation = torch.ones(1, P // 2, dtype=torch.complex64)
    args = (q, rotation, *paged(latents, 599, False), w_uk, w_uv, 1.0)
    assert off(native.attention(*args), reference.attention(*args)) < 1e-3


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_rows(native, tokens):
    x, weight = torch.randn(tokens, 100) * 3, torch.rand(100) + 0.5
    assert off(native.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)) < 1e-6
    embedding, ids = matrix(Format.INT8, 50, 100), torch.randint(0, 50, (tokens,))
    exact = reference.embedding(ids, embedding, torch.float32)
    assert torch.equal(native.embedding(ids, embedding, torch.float32), exact)
    kv_a, rotation = torch.randn(tokens, 72 + 16), torch.polar(torch.ones(tokens, 8), torch.randn(tokens, 8))
    blocks, metadata = paged(torch.zeros(60 + tokens, 88, dtype=torch.bfloat16), 60, True)  # across a block boundary
    ours, theirs = blocks.clone(), blocks.clone()
    native.write_latents(ours, metadata, kv_a, weight[:72], 1e-6, rotation)
    reference.write_latents(theirs, metadata, kv_a, weight[:72], 1e-6, rotation)
    assert torch.equal(ours.isnan(), blocks.isnan())
    ours, theirs = (gathered(written, metadata.block_tables[0], 60 + tokens) for written in (ours, theirs))
    assert torch.equal(ours[:60], torch.zeros(60, 88))
    assert torch.equal(native.add(x, x * 2), x + x * 2)
    assert off(ours.float(), theirs.float()) < 1e-3  # a few differ in the last bit


@pytest.mark.parametrize(
    "changes", [{}, {"norm_topk_prob": True}, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}]
)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_route(native, tokens, changes):
    raw = {**TINY, "model_type": "deepseek_v2", "routed_scaling_factor": 16.0, **changes}
    config = parse_config(raw)
    x, gate = torch.randn(tokens, 100), torch.randn(8, 100) / 5
    ids, weights = native.route(x, gate, config)
    exact_ids, exact_weights = reference.route(x, gate, config)
    assert torch.equal(ids, exact_ids)
    assert off(weights, exact_weights) < 1e-5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(64, 128), (13, 100), (8, 64), (1, 1)])
def test_quantiser_is_as_good_as_the_reference(native, format, shape):
    for weight in (torch.randn(shape), torch.distributions.StudentT(4.0).sample(shape), torch.randn(shape) * 1e-6):
        ours, theirs = quantize(weight, format), QUANTISERS[format](weight)
        assert [part.shape for part in ours.parts] == [part.shape for part in theirs.parts]
        error, bound = (off(reference.dequantize(m), weight) for m in (ours, theirs))
        assert error <= bound * 1.01 + 1e-6
    zeros = quantize(torch.zeros(shape), format)
    assert torch.equal(reference.dequantize(zeros), torch.zeros(shape))


@pytest.mark.parametrize("format", FORMATS)
def test_quantised_padding_is_zero(native, format):
    ours = quantize(torch.randn(3, 70), format)
    full = Matrix(format, 8, 128, *ours.parts)
    values = reference.dequantize(full)
    assert torch.equal(values[3:], torch.zeros(5, 128))
    assert torch.equal(values[:, 70:], torch.zeros(8, 58))


@pytest.mark.slow
def test_nano_answers_as_on_the_reference(native):
    """Greedy answers agree wherever the reference's two best tokens are further apart than the kernels' tolerance."""
    questions = ["What is a violin?", "What is a river?", "Write me a poem."]
    with kernels(cpu.REFERENCE):
        reference_llm = dsv2_local.load()
        prompts = [reference_llm.tokenizer.encode_chat([{"role": "user", "content": q}]) for q in questions]
        answers = [[c.token_id for c in reference_llm.generate(p, max_tokens=24, temperature=0)] for p in prompts]
        sequences = [p + [t for t in a if t is not None] for p, a in zip(prompts, answers, strict=True)]
        exact = [reference_llm.logits(s) for s in sequences]
    with kernels(native.variant):
        llm = dsv2_local.load()
        compared = 0
        for sequence, theirs in zip(sequences, exact, strict=True):
            ours = llm.logits(sequence)
            best = theirs.topk(2, dim=1).values
            clear = best[:, 0] - best[:, 1] > 0.5
            compared += int(clear.sum())
            assert torch.equal(ours.argmax(1)[clear], theirs.argmax(1)[clear])
        assert compared > 30


@cache
def sampled_answers() -> list[tuple[int, list[int]]]:
    """Answers of nano on the reference: the length of the prompt, and the ids of prompt and answer."""
    words = ("violin", "river", "doctor", "hammer", "bread", "piano", "dog", "water", "house", "tree", "stone", "king")
    with kernels(cpu.REFERENCE):
        llm, texts = dsv2_local.load(), []
        for seed, word in enumerate(words):
            prompt = llm.tokenizer.encode_chat([{"role": "user", "content": f"What is a {word}?"}])
            steps = llm.generate(prompt, max_tokens=40, temperature=1.0, top_p=1.0, seed=seed)
            texts.append((len(prompt), prompt + [step.token_id for step in steps if step.token_id is not None]))
    return texts


@cache
def perplexity(variant: str) -> float:
    """Of `sampled_answers`."""
    texts = sampled_answers()
    with kernels(variant):
        llm, logprobs = dsv2_local.load(), []
        for prompt, ids in texts:
            found = llm.logits(ids)[prompt - 1 : -1].log_softmax(1)
            logprobs.append(found.gather(1, torch.tensor(ids[prompt:])[:, None]))
    return float(torch.cat(logprobs).mean().neg().exp())


@pytest.mark.slow
def test_perplexity_of_nano_is_unchanged(native):
    """To 0.5 %, on answers sampled from the reference."""
    assert perplexity(native.variant) == pytest.approx(perplexity(cpu.REFERENCE), rel=0.005)


def test_prefill_in_chunks_gives_nanos_logits(native):
    with kernels(native.variant):
        llm = dsv2_local.load()
        ids = llm.tokenizer.encode("A river is a large natural stream of water. " * 12)
        whole = llm.logits(ids)
        llm.engine.chunk = 7
        chunked = llm.logits(ids)
    assert (chunked - whole).norm(dim=1).median() / whole.norm(dim=1).median() < 0.05


def test_the_environment_variable_chooses_the_variant(monkeypatch):
    for variant in [*cpu.usable(), cpu.REFERENCE]:
        with kernels(variant):
            assert ops.variant() == variant
    with kernels("mmx"), pytest.raises(InputError, match="DSV2_KERNELS=mmx is not available"):
        cpu.kernels()
    monkeypatch.setattr(cpu, "cpu_features", frozenset)
    assert cpu.usable() == ["portable"]


def test_without_compiled_kernels_the_reference_computes_with_a_notice(monkeypatch):
    monkeypatch.setattr(cpu, "libraries", dict)
    with kernels(""):
        assert ops.variant() == cpu.REFERENCE
        assert "C++ compiler" in (ops.slow_notice() or "")


def test_calls_from_several_python_threads(native):
    """Callers share the thread pool without mixing up their work."""
    from concurrent.futures import ThreadPoolExecutor

    weight = matrix(Format.NF4, 512, 256)
    inputs = [torch.randn(1 + i % 9, 256) for i in range(60)]
    expected = [native.linear(x, weight) for x in inputs]
    with ThreadPoolExecutor(4) as executor:
        for ours, theirs in zip(executor.map(lambda x: native.linear(x, weight), inputs), expected, strict=True):
            assert torch.equal(ours, theirs)


HEADER = Path(__file__).parent.parent / "kernels/cpu/api.hpp"
ARRAYS = ("float", "double", "void", "uint8_t", "uint16_t", "int64_t", "dsv2::Call")
# Arrays are passed as addresses; the types of all other arguments and results are declared exactly.
CTYPES = {
    "void": None, "float": c_float, "int32_t": c_int32, "int64_t": c_int64, "uint64_t": c_uint64,
    "const char*": c_char_p, "const int32_t*": POINTER(c_int32), "const dsv2::Matrix*": POINTER(cpu._Matrix),
    **{f"{const}{element}*": c_void_p for element in ARRAYS for const in ("", "const ")},
}  # fmt: skip


def prototypes() -> dict[str, tuple[tuple[Any, ...], Any]]:
    """The types of the arguments and of the result of every function in api.hpp, as ctypes."""
    text, found = re.sub(r"//.*", "", HEADER.read_text()), {}
    for result, name, parameters in re.findall(r"^API ([^;(]+?) dsv2_(\w+)\(([^)]*)\);", text, re.MULTILINE):
        types = [" ".join(parameter.split()[:-1]) for parameter in parameters.split(",")]
        found[name] = tuple(CTYPES[type] for type in types), CTYPES[result]
    assert found.keys() == set(re.findall(r"\bdsv2_(\w+)\(", text))
    return found


def test_ctypes_declares_every_function_of_the_header():
    """The same names on both sides, and for each the same number and types of arguments and the same result."""
    declared = {name: (types, cpu._RESULTS.get(name)) for name, types in cpu._SIGNATURES.items()}
    assert declared == prototypes()
    assert cpu._RESULTS.keys() <= declared.keys()
    assert f"CALL_ARGUMENTS = {CALL_ARGUMENTS};" in HEADER.read_text()


def test_functions_that_can_be_recorded_are_known_from_the_library(native):
    """A recorded call has room for their arguments, and no result."""
    assert {"linear", "attention", "experts"} <= native._recordable.keys() < cpu._SIGNATURES.keys()
    assert list(native._recordable.values()) == list(range(len(native._recordable)))
    assert max(len(cpu._SIGNATURES[name]) for name in native._recordable) <= CALL_ARGUMENTS
    assert not native._recordable.keys() & cpu._RESULTS.keys()


@pytest.mark.slow
def test_sanitizers(tmp_path):
    """tools/sanitize with AddressSanitizer and UndefinedBehaviorSanitizer; run it by hand for ThreadSanitizer."""
    root = Path(__file__).parent.parent
    if subprocess.run(["sh", "-c", "command -v c++"], capture_output=True, check=False).returncode:
        pytest.skip("no C++ compiler")
    done = subprocess.run(
        [sys.executable, root / "tools/sanitize", "address"],
        capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

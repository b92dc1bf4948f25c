"""A replayed decode step gives the bits of a computed one, and steps that cannot be replayed are computed."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2_local.architectures.families import parse_config
from dsv2_local.errors import ContextLengthError
from dsv2_local.kernels import cpu, ops
from dsv2_local.kernels.cpu.recording import Recording
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.offload.resident_experts import ResidentExperts
from dsv2_local.offload.sizes import RECORDED_ROWS
from dsv2_local.quant.schema import Recipe
from dsv2_local.runtime import random_weights
from dsv2_local.runtime.cache import LatentCache
from dsv2_local.runtime.cpu_step import CpuStep
from dsv2_local.runtime.model import Transformer
from tests.conftest import kernels
from tests.models import TINY
from tests.test_model import GROUPS

CONFIGS: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 0, "norm_topk_prob": True},
    {**GROUPS, "tie_word_embeddings": True},
]

pytestmark = pytest.mark.skipif(not cpu.usable(), reason="the native kernels are not compiled")


@pytest.fixture(params=cpu.usable(), autouse=True)
def variant(request) -> Iterator[str]:
    with kernels(request.param):
        yield request.param


def model(recipe: Recipe = Recipe.NF4, dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    config = parse_config({"model_type": "deepseek_v2", **TINY, **changes})
    made = random_weights.build(config, recipe, threads=1)
    return Transformer(config, made.weights, ResidentExperts(made.layout, made.records), dtype)


def cache(of: Transformer, context: int = 48, kind: CacheDtype = CacheDtype.BF16) -> LatentCache:
    return of.new_cache(context, kind)


def computed(of: Transformer, tokens: list[int], kind: CacheDtype = CacheDtype.BF16) -> list[Tensor]:
    """The logits after each token, without replays."""
    empty = cache(of, kind=kind)
    sequence = empty.new_sequence()
    return [of.logits(of.forward(empty, [(sequence, [token])]))[0] for token in tokens]


class Single:
    """Steps of one sequence."""

    def __init__(self, of: Transformer, context: int = 48, kind: CacheDtype = CacheDtype.BF16) -> None:
        self.step = CpuStep(of, cache(of, context, kind))
        self.sequence = self.step.cache.new_sequence()

    def run(self, token: int) -> Tensor:
        return self.step.run([(self.sequence, [token])])[0]

    @property
    def recording(self) -> Recording | None:
        return self.step.recording


TOKENS = [(7 * i * i + 3) % 199 for i in range(40)]


@pytest.mark.slow
@pytest.mark.parametrize("changes", CONFIGS)
@pytest.mark.parametrize("recipe", [Recipe.NF4, Recipe.MIXED, Recipe.INT8])
def test_a_replay_is_the_step_to_the_last_bit(recipe, changes):
    made = model(recipe, **changes)
    step = Single(made)
    for token, expected in zip(TOKENS, computed(made, TOKENS), strict=True):
        assert torch.equal(step.run(token), expected)
    assert step.recording is not None
    assert step.sequence.length == len(TOKENS)
    step.sequence.truncate(10)  # as when a chat turn is undone
    again = computed(made, TOKENS[:10] + TOKENS[20:22])
    for token, expected in zip(TOKENS[20:22], again[10:], strict=True):
        assert torch.equal(step.run(token), expected)


def test_a_replay_over_an_8_bit_cache():
    made = model()
    step = Single(made, kind=CacheDtype.INT8)
    for token, expected in zip(TOKENS, computed(made, TOKENS, CacheDtype.INT8), strict=True):
        assert torch.equal(step.run(token), expected)
    assert step.recording is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CacheDtype.BF16, CacheDtype.INT8])
def test_steps_of_several_sequences_are_the_steps_of_each_to_the_last_bit(kind):
    """For every number of rows that is recorded, with sequences of different lengths in any order, and with others."""
    made, shared = model(**GROUPS), 70
    expected, prompts = [], [[*range(shared), 90 + row, *range(100, 100 + row)] for row in range(17)]
    for row, prompt in enumerate(prompts):
        alone = cache(made, 256, kind)
        sequence = alone.new_sequence()
        made.forward(alone, [(sequence, prompt)])
        expected.append([made.logits(made.forward(alone, [(sequence, [token])]))[0] for token in TOKENS[row : row + 4]])
    step = CpuStep(made, cache(made, 17 * 256, kind))
    sequences = []
    for prompt in prompts:
        sequence = step.cache.new_sequence(prompt)
        sequence.begin()
        made.forward(step.cache, [(sequence, prompt[sequence.length :])])
        assert sequence.anchor == (shared if sequences else 0)
        sequence.insert_prefix()
        sequences.append(sequence)
    for count in (1, 2, 3, 4, 5, 8, 13, 16, 17):
        order = [(row * 7 + count) % 17 for row in range(count)]
        for sequence, prompt in zip(sequences, prompts, strict=True):
            sequence.truncate(len(prompt))
        for turn in range(4):  # the first is recorded
            parts = [(sequences[row], [TOKENS[row + turn]]) for row in order]
            logits = step.run(parts)
            for row, ours in zip(order, logits, strict=True):
                assert torch.equal(ours, expected[row][turn]), (count, row, turn)
        assert (step._steps[count].recording is not None) if count <= RECORDED_ROWS else count not in step._steps


@pytest.mark.parametrize(("recipe", "dtype"), [(Recipe.BF16, torch.float32), (Recipe.NF4, torch.bfloat16)])
def test_steps_with_other_than_native_kernels_are_computed_every_time(recipe, dtype):
    made = model(recipe, dtype)
    step = Single(made)
    for token, expected in zip(TOKENS[:4], computed(made, TOKENS[:4]), strict=True):
        assert torch.equal(step.run(token), expected)
        assert step.recording is None


def test_the_reference_is_not_recorded():
    with kernels(cpu.REFERENCE):
        assert ops.recording() is None
        made = model()
        step = Single(made)
        assert torch.equal(step.run(5), computed(made, [5])[0])


def test_torch_operations_make_a_recording_incomplete():
    x, weight = torch.randn(2, 64), torch.ones(64)
    for foreign in (lambda y: y + 1, lambda y: y.double(), lambda y: y.add_(1), lambda y: y.t().contiguous()):
        recording = ops.recording()
        assert recording is not None
        with torch.inference_mode(), recording:
            foreign(ops.rms_norm(x, weight, 1e-6))
        assert not recording.complete
    recording = ops.recording()
    assert recording is not None
    with torch.inference_mode(), recording:
        ops.add(ops.rms_norm(x, weight, 1e-6).view(2, 64)[1:].float(), x[:1])
    assert recording.complete
    assert recording.names == ["rms_norm", "add"]


def test_an_interrupt_leaves_the_cache_as_it_was(monkeypatch):
    made = model()
    step = Single(made)
    expected = computed(made, TOKENS)
    with monkeypatch.context() as patch:
        patch.setattr(made.layers[1], "attend", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            step.run(TOKENS[0])  # while it is being recorded
    assert (step.sequence.length, step.recording) == (0, None)
    for token, logits in zip(TOKENS[:5], expected, strict=False):
        assert torch.equal(step.run(token), logits)
    assert step.recording is not None
    replay, calls = step.recording._replay, iter(range(2))
    step.recording._slice = 12

    def stopping(*arguments: Any) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        replay(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step.recording, "_replay", stopping)
        with pytest.raises(KeyboardInterrupt):
            step.run(TOKENS[30])  # half a replay of a token that is then not used
    assert step.sequence.length == 5
    assert torch.equal(step.run(TOKENS[5]), expected[5])


def _interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_a_full_cache_is_refused():
    made = model()
    step = Single(made, context=2)
    step.run(1)
    step.run(2)
    with pytest.raises(ContextLengthError):
        step.run(3)
    with pytest.raises(ContextLengthError):
        made.forward(step.step.cache, [(step.sequence, [3])])
    assert step.sequence.length == 2


def test_every_call_is_timed():
    made = model()
    step = Single(made)
    step.run(1)
    assert step.recording is not None
    seconds = step.recording.take_times()
    step.run(2)
    assert len(seconds) == len(step.recording.names) > 3 * 8
    assert min(seconds) > 0


def test_calls_of_other_threads_are_not_recorded():
    made, other = model(), torch.ones(1, 64)
    recording = ops.recording()
    assert recording is not None
    with ThreadPoolExecutor(1) as executor, torch.inference_mode(), recording:
        executor.submit(ops.rms_norm, other, torch.ones(64), 1e-6).result()
        made.logits(torch.ones(1, made.config.hidden_size))
    assert recording.names == ["rms_norm", "linear"]


@pytest.mark.slow
def test_recording_does_not_import_the_compiler():
    """Importing torch's compiler would delay the first answer by a second."""
    code = (
        "import sys, dsv2_local\n"
        "list(dsv2_local.load().generate([5, 6, 7], max_tokens=4))\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

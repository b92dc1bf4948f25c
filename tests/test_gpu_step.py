"""`GpuStep`, run on the CPU with a simulated CUDA graph: a replay runs the captured Python step again."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv2_local import llm
from dsv2_local.errors import ContextLengthError
from dsv2_local.kernels import cpu
from dsv2_local.kernels.format import CACHE_BLOCK
from dsv2_local.kernels.graphs import GraphMemory
from dsv2_local.llm import LLM
from dsv2_local.offload.graph_experts import GraphBuffers
from dsv2_local.offload.offloaded_experts import OffloadedExperts
from dsv2_local.offload.plan_request import Mode
from dsv2_local.offload.sizes import DRAFT_ROWS
from dsv2_local.runtime import gpu_step, prefill
from dsv2_local.runtime.cpu_step import CpuStep
from dsv2_local.runtime.gpu_step import DRAFT, GpuStep
from dsv2_local.runtime.prefill import PrefillPass
from dsv2_local.runtime.prompt_lookup import PromptLookup
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.sequence import Sequence
from dsv2_local.runtime.step import candidate_limits
from tests.conftest import kernels
from tests.test_placement import devices, loaded

pytestmark = pytest.mark.skipif(cpu.kernels() is None, reason="the reference rounds one token and many differently")

PROMPT = "The bow of a violin is made of wood and hair. "
GREEDY, WARM = SamplingParams(temperature=0), SamplingParams(temperature=0.5)


class Again:
    """A simulated graph whose replay runs the captured step again, into the same result tensor."""

    fully_captured = True

    def __init__(self, memory: GraphMemory) -> None: ...
    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        self._step, self._result = step, step()
        return self._result

    def replay(self) -> None:
        self._result.copy_(self._step())


class Event:
    """A simulated event of a stream that has always ended."""

    def __init__(self, enable_timing: bool) -> None: ...
    def record(self, stream: object) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: "Event") -> float:
        return 250.0  # milliseconds


@pytest.fixture
def simulated_graphs(monkeypatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **given: empty(*shape, **given))
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(gpu_step, "PiecewiseGraph", Again)


@pytest.fixture(params=[256])
def model(request, simulated_graphs) -> LLM:
    """dsv2-nano on the CPU, decoding with `GpuStep`; the parameter is the context."""
    made = llm.load(context=request.param)
    made.engine.decode_step = GpuStep(made.engine.model, made.engine.cache, prepared=2)
    made.engine.warm_up()
    return made


def plain(model: LLM, tokens: list[int]) -> Tensor:
    """Logits [T, vocab] of one sequence of these tokens, one by one from `CpuStep`."""
    cache = model.engine.cache
    step, sequence = CpuStep(model.engine.model, cache), cache.new_sequence()
    logits = torch.cat([step.run([(sequence, [token])]).clone() for token in tokens])
    sequence.release()
    return logits


def shapes(model: LLM) -> list[tuple[int, int]]:
    """The captured steps: sequences and tokens of each."""
    return sorted(shape for shape, step in model.engine.decode_step._steps.items() if step.fully_captured)


def test_warming_up_captures_what_is_asked_for_and_leaves_an_empty_cache(model):
    step, cache = model.engine.decode_step, model.engine.cache
    assert step.asynchronous
    assert step.max_draft == DRAFT == DRAFT_ROWS - 1
    assert shapes(model) == [(1, 1), (1, 1 + DRAFT), (2, 1)]
    assert cache.pool.available == cache.pool.count
    assert not cache.new_sequence([0, 0]).match_prefix()


def test_steps_of_one_and_of_several_tokens(model):
    tokens = [100 + i for i in range(12)]
    expected, step, sequence = plain(model, tokens), model.engine.decode_step, model.engine.cache.new_sequence()
    at = 0
    for count in (1, 1 + DRAFT, 1, 1 + DRAFT):
        (result,) = step.launch([(sequence, tokens[at : at + count])], [GREEDY])
        result.wait()
        assert result.seconds == 0.25
        for token, logits in zip([*tokens[at + 1 : at + count], -1], expected[at : at + count], strict=True):
            assert torch.equal(result.logits(), logits)
            assert result.candidates().ids.tolist() == [int(logits.argmax())]
            assert result.accept(token) == (token != -1)
        at += count
        assert sequence.length == at
    assert torch.equal(step.run([(sequence, [7])])[0], plain(model, [*tokens, 7])[-1])


def test_a_draft_of_another_length_is_not_verified(model):
    sequence = model.engine.cache.new_sequence()
    (result,) = model.engine.decode_step.launch([(sequence, [1, 2, 3])], [GREEDY])
    assert result.draft == []
    assert torch.equal(result.logits(), plain(model, [1])[-1])
    assert sequence.length == 1


@pytest.mark.parametrize("model", [17 * CACHE_BLOCK], indirect=True)
def test_any_number_of_sequences_in_padded_steps(model):
    """Sequences come and go; each has the logits and candidates of itself alone, and padding leaves no trace."""
    step, cache, rng = model.engine.decode_step, model.engine.cache, random.Random(0)
    texts: list[tuple[Sequence, list[int]]] = []
    for count in (1, 3, 2, 5, 9, 16, 4, 1):
        for sequence, _ in texts[count // 2 :]:
            sequence.release()
        texts = texts[: count // 2]
        texts += [(cache.new_sequence(), []) for _ in range(count - len(texts))]
        rng.shuffle(texts)
        for _ in range(2):
            parts = [(sequence, [rng.randrange(1000)]) for sequence, _ in texts]
            params = [rng.choice([GREEDY, WARM]) for _ in texts]
            results = step.launch(parts, params)
            for (sequence, text), (_, tokens), own, result in zip(texts, parts, params, results, strict=True):
                text += tokens
                assert sequence.length == len(text)
                logits = result.logits()
                assert torch.equal(logits, plain(model, text)[-1])
                (likely,) = (logits >= logits.max() - candidate_limits(own)[1]).nonzero(as_tuple=True)
                assert result.candidates().ids.tolist() == likely.tolist()
    assert shapes(model) == [(1, 1), (1, 1 + DRAFT), (2, 1), (4, 1), (8, 1), (16, 1)]


def test_parameters_change_from_step_to_step(model):
    step, sequence = model.engine.decode_step, model.engine.cache.new_sequence()
    counts = [len(step.launch([(sequence, [5])], [params])[0].candidates().ids) for params in (GREEDY, WARM) * 2]
    assert counts[0] == counts[2] == 1
    assert min(counts[1], counts[3]) > 1


def test_a_full_context_is_refused_and_the_sequence_stays_as_it_was(model):
    step, sequence = model.engine.decode_step, model.engine.cache.new_sequence()
    for _ in range(254):
        step.launch([(sequence, [5])], [GREEDY])[0].wait()
    with pytest.raises(ContextLengthError):
        step.launch([(sequence, [5] * (1 + DRAFT))], [GREEDY])
    assert sequence.length == 254


def test_without_memory_for_a_capture_the_step_is_computed_all_the_same(model, monkeypatch):
    class Full(Again):
        def capture(self, step: Callable[[], Tensor]) -> Tensor:
            step()
            raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(gpu_step, "PiecewiseGraph", Full)
    step, cache = model.engine.decode_step, model.engine.cache
    sequences, expected = [cache.new_sequence() for _ in range(3)], plain(model, [8, 9])
    for at, token in enumerate((8, 9)):
        for result in step.launch([(sequence, [token]) for sequence in sequences], [GREEDY] * 3):
            assert torch.equal(result.logits(), expected[at])
    assert (4, 1) not in shapes(model)


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"seed": 2, "top_p": 0.9}, {"seed": 2, "repetition_penalty": 1.1}]
)
def test_answers_are_those_of_the_cpu_with_right_and_wrong_drafts(model, monkeypatch, options):
    expected = [chunk.token_id for chunk in llm.load(context=256).generate(PROMPT, max_tokens=50, **options)]
    prompt = len(model.tokenizer.encode(PROMPT))

    def propose(lookup: PromptLookup, most: int) -> list[int]:
        done = len(lookup._tokens) - prompt
        return [*expected[done : done + done % (most + 1)], 5, 5, 5, 5][:most]

    monkeypatch.setattr(PromptLookup, "propose", propose)
    chunks = model.generate(PROMPT, max_tokens=50, **options)
    assert [chunk.token_id for chunk in chunks] == expected
    if len(expected) > 10:
        assert 0 < chunks.stats.accepted_tokens < chunks.stats.draft_tokens


def test_a_prefill_pass_is_queued_piece_by_piece(model, monkeypatch):
    """On a simulated GPU that takes 0.15 s for a piece, which the host only queues."""
    now, busy_until = 0.0, 0.0

    def waiter(x: Tensor) -> Callable[[], object]:
        nonlocal busy_until
        busy_until = end = max(now, busy_until) + 0.15

        def wait() -> None:
            nonlocal now
            now = max(now, end)

        return wait

    monkeypatch.setattr(prefill, "waiter", waiter)
    monkeypatch.setattr(prefill, "perf_counter", lambda: now)
    engine, tokens = model.engine, list(range(100, 120))
    sequence = engine.cache.new_sequence(tokens)
    begun, turns, output = PrefillPass(engine.model, engine.cache, [(sequence, tokens)], [20]), 0, None
    while output is None:
        before = now
        output, turns = begun.advance(0.2), turns + 1
        assert busy_until - before < 0.2 + 2 * 0.15 + 1e-9, "a decode step would wait longer"
        now = busy_until  # the decode step after it
    assert turns == 2 * len(engine.model.layers) // 3
    assert torch.equal(engine.model.logits(output)[-1], plain(model, tokens)[-1])


class Between(Again):
    """A graph of parts with work of the host between them, which here runs at once."""

    fully_captured = False

    def call_between(self, *work: Callable[[], object]) -> None:
        for call in work:
            call()


@pytest.mark.parametrize(("mode", "slots"), [(Mode.HYBRID, 0), (Mode.HYBRID, 20), (Mode.STREAM, 40), (Mode.CPU, 0)])
def test_batches_with_experts_in_ram(simulated_graphs, monkeypatch, tmp_path, mode, slots):
    """On the torch reference, whose kernels skip experts that have no slot as those of GPUs do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gpu_step, "PiecewiseGraph", Between)
    with kernels(cpu.REFERENCE), loaded(mode, on=devices(slots)) as model:
        engine, config = model.engine, model.engine.model.config
        assert isinstance(model.experts, OffloadedExperts)
        (device,) = model.experts.devices
        device.graph_buffers = GraphBuffers.allocate(
            device.slots.device, config.hidden_size, config.num_experts_per_tok
        )
        step = GpuStep(engine.model, engine.cache)
        engine.decode_step = step
        texts = [[100 + 40 * i, 101 + 40 * i, 102 + 40 * i] for i in range(5)]
        expected = [plain(model, text) for text in texts]
        assert not step.asynchronous
        for count in (1, 3, 5, 3):
            sequences = [engine.cache.new_sequence() for _ in range(count)]
            for at in range(3):
                before = model.experts.stats
                logits = step.run([(s, [text[at]]) for s, text in zip(sequences, texts, strict=False)])
                for row, single in zip(logits, expected, strict=False):
                    assert (row - single[at]).norm() < 1e-4 * single[at].norm()
                done = model.experts.stats - before
                if at:  # a first step runs twice here, since a simulated capture computes
                    assert done.hits + done.misses <= count * config.num_experts_per_tok * len(config.moe_layers)
            for sequence in sequences:
                sequence.release()
        assert step.max_draft == 0
        assert model.experts.stats.retries == 0
        assert (model.experts.stats.hits > 0) == (slots > 0)

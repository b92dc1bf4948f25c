"""dsv2-nano on a GPU: CUDA graphs against single launches, and experts in RAM or on the GPU against the reference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv2_local import llm
from dsv2_local.kernels import cpu
from dsv2_local.kernels.format import CacheDtype
from dsv2_local.llm import LLM, bundled_model
from dsv2_local.offload.balance import Costs
from dsv2_local.offload.offloaded_experts import OffloadedExperts
from dsv2_local.offload.plan import CONTEXT_BYTES, make_plan
from dsv2_local.offload.plan_request import Machine, Mode
from dsv2_local.runtime.cpu_step import CpuStep
from dsv2_local.runtime.prompt_lookup import PromptLookup
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.sequence import Sequence
from dsv2_local.runtime.step import TopCandidates
from tests.conftest import kernels

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
pytest.importorskip("triton")

from dsv2_local.offload.cuda_device import CudaDevice
from dsv2_local.runtime.gpu_step import DRAFT, GpuStep

FP32, BF16 = torch.float32, torch.bfloat16
EVEN = Costs(fetch=1.0, read=1.0, token=0.1)
PROMPT = "A violin is a string instrument that is played with a bow. " * 3


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def loaded(mode: Mode, slots: int = 0, dtype: torch.dtype = FP32, context: int = 512) -> LLM:
    """dsv2-nano on GPU 0, with a memory limit that leaves room for `slots` experts."""
    vram = None
    if mode in (Mode.HYBRID, Mode.STREAM):
        cache_dtype = CacheDtype.FP32 if dtype == FP32 else CacheDtype.BF16
        request = replace(llm.load(context=context).plan.request, experts=Mode.STREAM, cache_dtype=cache_dtype)
        made = make_plan(request, Machine((1 << 34,), 1 << 40))
        (gpu,) = made.gpus
        fixed = sum(size for name, size in gpu.parts.items() if name not in ("driver", "expert slots"))
        vram = [CONTEXT_BYTES + fixed + slots * made.expert_bytes + 1]
    return LLM(
        bundled_model(), dtype=dtype, context=context, threads=None, experts=mode, devices=[CudaDevice(0)], vram=vram,
        costs=EVEN,
    )  # fmt: skip


def answer(model: LLM, tokens: int = 10) -> list[int | None]:
    never_end = dict.fromkeys(model._end_tokens, -100.0)
    return [c.token_id for c in model.generate(PROMPT, max_tokens=tokens, temperature=0, logit_bias=never_end)]


def decoded(model: LLM, step: GpuStep | CpuStep, tokens: list[int], sequence: Sequence | None = None) -> Tensor:
    """Logits [T, vocab] of tokens that follow those of a sequence, one by one."""
    sequence = sequence or model.engine.cache.new_sequence()
    return torch.cat([step.run([(sequence, [token])]).clone() for token in tokens])


@pytest.fixture(scope="module")
def expected() -> list[int | None]:
    with kernels(cpu.REFERENCE):
        return answer(llm.load(context=512))


def test_answers_are_those_of_the_reference(expected):
    with loaded(Mode.GPU) as model:
        assert isinstance(model.engine.decode_step, GpuStep)
        assert answer(model) == expected
        assert answer(model) == expected  # with a cached prompt, and all steps replayed


def test_answers_by_bitsandbytes_are_those_of_the_reference(expected):
    pytest.importorskip("bitsandbytes")
    with kernels(cpu.BITSANDBYTES), loaded(Mode.GPU) as model:
        assert not isinstance(model.engine.decode_step, GpuStep)
        assert answer(model) == expected


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_replay_is_the_step_to_the_last_bit(dtype):
    with loaded(Mode.GPU, dtype=dtype) as model:
        engine, tokens = model.engine, list(range(100, 130))
        launched = decoded(model, CpuStep(engine.model, engine.cache), tokens)
        graphs, sequence = GpuStep(engine.model, engine.cache), engine.cache.new_sequence()
        assert torch.equal(decoded(model, graphs, tokens, sequence), launched)
        sequence.truncate(10)  # as when a chat turn is undone; then prompts, in memory outside the graphs
        for length in (2, 3, 5, 7, 9):
            other = engine.cache.new_sequence()
            engine.model.forward(engine.cache, [(other, range(length))])
            other.release()
        assert torch.equal(decoded(model, graphs, tokens[10:], sequence), launched[10:])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("mode", "slots"), [(Mode.GPU, 0), (Mode.HYBRID, 0), (Mode.HYBRID, 20), (Mode.STREAM, 0), (Mode.CPU, 0)]
)
def test_several_sequences_in_a_step_are_several_steps_up_to_rounding(mode, slots, dtype):
    """Sequences of different lengths come and go, so that every number of rows is captured, replayed and padded."""
    with loaded(mode, slots, dtype, context=2048) as model:
        engine, step = model.engine, model.engine.decode_step
        assert isinstance(step, GpuStep)
        engine.warm_up()
        texts = [list(range(100 + 40 * i, 103 + 41 * i)) for i in range(16)]
        alone = [decoded(model, step, text)[-2:] for text in texts]
        for count in (2, 3, 16, 5, 8, 1):
            sequences = [engine.cache.new_sequence() for _ in range(count)]
            for sequence, text in zip(sequences, texts, strict=False):
                for token in text[:-2]:
                    step.run([(sequence, [token])])
            for at in (-2, -1):
                logits = step.run([(s, [text[at]]) for s, text in zip(sequences, texts, strict=False)])
                for row, single in zip(logits, alone, strict=False):
                    assert (row - single[at]).norm() < (1e-3 if dtype == FP32 else 5e-2) * single[at].norm()
            for sequence in sequences:
                sequence.release()


@pytest.mark.parametrize("slots", [0, 7, 40])
@pytest.mark.parametrize("mode", [Mode.HYBRID, Mode.STREAM, Mode.CPU])
def test_answers_with_offloaded_experts_are_those_of_the_reference(expected, mode, slots):
    """The CPU computes its experts with the reference, since the native kernels round activations to int8."""
    with kernels(cpu.REFERENCE), loaded(mode, slots) as model:
        assert isinstance(model.experts, OffloadedExperts)
        assert answer(model) == expected
        figures = model.experts.stats
        assert figures.retries == 0
        if mode is not Mode.CPU:
            assert (figures.hits > 0) == (slots > 0)


@pytest.mark.parametrize("slots", [0, 7, 40])
@pytest.mark.parametrize("mode", [Mode.HYBRID, Mode.STREAM, Mode.CPU])
def test_logits_with_experts_placed_by_native_code_are_those_of_the_gpu(mode, slots):
    """Up to the rounding of the CPU's kernels; between two prompts, so that prefill and native steps take turns."""
    tokens, found = list(range(100, 130)), []
    for placed in (Mode.GPU, mode):
        with loaded(placed, slots) as model:
            engine = model.engine
            if placed is not Mode.GPU:
                (device,) = model.experts.devices
                assert device.native is not None
                engine.warm_up()
            sequence = engine.cache.new_sequence()
            before = decoded(model, engine.decode_step, tokens, sequence)
            engine.model.forward(engine.cache, [(sequence, range(200))])
            found.append(torch.cat((before, decoded(model, engine.decode_step, tokens, sequence))))
            if placed is not Mode.GPU:
                assert model.experts.stats.host_experts > 0 or mode is Mode.STREAM
                assert (model.experts.stats.fetched_bytes > 0) == (mode is not Mode.CPU)
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()


@pytest.mark.parametrize(("mode", "slots"), [(Mode.GPU, 0), (Mode.HYBRID, 9), (Mode.STREAM, 9)])
def test_log_probabilities_of_a_prompt_are_those_of_its_logits(mode, slots):
    with loaded(mode, slots) as model:
        ids = model.tokenizer.encode(PROMPT * 3)
        rows = model.logits(ids).log_softmax(-1)
        generation = model.generate(ids, prompt_logprobs=1, max_tokens=3, temperature=0)
        list(generation)
    assert len(generation.prompt_logprobs) == len(ids)
    for at, entry in enumerate(generation.prompt_logprobs[1:], 1):
        assert entry
        assert entry.logprob == pytest.approx(float(rows[at - 1, ids[at]]), abs=1e-3)
        assert entry.top_logprobs[0][1] == pytest.approx(float(rows[at - 1].max()), abs=1e-3)


def test_streamed_experts_change_no_bit():
    logits = []
    for mode, slots in ((Mode.GPU, 0), (Mode.STREAM, 0), (Mode.STREAM, 20)):
        with loaded(mode, slots, BF16) as model:
            logits.append(decoded(model, model.engine.decode_step, list(range(100, 130))))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 1, "top_p": 0.9}, {"seed": 1, "temperature": 1.0}])
def test_sampling_from_top_candidates_is_sampling_from_all_logits(monkeypatch, options):
    """Steps are launched before their token is yielded, and the top candidates are found on the device."""

    def tokens() -> list[int | None]:
        with loaded(Mode.GPU, dtype=FP32) as model:
            assert model.engine.decode_step.asynchronous
            return [chunk.token_id for chunk in model.generate(PROMPT, max_tokens=40, **options)]

    narrowed = tokens()
    monkeypatch.setattr(TopCandidates, "unpack", lambda packed: None)
    assert tokens() == narrowed


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_several_tokens_in_a_step_are_several_steps_up_to_rounding(dtype):
    with loaded(Mode.GPU, dtype=dtype) as model:
        step, sequence = model.engine.decode_step, model.engine.cache.new_sequence()
        assert step.max_draft == DRAFT
        tokens, params = list(range(100, 130)), SamplingParams(temperature=0)
        expected = decoded(model, step, tokens, sequence)
        for start in range(0, len(tokens), 1 + DRAFT):
            sequence.truncate(start)
            launched = tokens[start : start + 1 + DRAFT]
            (result,) = step.launch([(sequence, launched)], [params])
            result.wait()
            assert result.seconds > 0
            for token, logits in zip([*launched[1:], -1], expected[start:], strict=False):
                ours, candidates = result.logits(), result.candidates()
                assert (ours - logits).norm() < (1e-4 if dtype == FP32 else 3e-2) * logits.norm()
                assert candidates is not None
                assert candidates.ids.tolist() == (ours == ours.max()).nonzero().flatten().tolist()  # bf16 has ties
                assert result.accept(token) == (token != -1)
        assert sequence.length == len(tokens)


def test_drafts_are_verified_in_one_step(monkeypatch):
    def tokens(propose) -> tuple[list[int | None], int]:
        monkeypatch.setattr(PromptLookup, "propose", propose)
        with loaded(Mode.GPU, dtype=FP32) as model:
            chunks = model.generate(
                PROMPT, max_tokens=40, temperature=0, logit_bias=dict.fromkeys(model._end_tokens, -100.0)
            )
            prompt.append(len(model.tokenizer.encode(PROMPT)))
            return [chunk.token_id for chunk in chunks], chunks.stats.accepted_tokens

    prompt: list[int] = []
    answer, _ = tokens(lambda self, most: [])
    right = lambda self, most: [*answer[len(self._tokens) - prompt[0] :], 5, 5, 5, 5][:most]  # noqa: E731
    again, accepted = tokens(right)
    assert again == answer
    assert accepted >= 20

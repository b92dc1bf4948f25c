"""dsv2-nano on a GPU: CUDA graphs against single launches, and experts in RAM or on the GPU against the reference."""

from dataclasses import replace

import pytest
import torch

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


@pytest.fixture(scope="module")
def expected() -> list[int | None]:
    with kernels(cpu.REFERENCE):
        return answer(llm.load(context=512))


def test_answers_are_those_of_the_reference(expected):
    with loaded(Mode.GPU) as model:
        assert isinstance(model.engine.step, GpuStep)
        assert answer(model) == expected
        assert answer(model) == expected  # with a cached prompt, and all steps replayed


def test_answers_by_bitsandbytes_are_those_of_the_reference(expected):
    pytest.importorskip("bitsandbytes")
    with kernels(cpu.BITSANDBYTES), loaded(Mode.GPU) as model:
        assert not isinstance(model.engine.step, GpuStep)
        assert answer(model) == expected


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_replay_is_the_step_to_the_last_bit(dtype):
    with loaded(Mode.GPU, dtype=dtype) as model:
        step = CpuStep(model.engine.model, model.engine.cache)
        tokens = list(range(100, 130))
        launched = [step.run(token).clone() for token in tokens]
        model.engine.cache.truncate(0)
        graphs = GpuStep(model.engine.model, model.engine.cache)
        for token, logits in zip(tokens, launched, strict=True):
            assert torch.equal(graphs.run(token), logits)
        model.engine.cache.truncate(10)  # as when a chat turn is undone; then prompts, in memory outside the graphs
        for length in (2, 3, 5, 7, 9):
            model.engine.model.forward(torch.arange(length), model.engine.cache)
        model.engine.cache.truncate(10)
        for token, logits in zip(tokens[10:], launched[10:], strict=True):
            assert torch.equal(graphs.run(token), logits)


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
            logits = [engine.step.run(token).clone() for token in tokens]
            engine.model.forward(torch.arange(200), engine.cache)
            logits += [engine.step.run(token).clone() for token in tokens]
            found.append(torch.stack(logits))
            if placed is not Mode.GPU:
                assert model.experts.stats.host_experts > 0 or mode is Mode.STREAM
                assert (model.experts.stats.fetched_bytes > 0) == (mode is not Mode.CPU)
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()


def test_streamed_experts_change_no_bit():
    logits = []
    for mode, slots in ((Mode.GPU, 0), (Mode.STREAM, 0), (Mode.STREAM, 20)):
        with loaded(mode, slots, BF16) as model:
            step = model.engine.step
            logits.append(torch.stack([step.run(token).clone() for token in range(100, 130)]))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 1, "top_p": 0.9}, {"seed": 1, "temperature": 1.0}])
def test_sampling_from_top_candidates_is_sampling_from_all_logits(monkeypatch, options):
    """Steps are launched before their token is yielded, and the top candidates are found on the device."""

    def tokens() -> list[int | None]:
        with loaded(Mode.GPU, dtype=FP32) as model:
            assert model.engine.step.asynchronous
            return [chunk.token_id for chunk in model.generate(PROMPT, max_tokens=40, **options)]

    narrowed = tokens()
    monkeypatch.setattr(TopCandidates, "unpack", lambda packed: None)
    assert tokens() == narrowed


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_several_tokens_in_a_step_are_several_steps_up_to_rounding(dtype):
    with loaded(Mode.GPU, dtype=dtype) as model:
        step, cache = model.engine.step, model.engine.cache
        assert step.max_draft == DRAFT
        tokens, params = list(range(100, 130)), SamplingParams(temperature=0)
        expected = torch.stack([step.run(token) for token in tokens])
        for start in range(0, len(tokens), 1 + DRAFT):
            cache.truncate(start)
            launched = tokens[start : start + 1 + DRAFT]
            result = step.launch(launched, params)
            result.wait()
            assert result.seconds > 0
            for token, logits in zip([*launched[1:], -1], expected[start:], strict=False):
                ours, candidates = result.logits(), result.candidates()
                assert (ours - logits).norm() < (1e-4 if dtype == FP32 else 3e-2) * logits.norm()
                assert candidates is not None
                assert candidates.ids.tolist() == (ours == ours.max()).nonzero().flatten().tolist()  # bf16 has ties
                assert result.accept(token) == (token != -1)
        assert cache.length == len(tokens)


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

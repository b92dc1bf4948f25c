"""NaN and infinity that the model computes are an error that names the layer, with every kind of kernels."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import dsv2_local
from dsv2_local.errors import CheckpointError, NonFiniteError
from dsv2_local.kernels import cpu
from dsv2_local.kernels.layout import expert_matrices
from dsv2_local.quant.checkpoint import Checkpoint
from dsv2_local.quant.convert import convert
from dsv2_local.quant.schema import Recipe
from dsv2_local.runtime.sampler import Sampler
from dsv2_local.runtime.sampling_params import SamplingParams
from dsv2_local.runtime.step import StepResult
from tests.conftest import kernels
from tests.models import save_random

VARIANTS = [*cpu.libraries(), cpu.REFERENCE]
LAYER = "model.layers.1."
DAMAGES = {
    "model.embed_tokens.weight.scales": "the embedding",
    "model.layers.0.mlp.down_proj.weight.scales": "layer 0",
    LAYER + "self_attn.q_b_proj.weight.scales": "layer 1",
    LAYER + "self_attn.kv_a_proj_with_mqa.weight.scales": "layer 1",
    LAYER + "self_attn.kv_b_proj.w_uk.scales": "layer 1",
    LAYER + "self_attn.kv_b_proj.w_uv.scales": "layer 1",
    LAYER + "self_attn.o_proj.weight.scales": "layer 1",
    LAYER + "mlp.shared_experts.gate_proj.weight.scales": "layer 1",
    LAYER + "mlp.shared_experts.down_proj.weight.scales": "layer 1",
    "lm_head.weight.scales": "the last norm or the head",
}
PROMPT = list(range(2, 42))  # begins with the token whose embedding is damaged


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("non-finite")
    convert(save_random(root / "source", num_hidden_layers=2), root / "converted", recipe=Recipe.NF4)
    return root / "converted"


def damaged(directory: Path, to: Path, name: str, value: float) -> Path:
    """A copy in which one number of a tensor, or one scale of each matrix of all routed experts, is this value."""
    shutil.copytree(directory, to)
    checkpoint = Checkpoint(to)
    if name == "experts":
        file, records = to / "experts-001.safetensors", checkpoint.experts(1).clone()
        for record in records:
            for matrix in expert_matrices(checkpoint.expert_layout, record):
                assert matrix.scales is not None
                matrix.scales.view(-1)[3] = value
        content = file.read_bytes()
        file.write_bytes(content[: len(content) - records.nbytes] + records.numpy().tobytes())
        return to
    for file in to.glob("dense*.safetensors"):
        content = bytearray(file.read_bytes())
        length = int.from_bytes(content[:8], "little")
        if entry := json.loads(content[8 : 8 + length]).get(name):
            dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[entry["dtype"]]
            third = 8 + length + entry["data_offsets"][0] + 2 * dtype.itemsize
            content[third : third + 2] = torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes()
            file.write_bytes(content)
            return to
    raise AssertionError(name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cache_dtype", ["bf16", "int8"])
def test_damaged_weights_name_their_layer(directory, tmp_path, variant, cache_dtype):
    with kernels(variant):
        for name, where in {**DAMAGES, "experts": "layer 1"}.items():
            for value in (float("nan"), float("inf")):
                copy = damaged(directory, tmp_path / f"{name} {value}", name, value)
                llm = dsv2_local.load(copy, context=128, cache_dtype=cache_dtype, threads=1)
                for options in ({"temperature": 0}, {"top_p": 0.9}, {"seed": 1, "repetition_penalty": 1.1}):
                    with pytest.raises(NonFiniteError, match=f"infinity in {where}: .*inspect --verify"):
                        list(llm.generate(PROMPT, max_tokens=3, **options))
                with pytest.raises(NonFiniteError, match=f"in {where}"):
                    llm.logits(PROMPT[:1])


@pytest.mark.parametrize("name", [LAYER + "input_layernorm.weight", LAYER + "mlp.gate.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_norms_and_routers_are_checked_when_they_are_loaded(directory, tmp_path, name, value):
    with pytest.raises(CheckpointError, match=f"dense.*safetensors: {name} has NaN or infinity"):
        dsv2_local.load(damaged(directory, tmp_path / "copy", name, value))


def test_what_was_computed_leaves_the_cache(directory, monkeypatch):
    llm = dsv2_local.load(directory, context=128)
    expected = [chunk.token_id for chunk in llm.generate(PROMPT, max_tokens=4, temperature=0)]
    layer = llm.engine.model.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "feed_forward", lambda x, *_: x * float("nan"))
        with pytest.raises(NonFiniteError, match="layer 1"):
            list(llm.generate([*PROMPT[:30], 3], max_tokens=4, temperature=0))
    again = llm.generate(PROMPT, max_tokens=4, temperature=0)
    assert [chunk.token_id for chunk in again] == expected
    assert again.stats.reused_tokens == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}, {}])
def test_logits_that_are_not_finite_are_no_distribution(value, params):
    logits = (
        torch.full((9,), value) if value == float("-inf") else torch.arange(9.0).index_fill(0, torch.tensor(4), value)
    )
    with pytest.raises(NonFiniteError, match="the logits"):
        Sampler(SamplingParams(**params), []).choose(StepResult(logits[None]))


def test_a_token_ruled_out_is_no_error():
    logits = torch.tensor([1.0, float("-inf"), 2.0])
    assert Sampler(SamplingParams(temperature=0), []).choose(StepResult(logits[None])) == 2

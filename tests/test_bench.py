"""`dsv2 bench` with small models, and random weights. No test depends on a time, since the machine may be busy."""

import itertools
import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv2_local import cli
from dsv2_local.architectures import released
from dsv2_local.architectures.config import ModelConfig
from dsv2_local.architectures.families import parse_config
from dsv2_local.commands import bench
from dsv2_local.commands.bench import hardware, parallel, report, settings, subject
from dsv2_local.commands.bench.subject import Subject
from dsv2_local.commands.bench.timing import Stopwatch
from dsv2_local.commands.inspect import summarise
from dsv2_local.errors import ConfigError, InputError
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import BLOCK, ROWS, CacheDtype, Format
from dsv2_local.kernels.graphs import PiecewiseGraph
from dsv2_local.kernels.layout import Matrix, expert_matrices
from dsv2_local.kernels.reference import dequantize
from dsv2_local.offload.resident_experts import ResidentExperts
from dsv2_local.quant.convert import convert
from dsv2_local.quant.schema import Kind, Recipe, dense_files, expert_layout
from dsv2_local.runtime import random_weights
from dsv2_local.runtime.model import Transformer
from tests.models import TINY, heed_signals, save_random
from tests.test_cli import DSV2, dsv2, environment

GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
GB = 10**9


def tiny(**changes: Any) -> ModelConfig:
    return parse_config({"model_type": "deepseek_v2", **TINY, **changes})


def write_config(directory: Path, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "config.json"
    path.write_text(json.dumps({"model_type": "deepseek_v2", **TINY, **changes}))
    return path


@pytest.fixture
def quick(monkeypatch):
    """Make the measurements short, and do not repeat them."""
    monkeypatch.setattr(settings, "READ_BYTES", 1 << 20)
    for user in (settings, subject):
        monkeypatch.setattr(user, "last_level_cache_bytes", lambda: 0)
    monkeypatch.setattr(hardware, "MATMUL_SIZE", 64)
    monkeypatch.setattr(hardware, "FILLED_SECONDS", 0.0)
    monkeypatch.setattr(random_weights, "DRAWN_BYTES", 1 << 16)
    monkeypatch.delenv("DSV2_MODEL", raising=False)


@pytest.fixture
def bench_json(quick, capsys):
    """Run the command in this process; returns the JSON object that it prints."""

    def run(*arguments: object) -> dict[str, Any]:
        cli.app(["bench", "--json", *map(str, arguments)], standalone_mode=False)
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def made(config: ModelConfig, recipe: Recipe = Recipe.NF4, **options: Any) -> random_weights.RandomModel:
    return random_weights.build(config, recipe, **options)


def tensors(model: random_weights.RandomModel) -> dict[str, tuple[Tensor, ...]]:
    """All tensors of a model by name: the planes of each matrix, and the records of each layer."""
    parts = {name: w.parts if isinstance(w, Matrix) else (w,) for name, w in model.weights.items()}
    return {**parts, **{f"experts {layer}": (records,) for layer, records in model.records.items()}}


def transformer(config: ModelConfig, model: random_weights.RandomModel) -> Transformer:
    return Transformer(config, model.weights, ResidentExperts(model.layout, model.records), torch.float32)


def test_json_has_these_keys(bench_json, tmp_path):
    path = write_config(tmp_path / "small")
    result = bench_json("--random-weights", path, "--prompt", "5,40", "--decode", 3, "--context", "0,70")
    assert list(result) == [
        "machine", "model", "prefill", "decode", "parallel", "predicted", "parts", "peak_rss_bytes", "weight_bytes"
    ]  # fmt: skip
    assert min(result["predicted"].values()) > 0
    assert list(result["machine"]) == ["read_gb_s", "matmul_gflops", "threads", "kernels"]
    assert list(result["model"]) == [
        "name", "layers", "recipe", "cache", "parameters", "active_weights_per_token", "weight_bytes"
    ]  # fmt: skip
    assert [set(run) for run in result["prefill"]] == [
        {"tokens", "tok_s", "seconds", "gflops", "first_token_seconds"}
    ] * 2
    assert [set(run) for run in result["decode"]] == [
        {"context", "tok_s", "bytes_per_token", "gb_s", "read_gb_s", "read_fraction"}
    ] * 2
    assert [set(run) for run in result["parallel"]] == [
        {
            "sequences", "context", "tok_s", "tok_s_each", "experts_per_layer", "random_experts_per_layer",
            "bytes_per_step", "gb_s", "read_gb_s", "read_fraction", "bound_tok_s", "bound_fraction",
        }
    ] * 3  # fmt: skip
    assert set(result["parts"]) == {
        "attention", "dense", "shared", "routed", "head", "rest", "outside_kernels"
    }  # fmt: skip
    assert [run["tokens"] for run in result["prefill"]] == [5, 40]
    assert [run["context"] for run in result["decode"]] == [0, 70]
    assert result["model"]["name"] == "random small"
    assert (result["model"]["layers"], result["model"]["recipe"]) == (3, "nf4")
    assert result["machine"]["kernels"] == ops.variant()
    assert isinstance(result["machine"]["threads"], int)


def test_the_figures_agree_with_one_another(bench_json, tmp_path):
    result = bench_json("--random-weights", write_config(tmp_path), "--prompt", 20, "--decode", 4, "--context", "0,9")
    active, reads = result["model"]["active_weights_per_token"], [run["read_gb_s"] for run in result["decode"]]
    assert min(reads) <= result["machine"]["read_gb_s"] <= max(reads)
    for run in result["decode"]:
        assert run["gb_s"] == pytest.approx(run["bytes_per_token"] * run["tok_s"] / 1e9)
        assert run["read_fraction"] == pytest.approx(run["gb_s"] / run["read_gb_s"])
    assert [(run["sequences"], run["context"]) for run in result["parallel"]] == [(1, 0), (4, 0), (16, 0)]
    one = result["parallel"][0]
    assert one["bytes_per_step"] == pytest.approx(result["decode"][0]["bytes_per_token"])
    assert one["experts_per_layer"] == pytest.approx(one["random_experts_per_layer"]) == 3
    for run in result["parallel"]:
        steps = run["tok_s"] / run["sequences"]
        assert run["tok_s_each"] == pytest.approx(steps)
        assert run["gb_s"] == pytest.approx(run["bytes_per_step"] * steps / 1e9)
        assert run["read_fraction"] == pytest.approx(run["gb_s"] / run["read_gb_s"])
        assert run["bound_fraction"] == pytest.approx(run["tok_s"] / run["bound_tok_s"])
        assert 3 <= run["experts_per_layer"] <= 8
    for run in result["prefill"]:
        assert run["tok_s"] == pytest.approx(run["tokens"] / run["seconds"])
        assert run["gflops"] == pytest.approx(2 * active * run["tok_s"] / 1e9)
        assert run["first_token_seconds"] >= run["seconds"] > 0
    assert result["weight_bytes"] == result["model"]["weight_bytes"] > 0
    assert result["peak_rss_bytes"] > result["weight_bytes"]
    parts = dict(result["parts"])
    assert 0 < parts.pop("outside_kernels") < 1
    assert all(seconds > 0 for seconds in parts.values())


def test_several_sequences_at_a_context(bench_json, tmp_path, capsys):
    arguments = ("--random-weights", write_config(tmp_path), "--prompt", 2, "--decode", 20, "--context", "70,0")
    result = bench_json(*arguments, "--parallel", "3,40,3")
    assert [(run["sequences"], run["context"]) for run in result["parallel"]] == [(3, 70), (40, 70)]
    cli.app(["bench", *map(str, arguments), "--parallel", "1,2"], standalone_mode=False)
    assert "Decode of several sequences in a step, at context 70" in capsys.readouterr().out
    assert bench_json(*arguments[:-1], 5_000)["parallel"] == []  # four sequences would need a larger KV cache


def test_the_number_of_experts_that_tokens_choose_at_random():
    config = tiny(n_routed_experts=32, num_experts_per_tok=5)
    choose = lambda: torch.randperm(32)[:5]  # noqa: E731
    for tokens in (1, 2, 16):
        drawn = [len(torch.cat([choose() for _ in range(tokens)]).unique()) for _ in range(2000)]
        assert sum(drawn) / 2000 == pytest.approx(parallel.random_experts(config, tokens), rel=0.01)
    assert parallel.random_experts(tiny(first_k_dense_replace=3), 4) == 0


@pytest.mark.parametrize("recipe", list(Recipe))
@pytest.mark.parametrize("tied", [False, True])
def test_a_token_reads_what_the_tensors_take(recipe, tied):
    config = tiny(tie_word_embeddings=tied)
    model = made(config, recipe)
    measured = Subject("tiny", recipe, transformer(config, model), summarise(config, recipe), [])
    sizes = {name: sum(part.nbytes for part in parts) for name, parts in tensors(model).items()}
    assert measured.weight_bytes == random_weights.weight_bytes(config, recipe) == sum(sizes.values())
    assert measured.model.config.moe_layers == (1, 2)
    padded_rows = config.vocab_size if recipe is Recipe.BF16 else -(-config.vocab_size // ROWS) * ROWS
    row = sizes["model.embed_tokens.weight"] // padded_rows
    experts = 2 * config.num_experts_per_tok * sizes["experts 1"] // config.n_routed_experts
    every_token = sum(size for name, size in sizes.items() if "embed" not in name and "experts " not in name)
    if tied:
        every_token += sizes["model.embed_tokens.weight"]
    assert measured.bytes_per_token == every_token + row + experts


def test_released_sizes_are_those_of_the_reference():
    for name, total, active, embedding in (
        ("deepseek-v2", 235_741_434_880, 21.4e9, 524.3e6),
        ("deepseek-v2-lite", 15_706_484_224, 2.66e9, 209.7e6),
    ):
        config = released.read_config(name)
        kinds = summarise(config, Recipe.NF4)
        measured = Subject(name, Recipe.NF4, HasConfig(config), kinds, [])  # type: ignore[arg-type]
        assert sum(kind.parameters for kind in kinds.values()) == total
        assert measured.active_weights + embedding == pytest.approx(active, rel=0.005)
    assert config.softmax_scale == pytest.approx(0.1147214, abs=1e-7)


class HasConfig:
    def __init__(self, config: ModelConfig) -> None:
        self.config = config


def test_layers_cut_the_model_and_the_whole_is_extrapolated(bench_json, tmp_path, capsys):
    path = write_config(tmp_path, num_hidden_layers=6)
    arguments = ("--random-weights", path, "--prompt", 4, "--decode", 2, "--context", 0)
    whole, cut = bench_json(*arguments), bench_json(*arguments, "--layers", 2)
    assert "extrapolated" not in whole
    assert "total_layers" not in whole
    assert (cut["layers"], cut["total_layers"], cut["model"]["layers"]) == (2, 6, 2)
    assert 0 < cut["extrapolated"]["decode_tok_s"] < cut["decode"][0]["tok_s"]
    assert cut["weight_bytes"] < whole["weight_bytes"]
    cli.app(["bench", *map(str, arguments), "--layers", "2"], standalone_mode=False)
    text = capsys.readouterr().out
    assert "2 of 6 layers" in text
    assert "EXTRAPOLATED from 2 layers" in text


def test_missing_layers_take_the_mean_of_their_kind():
    whole = tiny(num_hidden_layers=9, first_k_dense_replace=2)
    parts = {"dense layers": 0.8, "mixture layers": 1.2}  # seconds for 2 layers of each kind and 4 steps
    plan = settings.BenchPlan(
        settings.BenchOptions(decode=4), None, whole, random_weights.first_layers(whole, 4), Recipe.NF4,
        CacheDtype.BF16, settings.Lengths((), (0,), 4), 0,
    )  # fmt: skip
    facts = report.cut_facts(plan, 2.4, parts)
    assert 1 / facts["extrapolated"]["decode_tok_s"] == pytest.approx(0.6 + 5 * 0.15)


def test_a_converted_model_is_measured_and_may_be_cut(bench_json, tmp_path):
    convert(save_random(tmp_path / "source"), tmp_path / "converted", recipe=Recipe.INT8)
    result = bench_json("-m", tmp_path / "converted", "--prompt", 4, "--decode", 2, "--context", 3, "--layers", 2)
    assert (result["model"]["name"], result["model"]["recipe"]) == ("converted", "int8")
    assert (result["layers"], result["total_layers"]) == (2, 3)
    stored = sum(path.stat().st_size for path in (tmp_path / "converted").glob("*.safetensors"))
    assert result["weight_bytes"] < stored


@pytest.mark.slow
def test_the_bundled_model_leaves_out_what_does_not_fit():
    done = dsv2("bench", "--decode", 2, "--threads", 1)
    assert done.returncode == 0, done.stderr
    notices = done.stderr.decode()
    assert "measuring the bundled dsv2-nano" in notices
    assert "left out --context 4,096, 32,768: the model's context is 2,048 tokens" in notices
    text = done.stdout.decode()
    named = "dsv2-nano, nf4, bf16 cache: 6 layers, 17.2 million weights"
    for word in (named, "1 threads", "of read bandwidth", "peak memory"):
        assert word in text
    assert "EXTRAPOLATED" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-m", "x", "--random-weights", "CONFIG"], "drop one of them"),
        (["--random-weights", "CONFIG", "--layers", "0"], "--layers must be between 2 (one layer of each kind) and 3"),
        (["--random-weights", "CONFIG", "--layers", "1"], "--layers must be between 2"),
        (["--random-weights", "CONFIG", "--layers", "4"], "--layers must be between 2"),
        (["--random-weights", "CONFIG", "--prompt", "abc"], "--prompt must be whole numbers"),
        (["--random-weights", "CONFIG", "--prompt", "0"], "--prompt must be between 1 and 8,191"),
        (["--random-weights", "CONFIG", "--prompt", "8192"], "--prompt must be between 1 and 8,191"),
        (["--random-weights", "CONFIG", "--context", "4,"], "--context must be whole numbers"),
        (["--random-weights", "CONFIG", "--context", "-1"], "--context must be between 0 and 8,160"),
        (["--random-weights", "CONFIG", "--context", "0,8161"], "in a context of 8,192 tokens, not 8,161"),
        (["--random-weights", "CONFIG", "--decode", "0"], "--decode must be at least 1"),
        (["--random-weights", "CONFIG", "--decode", "8193"], "--decode 8,193 is more"),
        (["--random-weights", "CONFIG", "--threads", "0"], "--threads must be between 1 and"),
        (["--random-weights", "CONFIG", "--recipe", "q4"], "--recipe 'q4' is not one of nf4, mixed, int8, bf16"),
        (["--random-weights", "CONFIG", "--cache-type", "fp32"], "--cache-type 'fp32' is not one of bf16, int8"),
        (["--random-weights", "no-such-model"], "neither deepseek-v2 nor deepseek-v2-lite nor a config.json"),
        (["--random-weights", "CONFIG", "--parallel", "0"], "--parallel must be between 1 and 256 sequences, not 0"),
        (["--random-weights", "CONFIG", "--parallel", "1,300"], "--parallel must be between 1 and 256"),
        (["--random-weights", "CONFIG", "--parallel", "a"], "--parallel must be whole numbers"),
        (["--recipe", "nf4"], "--recipe needs --random-weights"),
        (["--context", "4096"], "--context must be between 0 and 2,016"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(options, message, tmp_path, monkeypatch, quick):
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    path = str(write_config(tmp_path))
    with pytest.raises(InputError) as error:
        cli.app(["bench", *(path if option == "CONFIG" else option for option in options)], standalone_mode=False)
    assert message in str(error.value)


@pytest.mark.slow
def test_an_option_error_is_one_line_and_code_2(tmp_path):
    done = dsv2("bench", "--random-weights", write_config(tmp_path), "--layers", 9)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == ("dsv2: error: --layers must be between 2 (one layer of each kind) and 3, not 9\n")


def test_random_weights_win_over_the_environments_model(bench_json, tmp_path, monkeypatch):
    monkeypatch.setenv("DSV2_MODEL", "no-such-model")
    result = bench_json("--random-weights", write_config(tmp_path).parent, "--prompt", 2, "--decode", 1, "--context", 0)
    assert result["model"]["name"].startswith("random ")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama"}'])
def test_a_file_that_is_no_configuration_is_named(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json"):
        released.read_config(str(path))


def test_too_little_memory_is_refused_with_the_layers_that_fit(quick, monkeypatch):
    monkeypatch.setattr(random_weights, "memory_available", lambda: 20 * GB)
    monkeypatch.setattr(random_weights, "allocate_in_ram", lambda nbytes: pytest.fail("allocated"))
    with pytest.raises(InputError) as error:
        cli.app(["bench", "--random-weights", "deepseek-v2", "--context", "0"], standalone_mode=False)
    assert "60 layers need 127." in str(error.value)
    assert "20.00 GB are available" in str(error.value)
    layers = int(str(error.value).rsplit("--layers ", 1)[1].split()[0])
    config, room = released.read_config("deepseek-v2"), {"context": 513, "cache_dtype": CacheDtype.BF16, "other": GB}
    random_weights.require_memory(random_weights.first_layers(config, layers), Recipe.NF4, **room)
    with pytest.raises(InputError, match=f"--layers {layers} fits"):
        random_weights.require_memory(random_weights.first_layers(config, layers + 1), Recipe.NF4, **room)
    monkeypatch.setattr(random_weights, "memory_available", lambda: GB)
    with pytest.raises(InputError, match="free memory"):
        random_weights.require_memory(config, Recipe.NF4, **room)


def test_the_same_seed_makes_the_same_model(quick):
    config = tiny()
    first, again, other = (tensors(made(config, **options)) for options in ({}, {"threads": 3}, {"seed": 1}))
    assert first.keys() == again.keys() == other.keys()
    for name, parts in first.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, again[name], strict=True)), name
        assert not all(torch.equal(a, b) for a, b in zip(parts, other[name], strict=True)), name
    assert not torch.equal(first["experts 1"][0], first["experts 2"][0])


@pytest.mark.parametrize("recipe", list(Recipe))
def test_every_tensor_of_the_schema_is_there_in_its_format(recipe, quick):
    config = tiny()
    model = made(config, recipe)
    specs = {spec.name: spec for specs in dense_files(config).values() for spec in specs}
    assert model.weights.keys() == specs.keys()
    for name, spec in specs.items():
        weight = model.weights[name]
        if isinstance(weight, Matrix):
            assert (weight.format, weight.rows, weight.cols) == (recipe.format_of(spec.kind), *spec.shape)
        else:
            assert not spec.quantised
            assert (tuple(weight.shape), weight.dtype) == (spec.shape, torch.bfloat16)
    assert model.layout == expert_layout(config, recipe)
    assert {layer: tuple(records.shape) for layer, records in model.records.items()} == dict.fromkeys(
        config.moe_layers, (config.n_routed_experts, model.layout.nbytes)
    )


@pytest.mark.parametrize("recipe", [Recipe.NF4, Recipe.INT8, Recipe.BF16])
def test_weights_have_the_size_that_keeps_activations(recipe, quick):
    model = made(tiny(), recipe)
    matrices = [w for name, w in model.weights.items() if isinstance(w, Matrix) and "embed" not in name]
    matrices += expert_matrices(model.layout, model.records[1][3])
    for matrix in matrices:
        weights = dequantize(matrix)
        assert float(weights.square().mean().sqrt()) == pytest.approx(matrix.cols**-0.5, rel=0.1)
        assert abs(float(weights.mean())) < 0.05 * matrix.cols**-0.5


@pytest.mark.parametrize("recipe", [Recipe.NF4, Recipe.INT8])
def test_padding_is_zero(recipe, quick):
    matrices = [
        w for w in made(tiny(hidden_size=100, vocab_size=203), recipe).weights.values() if isinstance(w, Matrix)
    ]
    assert any(m.rows % ROWS for m in matrices)
    assert any(m.cols % BLOCK for m in matrices)
    for m in matrices:
        rows, cols = -(-m.rows // ROWS) * ROWS, -(-m.cols // BLOCK) * BLOCK
        weights = dequantize(Matrix(m.format, rows, cols, *m.parts))
        assert not weights[m.rows :].any()
        assert not weights[:, m.cols :].any()
        assert m.format is not Format.BF16


@pytest.mark.parametrize("changes", [{}, GROUPED])
def test_a_random_model_computes_and_chooses_varied_experts(changes, quick):
    config = tiny(num_hidden_layers=5, n_routed_experts=32, **changes)
    model = made(config)
    chosen: dict[int, Tensor] = {}

    class Watched(ResidentExperts):
        def start(
            self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, capture: PiecewiseGraph | None = None
        ) -> Callable[[], Tensor]:
            chosen[layer] = ids
            return super().start(layer, x, ids, weights, capture)

    network = Transformer(config, model.weights, Watched(model.layout, model.records), torch.float32)
    ids = torch.randint(config.vocab_size, (64,), generator=torch.Generator().manual_seed(0))
    cache = network.new_cache(64, ops.cache_dtype(Recipe.NF4.format_of(Kind.KV_B), torch.float32, CacheDtype.BF16))
    logits = network.logits(network.forward(cache, [(cache.new_sequence(), ids.tolist())]))
    assert torch.isfinite(logits).all()
    assert 0.3 < float(logits.std()) < 3
    assert len(logits.argmax(1).unique()) > 16
    for layer in config.moe_layers:
        assert len(chosen[layer].unique()) > 16, layer
        assert len(chosen[layer][:, 0].unique()) > 8, layer


def test_the_stopwatch_counts_the_outermost_call_and_leaves_no_trace():
    class Counter:
        def down(self, depth: int) -> int:
            return self.down(depth - 1) + 1 if depth else 0

    counter, watch = Counter(), Stopwatch(itertools.count().__next__)
    original = ops.linear
    with watch.on([(counter, "down", "down"), (ops, "linear", "kernels")]):
        assert ops.linear is not original
        assert counter.down(3) == 3
    assert vars(counter) == {}
    assert ops.linear is original
    assert watch.spans == [("down", 0, 1)]
    with pytest.raises(ZeroDivisionError), watch.on([(counter, "down", "down")]):
        raise ZeroDivisionError
    assert vars(counter) == {}


def test_caches_of_the_highest_level_are_added_up(tmp_path):
    caches = {"cpu0/cache/index0": ("1", "0", "32K"), "cpu0/cache/index3": ("3", "0-1", "16384K"),
              "cpu1/cache/index3": ("3", "0-1", "16384K"), "cpu2/cache/index3": ("3", "2", "8192K")}  # fmt: skip
    for name, values in caches.items():
        (tmp_path / name).mkdir(parents=True)
        for file, value in zip(("level", "shared_cpu_list", "size"), values, strict=True):
            (tmp_path / name / file).write_text(value + "\n")
    assert hardware.last_level_cache_bytes(tmp_path) == 24 << 20
    assert hardware.last_level_cache_bytes(tmp_path / "none") == 0


@pytest.mark.slow
def test_ctrl_c_ends_quietly():
    with subprocess.Popen([*DSV2, "bench", "--decode", "100"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          stdin=subprocess.DEVNULL, env=environment(), preexec_fn=heed_signals) as process:  # fmt: skip
        assert process.stderr is not None
        assert b"bundled" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in errors

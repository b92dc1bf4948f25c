"""Values from files, options and callers: whatever stands in a field, it is read rightly or refused by name."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dsv2_local import options
from dsv2_local.architectures.config import VALUES, YARN_VALUES
from dsv2_local.architectures.families import parse_config
from dsv2_local.errors import ConfigError, Dsv2Error, InputError
from dsv2_local.model_files import parse_object, read_object, read_text
from dsv2_local.quant.checkpoint import Manifest
from dsv2_local.quant.schema import Recipe, dense_files
from dsv2_local.quant.source import Source
from dsv2_local.runtime import sampling_params
from dsv2_local.runtime.rope import inverse_frequencies
from dsv2_local.runtime.sampling_params import GenerationConfig, SamplingParams
from dsv2_local.values import Number, shown
from tests.test_config import V2

NUMBERS = st.one_of(
    st.integers(),
    st.integers(-3, 300),
    st.sampled_from([10**400, -(10**400), 2**31, 2**63, 2**64, -(2**63)]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e-46, 5e-324, -0.0, 1e308, 40.0]),
)
ANYTHING = st.one_of(
    NUMBERS, NUMBERS.map(lambda number: str(number)[:30] if not isinstance(number, int) else shown(number)),
    st.none(), st.booleans(), st.text(max_size=5), st.lists(NUMBERS, max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
FIELDS = [*VALUES, "eos_token_id", "num_key_value_heads", "rope_scaling", "rope_parameters", "quantization_config",
          "scoring_func", "hidden_act", "attention_bias", "mlp_bias"]  # fmt: skip


def refused(call: Any, *names: str) -> Any:
    """What `call` returns; None if it raised a typed error of one line that has these names."""
    try:
        return call()
    except Dsv2Error as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 400
    assert all(name in message for name in names)
    return None


@given(st.sampled_from(FIELDS), ANYTHING)
@settings(max_examples=400, deadline=None)
def test_any_value_in_any_field_of_config_json(name, value):
    config = refused(lambda: parse_config({**V2, name: value}, "some/config.json"), "some/config.json", name)
    if config is None:
        return
    for field, kind in VALUES.items():
        if isinstance(kind, Number) and (number := getattr(config, field)) is not None:
            assert type(number) is (int if kind.whole else float)
            assert math.isfinite(number)
    assert math.isfinite(config.softmax_scale)
    assert inverse_frequencies(config).isfinite().all()
    assert len(dense_files(config)) == config.num_hidden_layers + 1


@given(st.sampled_from([*YARN_VALUES, "type", "rope_type", "rope_theta", "attention_factor"]), ANYTHING)
@settings(max_examples=300, deadline=None)
@example("beta_slow", 1e-300)
@example("factor", 1e308)
def test_any_value_in_any_field_of_rope_scaling(name, value):
    raw = {**V2, "rope_scaling": {**V2["rope_scaling"], name: value}}
    config = refused(lambda: parse_config(raw, "some/config.json"), "some/config.json")
    if config is not None:
        assert math.isfinite(config.softmax_scale)
        assert inverse_frequencies(config).isfinite().all()
        assert math.isfinite(config.yarn.rotation_scale if config.yarn else 1)


@given(st.sampled_from([*sampling_params.VALUES, "do_sample", "eos_token_id"]), ANYTHING)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_field_of_generation_config(tmp_path, name, value):
    text = json.dumps({"do_sample": True, name: value})
    (tmp_path / "generation_config.json").write_text(text)
    loaded = refused(lambda: GenerationConfig.load(tmp_path, 50), "generation_config.json", name)
    if loaded is not None:
        assert all(id in range(50) for id in loaded.eos_token_id)
        assert_sane(loaded.params)


@given(st.sampled_from([*sampling_params.VALUES]), ANYTHING)
@settings(max_examples=400, deadline=None)
def test_any_value_in_any_sampling_parameter(name, value):
    params = refused(lambda: SamplingParams(**{name: value}), name)
    if params is not None:
        assert_sane(params)


def assert_sane(params: SamplingParams) -> None:
    assert params.temperature == 0 or 2.0**-126 <= params.temperature < math.inf
    assert 0 < params.top_p <= 1
    assert type(params.top_k) is int
    assert params.top_k >= 0
    assert 0 <= params.min_p <= 1
    assert params.seed is None or 0 <= params.seed < 2**64


@given(st.text(max_size=12) | st.from_regex(r"[0-9.]{1,400}\s?([KMGT](iB|B)?)?", fullmatch=True))
@example("9" * 400 + "GiB")
@example("1.2.3GiB")
def test_any_text_as_a_size(text):
    found = refused(lambda: options.size("--vram", text), "--vram")
    assert found is None or found >= 0


def test_errors_show_values_in_short():
    for value, text in [
        (10**5000, "a number of about 5,000 digits"), (-5, "-5"), (math.nan, "nan"), ("x" * 500, "x" * 20),
        ([[[[[[[[]]]]]]]], "[[["), (object, "class"), (True, "True"), ([10**5000], "a list"),
    ]:  # fmt: skip
        assert text in shown(value)
        assert len(shown(value)) < 100


def test_small_files_are_read_whole_or_refused(tmp_path: Path):
    path = tmp_path / "config.json"
    assert read_object(path, ConfigError) is None
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')  # Windows' editors begin UTF-8 like this
    assert read_object(path, ConfigError) == {"a": 1}
    for content, named in [(b"\xff", "byte 0 is 0xff"), (b"[1]", "not a JSON object"), (b"{", "not valid JSON")]:
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"config\.json is {named}|{named}"):
            read_object(path, ConfigError)
    path.unlink()
    os.mkfifo(path)  # opening it would wait for a writer
    with pytest.raises(ConfigError, match="a pipe or a device"):
        read_text(path, ConfigError)
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="link to a file that does not exist"):
        read_text(path, ConfigError)
    with pytest.raises(InputError, match="nested too deeply"):
        parse_object('{"a":' * 100_000, "it", InputError)


@given(st.text(max_size=30), st.integers(0, 3000))
def test_an_error_is_one_line_of_visible_characters(text, more):
    message = str(InputError(text + "x" * more))
    assert message.isprintable()
    assert len(message) <= 2001
    if text.isprintable() and len(text) + more <= 2000:
        assert message == text + "x" * more


def test_escape_sequences_are_shown_and_not_sent():
    assert str(InputError("a\x1b[2J\n\u202eb\ud800é😀")) == "a\\x1b[2J \\u202eb\\ud800é😀"


MANIFEST: dict[str, Any] = {
    "recipe": "nf4",
    "source": "x",
    "format_version": 1,
    "files": {"a": {"bytes": 1, "sha256": "0" * 64}},
}


@given(st.sampled_from([*MANIFEST, "bytes", "sha256"]), ANYTHING)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_field_of_a_manifest(tmp_path, name, value):
    changed = {**MANIFEST, name: value} if name in MANIFEST else {**MANIFEST, "files": {"a": {
        **MANIFEST["files"]["a"], name: value}}}  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(changed))
    manifest = refused(lambda: Manifest.load(tmp_path), "manifest.json")
    if manifest is not None:
        assert manifest.recipe in {*Recipe}
        assert isinstance(manifest.source, str)
        for file, record in manifest.files.items():
            assert type(record.bytes) is int
            assert Path(file).name == file


HEADER = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}


@given(st.sampled_from([*HEADER]), ANYTHING | st.lists(NUMBERS, min_size=2, max_size=2))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_field_of_a_header(tmp_path, name, value):
    text = json.dumps({"a": {**HEADER, name: value}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    source = refused(lambda: Source(tmp_path), "model.safetensors")
    if source is not None:
        assert source.read("a").nbytes == source.tensors["a"].end - source.tensors["a"].start
        source.close()

"""Paths that hold something else than the model that was asked for: each is named for what it is, without the hub."""

import json
import os
import shutil
from pathlib import Path

import pytest

from dsv2_local import llm
from dsv2_local.commands import inspect, plan, quantize
from dsv2_local.errors import CheckpointError, ConfigError, ConversionError, Dsv2Error, HubError, InputError
from dsv2_local.quant import hub
from dsv2_local.quant.convert import convert
from dsv2_local.quant.schema import Recipe
from tests.models import save_random

OPTIONS = {"recipe": Recipe.NF4, "check": False, "force": False, "revision": None, "token": None}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("release") / "tiny")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A current directory with a folder of models, and a hub that must not be asked."""

    def fetch(repository, *_, **__):
        raise hub._NotFoundError(f"{repository} is not in the cache, and the hub cannot be reached")

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def files(directory, **contents):
    directory.mkdir(exist_ok=True)
    for name, content in contents.items():
        (directory / name.replace("__", ".")).write_text(content)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("v2.gguf", b"GGUF\3\0\0\0", "models/v2.gguf is a GGUF file; dsv2 converts a release's safetensors"),
        ("v2", b"GGUF\3\0\0\0", "models/v2 is a GGUF file"),
        ("empty", b"", "models/empty is an empty file; a model is a directory"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        ("page.json", b"<!DOCTYPE html>", "models/page.json is a web page"),
        ("model.safetensors", b"12345678", "models/model.safetensors is a file; a model is a directory: .*models$"),
    ],
)
def test_a_file_is_named_for_what_it_is(here, name, content, said):
    (here / name).write_bytes(content)
    (here / "config.json").write_text("{}")
    for use in (llm.load, inspect_of, lambda path: quantize.run(path, here / "out", **OPTIONS)):
        with pytest.raises(InputError, match=said):
            use(f"models/{name}")


def inspect_of(path):
    return inspect.show(path, as_json=True)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("models/v2-lit", r"there is no directory models/v2-lit; did you mean models/v2-lite\?"),
        ("./models/v2-lit", r"did you mean models/v2-lite\?"),
        ("models/v2-lite/nano", "neither a directory nor a hub repository"),
        ("model", r"neither a directory nor a hub repository \(owner/name\); did you mean models\?"),
        ("no-such/v2.gguf", "neither a directory nor"),
        ("~/no-such", "neither a directory nor"),
        ("../no-such", "neither a directory nor"),
        ("~nobody-at-all/x", "home directory that does not exist"),
        ("models/link", "models/link is a link to nowhere, which does not exist"),
        ("", "the model's name is empty"),
    ],
)
def test_a_path_that_does_not_exist_is_no_repository(here, model, said):
    (here / "v2-lite").mkdir()
    (here / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match=said) as error:
        llm.load(model)
    assert "cannot be reached" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("models/v2-lit", r"there is no model models/v2-lit; did you mean models/v2-lite\?"),
        ("models/lora", "has no config.json; it is a LoRA adapter"),
        ("", "the model's name is empty"),
        ("no-such", "no-such is neither deepseek-v2 nor"),
    ],
)
def test_a_plan_of_what_is_not_there(here, model, said):
    (here / "v2-lite").mkdir()
    files(here / "lora", adapter_config__json="{}")
    with pytest.raises(Dsv2Error, match=said):
        plan.run(plan.PlanOptions(model), as_json=False)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_small_file_that_was_not_downloaded(here, release, name):
    copy = shutil.copytree(release, here / "copy")
    for content, said in (("", "an empty file"), ("<html>", "a web page"), ("version https://git-lfs", "Git LFS")):
        (copy / name).write_text(content)
        with pytest.raises(Dsv2Error, match=f"{name} is .*{said}"):
            quantize.run(str(copy), here / "out", **OPTIONS)


def test_names_that_are_not_unicode(here, release):
    name = os.fsdecode(b"models/caf\xe9")
    quantize.run(str(release), Path(name), **OPTIONS)
    with llm.load(name) as model:
        list(model.generate([1], max_tokens=1))
        model.save_cache(Path(name) / "cache")
        assert model.load_cache(Path(name) / "cache") == 1


def test_a_destination_below_what_does_not_exist(here, release, capsys):
    quantize.run(str(release), Path("models/no-such/../out"), **OPTIONS)
    assert f"{here / 'out'}: " in capsys.readouterr().err


def test_a_repository_stays_one(here):
    with pytest.raises(HubError, match="org/model is not in the cache"):
        hub.resolve("org/model")


def test_home_directories_are_found(here, monkeypatch, release):
    monkeypatch.setenv("HOME", str(here))
    quantize.run(str(release), here / "v2", **OPTIONS)
    assert hub.resolve_converted("~/v2") == here / "v2"


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({"adapter_config__json": "{}", "adapter_model__safetensors": ""}, "is a LoRA adapter"),
        ({"v2__gguf": "GGUF"}, "holds GGUF files"),
        ({"config__json": "{}"}, r"not a converted checkpoint \(no manifest.json\); convert it: dsv2 quantize"),
        ({}, "not a converted checkpoint"),
    ],
)
def test_a_directory_is_named_for_what_it_holds(here, contents, said):
    files(here, **contents)
    with pytest.raises(CheckpointError, match=said):
        llm.load("models")
    if "config__json" not in contents:
        for use in (inspect_of, lambda path: quantize.run(path, here.parent / "out", **OPTIONS)):
            with pytest.raises(ConfigError, match=f"no config.json; {'it ' + said if contents else 'is it a model'}"):
                use("models")


def test_a_directory_of_models_and_an_unfinished_one(here, release):
    (here / "v2").mkdir()
    (here / "v2" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a model but holds v2; name one of them"):
        llm.load("models")

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(release, here / "half", recipe=Recipe.NF4, report=stop)
    with pytest.raises(CheckpointError, match="not finished; run the same `dsv2 quantize` again"):
        llm.load("models/half")


def test_a_source_that_is_converted_already(here, release):
    convert(release, here / "v2", recipe=Recipe.INT8)
    with pytest.raises(ConversionError, match=r"is converted already \(recipe int8\); load it with -m"):
        convert(here / "v2", here / "again", recipe=Recipe.NF4)


def source(here, release):
    copy = shutil.copytree(release, here / "source")
    for path in llm.bundled_model().glob("tokenizer*"):
        shutil.copy(path, copy)
    return copy


def test_a_tokenizer_that_will_be_missing_is_told_at_conversion(here, release, capsys):
    copy = source(here, release)
    quantize.run(str(copy), here / "fine", **OPTIONS)
    assert "token ids only" not in capsys.readouterr().err
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be used"):
        quantize.run(str(copy), here / "damaged", **OPTIONS)
    (copy / "tokenizer.json").unlink()
    quantize.run(str(copy), here / "without", **OPTIONS)
    assert "has no tokenizer.json; without it" in capsys.readouterr().err
    (copy / "tokenizer.json").symlink_to("../blobs/missing")
    with pytest.raises(Dsv2Error, match=r"tokenizer.json is a link to"):
        convert(copy, here / "dangling", recipe=Recipe.NF4)


def test_files_of_other_systems_are_not_the_models(here, release):
    copy = source(here, release)
    for name in ("._model.safetensors", "._tokenizer.json", ".DS_Store"):
        (copy / name).write_bytes(b"\0\5\x16\7Mac OS X")
    manifest = convert(copy, here / "out", recipe=Recipe.NF4)
    assert not [name for name in manifest.files if name.startswith(".")]


def linked(copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to("../../blobs/1234")


def listed(copy):
    linked(copy)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))


def pointer(copy):
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (linked, r"model.safetensors is a link to \.\./\.\./blobs/1234, which is missing"),
        (listed, r"model.safetensors is listed in .* but a link to \.\./\.\./blobs/1234, which is missing"),
        (pointer, r"model.safetensors is a pointer of Git LFS, not the file itself \(git lfs pull\)"),
    ],
)
def test_weights_that_are_not_there(here, release, damage, said):
    copy = source(here, release)
    damage(copy)
    with pytest.raises(CheckpointError, match=said):
        convert(copy, here / "out", recipe=Recipe.NF4)

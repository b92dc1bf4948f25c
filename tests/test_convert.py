import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv2_local import locks
from dsv2_local.architectures.tensors import Kind
from dsv2_local.commands import quantize
from dsv2_local.errors import CheckpointError, ConversionError, Dsv2Error
from dsv2_local.kernels.layout import expert_matrices
from dsv2_local.kernels.reference import dequantize
from dsv2_local.quant import convert as convert_module
from dsv2_local.quant.checkpoint import Checkpoint, is_checkpoint
from dsv2_local.quant.convert import convert
from dsv2_local.quant.local import PARTIAL
from dsv2_local.quant.pieces import ConversionPlan
from dsv2_local.quant.schema import EXPERTS, Recipe, dense_files
from dsv2_local.quant.source import Source
from dsv2_local.quant.verify import verify
from tests.models import save_random
from tests.test_cli import dsv2

UP = "model.layers.1.mlp.experts.2.up_proj.weight"
RUN = (
    "import sys; from pathlib import Path; from dsv2_local.quant.convert import convert; "
    "from dsv2_local.quant.schema import Recipe; convert(Path(sys.argv[1]), Path(sys.argv[2]), recipe=Recipe.NF4)"
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = save_random(tmp_path_factory.mktemp("source") / "tiny")
    (directory / "LICENSE").write_text("terms")
    return directory


@pytest.fixture
def source(pristine, tmp_path):
    """A copy of the release that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "source"))


def digests(directory):
    files = [path for path in directory.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def change(source, edit):
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors")


@pytest.mark.parametrize("recipe", list(Recipe))
def test_round_trip_and_planned_sizes(pristine, tmp_path, recipe):
    manifest = convert(pristine, tmp_path / "out", recipe=recipe)
    checkpoint = Checkpoint(tmp_path / "out")
    for name in manifest.files:
        checkpoint.verify_file(name)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*manifest.files, "manifest.json"}
    assert "LICENSE" in manifest.files
    source = Source(pristine)
    plan = ConversionPlan(source, checkpoint.config, recipe)
    assert all(manifest.files[file].bytes == plan.nbytes(file) for file in plan.files)
    source.close()
    errors = verify(pristine, tmp_path / "out")
    bound = {"nf4": 0.0855, "int8": 0.008, "bf16": 1e-9}  # Gaussian weights; source is bf16
    for kind in (Kind.ATTENTION, Kind.ROUTED, Kind.SHARED, Kind.KV_B, Kind.EMBEDDING):
        assert errors[kind] <= bound[str(recipe.format_of(kind))], kind
    assert errors[Kind.NORM] == errors[Kind.ROUTER] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sources_of_every_type(pristine, source, tmp_path, dtype):
    change(source, lambda w: w.update({name: tensor.to(dtype) for name, tensor in w.items()}))
    convert(source, tmp_path / "out", recipe=Recipe.NF4)
    assert verify(source, tmp_path / "out")[Kind.ROUTED] <= 0.0855
    if dtype is torch.float32:  # the same values and codes; fp16 rounds the smallest values
        convert(pristine, tmp_path / "plain", recipe=Recipe.NF4)
        assert (
            digests(tmp_path / "out")["experts-001.safetensors"]
            == digests(tmp_path / "plain")["experts-001.safetensors"]
        )


def test_kv_b_and_expert_records_have_the_documented_layout(pristine, tmp_path):
    convert(pristine, tmp_path / "out", recipe=Recipe.BF16)
    weights = load_file(pristine / "model.safetensors")
    stored = load_file(tmp_path / "out" / "dense-001.safetensors")
    c = Checkpoint(tmp_path / "out").config
    H, N, V, C = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank
    prefix = "model.layers.1.self_attn.kv_b_proj"
    w_uk, w_uv = (stored[f"{prefix}.{half}"] for half in ("w_uk", "w_uv"))
    whole = weights[f"{prefix}.weight"]
    for head in range(H):
        rows = whole[head * (N + V) : (head + 1) * (N + V)]
        assert torch.equal(w_uk[head * C : (head + 1) * C], rows[:N].T)
        assert torch.equal(w_uv[head * V : (head + 1) * V], rows[N:])
    records = load_file(tmp_path / "out" / "experts-001.safetensors")[EXPERTS]
    up = expert_matrices(Checkpoint(tmp_path / "out").expert_layout, records[2])[1]
    assert torch.equal(dequantize(up, torch.bfloat16), weights[UP])


def test_shards_give_the_same_bytes(pristine, source, tmp_path):
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, source / file)
    (source / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(pristine, tmp_path / "one", recipe=Recipe.NF4, source_name="x")
    convert(source, tmp_path / "two", recipe=Recipe.NF4, source_name="x")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    (source / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2.safetensors is listed"):
        convert(source, tmp_path / "three", recipe=Recipe.NF4)


def edited(edit):
    return lambda source: change(source, edit)


def truncated(source):
    os.truncate(source / "model.safetensors", (source / "model.safetensors").stat().st_size - 10)


def corrupt(source):
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"!!")


def only_bin(source):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (truncated, r"model.safetensors is truncated: .* ends 10 bytes"),
        (corrupt, "the header of .*model.safetensors is not valid JSON"),
        (only_bin, r"no .*safetensors"),
        (edited(lambda w: w.pop(UP)), f"lacks the tensor {UP}"),
        (edited(lambda w: w.update(extra=torch.zeros(2))), "model.safetensors: unknown tensor extra"),
        (edited(lambda w: w.update({UP: w[UP][:8].clone()})), f"model.safetensors: {UP} has shape"),
        (
            edited(lambda w: w[UP].view(-1)[5:6].fill_(float("nan"))),
            f"model.safetensors: {UP} has values that are not finite",
        ),
        (edited(lambda w: w.update({UP: w[UP].float() * 1e9})), f"model.safetensors: {UP} has a value of"),
        (edited(lambda w: w.update({UP: w[UP].to(torch.float8_e4m3fn)})), f"{UP} is F8_E4M3"),
    ],
)
def test_a_bad_source_is_named(source, tmp_path, damage, text):
    damage(source)
    with pytest.raises(CheckpointError, match=text):
        convert(source, tmp_path / "out", recipe=Recipe.NF4)
    assert not is_checkpoint(tmp_path / "out")


def test_inv_freq_is_ignored(source, tmp_path):
    change(source, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    convert(source, tmp_path / "out", recipe=Recipe.NF4)


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_bytes(pristine, tmp_path):
    convert(pristine, tmp_path / "whole", recipe=Recipe.NF4)
    random.seed(1)
    files = list(dense_files(Checkpoint(tmp_path / "whole").config))
    out, partial = tmp_path / "out", tmp_path / "out" / PARTIAL
    for seen in random.sample(files, 2):
        process = subprocess.Popen([sys.executable, "-c", RUN, pristine, out])
        while process.poll() is None and not (partial / seen).exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (partial / "manifest.json").exists()
    convert(pristine, out, recipe=Recipe.NF4)
    assert digests(out) == digests(tmp_path / "whole")
    assert not partial.exists()


class Stop:
    """A `report` that records the progress, and raises `error` at the n-th call."""

    def __init__(self, at=None, error=KeyboardInterrupt):
        self.at, self.error, self.seen = at, error, []

    def __call__(self, progress):
        self.seen.append(progress)
        if len(self.seen) == self.at:
            raise self.error


def test_an_interrupt_keeps_finished_files_and_progress_only_grows(pristine, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert(pristine, tmp_path / "out", recipe=Recipe.NF4, report=Stop(60))
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / PARTIAL).glob("*.safetensors")}
    assert finished
    report = Stop()
    convert(pristine, tmp_path / "out", recipe=Recipe.NF4, report=report)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in finished.items())
    assert all(
        a.bytes <= b.bytes and a.tensors <= b.tensors for a, b in zip(report.seen, report.seen[1:], strict=False)
    )
    last = report.seen[-1]
    assert (last.tensors, last.bytes) == (last.total_tensors, last.total_bytes)


def test_a_partial_conversion_with_another_recipe_is_refused_unless_forced(pristine, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert(pristine, tmp_path / "out", recipe=Recipe.INT8, report=Stop(60))
    with pytest.raises(ConversionError, match="another source or recipe"):
        convert(pristine, tmp_path / "out", recipe=Recipe.NF4)
    (tmp_path / "out" / PARTIAL / "experts-099.safetensors").write_bytes(b"of another model")
    convert(pristine, tmp_path / "out", recipe=Recipe.NF4, force=True)
    convert(pristine, tmp_path / "fresh", recipe=Recipe.NF4)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_an_existing_checkpoint_stays_until_the_new_one_is_finished(pristine, tmp_path):
    out = tmp_path / "out"
    convert(pristine, out, recipe=Recipe.INT8)
    before = digests(out)
    (out / "notes").write_text("the user's own")
    with pytest.raises(ConversionError, match="--force"):
        convert(pristine, out, recipe=Recipe.NF4)
    with pytest.raises(KeyboardInterrupt):
        convert(pristine, out, recipe=Recipe.NF4, force=True, report=Stop(60))
    assert {name: digest for name, digest in digests(out).items() if name in before} == before
    convert(pristine, out, recipe=Recipe.NF4, force=True)
    assert Checkpoint(out).recipe is Recipe.NF4
    assert (out / "notes").read_text() == "the user's own"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_destinations(source, tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (source, source / "inside", tmp_path, tmp_path / "file"):
        with pytest.raises(ConversionError):
            convert(source, bad, recipe=Recipe.NF4, force=True)


def there(tmp_path, kind):
    """A destination in the current directory, and where it is."""
    disk = tmp_path / "disk"
    disk.mkdir()
    os.chdir(tmp_path)
    if kind == ".":
        os.chdir(disk)
        return Path(), disk
    if kind == "link":
        Path("link").symlink_to("disk")
        return Path("link"), disk
    if kind == "dangling link":
        Path("link").symlink_to("disk/deep/out")
        return Path("link"), disk / "deep" / "out"
    if kind == "home":
        return Path("~/out"), disk / "out"
    if kind == "lost+found":
        (disk / "lost+found").mkdir()
        (disk / ".DS_Store").write_text("")
    return disk, disk


@pytest.mark.parametrize("kind", [".", "link", "dangling link", "home", "lost+found"])
def test_a_destination_is_a_place_and_not_a_name(pristine, tmp_path, monkeypatch, kind):
    """It keeps its inode, so that a shell in it, a link to it or a mount on it show the result; resuming works too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "disk"))
    destination, place = there(tmp_path, kind)
    inode = place.stat().st_ino if place.exists() else None
    with pytest.raises(KeyboardInterrupt):
        convert(pristine, destination, recipe=Recipe.NF4, report=Stop(60))
    finished = list((place / PARTIAL).glob("*.safetensors"))
    assert finished
    assert convert_module.finished_files(destination) == len(finished)
    convert(pristine, destination, recipe=Recipe.NF4)
    Checkpoint(place)
    assert inode in (None, place.stat().st_ino)
    assert not (place / PARTIAL).exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"disk", "link"}


def test_destinations_of_the_command():
    done = dsv2("quantize", "tests", "")
    assert (done.returncode, done.stderr) == (2, b"dsv2: error: the destination is empty; is a variable not set?\n")
    for command in (("quantize", "", "out"), ("run", "hi", "-m", ""), ("inspect", "")):
        assert b"the model's name is empty" in dsv2(*command).stderr


def test_space_is_that_of_the_disk_that_is_written(pristine, tmp_path, monkeypatch):
    asked = []
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(1000))
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/out")
    with pytest.raises(ConversionError, match=r"disk/out has 0\.00 GB free"):
        convert(pristine, tmp_path / "link", recipe=Recipe.NF4)
    assert asked == [tmp_path / "disk" / "out"]
    assert list((tmp_path / "disk" / "out").iterdir()) == []
    with pytest.raises(ConversionError, match="free"):
        convert(pristine, tmp_path / "new" / "out", recipe=Recipe.NF4)
    assert not (tmp_path / "new").exists()  # refused before anything was written


@pytest.mark.parametrize("make", ["foreign", "link", "tokenizer"])
def test_what_is_not_of_a_conversion_stays(pristine, tmp_path, make):
    out = tmp_path / "out"
    out.mkdir()
    for partial in (out / PARTIAL, tmp_path / "out.partial"):
        mine = (tmp_path / "elsewhere" if make == "link" else partial) / (
            "tokenizer.json" if make == "tokenizer" else "thesis.txt"
        )
        mine.parent.mkdir(exist_ok=True)
        if make == "link":
            partial.symlink_to(tmp_path / "elsewhere")
        mine.write_text("mine")
        if partial.parent == out:
            with pytest.raises(ConversionError, match="is a link" if make == "link" else f"holds {mine.name}"):
                convert(pristine, out, recipe=Recipe.NF4, force=True)
            partial.unlink() if make == "link" else shutil.rmtree(partial)
        else:
            convert(pristine, out, recipe=Recipe.NF4)
            assert mine.read_text() == "mine"


def test_stopped_while_files_are_moved_into_place_it_ends_the_same(pristine, tmp_path, monkeypatch):
    """At each change of the file system, while another checkpoint is replaced."""
    convert(pristine, tmp_path / "whole", recipe=Recipe.NF4)
    convert(pristine, tmp_path / "before", recipe=Recipe.INT8)
    (tmp_path / "before" / "NOTICE").write_text("the user's own")
    monkeypatch.setattr(convert_module, "_put_in_place", lambda *_: None)
    shutil.copytree(tmp_path / "before", tmp_path / "ready")
    convert(pristine, tmp_path / "ready", recipe=Recipe.NF4, force=True)
    monkeypatch.undo()
    expected = digests(tmp_path / "whole") | {"NOTICE": digests(tmp_path / "before")["NOTICE"]}
    out, stopped = tmp_path / "out", 0
    while True:
        shutil.copytree(tmp_path / "ready", out)
        steps = iter(range(stopped + 1))
        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "unlink", "rmdir"):
                patch.setattr(Path, name, once_more(getattr(Path, name), steps))
            try:
                convert_module._put_in_place(out / PARTIAL, out)
            except KeyboardInterrupt:
                stopped += 1
            else:
                break
        assert not is_checkpoint(out) or set(expected) <= set(digests(out))
        begun, ended = stopped > 1, not (out / PARTIAL / "progress.json").exists()
        convert(pristine, out, recipe=Recipe.NF4, force=not begun or ended)
        assert digests(out) == expected
        assert not (out / PARTIAL).exists()
        shutil.rmtree(out)
    assert stopped > len(expected)


def once_more(function, steps):
    def call(*args, **options):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return function(*args, **options)

    return call


def test_a_lock_is_on_what_the_path_names(tmp_path):
    """One process has the lock and deletes the directory; the next one must not hold a lock on what is gone."""
    path = tmp_path / "locked"
    path.mkdir()
    first = locks.take(path, directory=True)
    with pytest.raises(BlockingIOError):
        locks.take(path, directory=True)
    waiting = threading.Thread(target=lambda: taken.append(locks.take(path, directory=True, wait=True)))
    taken = []
    waiting.start()
    time.sleep(0.05)
    path.rename(tmp_path / "moved")
    path.mkdir()
    os.close(first)
    waiting.join()
    assert os.fstat(taken[0]).st_ino == path.stat().st_ino
    with pytest.raises(BlockingIOError):
        locks.take(path, directory=True)
    os.close(taken[0])


def test_a_second_conversion_at_the_same_time_is_refused(pristine, tmp_path):
    def second(_):
        with pytest.raises(ConversionError, match="another conversion"):
            convert(pristine, tmp_path / "out", recipe=Recipe.NF4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(pristine, tmp_path / "out", recipe=Recipe.NF4, report=second)


def test_no_space(pristine, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1000))
        with pytest.raises(ConversionError, match="GB are needed"):
            convert(pristine, tmp_path / "out", recipe=Recipe.NF4)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(convert_module.os, "pwrite", full)
        with pytest.raises(ConversionError, match="No space left"):
            convert(pristine, tmp_path / "out", recipe=Recipe.NF4)
    convert(pristine, tmp_path / "out", recipe=Recipe.NF4)


def test_verify_finds_a_changed_byte(pristine, tmp_path):
    convert(pristine, tmp_path / "out", recipe=Recipe.NF4)
    file = tmp_path / "out" / "experts-001.safetensors"
    with file.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([file.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"experts-001.safetensors does not match its checksum"):
        verify(pristine, tmp_path / "out")


def test_command(pristine, tmp_path, capsys):
    options = {"recipe": Recipe.NF4, "force": False, "revision": None, "token": None}
    quantize.run(str(pristine), tmp_path / "out", check=True, **options)
    captured = capsys.readouterr()
    assert "bits per weight" in captured.err
    assert "routed experts" in captured.out
    assert "bits per weight" not in captured.out


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "model.safetensors", "config.json"])
def test_links_that_leave_the_source_are_refused(source, tmp_path, name):
    """A model from elsewhere must not make a conversion copy a private file of whoever converts it."""
    private = tmp_path / "private"
    private.write_bytes((source / name).read_bytes() if (source / name).exists() else b"secret")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(private)
    with pytest.raises(CheckpointError, match=f"{name} leads out of .*private; put the file itself there"):
        convert(source, tmp_path / "out", recipe=Recipe.BF16)
    assert not (tmp_path / "out").exists()


def test_links_inside_the_source_and_into_the_hubs_cache_are_followed(source, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(path for path in source.iterdir() if path.is_file()):
        (blobs / f"{number:040}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040}")
    (snapshot / "README.md").symlink_to("config.json")
    convert(snapshot, tmp_path / "out", recipe=Recipe.BF16)
    assert (tmp_path / "out" / "README.md").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, "leads out of"),
        ({"weight_map": {"a": "/etc/hostname"}}, "leads out of"),
        ({"weight_map": {"a": "a\0b"}}, "is listed in .* but no name of a file"),
        ({"weight_map": {"a": "a" * 300}}, "is listed in .* but no name of a file"),
        ({"weight_map": {"a": 5}}, "weight_map of 'a' must be text, not 5"),
        ({"weight_map": ["a"]}, "weight_map must be an object"),
        ({}, "has no weight_map"), ([1], "not a JSON object"), ("[" * 100_000, "nested too deeply"),
        ({"weight_map": {"a\x1b[2J": "\x1b]0;x\x07.safetensors"}}, r"\\x1b\]0;x\\x07.safetensors is listed"),
    ],
)  # fmt: skip
def test_impossible_indexes_are_refused(source, tmp_path, index, named):
    text = index if isinstance(index, str) else json.dumps(index)
    (source / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=named):
        convert(source, tmp_path / "out", recipe=Recipe.BF16)


GOOD = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ("[" * 100_000, "header of .* nested too deeply"), ({"a": 5}, "a must be an object, not 5"),
        ({"a": {**GOOD, "shape": ["2"]}}, "a: shape must be a whole number, not '2'"),
        ({"a": {**GOOD, "shape": [-1, -2]}}, "shape must be between 0 and"),
        ({"a": {**GOOD, "shape": None}}, "no shape"),
        ({"a": {**GOOD, "data_offsets": [0.5, 4.5]}}, "data_offsets must be"),
        ({"a": {**GOOD, "data_offsets": [4]}}, "no data_offsets"), ({"a": {**GOOD, "dtype": 7}}, "dtype must be text"),
        ({"a": {**GOOD, "dtype": "F8_E4M3"}}, "a is F8_E4M3, which is not supported"),
        ({"a\n\x1b[31m": {**GOOD, "shape": [3]}}, r"a \\x1b\[31m has 4 bytes"),
    ],
)  # fmt: skip
def test_impossible_headers_are_refused(source, tmp_path, header, named):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=named) as caught:
        convert(source, tmp_path / "out", recipe=Recipe.BF16)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("generation_config.json", {"eos_token_id": "1"}, "eos_token_id must be a whole number"),
        ("generation_config.json", {"eos_token_id": 199}, "but vocab_size is 199"),
        ("tokenizer.json", {}, "tokenizer.json cannot be used"),
    ],
)
def test_a_file_that_cannot_be_used_later_is_told_before_the_conversion(source, tmp_path, file, content, error):
    (source / file).write_text(json.dumps(content))
    with pytest.raises(Dsv2Error, match=error):
        quantize.run(
            str(source), tmp_path / "out", recipe=Recipe.NF4, check=False, force=False, revision=None, token=None
        )
    assert not list(tmp_path.glob("out*"))

"""Saved caches: a loaded cache gives bit-identical answers, and files that are not a cache of the model are refused."""

import json
import os
import stat
import textwrap
import threading

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsv2_local import llm
from dsv2_local.errors import SavedCacheError
from dsv2_local.runtime import saved_cache
from tests.models import kill_half_way
from tests.test_cli import dsv2

BOOK = "A violin is a string instrument that is played with a bow. " * 20


def answer(model: llm.LLM, text: str) -> tuple[list[int | None], int]:
    generation = model.generate(text, max_tokens=8, temperature=0)
    return [chunk.token_id for chunk in generation], generation.stats.reused_tokens


@pytest.mark.parametrize("kept", ["bf16", "int8"])
def test_a_loaded_cache_gives_the_same_answer(tmp_path, kept):
    path, asked = tmp_path / "book", BOOK + "What is a bow?"
    expected, _ = answer(llm.load(cache_dtype=kept), asked)
    first = llm.load(cache_dtype=kept)
    answer(first, BOOK)
    first.save_cache(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["book"]
    again = llm.load(cache_dtype=kept)
    count = again.load_cache(path)
    tokens, reused = answer(again, asked)
    assert tokens == expected
    assert 0 < reused <= count
    short = llm.load(cache_dtype=kept, context=20)
    assert short.load_cache(path) == 20


def test_what_is_no_cache_of_this_model_is_refused_and_changes_nothing(tmp_path):
    path, model = tmp_path / "book", llm.load()
    expected = answer(model, BOOK)[0]
    model.save_cache(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)

    def refused(match: str, other: llm.LLM = model) -> None:
        held = other.engine.tokens
        with pytest.raises(SavedCacheError, match=match):
            other.load_cache(path)
        assert other.engine.tokens == held
        assert answer(other, BOOK)[0] == expected

    refused("stores latents as (bf16|fp32)", llm.load(cache_dtype="int8"))
    save_file(tensors, path, metadata | {"model": "other"})
    refused("another model")
    for kind, match in (
        ("dsv2 cache 3", "newer version"),
        ("dsv2 cache x", "not a saved cache"),
        ("", "not a saved cache"),
    ):
        save_file(tensors, path, metadata | {"format": kind})
        refused(match)
    save_file({**tensors, "tokens": tensors["tokens"].float()}, path, metadata)
    refused("its tokens are")
    save_file({**tensors, "layer.001": tensors["layer.001"] + 1}, path, metadata)
    refused("checksum")
    save_file({**tensors, "layer.001": tensors["layer.001"][1:].clone()}, path, metadata)
    refused("is damaged")
    save_file({name: tensor for name, tensor in tensors.items() if name != "layer.002"}, path, metadata)
    refused("damaged")
    whole = path.read_bytes()
    for rubbish in (b"", b"GGUF", whole[: len(whole) // 2], b"\xff" * 100):
        path.write_bytes(rubbish)
        refused("not a saved cache|cannot be read")
    with pytest.raises(SavedCacheError, match="cannot be written"):
        model.save_cache(tmp_path / "none" / "book")


def test_a_file_of_version_1_is_read_and_what_a_killed_save_left_goes(tmp_path):
    path, model = tmp_path / "book [1]", llm.load()
    answer(model, BOOK)
    abandoned = tmp_path / ".book [1].partial"
    abandoned.mkdir(mode=0o700)
    (abandoned / "new").write_text("half")
    model.save_cache(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "dsv2 cache 2"
    save_file(load_file(path), path, metadata | {"format": "dsv2 cache 1"})
    assert model.load_cache(path) == len(model.engine.tokens) > 0


def test_a_save_takes_its_turn_and_asks_again(tmp_path):
    path, model = tmp_path / "book", llm.load()
    answer(model, BOOK)
    turn = saved_cache._turn(path)
    turn.__enter__()  # another process is saving
    saved_cache.remove_abandoned(path)
    asked, saved = [], []

    def wanted(tokens: int) -> bool:
        asked.append(tokens)
        return tokens < 1000

    saving = threading.Thread(target=lambda: saved.append(model.save_cache(path, wanted=wanted)))
    saving.start()
    saving.join(0.1)
    assert saving.is_alive()
    assert not path.exists()
    turn.__exit__(None, None, None)
    saving.join()
    assert (asked, saved) == ([0], [True])
    before = path.read_bytes()
    assert not model.save_cache(path, wanted=lambda tokens: tokens < len(model.engine.tokens))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["book"]


def test_a_link_is_followed_and_what_others_can_write_is_not_used(tmp_path):
    model = llm.load()
    answer(model, BOOK)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/book")
    model.save_cache(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert model.load_cache(tmp_path / "disk" / "book") > 0
    trap = tmp_path / ".book.partial"
    trap.mkdir(mode=0o777)
    trap.chmod(0o777)
    with pytest.raises(SavedCacheError, match="is not this user's alone"):
        model.save_cache(tmp_path / "book")


@pytest.mark.slow
def test_an_empty_file_is_written_and_what_is_no_file_is_refused(tmp_path):
    path = tmp_path / "of mktemp"
    path.touch()
    done = dsv2("run", "--cache", path, "-n", 1, "What is a dog?")
    assert done.returncode == 0
    assert saved_cache.read_header(path).tokens > 0
    for nowhere in ("/dev/null", "/dev/stdout", "/", "/no/such/directory/file", tmp_path / ("a" * 247)):
        done = dsv2("run", "--cache", nowhere, "hello")
        assert (done.returncode, done.stdout) == (2, b"")
        assert b"cannot be written" in done.stderr


def test_a_pipe_is_no_saved_cache(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SavedCacheError, match="cannot be read: it is not a file"):
        saved_cache.read_header(tmp_path / "pipe")


@pytest.mark.slow
def test_a_script_reads_a_book_once(tmp_path):
    book, path = tmp_path / "book.txt", tmp_path / "book.cache"
    book.write_text(BOOK)

    def run(*options: object) -> dict[str, object]:
        done = dsv2("run", "--json", "-n", 6, "--temperature", 0, "--cache", path, *options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first = run("-f", book, "What is it?")
    assert first["reused_tokens"] == 0
    written = path.read_bytes()
    second = run("-f", book, "Who plays it?")
    assert second["reused_tokens"] > 200
    plain = json.loads(dsv2("run", "--json", "-n", 6, "--temperature", 0, "-f", book, "Who plays it?").stdout)
    assert second["text"] == plain["text"]
    run("hello")  # a question without the book must not replace the file
    assert path.read_bytes() == written
    for nowhere in (tmp_path, tmp_path / "none" / "file"):
        failed = dsv2("run", "--cache", nowhere, "hello")
        assert (failed.returncode, failed.stdout) == (2, b"")
    path.write_text("not a cache")
    failed = dsv2("run", "--cache", path, "hello")
    assert (failed.returncode, failed.stdout) == (1, b"")
    assert b"not a saved cache" in failed.stderr
    assert path.read_text() == "not a cache"


@pytest.mark.slow
def test_killed_while_it_saves_the_old_file_stays(tmp_path):
    path = tmp_path / "book"
    model = llm.load()
    answer(model, BOOK)
    model.save_cache(path)
    before = path.read_bytes()
    script = textwrap.dedent(
        f"""
        import pathlib
        from dsv2_local import llm
        from dsv2_local.runtime import saved_cache
        model = llm.load()
        list(model.generate("something else", max_tokens=4))
        real = saved_cache.save_file
        def slow(*arguments):
            real(*arguments)
            print("half way", flush=True)
            import time; time.sleep(60)
        saved_cache.save_file = slow
        model.save_cache(pathlib.Path({str(path)!r}))
        """
    )
    kill_half_way(script)
    assert path.read_bytes() == before
    assert model.load_cache(path) > 0

"""The block store: it gives back the same bytes; files that are torn, damaged or another model's change nothing."""

import errno
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import dsv2_local
from dsv2_local.errors import InputError, SavedCacheError
from dsv2_local.kernels import cpu
from dsv2_local.kernels.format import CACHE_BLOCK, CacheDtype
from dsv2_local.runtime import block_files
from dsv2_local.runtime.block_files import KEY_BYTES, NEW, BlockFiles, BlockName
from dsv2_local.runtime.block_pool import BlockPool
from dsv2_local.runtime.block_store import BlockStore, first_key, next_key
from dsv2_local.runtime.engine import Engine
from tests.models import kill_half_way
from tests.scheduling import SIZE, add_store, seen
from tests.test_block_pool import World, found, kept
from tests.test_cache import answer, conversations, engine

MODEL = "ab" * KEY_BYTES
KEY = first_key("a model")


def complain(text: str) -> None:
    raise AssertionError(text)


def opened(directory: Path, limit: int | None = None, notice=complain, model: str = MODEL) -> BlockFiles:
    return BlockFiles(directory, model, SIZE, SIZE * 8, limit, notice)


def blocks_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if BlockName.parse(path.name))


def filled(directory: Path, *texts: list[int], limit: int | None = None) -> None:
    """Store texts as a process does that evicts and ends."""
    pool, store = simulated(directory, 40, limit=limit)
    for text in texts:
        keep(pool, text)
        pool.set_aside()
        store.flush()
    store.close()


def simulated(directory: Path | None, count: int, ram: int = 0, limit: int | None = None, notice=complain):
    """A pool of so many blocks, whose memory tells tokens, and its store."""
    pool = BlockPool(count, SIZE)
    pool.memory = [[0] * SIZE for _ in range(count)]  # type: ignore[attr-defined]
    files = opened(directory, limit, notice) if directory else None
    return pool, add_store(pool, pool.memory, ram, files)  # type: ignore[attr-defined]


def keep(pool: BlockPool, text: list[int]) -> None:
    """Compute a text, and leave it in the prefix cache."""
    for at, block in enumerate(kept(pool, text)):
        cells = seen(text)[at * SIZE :][:SIZE]
        pool.memory[block][: len(cells)] = cells  # type: ignore[attr-defined]


def restored(pool: BlockPool, text: list[int]) -> int:
    """Bring a text back, and check its contents; returns how many of its tokens are there then."""
    pool.restore(text)
    blocks, done = pool.match(text)
    cells = [cell for block in blocks for cell in pool.memory[block]]  # type: ignore[attr-defined]
    assert cells[:done] == seen(text)[:done]
    pool.release(blocks)
    return done


def evict_all(pool: BlockPool) -> None:
    pool.release([pool.allocate() for _ in range(pool.count)])


def text(number: int, length: int = 3 * SIZE + 2) -> list[int]:
    return [number * 100 + at for at in range(length)]


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_evicted_comes_back(tmp_path: Path, on_disk: bool):
    pool, store = simulated(tmp_path if on_disk else None, 8, ram=0 if on_disk else 20)
    keep(pool, text(1))
    evict_all(pool)
    assert found(pool, text(1)) == 0
    assert pool.find(text(1)) == ([], 0, 14)
    assert restored(pool, text(1)) == 14
    evict_all(pool)
    assert restored(pool, [*text(1)[:6], 5, 5, 5]) == 6  # a block that agrees in part
    evict_all(pool)
    assert restored(pool, [*text(1), 5, 5, 5]) == 14
    assert restored(pool, text(2)) == 0
    counts = store.counts
    assert (counts.restored_tokens, counts.hits, counts.lookups) == (34, 3, 4)
    store.close()


def test_a_longer_block_takes_the_place_of_its_beginning(tmp_path: Path):
    pool, store = simulated(tmp_path, 8, ram=20)
    for length in (1, 3, 4, 2):
        keep(pool, text(1, length))
        evict_all(pool)
    store.flush()
    assert store.counts.disk_blocks == store.counts.ram_blocks == len(blocks_in(tmp_path)) == 1
    assert restored(pool, text(1)) == 4
    store.close()


def test_in_ram_the_end_of_a_text_and_the_oldest_text_are_dropped_first():
    pool, store = simulated(None, 8, ram=6)
    for number in (1, 2, 3):
        keep(pool, text(number, 3 * SIZE))
        evict_all(pool)
    assert store.counts.ram_blocks == 6
    assert [pool.find(text(number))[2] for number in (1, 2, 3)] == [0, 12, 12]
    keep(pool, text(4, SIZE))
    evict_all(pool)
    assert pool.find(text(2))[2] == 8


def test_a_restored_block_is_in_ram_once():
    pool, store = simulated(None, 8, ram=6)
    keep(pool, text(1, 3 * SIZE))
    evict_all(pool)
    assert restored(pool, text(1)) == 12
    assert store.counts.ram_blocks == 0
    evict_all(pool)
    assert restored(pool, text(1)) == 12


def test_blocks_that_others_hold_leave_room_for_a_part():
    pool, _ = simulated(None, 8, ram=20)
    keep(pool, text(1, 3 * SIZE))
    evict_all(pool)
    held = [pool.allocate() for _ in range(7)]
    assert restored(pool, text(1)) == 4
    pool.release(held)
    assert restored(pool, text(1)) == 12


def test_clear_forgets_everything(tmp_path: Path):
    pool, store = simulated(tmp_path, 8, ram=20)
    keep(pool, text(1))
    evict_all(pool)
    pool.clear()
    store.flush()
    assert blocks_in(tmp_path) == []
    assert pool.find(text(1)) == ([], 0, 0)
    store.close()


@pytest.mark.slow
def test_any_operations_with_files(tmp_path: Path):
    """Little RAM and few files, and blocks that are lost at any time: whatever is found has the right contents."""
    draw = random.Random(1)
    for number in range(4):
        count = 3 + number * 4
        files = opened(tmp_path, 30 * 200, notice=print, model=f"{number:02}" * KEY_BYTES)
        world = World(count, lambda n: int(draw.random() * n), number * 5, files)
        for _ in range(1500):
            world.step()
            if draw.random() < 0.02 and (there := blocks_in(files.folder)):
                draw.choice(there).unlink(missing_ok=True)
            if draw.random() < 0.02 and (files.flush() or (there := blocks_in(files.folder))):
                with draw.choice(there).open("r+b") as file:
                    file.seek(draw.randrange(files.record))
                    file.write(b"\xee")
        world.check_all()
        assert world.restored > 50
        world.pool.store.close()
        assert len(blocks_in(files.folder)) * files.record <= files.limit


def test_a_restart_finds_everything(tmp_path: Path):
    filled(tmp_path, text(1), text(2))
    pool, store = simulated(tmp_path, 8)
    assert restored(pool, text(1)) == restored(pool, text(2)) == 14
    store.close()
    for path in (tmp_path / MODEL, *(tmp_path / MODEL).iterdir()):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("keep_bytes", [0, 1, 40, 99])
def test_torn_files_are_deleted(tmp_path: Path, keep_bytes: int):
    filled(tmp_path, text(1))
    os.truncate(blocks_in(tmp_path)[0], keep_bytes)
    (tmp_path / MODEL / NEW).write_bytes(b"torn")
    opened(tmp_path).close()
    assert len(blocks_in(tmp_path)) == 3
    assert not (tmp_path / MODEL / NEW).exists()


def test_every_damaged_byte_is_found(tmp_path: Path):
    """Each byte of a file matters, but for the bits after its last token; a damaged file is told once, and deleted."""
    filled(tmp_path, text(1, 3))
    path = blocks_in(tmp_path)[0]
    contents = path.read_bytes()
    for at in range(len(contents)):
        path.write_bytes(contents[:at] + bytes([contents[at] ^ 1]) + contents[at + 1 :])
        told: list[str] = []
        pool, store = simulated(tmp_path, 8, notice=told.append)
        assert restored(pool, text(1)) == 0
        assert len(told) == 1
        assert "left out of the prefix cache: its contents do not match its checksum" in told[0]
        store.close()
        assert not path.exists()


def test_a_file_under_another_name_is_not_taken_for_its_block(tmp_path: Path):
    filled(tmp_path, text(1, SIZE), text(2, SIZE))
    one, two = blocks_in(tmp_path)
    contents = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(contents)
    told: list[str] = []
    pool, store = simulated(tmp_path, 8, notice=told.append)
    assert restored(pool, text(1)) == restored(pool, text(2)) == 0
    assert len(told) == 1
    store.close()


def test_a_file_that_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    filled(tmp_path, text(1))
    told: list[str] = []
    pool, store = simulated(tmp_path, 8, notice=told.append)

    def refuse(path: object, *options: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert restored(pool, text(1)) == 0
    monkeypatch.undo()
    assert "Permission denied" in told[0]
    store.close()


def test_a_full_disk_is_told_once_and_files_are_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    filled(tmp_path, text(1))
    told: list[str] = []
    pool, store = simulated(tmp_path, 8, notice=told.append)

    def full(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for number in (2, 3):
        keep(pool, text(number))
        evict_all(pool)
        store.flush()
    monkeypatch.undo()
    assert len(told) == 1
    assert "no longer written" in told[0]
    assert "No space left" in told[0]
    assert restored(pool, text(2)) == 0
    assert restored(pool, text(1)) == 14
    pool.set_aside()
    store.close()
    assert len(blocks_in(tmp_path)) == 4
    assert not (tmp_path / MODEL / NEW).exists()


def test_the_least_recently_used_files_are_deleted(tmp_path: Path):
    filled(tmp_path, text(1, 2 * SIZE), text(2, 2 * SIZE), text(3, 2 * SIZE))
    pool, store = simulated(tmp_path, 8)
    assert restored(pool, text(1, 2 * SIZE)) == 8  # used just now
    store.close()
    record = store_record(tmp_path)
    pool, store = simulated(tmp_path, 8, limit=4 * record + 5)
    store.flush()
    assert len(blocks_in(tmp_path)) == 4
    assert [pool.find(text(number, 2 * SIZE))[2] for number in (1, 2, 3)] == [8, 0, 8]
    keep(pool, text(4, SIZE))
    evict_all(pool)
    store.flush()
    assert len(blocks_in(tmp_path)) == 4
    assert pool.find(text(3, 2 * SIZE))[2] == 4  # the end goes first
    store.close()


def store_record(directory: Path) -> int:
    return blocks_in(directory)[0].stat().st_size


def test_files_of_other_models_count_and_are_never_read(tmp_path: Path):
    filled(tmp_path, text(1))
    other = opened(tmp_path, model="cd" * KEY_BYTES)
    assert other.found == []
    assert other.foreign == 4 * store_record(tmp_path)
    assert other.delete_foreign()
    other.close()
    assert len(blocks_in(tmp_path)) == 3
    used = opened(tmp_path)
    again = opened(tmp_path, model="cd" * KEY_BYTES)
    assert again.foreign == 0  # another process uses them
    assert not again.delete_foreign()
    again.close()
    used.close()


def test_a_second_process_reads(tmp_path: Path):
    filled(tmp_path, text(1))
    first = opened(tmp_path)
    pool, store = simulated(tmp_path, 8)
    assert restored(pool, text(1)) == 14
    keep(pool, text(2))
    evict_all(pool)
    pool.set_aside()
    pool.clear()
    store.close()
    first.close()
    assert len(blocks_in(tmp_path)) == 4
    pool, store = simulated(tmp_path, 8)
    assert store.keeps  # the lock is free again
    store.close()


@pytest.mark.slow
def test_a_killed_process_leaves_whole_blocks(tmp_path: Path):
    kill_half_way(
        f"""
import time
from pathlib import Path
from tests.test_block_store import evict_all, keep, simulated, text
pool, store = simulated(Path({str(tmp_path)!r}), 8)
keep(pool, text(0)); evict_all(pool); store.flush()
print("half way", flush=True)
for number in range(1, 100_000):
    keep(pool, text(number)); evict_all(pool)
"""
    )
    pool, store = simulated(tmp_path, 8)
    assert restored(pool, text(0)) == 14
    assert {restored(pool, text(number)) for number in range(20)} <= {0, 4, 8, 12, 14}
    store.close()


def test_what_comes_faster_than_the_disk_writes_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    go_on = threading.Event()
    write = BlockFiles._write

    def slow(self: BlockFiles, *block: object) -> bool:
        assert go_on.wait(20)
        return write(self, *block)  # type: ignore[arg-type]

    monkeypatch.setattr(BlockFiles, "_write", slow)
    pool, store = simulated(tmp_path, 8)
    monkeypatch.setattr(block_files, "QUEUE_BYTES", 3 * store._files.record)
    keep(pool, text(1, 7 * SIZE))
    evict_all(pool)
    counts = store.counts
    assert (counts.disk_blocks, counts.lost_blocks) == (3, 4)
    assert counts.queued_bytes == 3 * store._files.record
    keep(pool, text(2, 7 * SIZE))
    pool.set_aside(wait=False)
    assert store.counts == counts
    threading.Timer(0.01, go_on.set).start()
    pool.set_aside()  # waits
    store.close()
    assert len(blocks_in(tmp_path)) == 10


@pytest.mark.parametrize("mode", [0o755, 0o701])
def test_a_folder_that_others_can_read_is_refused(tmp_path: Path, mode: int):
    opened(tmp_path).close()
    (tmp_path / MODEL).chmod(mode)
    with pytest.raises(SavedCacheError, match="not this user's alone"):
        opened(tmp_path)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(
        SavedCacheError, match=r"cannot hold the prefix cache: (File exists|Not a directory); name another"
    ):
        opened(tmp_path / "file")


def test_keys_depend_on_everything_before():
    keys = {next_key(key, tokens) for key in (KEY, first_key("other")) for tokens in ([1], [1, 2], [2, 1], [1, 2, 0])}
    assert len(keys) == 8
    assert {len(key) for key in keys} == {KEY_BYTES}


def with_store(of: Engine, ram: int = 0, directory: Path | None = None) -> BlockStore:
    nbytes = sum(layer[0].nbytes for layer in of.cache.layers)
    files = BlockFiles(directory, MODEL, CACHE_BLOCK, nbytes, None, complain) if directory else None
    of.cache.add_store(KEY, ram, files)
    assert of.cache.pool.store is not None
    return of.cache.pool.store


@pytest.mark.skipif(
    not {"avx2", "avx512"} & {*cpu.usable()}, reason="other kernels round one token and many differently"
)
@pytest.mark.parametrize("kind", [CacheDtype.BF16, CacheDtype.INT8])
@pytest.mark.parametrize("on_disk", [False, True])
def test_restored_answers_have_the_bits_of_those_without_reuse(tmp_path: Path, kind: CacheDtype, on_disk: bool):
    """In a cache that is too small for all prompts, while the store has room for all."""
    ours, plain = engine(300, kind), engine(300, kind)
    store = with_store(ours, 0 if on_disk else 1 << 24, tmp_path if on_disk else None)
    said: list[list[int]] = []
    for _, prompt in zip(range(40), conversations(random.Random(1), 300), strict=False):
        steps, reused = answer(ours, prompt)
        plain.clear()
        assert (steps, 0) == answer(plain, prompt)
        assert reused >= max((common_length(prompt[:-1], text) for text in said), default=0)  # everything is kept
        said.append(prompt + [step.token for step in steps[:-1]])
    assert store.counts.restored_tokens > 500
    ours.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("dsv2-blocks", "dsv2-read"))]


def common_length(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("kind", [CacheDtype.BF16, CacheDtype.INT8])
def test_rows_are_the_same_bytes_after_a_restart(tmp_path: Path, kind: CacheDtype):
    prompt = [7 * at % 199 for at in range(150)]
    first = engine(300, kind)
    with_store(first, directory=tmp_path)
    answer(first, prompt)
    hit = answer(first, [*prompt, 5])
    rows = [first.cache.rows(first.sequence, layer).clone() for layer in range(3)]
    first.close()
    second = engine(300, kind)
    with_store(second, directory=tmp_path)
    again = answer(second, [*prompt, 5])
    assert again == hit
    assert again[1] == 150
    for layer in range(3):
        assert second.cache.rows(second.sequence, layer).equal(rows[layer])
    second.close()


@pytest.mark.parametrize("places", [[[0, 1, 2]], [[0], [1, 2]], [[0, 2], [1]], [[1], [2], [0]]])
@pytest.mark.parametrize("ram", [[True, False, True], [False] * 3])
def test_blocks_of_several_devices_and_types_keep_their_bytes(
    monkeypatch: pytest.MonkeyPatch, places: list[list[int]], ram: list[bool]
):
    """The bytes are in the order of the layers, whichever device they are on."""
    for kind in (CacheDtype.BF16, CacheDtype.INT8):
        of = engine(300, kind)
        monkeypatch.setattr(of.cache, "_places", lambda: list(zip(places, ram, strict=False)))
        for number, layer in enumerate(of.cache.layers):
            layer.view(dtype=layer.dtype).flatten()[:] = number + 1
        rows = of.cache.read_block(1, 60)
        of.cache.write_block(3, rows)
        assert np.array_equal(rows, torch.stack([layer[3] for layer in of.cache.layers]).view(torch.uint8).flatten())
        for layer in of.cache.layers:
            assert layer[3, :60].equal(layer[1, :60])
            assert not layer[3, 60:].count_nonzero()
        assert rows.dtype == np.uint8
        assert np.array_equal(of.cache.read_block(3, CACHE_BLOCK), rows)


def tokens_of(llm: dsv2_local.LLM, prompt: list[int]) -> tuple[list[int | None], int, int]:
    generation = llm.generate(prompt, max_tokens=8, temperature=0)
    return [chunk.token_id for chunk in generation], generation.stats.reused_tokens, generation.stats.restored_tokens


def test_a_model_that_is_loaded_again_reads_nothing_twice(tmp_path: Path):
    draw = random.Random(0)
    prompt = [draw.randrange(2, 4000) for _ in range(500)]
    with dsv2_local.load(device="cpu", cache_dir=tmp_path) as llm:
        tokens_of(llm, prompt)
        llm.engine.set_aside()
        assert len(blocks_in(tmp_path)) == llm.engine.stored.disk_blocks == 8
        hit = tokens_of(llm, prompt)
        assert hit[1:] == (499, 0)
        other = dsv2_local.load(device="cpu", cache_dir=tmp_path)
        assert any("another process writes to" in note for note in other.notes)
        other.close()
    with dsv2_local.load(device="cpu", cache_dir=tmp_path) as llm:
        assert tokens_of(llm, prompt) == (hit[0], 499, 499)
        assert tokens_of(llm, prompt) == (hit[0], 499, 0)
        assert llm.engine.stored.restored_tokens == 499
    with dsv2_local.load(device="cpu", cache_dir=tmp_path, cache_dtype="int8") as llm:
        assert tokens_of(llm, prompt)[1] == 0
    with dsv2_local.load(device="cpu", cache_dir=tmp_path, batch_invariant=True) as llm:
        assert tokens_of(llm, prompt)[1] == 0


def test_a_conversation_survives_a_full_pool_in_ram():
    draw = random.Random(0)
    prompts = [[draw.randrange(2, 4000) for _ in range(200)] for _ in range(3)]
    with dsv2_local.load(device="cpu", context=256, cache_ram=1 << 26) as llm:
        for _ in range(2):
            reused = [tokens_of(llm, prompt)[1] for prompt in prompts]
        assert reused == [199, 199, 199]
        llm.engine.clear()
        assert tokens_of(llm, prompts[0])[1] == 0
        assert llm.engine.stored.ram_limit == 1 << 26
    assert llm.engine.stored.ram_bytes == 0


def test_options_of_the_store_are_checked(tmp_path: Path):
    for options, message in (
        ({"cache_ram": -1}, "cache_ram"),
        ({"cache_ram": 1 << 60}, "cache_ram asks for .* are free"),
        ({"cache_disk": 5}, "name that directory"),
        ({"cache_disk": -1, "cache_dir": tmp_path}, "cache_disk"),
        ({"cache_dir": 3}, "must be text or a path"),
    ):
        with pytest.raises(InputError, match=message):
            dsv2_local.load(device="cpu", **options)
    with dsv2_local.load(device="cpu", cache_ram=None) as llm:
        assert 0 < llm.engine.stored.ram_limit <= 4 * llm.engine.cache.nbytes + 4 * CACHE_BLOCK * 10_000
    with dsv2_local.load(device="cpu", cache_ram=None, cache_dir=tmp_path, cache_disk=0) as llm:
        assert llm.engine.stored.ram_limit == llm.engine.stored.disk_limit == 0
        tokens_of(llm, [5] * 100)
    assert blocks_in(tmp_path) == []

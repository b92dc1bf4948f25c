"""The block store, below the block pool: blocks that were evicted from the prefix cache, in RAM and in files.

Pure Python and numpy, no torch. A block is stored under a key of its tokens and all tokens before it: a chain of hashes
that begins with the model and the format of its rows. A prompt takes blocks back whose tokens continue what the prefix
cache has of it. In RAM a block leaves the store when it is taken back, since the pool has it then; files stay. Of both,
the least recently used are dropped: the pool evicts the end of a text before its beginning, and so does the store.
"""

import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

from dsv2_local.kernels.format import CACHE_BLOCK
from dsv2_local.runtime.block_files import KEY_BYTES, BlockFiles, BlockName, DamagedBlockError, Rows

CANDIDATES = 64  # blocks with the same beginning that are compared with the end of a prompt, the newest first
READERS = 4  # threads that read files

_Contents = tuple[tuple[int, ...], Rows]  # the tokens of a block, and its rows


def first_key(*parts: object) -> bytes:
    """The key before the first block, of everything that rows depend on besides the tokens."""
    return blake2b(repr(parts).encode(), digest_size=KEY_BYTES).digest()


def next_key(key: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a block of `tokens` that follows the block of `key`."""
    return blake2b(key + array("i", tokens).tobytes(), digest_size=KEY_BYTES).digest()


@dataclass(eq=False, slots=True)
class StoredBlock:
    """A block in the store: its name, its tokens (None: only its file has them), and its rows if they are in RAM."""

    name: BlockName
    tokens: tuple[int, ...] | None
    rows: Rows | None = None


@dataclass
class StoreCounts:
    """What a block store holds and has done, in blocks and bytes.

    Attributes:
        ram_blocks, ram_bytes, ram_limit: in RAM, and how many bytes may be.
        disk_blocks, disk_bytes, disk_limit: in files, those that wait to be written included.
        queued_bytes: that wait to be written.
        stored_blocks: that came from the block pool.
        restored_blocks, restored_bytes: that went back to it.
        restored_tokens: tokens of prompts that were found in them.
        lookups, hits: prompts that were looked up, and those for which something was found.
        read_bytes, written_bytes: of files.
        lost_blocks: that were dropped since they came faster than the disk writes, or were damaged.
    """

    ram_blocks: int = 0
    ram_bytes: int = 0
    ram_limit: int = 0
    disk_blocks: int = 0
    disk_bytes: int = 0
    disk_limit: int = 0
    queued_bytes: int = 0
    stored_blocks: int = 0
    restored_blocks: int = 0
    restored_bytes: int = 0
    restored_tokens: int = 0
    lookups: int = 0
    hits: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    lost_blocks: int = 0


class BlockStore:
    """Blocks by their keys. One thread at a time may use it; any may read `counts`.

    Attributes:
        first: the key before the first block.
        read: copies rows from the block pool's memory: (block, number of tokens) -> uint8 [bytes of a block].
        write: copies them back: (block, rows).
    """

    def __init__(
        self,
        first: bytes,
        nbytes: int,
        read: Callable[[int, int], Rows],
        write: Callable[[int, Rows], object],
        ram: int = 0,
        files: BlockFiles | None = None,
        size: int = CACHE_BLOCK,
    ) -> None:
        """A store of blocks of `size` tokens and `nbytes` bytes: at most `ram` bytes in RAM, the others in `files`."""
        self.first, self.read, self.write = first, read, write
        self._size, self._nbytes, self._limit, self._files = size, nbytes, ram, files
        self._blocks: dict[bytes, StoredBlock] = {}
        self._children: dict[bytes, dict[bytes, StoredBlock]] = {}
        self._ram: OrderedDict[bytes, None] = OrderedDict()  # keys, the least recently used first
        self._disk: OrderedDict[bytes, None] = OrderedDict()
        self._pending = set[bytes]()  # keys of _disk that are not written yet
        self._lock = threading.RLock()
        self._counts = StoreCounts()
        for name in files.found if files else []:
            self._add(StoredBlock(name, None))
            self._disk[name.key] = None
        self._shrink()

    @property
    def empty(self) -> bool:
        """Whether nothing is stored."""
        return not self._blocks

    @property
    def counts(self) -> StoreCounts:
        """A copy of the counters."""
        with self._lock:
            counts = StoreCounts(**vars(self._counts))
            counts.ram_blocks, counts.ram_limit = len(self._ram), self._limit
            counts.ram_bytes = len(self._ram) * self._nbytes
            if self._files:
                counts.disk_blocks, counts.disk_limit = len(self._disk), self._files.limit
                counts.disk_bytes = len(self._disk) * self._files.record
                counts.queued_bytes, counts.written_bytes = self._files.queued, self._files.written
            return counts

    def put(self, parent: bytes, tokens: tuple[int, ...], block: int, *, wait: bool = False) -> bytes:
        """Store a block that leaves the block pool, unless it is stored already; returns its key.

        Args:
            parent: the key of the block before it.
            tokens: its tokens, at most as many as a block has.
            block: its number in the block pool.
            wait: wait for the disk if too much waits to be written; else the block is not written then.
        """
        name = BlockName(next_key(parent, tokens), parent)
        with self._lock:
            if self._covered(name, tokens):
                return name.key
            to_ram = self._limit >= self._nbytes and name.key not in self._ram
            to_disk = self._writes and name.key not in self._disk
            if name.key in self._blocks:
                self._touch(self._blocks[name.key])
        if not (to_ram or to_disk):
            return name.key
        if to_disk and self._files and not self._files.has_room(wait=wait):
            to_disk = False
            self._counts.lost_blocks += not to_ram
        if to_ram or to_disk:
            self._put(name, tokens, self.read(block, len(tokens)), to_ram, to_disk)
        return name.key

    @staticmethod
    def next_key(key: bytes, tokens: Sequence[int]) -> bytes:
        """See the function."""
        return next_key(key, tokens)

    def match(self, key: bytes, tokens: Sequence[int]) -> tuple[list[StoredBlock], int]:
        """Find blocks that continue the block of `key` with `tokens`; returns them, and how many tokens they match.

        The last one may match in part: it then has other tokens after the common ones.
        """
        with self._lock:
            blocks, matched = list[StoredBlock](), 0
            while True:
                part = tuple(tokens[matched : matched + self._size])
                block = self._blocks.get(next_key(key, part)) if len(part) == self._size else None
                if block is None:
                    break
                block.tokens = part
                blocks.append(block)
                key, matched = block.name.key, matched + self._size
            best, most = None, 0
            for block in self._beside(key) if part else []:
                common = _common_length(self._tokens(block), part)
                if common > most:
                    best, most = block, common
            if best:
                blocks.append(best)
            return blocks, matched + most

    def take(self, blocks: Sequence[StoredBlock]) -> Generator[_Contents, None, None]:
        """The tokens and rows of blocks that were matched, in order; ends before one that is lost.

        Those in RAM leave it with the step that yields them. Files are read ahead by several threads.
        """
        with self._lock:
            for block in reversed(blocks):  # so that the end of a text is dropped before its beginning
                self._touch(block)
            rows = [block.rows for block in blocks]  # the pool may drop blocks to make room for these
        with (
            ThreadPoolExecutor(READERS, "dsv2-read") if sum(each is None for each in rows) > 1 else _Alone() as readers
        ):
            ahead, remaining = deque[Callable[[], _Contents | None]](), iter(zip(blocks, rows, strict=True))
            try:
                for block in blocks:
                    for following in islice(remaining, 2 * READERS - len(ahead)):
                        ahead.append(readers.submit(self._contents, *following).result)
                    found = ahead.popleft()()
                    if found is None:
                        return
                    self._restored(block)
                    yield found
            finally:
                if isinstance(readers, ThreadPoolExecutor):
                    readers.shutdown(cancel_futures=True)

    def count(self, tokens: int) -> None:
        """Count a prompt that was looked up, and its tokens that were found."""
        self._counts.lookups += 1
        self._counts.hits += tokens > 0
        self._counts.restored_tokens += tokens

    def clear(self) -> None:
        """Forget all blocks, and delete their files."""
        with self._lock:
            for key in list(self._disk):
                self._delete(key)
            for key in list(self._ram):
                self._drop_from_ram(key)

    def flush(self) -> None:
        """Wait until everything is written."""
        if self._files:
            self._files.flush()

    def close(self) -> None:
        """Write what waits to be written, and free everything."""
        if self._files:
            self._files.close()
        with self._lock:
            self._limit, self._files = 0, None
            for index in (self._blocks, self._children, self._ram, self._disk):
                index.clear()

    @property
    def _writes(self) -> bool:
        return self._files is not None and self._files.writable and self._files.limit >= self._files.record

    @property
    def keeps(self) -> bool:
        """Whether blocks outlive this process, so that what the block pool has should be stored in the end."""
        return self._writes

    @property
    def has_room(self) -> bool:
        """Whether a block could be written without waiting for the disk."""
        return self._writes and self._files is not None and self._files.has_room()

    def _put(self, name: BlockName, tokens: tuple[int, ...], rows: Rows, to_ram: bool, to_disk: bool) -> None:
        with self._lock:
            block = self._blocks.get(name.key) or self._add(StoredBlock(name, tokens))
            block.rows = rows
            self._counts.stored_blocks += 1
            if to_ram:
                self._ram[name.key] = None
            if to_disk and self._files:
                self._disk[name.key] = None
                self._pending.add(name.key)
                self._files.write(name, tokens, rows, lambda written: self._written(name.key, written))
            self._shrink()

    def _written(self, key: bytes, written: bool) -> None:
        """A block was written, or could not be. Called by the thread that writes."""
        with self._lock:
            if key not in self._pending:  # it was dropped meanwhile, and its file will be
                return
            self._pending.discard(key)
            if not written:
                self._disk.pop(key, None)
            self._settle(key)

    def _settle(self, key: bytes) -> None:
        """Forget rows that nothing needs in RAM, and a block that is nowhere."""
        if (block := self._blocks.get(key)) is None:
            return
        if key not in self._ram and key not in self._pending:
            block.rows = None
        if key not in self._ram and key not in self._disk:
            del self._blocks[key]
            siblings = self._children[block.name.parent]
            del siblings[key]
            if not siblings:
                del self._children[block.name.parent]

    def _add(self, block: StoredBlock) -> StoredBlock:
        self._blocks[block.name.key] = block
        self._children.setdefault(block.name.parent, {})[block.name.key] = block
        return block

    def _beside(self, parent: bytes) -> list[StoredBlock]:
        """The newest blocks that follow the block of `parent`."""
        return list(islice(reversed(self._children.get(parent, {}).values()), CANDIDATES))

    def _tokens(self, block: StoredBlock) -> tuple[int, ...]:
        """The tokens of a block; none if its file is damaged, which is deleted."""
        if block.tokens is None and self._files:
            try:
                block.tokens = self._files.read_tokens(block.name)
            except (OSError, DamagedBlockError) as error:
                self._lost(block, error)
        return block.tokens or ()

    def _covered(self, name: BlockName, tokens: tuple[int, ...]) -> bool:
        """Whether another block begins with these tokens; drops those that these begin with."""
        for block in self._beside(name.parent):
            if block.name != name and block.tokens is not None:
                if len(block.tokens) >= len(tokens) and block.tokens[: len(tokens)] == tokens:
                    self._touch(block)
                    return True
                if tokens[: len(block.tokens)] == block.tokens:
                    self._drop_from_ram(block.name.key)
                    self._delete(block.name.key)
        return False

    def _contents(self, block: StoredBlock, rows: Rows | None) -> _Contents | None:
        """The tokens and rows of a block; None if they are lost. Called by several threads."""
        files = self._files
        if rows is not None and block.tokens is not None:
            return block.tokens, rows
        if files is None:
            return None
        try:
            tokens, rows = files.read(block.name)
        except (OSError, DamagedBlockError) as error:
            self._lost(block, error)
            return None
        with self._lock:
            self._counts.read_bytes += files.record
        return tokens, rows

    def _restored(self, block: StoredBlock) -> None:
        with self._lock:
            self._counts.restored_blocks += 1
            self._counts.restored_bytes += self._nbytes
            self._drop_from_ram(block.name.key)

    def _lost(self, block: StoredBlock, error: Exception) -> None:
        """A file cannot be read: forget it."""
        with self._lock:
            if block.name.key not in self._disk:
                return
            self._counts.lost_blocks += 1
            self._delete(block.name.key)
        if self._files and not isinstance(error, FileNotFoundError):
            reason = getattr(error, "strerror", None) or "its contents do not match its checksum"
            self._files.notice("read", f"{self._files.path(block.name)} is left out of the prefix cache: {reason}")

    def _touch(self, block: StoredBlock) -> None:
        """Note that a block was used just now."""
        key = block.name.key
        if key in self._ram:
            self._ram.move_to_end(key)
        if key in self._disk:
            self._disk.move_to_end(key)
            if self._files:
                self._files.touch(block.name)

    def _drop_from_ram(self, key: bytes) -> None:
        if key in self._ram:
            del self._ram[key]
            self._settle(key)

    def _delete(self, key: bytes) -> None:
        """Forget a block's file, and delete it."""
        if key in self._disk:
            del self._disk[key]
            self._pending.discard(key)
            if self._files:
                self._files.delete(self._blocks[key].name)
            self._settle(key)

    def _shrink(self) -> None:
        """Drop the least recently used blocks until all limits are kept."""
        while len(self._ram) * self._nbytes > self._limit:
            self._drop_from_ram(next(iter(self._ram)))
        files = self._files
        if files is None or not files.writable:
            return
        while len(self._disk) * files.record + files.foreign > files.limit:
            if not files.delete_foreign():
                self._delete(next(iter(self._disk)))


class _Alone:
    """Stands for threads that read, where there is nothing to read ahead."""

    def __enter__(self) -> "_Alone":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to end."""

    def submit(self, call: Callable[[StoredBlock, Rows | None], _Contents | None], *of: Any) -> "_Later":
        return _Later(lambda: call(*of))


@dataclass(frozen=True)
class _Later:
    """A call that is made when its result is asked for."""

    result: Callable[[], _Contents | None]


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

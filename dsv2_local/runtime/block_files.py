"""Files of blocks that left the block pool: one file for each block of a model, never changed once it has its name.

A directory holds, for each model and format, a folder that its user alone can read; in it a file for each block, whose
name is the block's key and that of the block before it. A file is written under another name and renamed, so a process
that is killed leaves whole files or none; a checksum finds what a power failure or a disk has damaged. Whoever locks a
folder writes to it; further processes with the same model read what is there.

A file: the header (magic, number of tokens, checksum of the rows, both keys), the tokens as int32, the checksum of all
of this, and the rows. All files of a folder have the same size. The time of change is the time of the last use.
"""

import os
import shutil
import struct
import threading
import time
import weakref
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsv2_local import locks
from dsv2_local.errors import SavedCacheError

MAGIC = b"dsv2blk1"
KEY_BYTES = 20
LOCK, NEW = "lock", "new"  # files of a folder that are no blocks
HEADER = struct.Struct(f"<8sII{KEY_BYTES}s{KEY_BYTES}s")
CHECKSUM = struct.Struct("<I")
TOKEN_BYTES = 4
QUEUE_BYTES = 256 << 20  # of blocks that wait to be written
LIMIT = 16 << 30  # bytes of all files unless the user says otherwise

Rows = NDArray[np.uint8]
Notice = Callable[[str], object]


@dataclass(frozen=True)
class BlockName:
    """A block's key, and that of the block before it (`block_store.next_key`)."""

    key: bytes
    parent: bytes

    def __str__(self) -> str:
        return f"{self.key.hex()}-{self.parent.hex()}"

    @classmethod
    def parse(cls, name: str) -> "BlockName | None":
        """None if it is not a block's file."""
        key, _, parent = name.partition("-")
        with suppress(ValueError):
            if len(key) == len(parent) == 2 * KEY_BYTES:
                return cls(bytes.fromhex(key), bytes.fromhex(parent))
        return None


class DamagedBlockError(Exception):
    """A file does not hold what its name says."""


class BlockFiles:
    """The files of one model, and a thread that writes while there is something to write.

    Attributes:
        folder: where the files are.
        nbytes: bytes of the rows of a block.
        record: bytes of a file.
        limit: the most bytes of all files, those of other models in the directory included.
        found: the blocks that were there, the least recently used first.
        foreign: bytes of the files of other models that no process uses.
        writable: whether this process writes.
        queued: bytes that wait to be written.
        written: bytes that were written.
    """

    def __init__(self, directory: Path, model: str, size: int, nbytes: int, limit: int | None, notice: Notice) -> None:
        """Open the folder of a model, which is made if needed.

        Args:
            directory: holds a folder for each model.
            model: the name of this model's folder.
            size: tokens of a block.
            nbytes: bytes of the rows of a block.
            limit: the most bytes of all files; None: 16 GiB, or half of what the disk has room for if that is less.
            notice: called with a line of text if something goes wrong later, once for each kind; by any thread.

        Raises:
            SavedCacheError: the folder cannot be used, or others than the user could read it.
        """
        self.folder, self._size, self.nbytes, self._notice = directory / model, size, nbytes, notice
        self._head = HEADER.size + size * TOKEN_BYTES + CHECKSUM.size
        self.record = self._head + nbytes
        self.writable, self.queued, self.written = True, 0, 0
        self._jobs = deque[Callable[[], None]]()
        self._thread: threading.Thread | None = None
        self._working = False
        self._unlock: Callable[[], object] | None = None  # gives back the lock of the folder
        self._changed = threading.Condition()
        self._noticed = set[str]()
        try:
            self._open(directory)
            self.found = self._scan()
            self._others = self._scan_others(directory) if self.writable else deque()
            self.foreign = sum(size for _, size, _ in self._others)
            self.limit = self._default_limit() if limit is None else limit
        except OSError as error:
            raise SavedCacheError(
                f"{self.folder} cannot hold the prefix cache: {error.strerror or error}; name another --cache-dir"
            ) from None

    def _open(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        found = self.folder.lstat()
        if self.folder.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise SavedCacheError(f"{self.folder} is not this user's alone (mode 700); name another --cache-dir")
        try:
            descriptor = locks.take(self.folder / LOCK)
        except BlockingIOError:
            self.writable = False
            return
        self._unlock = weakref.finalize(self, os.close, descriptor)
        (self.folder / NEW).unlink(missing_ok=True)  # of a process that was killed

    def _scan(self) -> list[BlockName]:
        """The blocks of the folder, the least recently used first; deletes files that are no whole blocks."""
        found = []
        with os.scandir(self.folder) as files:
            for file in files:
                if name := BlockName.parse(file.name):
                    status = file.stat(follow_symlinks=False)
                    if status.st_size == self.record:
                        found.append((status.st_mtime_ns, name))
                    elif self.writable:
                        Path(file.path).unlink(missing_ok=True)
        return [name for _, name in sorted(found, key=lambda pair: pair[0])]

    def _scan_others(self, directory: Path) -> deque[tuple[int, int, Path]]:
        """The files of models that no process uses."""
        found = []
        for folder in directory.iterdir():
            if folder == self.folder or len(folder.name) != len(self.folder.name) or not (folder / LOCK).is_file():
                continue
            with suppress(OSError):  # BlockingIOError: it is in use
                os.close(locks.take(folder / LOCK))
                for path in folder.iterdir():
                    if BlockName.parse(path.name):
                        status = path.lstat()
                        found.append((status.st_mtime_ns, status.st_size, path))
        return deque(sorted(found))

    def _default_limit(self) -> int:
        held = len(self.found) * self.record + self.foreign
        return min(LIMIT, (shutil.disk_usage(self.folder).free + held) // 2)

    def path(self, name: BlockName) -> Path:
        return self.folder / str(name)

    def has_room(self, *, wait: bool = False) -> bool:
        """Whether one more block may wait to be written; `wait`: wait until one may, unless writing fails."""
        with self._changed:
            if wait:
                self._changed.wait_for(self._may_queue)
            return self.writable and self._may_queue()

    def _may_queue(self) -> bool:
        return not self.writable or not self.queued or self.queued + self.record <= QUEUE_BYTES

    def write(self, name: BlockName, tokens: Sequence[int], rows: Rows, done: Callable[[bool], None]) -> None:
        """Write a block soon; `done` is called by another thread, with whether it was written."""
        with self._changed:
            self.queued += self.record
        now = time.time_ns()

        def job() -> None:
            written = self.writable and self._write(name, tokens, rows, now)
            with self._changed:
                self.queued -= self.record
                self.written += self.record * written
                self._changed.notify_all()
            done(written)

        self._submit(job)

    def touch(self, name: BlockName) -> None:
        """Note that a block was used just now."""
        if self._unlock:
            now = time.time_ns()

            def job() -> None:
                with suppress(OSError):
                    os.utime(self.path(name), ns=(now, now))

            self._submit(job)

    def delete_foreign(self) -> bool:
        """Delete the least recently used file of another model; returns whether there was one."""
        if not self._others:
            return False
        _, size, path = self._others.popleft()
        self.foreign -= size
        self.delete(path)
        return True

    def delete(self, name: BlockName | Path) -> None:
        """Delete a block's file soon, after what is queued for it, unless another process writes to the folder."""
        if self._unlock:
            path = self.path(name) if isinstance(name, BlockName) else name

            def job() -> None:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

            self._submit(job)

    def read_tokens(self, name: BlockName) -> tuple[int, ...]:
        """The tokens of a block, at most `size`.

        Raises:
            DamagedBlockError: the file is damaged.
            OSError: it cannot be read, or is there no longer.
        """
        with self._opened(name) as descriptor:
            return self._read_head(descriptor, name)[0]

    def read(self, name: BlockName) -> tuple[tuple[int, ...], Rows]:
        """The tokens and the rows of a block. Raises what `read_tokens` does. Any thread may call this."""
        with self._opened(name) as descriptor:
            tokens, checksum = self._read_head(descriptor, name)
            rows = np.empty(self.nbytes, dtype=np.uint8)
            view, done = rows.data, 0
            while done < self.nbytes and (count := os.readv(descriptor, [view[done:]])):
                done += count
        if done < self.nbytes or zlib.crc32(rows.data) != checksum:
            raise DamagedBlockError
        return tokens, rows

    def notice(self, kind: str, text: str) -> None:
        """Tell the user once for each kind of fault."""
        if kind not in self._noticed:
            self._noticed.add(kind)
            self._notice(text)

    def flush(self) -> None:
        """Wait until everything is written."""
        while (thread := self._thread) and thread.is_alive():
            thread.join()

    def close(self) -> None:
        """Write what waits, and let other processes write."""
        self.flush()
        self.writable = False
        if self._unlock:
            self._unlock()
            self._unlock = None

    def _opened(self, name: BlockName) -> "_Descriptor":
        return _Descriptor(os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))

    def _read_head(self, descriptor: int, name: BlockName) -> tuple[tuple[int, ...], int]:
        head = os.read(descriptor, self._head)
        if len(head) < self._head or CHECKSUM.unpack(head[-CHECKSUM.size :])[0] != zlib.crc32(head[: -CHECKSUM.size]):
            raise DamagedBlockError
        magic, count, checksum, key, parent = HEADER.unpack_from(head)
        if magic != MAGIC or (key, parent) != (name.key, name.parent) or not 0 < count <= self._size:
            raise DamagedBlockError
        return tuple(array("i", head[HEADER.size : HEADER.size + count * TOKEN_BYTES])), checksum

    def _write(self, name: BlockName, tokens: Sequence[int], rows: Rows, now: int) -> bool:
        """Write a file; if that fails, nothing is written from now on."""
        numbers = array("i", tokens).tobytes().ljust(self._size * TOKEN_BYTES, b"\0")
        head = HEADER.pack(MAGIC, len(tokens), zlib.crc32(rows.data), name.key, name.parent) + numbers
        head += CHECKSUM.pack(zlib.crc32(head))
        new = self.folder / NEW
        try:
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with _Descriptor(descriptor):
                for part in (memoryview(head), rows.data):
                    done = 0
                    while done < len(part):
                        done += os.write(descriptor, part[done:])
            os.utime(new, ns=(now, now))  # the system's own time of a change is less exact, and would be out of order
            new.rename(self.path(name))
        except OSError as error:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            self.writable = False
            self.notice(
                "write",
                f"the prefix cache is no longer written to {self.folder}: {error.strerror or error}; what it holds is "
                "still read",
            )
            return False
        return True

    def _submit(self, job: Callable[[], None]) -> None:
        with self._changed:
            self._jobs.append(job)
            if self._working:
                return
            self._working = True
            self._thread = threading.Thread(target=self._run, name="dsv2-blocks")
            try:
                self._thread.start()
            except RuntimeError:  # Python is about to end and starts no more threads
                self._run()

    def _run(self) -> None:
        """Do what is queued, and end."""
        while True:
            with self._changed:
                if not self._jobs:
                    self._working = False
                    return
                job = self._jobs.popleft()
            job()


class _Descriptor:
    """An open file, as a context manager."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

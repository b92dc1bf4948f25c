"""Locks between processes: on a file or directory, until its descriptor is closed or the process ends."""

import fcntl
import os
from pathlib import Path


def take(path: Path, *, directory: bool = False, wait: bool = False) -> int:
    """Lock a file, which is created if needed, or a directory; returns the descriptor that holds the lock.

    The lock is on what `path` names when it returns: one that was deleted or replaced meanwhile, by whoever held the
    lock before, would lock nobody out.

    Raises:
        BlockingIOError: another process has the lock, and `wait` is not set.
        FileNotFoundError: the directory does not exist, or whoever had the lock has removed it.
        OSError: the path cannot be opened.
    """
    while True:
        flags = os.O_RDONLY | os.O_DIRECTORY if directory else os.O_RDWR | os.O_CREAT
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)

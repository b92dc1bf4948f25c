"""The standard streams as a process inherits them: closed, full, silent, not blocking, or of a narrow encoding."""

import codecs
import fcntl
import io
import os
import select
import stat
import sys
from collections.abc import Callable
from typing import Any, TextIO

from dsv2_local.commands.console import notice
from dsv2_local.errors import InputError, OutputError

BROKEN_PIPE = 141  # exit code that shells use for SIGPIPE
PATIENCE = 1.0
"""Seconds of silence on an input after which a line says what is waited for."""
LARGEST = 1 << 28
"""Bytes of a text that are read; no context holds the tokens of more."""


def repair() -> None:
    """Replace the streams of `sys` by ones that can be used whatever was inherited; call it once, before any output.

    - A standard input that is closed, or open for writing alone (`nohup` does that), is empty. Writing to a closed
      standard output is an error, as for a full one.
    - An error of standard output is an OutputError; if its reader has left, the process ends with `BROKEN_PIPE`. Output
      that follows is dropped, so that nothing fails again when the process ends.
    - A width of 0 columns, in which tables would be invisible, is none.
    - Standard error never fails: lines that cannot be written are dropped.
    - Characters that the encoding of standard output lacks are written as escapes, and a line on stderr says so.
    """
    if sys.stdin is None or not _is_readable(0):  # type: ignore[redundant-expr, unused-ignore]
        sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123 (stays open until the process ends)
    if not os.environ.get("COLUMNS", "").strip("0"):
        os.environ.pop("COLUMNS", None)
    codecs.register_error("dsv2.escaped", _escaped)
    # Descriptors that cannot be written, so that errors are those of a closed stream
    sys.stdout = _text(sys.stdout, os.O_RDONLY, _stdout_failed, "dsv2.escaped")
    sys.stderr = _text(sys.stderr, os.O_WRONLY, lambda error: None, "backslashreplace")


def _is_readable(descriptor: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY


class _Output(io.FileIO):
    """A descriptor that is written completely even if it does not block; after the first error, output is dropped."""

    def __init__(self, descriptor: int, failed: Callable[[OSError], None]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._failed, self._broken = failed, False

    def write(self, data: Any) -> int:
        try:
            while not self._broken:
                written = super().write(data)
                if written is not None:
                    return written
                _wait(self.fileno(), select.POLLOUT)
        except OSError as error:
            self._broken = True
            self._failed(error)
        return len(data)


class _Input(io.FileIO):
    """A descriptor that is read even if it does not block; after `PATIENCE` seconds of silence, a line says so."""

    def __init__(self, descriptor: int, where: str) -> None:
        super().__init__(descriptor, "r", closefd=False)
        self._where = where
        self._patience: float | None = PATIENCE

    def readinto(self, buffer: Any) -> int:
        while True:
            if not _wait(self.fileno(), select.POLLIN, self._patience):
                notice(f"waiting for {self._where}")
                self._patience = None
            elif (size := super().readinto(buffer)) is not None:
                return size


def _text(stream: TextIO | None, flags: int, failed: Callable[[OSError], None], errors: str) -> TextIO:
    """A text stream over the descriptor of `stream`, with its encoding and buffering; None: it was closed."""
    raw = _Output(os.open(os.devnull, flags) if stream is None else stream.fileno(), failed)
    encoding = stream.encoding if stream else "utf-8"
    through = isinstance(stream, io.TextIOWrapper) and stream.write_through
    lines = isinstance(stream, io.TextIOWrapper) and stream.line_buffering
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors=errors, line_buffering=lines, write_through=through
    )


def _stdout_failed(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        raise SystemExit(BROKEN_PIPE) from None
    raise OutputError(f"standard output cannot be written: {error.strerror}") from None


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """An encoding's error handler: the characters that it lacks become escapes such as \\u263a."""
    if isinstance(error, UnicodeEncodeError) and not error.encoding.startswith("utf") and not _escaped_before:
        _escaped_before.append(True)
        notice(f"standard output is {error.encoding}: other characters are written as escapes; LC_ALL=C.UTF-8 has all")
    return codecs.backslashreplace_errors(error)


_escaped_before: list[bool] = []


def _wait(descriptor: int, event: int, seconds: float | None = None) -> bool:
    """Wait until a descriptor, which may be above those that `select` takes, is ready, has ended or has failed."""
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


def is_unicode(stream: TextIO) -> bool:
    """Whether the encoding of `stream` has all characters."""
    return (stream.encoding or "").lower().startswith("utf")


def read_all(descriptor: int, where: str, advice: str = "") -> bytes:
    """Read a descriptor to its end; after `PATIENCE` seconds of silence, a line on stderr says so, with `advice`.

    Raises:
        InputError: it cannot be read, or has more than `LARGEST` bytes; the message has `where`.
    """
    parts, size = list[bytes](), 0
    patience: float | None = PATIENCE
    while True:
        if not _wait(descriptor, select.POLLIN, patience):
            notice(f"waiting for {where}{advice}")
            patience = None
            continue
        try:
            part = os.read(descriptor, 1 << 20)
        except BlockingIOError:
            continue
        except OSError as error:
            raise InputError(f"{where} cannot be read: {error.strerror}") from None
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise InputError(f"{where} has more than {LARGEST >> 20} MiB, which is more text than any context holds")


def reader(descriptor: int, where: str) -> io.BufferedReader:
    """A file to read a descriptor line by line; `where` is what is waited for."""
    return io.BufferedReader(_Input(descriptor, where))


def shared(descriptor: int) -> tuple[int, int] | None:
    """The position in a file that someone else has begun to read (as the `read` of a shell's loop does), and its size.

    None if it stands at its beginning or end, or is no file.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return None
    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    return (at, status.st_size) if 0 < at < status.st_size else None

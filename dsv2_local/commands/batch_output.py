"""Where the results of a batch go: a file that is continued after any interruption, or a stream.

Every result is one line, written whole before the next one. A line begins with the number and the key of the line of
the input that it answers, so what a file has can be compared with the input again.
"""

import json
import os
import re
import stat
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from dsv2_local import locks
from dsv2_local.commands.batch_lines import Request, Style
from dsv2_local.commands.console import json_line
from dsv2_local.commands.streams import is_unicode
from dsv2_local.errors import BatchError, Dsv2Error, InputError
from dsv2_local.server import openai_format

BEGINNINGS = (rb'{"line": (\d{1,15}), "key": "([0-9a-f]{16})', rb'{"id": "batch_req_(\d{1,15})_([0-9a-f]{16})')
_BEGIN = tuple(map(re.compile, BEGINNINGS))
_SHORTEST = (b'{"line": ', b'{"id": "batch_req_')
_TORN = 1 << 16  # bytes of a torn line that are looked at


def answer(request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """The result of a request that was answered; `body` is its answer, in the shape of the request's style."""
    if request.style is Style.SIMPLE:
        return {"line": request.number, "key": f"{request.key:016x}", **request.ids, **body}
    return _response(request, 200, body, None)


def refusal(request: Request, error: Dsv2Error) -> dict[str, Any]:
    """The result of a request that has no answer.

    A line that cannot be read gets both the fields of simple results and those of OpenAI's, so that programs for either
    find what they look for.
    """
    status, described = openai_format.error_of(error)
    found = {"code": described["code"] or described["type"], "message": str(error), "line": request.number}
    begin = {"line": request.number, "key": f"{request.key:016x}"}
    if request.style is Style.UNREADABLE:
        return {**begin, "id": f"batch_req_{reference(request)}", "custom_id": None, "response": None, "error": found}
    if request.style is Style.SIMPLE:
        return {**begin, **request.ids, "error": found}
    return _response(request, status, {"error": described}, found)


def reference(request: Request) -> str:
    """What identifies a line in the results: the same in every run."""
    return f"{request.number}_{request.key:016x}"


def _response(request: Request, status: int, body: dict[str, Any], error: dict[str, Any] | None) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{reference(request)}", "body": body}
    return {
        "id": f"batch_req_{reference(request)}", "custom_id": request.ids.get("custom_id"), "response": response,
        "error": error,
    }  # fmt: skip


class Done:
    """Which lines have a result already.

    Attributes:
        count: how many.
        last: the largest number among them.
        contiguous: whether they are the first ones, in the order of the input.
        errors: how many of them are errors.
        first_error: the number of the first of these, and its message.
    """

    def __init__(self) -> None:
        self.count = self.last = self.errors = 0
        self.contiguous = True
        self.first_error: tuple[int, str] | None = None
        self._keys = array("Q", [0])  # by line; 0: no result. 8 MB for a million lines

    def key(self, number: int) -> int:
        """The key that a line had when its result was written; 0 if there is none."""
        return self._keys[number] if number < len(self._keys) else 0

    def add(self, number: int, key: int, error: str | None) -> None:
        """Count the result of a line."""
        if number >= len(self._keys):
            self._keys.frombytes(bytes(8 * (number + 1 - len(self._keys))))
        self._keys[number] = key
        self.contiguous = self.contiguous and number == self.last + 1
        self.count, self.last = self.count + 1, max(self.last, number)
        if error is not None:
            self.errors += 1
            if self.first_error is None or number < self.first_error[0]:
                self.first_error = (number, error)


class Output(Protocol):
    """Takes results.

    Attributes:
        done: the results that it has.
        torn: whether it ends in a line that is not whole.
    """

    done: Done
    torn: bool

    def write(self, result: dict[str, Any]) -> None:
        """Write a result as a whole line. Raises BatchError or OutputError if that fails."""
        ...

    def close(self) -> None:
        """Release what is held."""
        ...


class StreamOutput:
    """Standard output: nothing can be read back, so nothing is continued."""

    def __init__(self, stream: TextIO) -> None:
        self.done, self.torn = Done(), False
        self._stream, self._ascii = stream, not is_unicode(stream)

    def write(self, result: dict[str, Any]) -> None:
        """See `Output`."""
        self._stream.write(json_line(result, ascii=self._ascii) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """See `Output`."""


class FileOutput:
    """A file, locked while it is open. What it has is kept; a last line that is not whole goes with the first write.

    Attributes:
        done, torn: see `Output`.
        keep: whether to leave a new file there although nothing was written to it.
    """

    def __init__(self, path: Path) -> None:
        """Open a file, or make one, and read what it has.

        Raises:
            BatchError: it cannot be written, is written by another process, or has other lines than results.
            InputError: it is a directory.
        """
        self.path, self.done = path, Done()
        self.torn = self.keep = False
        self._end = 0  # of the last whole line
        self._began = self._regular = False
        try:
            self._new = _create(path)
            self._descriptor = _lock(path)
        except BlockingIOError:
            raise BatchError(
                f"another process writes to {path}; wait until it has ended, or choose another -o"
            ) from None
        except IsADirectoryError:
            raise InputError(f"-o {path} is a directory; name a file") from None
        except OSError as error:
            raise self._failed(error) from None
        try:
            self._regular = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
            if self._regular:
                self._read()
        except BaseException:
            self.close()
            raise

    def write(self, result: dict[str, Any]) -> None:
        """See `Output`. What was written of a line that fails is removed again."""
        data = memoryview(json_line(result, ascii=False).encode() + b"\n")
        try:
            if not self._began and self._regular:
                os.ftruncate(self._descriptor, self._end)
                os.lseek(self._descriptor, self._end, os.SEEK_SET)
            self._began = True
            size = len(data)
            while data:
                data = data[os.write(self._descriptor, data) :]
            self._end += size
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Leave whole lines alone, and no file that has none and was not there before."""
        with suppress(OSError):
            if self._regular and self._began:
                os.ftruncate(self._descriptor, self._end)
            if self._new and self._regular and not self._end and not self.keep:
                self.path.resolve().unlink()
        os.close(self._descriptor)

    def _failed(self, error: OSError) -> BatchError:
        return BatchError(f"{self.path} cannot be written: {error.strerror}")

    def _read(self) -> None:
        with open(os.dup(self._descriptor), "rb") as file:  # noqa: PTH123 (a descriptor)
            for number, data in enumerate(file, 1):
                if not data.endswith(b"\n"):
                    self._check_torn(data[:_TORN])
                    self.torn = True
                    return
                self._add(number, data)
                self._end += len(data)

    def _add(self, number: int, data: bytes) -> None:
        found = next(filter(None, (begin.match(data) for begin in _BEGIN)), None)
        try:
            if found is None:
                raise ValueError
            error = json.loads(data).get("error")
            message = None if error is None else str(error["message"])
        except (ValueError, RecursionError, TypeError, KeyError):
            raise BatchError(f"line {number:,} of {self.path} is no result of a batch; choose another -o") from None
        line, key = int(found[1]), int(found[2], 16)
        if self.done.key(line):
            raise BatchError(f"{self.path} has two results of line {line:,}; choose another -o")
        self.done.add(line, key, message)

    def _check_torn(self, data: bytes) -> None:
        """Check that a last line is one that was being written; a crash of the system may leave zeros in its place."""
        data = data.rstrip(b"\0")
        if not any(data.startswith(begin) or begin.startswith(data) for begin in _SHORTEST):
            raise BatchError(f"the last line of {self.path} is no result of a batch; choose another -o")


def _create(path: Path) -> bool:
    """Make a file with the usual permissions; returns whether there was none."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except FileExistsError:
        if path.is_symlink() and not path.exists():
            path.resolve().touch(exist_ok=False)
            return True
        return False
    return True


def _lock(path: Path) -> int:
    """Open a file for a single process; what is no regular file (a device, a pipe) for several."""
    if path.exists() and not path.is_file() and not path.is_dir():
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    return locks.take(path.resolve())


def is_done(done: Done, number: int, key: int, where: str, output: str) -> bool:
    """Whether a line has a result already.

    Args:
        done: the results.
        number, key: those of the line.
        where, output: what errors call input and output.

    Raises:
        BatchError: the result is that of another line, or of other options.
    """
    if done.key(number) not in (0, key):
        raise BatchError(
            f"line {number:,} of {where}, the model or the options are not those that {output} has a result of; "
            "restore them, or choose another -o"
        )
    return bool(done.key(number))

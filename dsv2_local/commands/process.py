"""How a command ends: exit codes, signals, and one line for any exception."""

import ctypes
import os
import signal
import sys
import termios
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dsv2_local.commands import streams
from dsv2_local.commands.console import notice
from dsv2_local.errors import Dsv2Error

INTERRUPTED = 130  # exit code that shells use for SIGINT
TRACEBACK = "DSV2_TRACEBACK"
"""The environment variable that shows tracebacks."""


def run(command: Callable[[], object]) -> NoReturn:
    """Run `command` and end the process. Any exception becomes one line on stderr and an exit code.

    SIGTERM and SIGHUP are raised as KeyboardInterrupt, so that what Ctrl-C keeps is kept then too.
    """
    global _modes
    streams.repair()
    _modes = _terminal_modes()
    threading.excepthook = lambda failed: _report(failed.exc_value)
    stopped = list[int]()
    try:
        _raise_signals(stopped)
        code = _exit_code(command)
    except BaseException as error:  # the net: whatever it is, no traceback
        code = _report(error)
    exec("")  # if an `exec` was interrupted, Python would end itself by SIGINT, whatever the exit code, but for another
    sys.exit(128 + stopped[0] if stopped and code == INTERRUPTED else code)


def _exit_code(command: Callable[[], object]) -> int | str | None:
    try:
        Path.cwd()  # libraries end the process without a word of use if it is gone
        command()
        return 0
    except SystemExit as leave:
        return leave.code
    finally:
        sys.stdout.flush()


def _report(error: BaseException | None) -> int:
    """Print an exception as one line; returns the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    notice(f"error: {_describe(error)}")
    return error.exit_code if isinstance(error, Dsv2Error) else Dsv2Error.exit_code


def _describe(error: BaseException | None) -> str:
    if isinstance(error, Dsv2Error):
        return str(error)
    if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch has RuntimeErrors for it
        return "there is not enough memory; choose a smaller --context, or close other programs"
    if isinstance(error, OSError) and error.strerror:
        if not _has_directory():
            return "the current directory no longer exists; change to another one"
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}; {TRACEBACK}=1 shows where"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "no further thread can be started; raise the limit (ulimit -u, or the container's pids limit)"
    text = " ".join(str(error).split())[:300]
    where = f" in {_place(error)}" if error else ""
    return (
        f"{type(error).__name__}: {text}{where}; this is a fault of dsv2: please report this line and the command "
        f"({TRACEBACK}=1 shows the traceback)"
    )


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"


def _has_directory() -> bool:
    try:
        return bool(Path.cwd())
    except OSError:
        return False


def explain_lost_files() -> None:
    """End the process with one line if a file that is mapped becomes shorter, in place of the signal SIGBUS.

    Python's own handlers cannot: they run once the instruction is done, which it never is.
    """

    def end(_: int) -> None:
        if _modes is not None:
            termios.tcsetattr(0, termios.TCSANOW, _modes)
            os.write(1, PLAIN_TERMINAL)
        os.write(2, LOST_FILE.encode())
        os._exit(Dsv2Error.exit_code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    _handlers.append(handler)  # it must live as long as the process
    ctypes.CDLL(None).signal(signal.SIGBUS, handler)


def _terminal_modes() -> list[Any] | None:
    try:
        return termios.tcgetattr(0) if os.isatty(1) else None
    except termios.error:
        return None


_handlers: list[object] = []
_modes: list[Any] | None = None  # of the terminal when the process began
PLAIN_TERMINAL = b"\x1b[?2004l\x1b[?25h"  # pasted text is not marked, the cursor is shown
LOST_FILE = (
    "dsv2: error: a file of the model became shorter while it was in use; restore it, and replace files of a model by "
    "renaming others, never by writing into them\n"
)


def _raise_signals(stopped: list[int]) -> None:
    """Raise KeyboardInterrupt at Ctrl-C, and at the first SIGTERM or SIGHUP; `stopped` gets the number of these two.

    Signals that are ignored already (as `nohup` does) stay so.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    heeded = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_DFL]

    def stop(number: int, _: FrameType | None) -> None:
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)
        stopped.append(number)
        raise KeyboardInterrupt

    for each in heeded:
        signal.signal(each, stop)


@contextmanager
def held_signals() -> Iterator[None]:
    """Deliver Ctrl-C, SIGTERM and SIGHUP after the block, in which packages are imported that would swallow it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

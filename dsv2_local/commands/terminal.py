"""The terminal of a chat, owned from the start of the command to its end, whatever ends it.

Nothing that is typed while no message is being read appears on the screen or is lost: it becomes the beginning of the
next message, and Enter stays Enter. prompt_toolkit is imported with the first prompt, since importing it takes a while.
"""

import errno
import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from dsv2_local.machine.resources import startable

if TYPE_CHECKING:
    from prompt_toolkit.input.vt100 import Vt100Input
    from prompt_toolkit.key_binding import KeyPress

IFLAG, LFLAG, CC = 0, 3, 6  # indices in what termios.tcgetattr returns
PASTE_ON, PASTE_OFF = b"\x1b[?2004h", b"\x1b[?2004l"
"""Whether the terminal marks pasted text, so that its line ends are not taken for Enter."""
SHOW_CURSOR = b"\x1b[?25h"


class Terminal:
    """A context manager that owns the terminal on standard input.

    Ctrl-C and Ctrl-Z are signals except while prompt_toolkit reads; Ctrl-C discards no key that was pressed before it.

    Attributes:
        stops: how often the process was stopped (Ctrl-Z) and continued; then the screen is no longer as it was left.
    """

    def __init__(self) -> None:
        self.stops = 0
        self._stdin = sys.stdin.fileno()
        self._output = sys.stdout.fileno() if sys.stdout.isatty() else None
        self._handlers: dict[int, Any] = {}
        self._input: Vt100Input | None = None
        self._keys: list[KeyPress] = []  # pressed while no message was read
        self._collector: threading.Thread | None = None
        self._wake: tuple[int, int] | None = None  # a pipe that ends the collector

    def __enter__(self) -> "Terminal":
        self._before = termios.tcgetattr(self._stdin)
        self._handle(signal.SIGTSTP, self._suspend)
        self._handle(signal.SIGCONT, self._resume)
        self._handle(signal.SIGQUIT, _leave)
        self._own()
        self._early = self._typed_before()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stop_collecting()
        finally:
            with suppress(termios.error):
                termios.tcflush(self._stdin, termios.TCIFLUSH)  # what was typed for the chat is no command for a shell
            self._release()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    @property
    def input(self) -> "Vt100Input":
        """The keyboard, for prompt_toolkit."""
        if self._input is None:
            from prompt_toolkit.input.vt100 import Vt100Input

            self._input = Vt100Input(sys.stdin)
            self._input.vt100_parser.feed(self._early.decode(sys.stdin.encoding, "surrogateescape"))
            self._keys += self._input.flush_keys()
        return self._input

    def collect(self) -> None:
        """Keep the keys that are pressed from now on for the next message, however many they are."""
        if self._collector is None and startable(1):
            self._wake = os.pipe()
            self._collector = threading.Thread(target=self._collect, args=(self.input, self._wake[0]), daemon=True)
            self._collector.start()

    @contextmanager
    def reading(self, queued: bool) -> Iterator[None]:
        """Let prompt_toolkit read the keyboard; with `queued` it first gets the keys that were pressed before."""
        from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead

        self._stop_collecting()
        if queued:
            keys, self._keys = self._keys, []
            store_typeahead(self.input, keys)
        try:
            yield
        finally:
            self._keys += get_typeahead(self.input)  # what was typed after Enter
            self._write(PASTE_ON)  # prompt_toolkit has switched it off
            self.collect()

    def check_interrupt(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C followed Enter so fast that it was read as a key."""
        from prompt_toolkit.keys import Keys

        pressed = [key.key for key in self._keys]
        if Keys.ControlC in pressed:
            del self._keys[: pressed.index(Keys.ControlC) + 1]
            raise KeyboardInterrupt

    def _collect(self, keyboard: "Vt100Input", wake: int) -> None:
        from prompt_toolkit.keys import Keys

        poll = select.poll()
        for descriptor in (self._stdin, wake):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if wake in ready or ready.get(self._stdin, 0) & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                return
            # An answer to prompt_toolkit's question where the cursor is may come late, and is no key.
            self._keys += [key for key in keyboard.read_keys() if key.key != Keys.CPRResponse]
            if keyboard.closed:
                return

    def _stop_collecting(self) -> None:
        if self._collector and self._wake:
            if self._collector.is_alive():
                os.write(self._wake[1], b"x")
                self._collector.join()
            for descriptor in self._wake:
                os.close(descriptor)
            self._collector = self._wake = None

    def _own(self) -> None:
        """Set the terminal's modes: no echo, every key at once, Enter is not translated."""
        modes = termios.tcgetattr(self._stdin)
        modes[IFLAG] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR)
        modes[LFLAG] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
        modes[LFLAG] |= termios.ISIG | termios.NOFLSH
        modes[CC][termios.VMIN], modes[CC][termios.VTIME] = 1, 0
        modes[CC][termios.VQUIT] = b"\0"  # Ctrl-\ would end the process at once
        _set_modes(self._stdin, modes)
        self._write(PASTE_ON)

    def _release(self) -> None:
        """Restore the modes that the terminal had before."""
        self._write(PASTE_OFF + SHOW_CURSOR)
        with suppress(termios.error):  # it may be gone
            _set_modes(self._stdin, self._before)

    def _write(self, codes: bytes) -> None:
        # Not through sys.stdout: a signal may have interrupted a write there.
        if self._output is not None:
            with suppress(OSError):
                os.write(self._output, codes)

    def _typed_before(self) -> bytes:
        """What was typed before the terminal was owned, when Enter was still translated to a line end."""
        typed = os.read(self._stdin, 4096) if select.select([self._stdin], [], [], 0)[0] else b""
        return typed.replace(b"\n", b"\r")

    def _handle(self, number: int, handler: Any) -> None:
        if signal.getsignal(number) == signal.SIG_DFL:
            self._handlers[number] = signal.signal(number, handler)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Stop like any other process, with the terminal as it was before; goes on when the process is continued."""
        self._release()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._suspend)
        self._own()

    def _resume(self, number: int, frame: FrameType | None) -> None:
        self.stops += 1
        self._own()


def _set_modes(terminal: int, modes: list[Any]) -> None:
    """Set the modes of a terminal. In the background this stops the process, and fails when it is continued."""
    while True:
        try:
            return termios.tcsetattr(terminal, termios.TCSANOW, modes)
        except termios.error as error:
            if error.args[0] != errno.EINTR:
                raise


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)

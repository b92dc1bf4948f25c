"""Signals while the engine computes: an interrupt in the middle of a step would leave answers half computed."""

import signal
import threading

# The functions that `signal` wraps; the wrappers take longer than everything else that a step does in Python.
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_handler
from collections.abc import Callable
from time import perf_counter
from types import FrameType
from typing import Any

SIGNALS = tuple(int(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
PATIENCE = 0.5  # seconds from the start of a block, after which a signal is handled at once

Handler = Callable[[int, FrameType | None], Any]


class DeferredInterrupts:
    """A context manager that calls the program's signal handlers after its block, where they may raise.

    In a block that takes longer than `PATIENCE` a signal is handled at once. Signals without a handler written in
    Python stay as they are. In other threads than the main one, where Python calls no signal handlers, it does nothing.
    """

    def __init__(self) -> None:
        self._handlers = dict[int, Handler]()
        self._received: tuple[int, FrameType | None] | None = None
        self._begin = 0.0

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        self._begin = perf_counter()
        for number in SIGNALS:
            if callable(handler := getsignal(number)):
                self._handlers[number] = handler
                set_handler(number, self._receive)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            ours = set_handler(number, handler)
            if ours != self._receive:  # the block has installed another one
                set_handler(number, ours)
        if self._received:
            number, frame = self._received
            self._handlers[number](number, frame)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if perf_counter() - self._begin > PATIENCE:
            self._handlers[number](number, frame)
        elif not self._received:
            self._received = number, frame

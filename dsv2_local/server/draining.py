"""How the server ends: what is being computed may go on for a while; what waits and what comes is sent elsewhere."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from dsv2_local.server.service import Service, State

log = logging.getLogger("dsv2_local.server")

LAST_SECONDS = 2
"""How long clients may take to read that their answer was cut off, before they are."""


class DrainingServer(uvicorn.Server):
    """uvicorn's server that goes on listening after the first signal, until no answer is left; a second one kills it.

    uvicorn alone would stop listening first, so that clients met a closed port in place of an answer that says why.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        drain_seconds: float,
        abandon: Callable[[], None] = lambda: None,
    ) -> None:
        """A server for the application of a service.

        Args:
            config: uvicorn's settings.
            service: knows what is being computed.
            drain_seconds: how long that may go on after a signal.
            abandon: called to end a process that is loading its model, which cannot be interrupted.
        """
        config.timeout_graceful_shutdown = LAST_SECONDS
        super().__init__(config)
        self._service, self._drain_seconds, self._abandon = service, drain_seconds, abandon
        self._asked = False
        self._end: float | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever runs the server: uvicorn would raise them again in the end."""
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal; the second one ends the process as it would have without a handler."""
        if self._asked:
            signal.signal(sig, signal.SIG_DFL)
            os.kill(os.getpid(), sig)
        self._asked = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop listening."""
        if self._asked and self._end is None:
            if self._service.state is State.LOADING:
                self._abandon()
            self._service.drain()
            self._end = time.monotonic() + self._drain_seconds
            if self._service.active:
                log.info(
                    "ending: %d requests have %g s; a second signal ends at once",
                    self._service.active,
                    self._drain_seconds,
                )
        if self._end is not None and (not self._service.active or time.monotonic() >= self._end):
            self._service.cut_off()
            self.should_exit = True
        return await super().on_tick(counter)

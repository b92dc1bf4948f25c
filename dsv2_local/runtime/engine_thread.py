"""A thread that drives an engine, so that answers are computed while nobody waits for them."""

import atexit
import threading
from weakref import WeakSet

from dsv2_local.runtime.engine import Engine
from dsv2_local.runtime.interrupts import DeferredInterrupts


class EngineThread:
    """Drives an engine while it has answers that are not paced. There is no thread at other times."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = False
        _all.add(self)

    def wake(self) -> None:
        """See to it that a thread drives the engine; call it after submitting an answer. Any thread may."""
        with DeferredInterrupts(), self._lock:
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._run, name="dsv2-engine", daemon=True)
                self._thread.start()

    def join(self) -> None:
        """Wait until the thread has ended, if there is one."""
        if (thread := self._thread) and thread is not threading.current_thread():
            thread.join()

    def stop(self) -> None:
        """Compute nothing more, and wait for the piece that is being computed."""
        self._stopped = True
        self.join()

    def _run(self) -> None:
        while True:
            try:
                self._engine.drive(self._has_ended)
            except BaseException as error:  # it was closed, or it is broken: nobody else would tell those who wait
                self._engine.end_all(error)
            with self._lock:
                if self._has_ended():
                    self._thread = None
                    return

    def _has_ended(self) -> bool:
        return self._stopped or not self._engine.pressing


_all = WeakSet[EngineThread]()


@atexit.register
def _stop_all() -> None:
    """Python ends a thread that is in native code with the whole process, as a crash."""
    for thread in list(_all):
        thread.stop()

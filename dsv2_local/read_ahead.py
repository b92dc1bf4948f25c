"""An iterator that is read in a thread of its own, since it may wait for a file or for the network."""

import atexit
import threading
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar
from weakref import WeakSet

Item = TypeVar("Item")
PATIENCE = 0.5  # seconds that the end of Python waits for a source to give its item


class ReadAhead(Generic[Item]):
    """Takes items of a source in a thread of its own, as many as there is room for.

    Its user calls `done` for every item that need not be counted any more, and `close` in the end.
    """

    def __init__(self, source: Iterable[Item], room: int) -> None:
        """Begin to take items; at most `room` that are not done."""
        self._room, self._closed = threading.Semaphore(room), False
        self._items: SimpleQueue[Item | _End] = SimpleQueue()
        self._end: _End | None = None
        self._thread = threading.Thread(target=self._read, args=(iter(source),), name="dsv2-source", daemon=True)
        self._thread.start()
        _all.add(self)

    @property
    def has_news(self) -> bool:
        """Whether an item has come that was not taken, or the end, which was not noticed."""
        return not self._items.empty()

    def next(self, *, wait: bool) -> Item | None:
        """The next item, or None: if `wait` is set, at the end, else also if none has come.

        Raises:
            BaseException: the source raised it after its last item. Only if `wait` is set.
        """
        if not self._end:
            try:
                item = self._items.get(block=wait)
            except Empty:
                return None
            if not isinstance(item, _End):
                return item
            self._end = item
        if wait and self._end.error:
            raise self._end.error
        return None

    def done(self) -> None:
        """Let one more item be taken."""
        self._room.release()

    def close(self) -> None:
        """Take no more items. A source that makes its thread wait is not waited for."""
        self._closed = True
        self._room.release()

    def stop(self) -> None:
        """Take no more items, and wait for the one that is being made, but not for long."""
        self.close()
        self._thread.join(PATIENCE)

    def _read(self, source: Iterator[Item]) -> None:
        end = _End(None)
        try:
            while self._room.acquire() and not self._closed:
                self._items.put(next(source))
        except StopIteration:
            pass
        except BaseException as error:
            end = _End(error)
        self._items.put(end)


class _End:
    """The end of a source, and the error that it ended with."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


_all = WeakSet[ReadAhead[Any]]()


@atexit.register
def _stop_all() -> None:
    """Python ends a thread that is in native code, as in a tokenizer, with the whole process, as a crash."""
    for source in list(_all):
        source.stop()

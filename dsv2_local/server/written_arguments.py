"""The text of tool calls as the model wrote it, for clients that send calls back as objects.

Anthropic's and Ollama's APIs have arguments as objects. Written anew they differ in white space, in the order of names
or in the form of numbers, and the prompt would differ from the tokens in the prefix cache from the first call on.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock
from typing import Any, Protocol

MOST_ENTRIES = 10_000
MOST_BYTES = 64 * 2**20
_EXACT = 2**53  # JavaScript has floats alone; integers above become the nearest one


class Call(Protocol):
    """A function's name, and arguments as the text of a JSON object."""

    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> str: ...


class WrittenArguments:
    """Remembers the arguments of the latest calls, as long as they are not what `written` would make of them."""

    def __init__(self, entries: int = MOST_ENTRIES, nbytes: int = MOST_BYTES) -> None:
        """Remember at most so many calls, of so many bytes together."""
        self._entries, self._nbytes = entries, nbytes
        self._texts: OrderedDict[bytes, bytes] = OrderedDict()
        self._held = 0
        self._lock = Lock()

    def note(self, calls: Iterable[Call]) -> None:
        """Remember calls that the model has written; those that are no objects of JSON are left out."""
        for call in calls:
            value = parsed(call.arguments)
            text = call.arguments.encode("utf-8", "surrogatepass")
            if value is None or _written(value) == call.arguments or len(text) > self._nbytes:
                continue
            key = _key(call.name, value)
            with self._lock:
                self._held += len(text) - len(self._texts.pop(key, b""))
                self._texts[key] = text
                while len(self._texts) > self._entries or self._held > self._nbytes:
                    self._held -= len(self._texts.popitem(last=False)[1])

    def text(self, name: str, arguments: dict[str, Any]) -> str:
        """The arguments of a call as the model wrote them, if it is remembered; else in the usual form of JSON."""
        key = _key(name, arguments)
        with self._lock:
            if (text := self._texts.get(key)) is None:
                return _written(arguments)
            self._texts.move_to_end(key)
            return text.decode("utf-8", "surrogatepass")


def parsed(arguments: str) -> dict[str, Any] | None:
    """Arguments as an object; None if the text is none, as when an answer was cut off."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _written(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _key(name: str, arguments: dict[str, Any]) -> bytes:
    canonical = json.dumps([name, _plain(arguments)], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).digest()


def _plain(value: Any) -> Any:
    """A value as it is after JavaScript has read and written it."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
        try:
            return int(float(value))
        except OverflowError:
            return None  # infinite there, which is null in JSON
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return value

"""JSON in and out: the body of a request, and the bytes of an answer."""

import codecs
import json
import re
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from dsv2_local.errors import InputError
from dsv2_local.json_object import read_object
from dsv2_local.server.limits import MOST_ITEMS

_MARKS = codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
_LONG = 1 << 16  # bytes of a body that takes milliseconds
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_json(request: Request) -> dict[str, Any]:
    """Read the body.

    Raises:
        InputError: it is no object of JSON in UTF-8 (see `read_object`), or a list in it is longer than `MOST_ITEMS`.
    """
    data = await request.body()
    return await run_in_threadpool(_read, data) if len(data) > _LONG else _read(data)


def _read(data: bytes) -> dict[str, Any]:
    if data.startswith(_MARKS):
        raise InputError("the body begins with a byte order mark; send UTF-8 without one")
    found = read_object(data, "the body")
    if _HALF_PAIR.search(data):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError("the body is not Unicode text: a character is half of a surrogate pair") from None
    for name, most in MOST_ITEMS.items():
        if isinstance(given := found.get(name), list) and len(given) > most:
            raise InputError(f"{name} has {len(given):,} entries; {most:,} are the most")
    return found


def json_bytes(value: Any) -> bytes:
    """JSON on one line, in UTF-8.

    Some clients split lines where Python's `splitlines` does, so the three line ends that JSON allows are escaped.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for letter in "\x85\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 cannot have
        return json.dumps(value, separators=(",", ":")).encode()

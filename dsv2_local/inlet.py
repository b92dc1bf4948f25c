"""Where text enters: whatever comes from outside becomes Unicode, or is refused with the place.

A Python string need not be Unicode. Half a surrogate pair may come from JSON, and bytes that are not UTF-8 from the
command line or a terminal (surrogateescape); tokenizers, files and streams fail on both, each with an error of its own.
"""

import codecs
from contextlib import suppress

from dsv2_local.errors import InputError

BYTE_ORDER_MARK = "\ufeff"
_MARKED = {  # that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
REMEDY = "use UTF-8 (iconv converts files; a terminal has a setting)"


def text(value: str, where: str) -> str:
    """`value` as Unicode text, without a byte order mark at its beginning; `where` is what errors call it.

    Raises:
        InputError: see `well_formed`.
    """
    return well_formed(value, where).removeprefix(BYTE_ORDER_MARK)


def well_formed(value: str, where: str) -> str:
    """`value` with the halves of surrogate pairs joined, and bytes decoded; `where` is what errors call it.

    Raises:
        InputError: a half lacks its other half, or stands for a byte that is not UTF-8.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        with suppress(UnicodeError):  # bytes that the locale took for none of its own
            return value.encode("utf-8", "surrogateescape").decode()
        try:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            code = ord(value[error.start])
            wrong = f"is byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"is half a pair, U+{code:04X}"
            raise InputError(f"{where} is not Unicode text: character {error.start:,} {wrong}; {REMEDY}") from None
    return value


def decoded(data: bytes, where: str) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 that begins with a byte order mark, which is removed.

    A NUL is valid UTF-8 but a sign of a binary file, and refused.

    Raises:
        InputError: `data` is not text; the message has `where` it is from, and the position.
    """
    encoding = next((name for mark, name in _MARKED.items() if data.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in data:
        raise InputError(f"{where} is not text: byte {data.index(0):,} is NUL")
    try:
        value = data.decode(encoding)
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start:,} is 0x{data[error.start]:02x}"
        raise InputError(f"{where} is not {encoding.removesuffix('-sig').upper()} text: {wrong}; {REMEDY}") from None
    if "\0" in value:
        raise InputError(f"{where} is not text: character {value.index(chr(0)):,} is NUL")
    return value

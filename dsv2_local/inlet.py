"""Where text enters: whatever comes from outside becomes Unicode, or is refused with the place.

A Python string need not be Unicode. Half a surrogate pair may come from JSON, and bytes that are not UTF-8 from the
command line or a terminal (surrogateescape); tokenizers, files and streams fail on both, each with an error of its own.
"""

import codecs
from contextlib import suppress

from dsv2_local.errors import InputError

BYTE_ORDER_MARK = "\ufeff"
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
    """Text in UTF-8, or in UTF-16 that begins with a byte order mark, which is removed.

    A NUL is valid UTF-8 but a sign of a binary file, and refused.

    Raises:
        InputError: `data` is not text; the message has `where` it is from, and the position.
    """
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        value = data.decode(encoding)
    except UnicodeDecodeError as error:
        if (at := data.find(b"\0", 0, error.start)) < 0:
            wrong = f"byte {error.start:,} is 0x{data[error.start]:02x}"
            raise InputError(
                f"{where} is not {encoding.removesuffix('-sig').upper()} text: {wrong}; {REMEDY}"
            ) from None
    else:
        at = value.find("\0") if encoding == "utf-16" else data.find(b"\0")
        if at < 0:
            return value
    raise InputError(f"{where} is not text: byte {at:,} is NUL")

"""Finds added tokens in a text as the tokenizers library does, whose flags it knows but does not tell where they led.

Each added token has flags: `normalized` (found in the normalised text), `single_word` (not inside a word), `lstrip` and
`rstrip` (with the white space before or after it).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

# White space as in Unicode, which does not count the separators of ASCII (U+001C to U+001F) that Python counts.
_SPACE = r"[^\S\x1c-\x1f]*"
_BEFORE, _AFTER = re.compile(_SPACE + r"\Z"), re.compile(_SPACE)


@dataclass(frozen=True)
class Part:
    """A part of a text: an added token, or normalised text between two of them.

    Attributes:
        text: the normalised text; of a token, what it was found as.
        token: the token's id, or None.
        first: whether the text begins with this part.
    """

    text: str
    token: int | None
    first: bool


class AddedTokens:
    """The added tokens of a tokenizer.

    Attributes:
        ids: their ids by their texts.
        normalizes: whether some of them are found in text that a normaliser has changed.
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        known = tokenizer.get_added_tokens_decoder()
        self._normalizer = tokenizer.normalizer
        self.ids = {token.content: id for id, token in known.items()}
        self._exact = _Finder({token.content: (id, token) for id, token in known.items() if not token.normalized})
        # Two that are the same when normalised are one; which of them the library finds changes from run to run.
        later = {self._normalized(token.content): (id, token) for id, token in known.items() if token.normalized}
        self._normal = _Finder(later)
        self.normalizes = any(text != token.content for text, (_, token) in later.items())

    def split(self, text: str) -> Iterator[Part]:
        """Cut a text into added tokens and the normalised text between them."""
        first = True
        for piece, token in self._exact.split(text):
            parts = [(piece, token)] if token is not None else self._normal.split(self._normalized(piece))
            for part, id in parts:
                yield Part(part, id, first)
                first = False

    def _normalized(self, text: str) -> str:
        return self._normalizer.normalize_str(text) if self._normalizer is not None else text


class _Finder:
    """Finds some tokens by their exact texts: the leftmost, and the longest of those that begin there."""

    def __init__(self, tokens: dict[str, tuple[int, AddedToken]]) -> None:
        self._tokens = tokens
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The tokens with their ids and the texts between them with None, in order; no part is empty."""
        done = 0
        for found in self._pattern.finditer(text):
            id, token = self._tokens[found[0]]
            start, stop = found.span()
            if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1])):
                continue
            if token.lstrip:
                start = max(done, _spaces_before(text, start))
            if token.rstrip:
                after = _AFTER.match(text, stop)
                stop = after.end() if after else stop
            if done < start:
                yield text[done:start], None
            yield text[start:stop], id
            done = stop
        if done < len(text):
            yield text[done:], None


def _is_word(letter: str) -> bool:
    return re.fullmatch(r"\w", letter) is not None


def _spaces_before(text: str, end: int) -> int:
    """Where the white space begins that ends at `end`."""
    while end and text[end - 1].isspace() and not "\x1c" <= text[end - 1] <= "\x1f":
        end -= 1
    return end

"""Guessing the next tokens from the text itself: what followed where its latest tokens stood before.

Quoting, editing code and summarising repeat what was read. A step over several guessed tokens takes less than as many
steps, and where the guess was wrong its surplus was in vain. Guessing changes no answer: after every token the next is
drawn from the model's own distribution, and a guess only says which distribution to have ready (prompt lookup decoding,
Saxena, 2023).

While a text repeats a passage, its place there is kept, so that words which stand in many places do not lead elsewhere;
and the longer it has, the more is guessed.
"""

from collections import defaultdict, deque
from collections.abc import Iterable

GRAM = 4  # tokens that must agree, and the fewest that are guessed
GUESSES = 32  # at most
MEMORY, WARM_UP = 32, 3  # steps of each length that are compared, at most and at least
PATIENCE = 64  # guesses of a length that are kept back while it does not pay, before one is tried again


class Lookup:
    """A text, and where every run of `GRAM` tokens in it was last.

    Attributes:
        guessed, right: tokens so far.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.guessed, self.right = 0, 0
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._next: int | None = None  # where the text goes on, if it goes on repeating itself
        self._agreed = 0  # tokens before `_next` that are also the text's latest
        self._steps = defaultdict[int, _Steps](_Steps)  # by the number of bits of what was guessed: 0, 4 to 7, …
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Take in the next token of the text."""
        repeats = self._next is not None and self._tokens[self._next] == token
        self._tokens.append(token)
        gram = tuple(self._tokens[-GRAM:])
        if self._next is not None and repeats:
            self._next, self._agreed = self._next + 1, self._agreed + 1
        else:
            self._next, self._agreed = self._ends.get(gram), GRAM
        self._ends[gram] = len(self._tokens)

    def guess(self, most: int = GUESSES) -> list[int]:
        """The next tokens, a power of two of them, if this has happened before and guessing so many pays.

        `most` is at least `GRAM`.
        """
        if self._next is None:
            return []
        count = 1 << (min(most, self._agreed).bit_length() - 1)
        if not self._pays(count):
            return []
        period = len(self._tokens) - self._next  # of a text that repeats its very end
        return [self._tokens[self._next + i % period] for i in range(count)]

    def took(self, seconds: float, guessed: int, right: int) -> None:
        """Take in what a step took that had `guessed` tokens ahead of its own, of which `right` were right."""
        self.guessed, self.right = self.guessed + guessed, self.right + right
        self._steps[guessed.bit_length()].add(seconds, 1 + right)

    def _pays(self, count: int) -> bool:
        plain, guessing = self._steps[0].seconds_per_token, self._steps[count.bit_length()]
        if plain is None or guessing.seconds_per_token is None or guessing.seconds_per_token < plain:
            return True
        guessing.kept_back += 1
        return guessing.kept_back % PATIENCE == 0


class _Steps:
    """The latest steps of one kind."""

    def __init__(self) -> None:
        self.kept_back = 0
        self._latest = deque[tuple[float, int]](maxlen=MEMORY)

    def add(self, seconds: float, tokens: int) -> None:
        self._latest.append((seconds, tokens))

    @property
    def seconds_per_token(self) -> float | None:
        """None while there were too few to tell."""
        if len(self._latest) < WARM_UP:
            return None
        return sum(seconds for seconds, _ in self._latest) / sum(tokens for _, tokens in self._latest)

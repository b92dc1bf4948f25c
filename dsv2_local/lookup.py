"""Guessing the next tokens from the text itself: what followed the last time that its latest tokens stood there.

Quoting, editing code and summarising repeat what was read. A step over several guessed tokens takes less than as many
steps, and where the guess was wrong its surplus was in vain. Guessing changes no answer: after every token the next is
drawn from the model's own distribution, and a guess only says which distribution to have ready (prompt lookup decoding,
Saxena, 2023).
"""

from collections import deque
from collections.abc import Iterable

GRAM = 3  # tokens that must agree
GUESSES = 4  # at most
MEMORY, WARM_UP = 32, 3  # steps of each kind that are compared, at most and at least
PATIENCE = 64  # guesses that are kept back while guessing does not pay, before one is tried again


class Lookup:
    """A text, and where every run of `GRAM` tokens in it was last.

    Attributes:
        guessed, right: tokens so far.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.guessed, self.right = 0, 0
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._before: int | None = None  # where the latest run of tokens ended the last time
        self._seconds = {guessed: deque[float](maxlen=MEMORY) for guessed in (False, True)}  # a token
        self._kept_back = 0
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Take in the next token of the text."""
        self._tokens.append(token)
        gram = tuple(self._tokens[-GRAM:])
        self._before = self._ends.get(gram)
        self._ends[gram] = len(self._tokens)

    def guess(self) -> list[int]:
        """The next tokens, if this has happened before and guessing pays."""
        if self._before is None or not self._pays():
            return []
        return self._tokens[self._before : self._before + GUESSES]

    def took(self, seconds: float, guessed: int, right: int) -> None:
        """Take in what a step took that had `guessed` tokens ahead of its own, of which `right` were right."""
        self.guessed, self.right = self.guessed + guessed, self.right + right
        self._seconds[guessed > 0].append(seconds / (1 + right))

    def _pays(self) -> bool:
        plain, guessing = (
            sum(times) / len(times) if len(times) >= WARM_UP else None for times in self._seconds.values()
        )
        if plain is None or guessing is None or guessing < plain:
            return True
        self._kept_back += 1
        return self._kept_back % PATIENCE == 0

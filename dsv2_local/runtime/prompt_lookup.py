"""Speculative decoding without a draft model: draft tokens are looked up in the text itself (prompt lookup decoding).

Quotations, edited code and summaries repeat earlier text, so the tokens that followed an earlier occurrence of the
latest n-gram are a good draft. The model verifies a whole draft in one step, which takes less time than one step per
token; the time for rejected tokens is lost. A draft never changes the answer: every token is still drawn from the
model's own distribution, and the draft only decides which distributions are computed ahead (A. Saxena, Prompt Lookup
Decoding, 2023).

While the text repeats an earlier passage, the draft follows that passage, even through n-grams that have occurred
elsewhere since; the longer the match, the longer the draft.
"""

from collections import defaultdict, deque
from collections.abc import Iterable

NGRAM = 4  # tokens that must match; also the shortest draft
MAX_DRAFT = 32  # tokens of the longest draft
WINDOW, WARM_UP = 32, 3  # maximum and minimum number of steps per draft length whose times are compared
RETRY_AFTER = 64  # a draft length that does not pay off is tried again once in so many proposals


class PromptLookup:
    """A text, with the position of the last occurrence of every n-gram of `NGRAM` tokens.

    Attributes:
        drafted: draft tokens verified so far.
        accepted: draft tokens that the sampler chose.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.drafted, self.accepted = 0, 0
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # for each n-gram, the position after its last occurrence
        self._next: int | None = None  # position of the next token, if the text goes on repeating an earlier passage
        self._matched = 0  # number of tokens before `_next` that equal the latest tokens of the text
        self._payoff = Payoff()
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add the next token of the text."""
        repeats = self._next is not None and self._tokens[self._next] == token
        self._tokens.append(token)
        ngram = tuple(self._tokens[-NGRAM:])
        if self._next is not None and repeats:
            self._next, self._matched = self._next + 1, self._matched + 1
        else:
            self._next, self._matched = self._ends.get(ngram), NGRAM
        self._ends[ngram] = len(self._tokens)

    def propose(self, max_tokens: int = MAX_DRAFT) -> list[int]:
        """Propose a draft of the next tokens.

        Its length is a power of two, at least `NGRAM` and at most `max_tokens` (which must be at least `NGRAM`). Empty
        if nothing matches, or if drafts of this length have not paid off.
        """
        if self._next is None:
            return []
        count = 1 << (min(max_tokens, self._matched).bit_length() - 1)
        if not self._payoff.expected(count):
            return []
        period = len(self._tokens) - self._next  # shorter than the draft if the text repeats its own end
        return [self._tokens[self._next + i % period] for i in range(count)]

    def observe(self, seconds: float, drafted: int, accepted: int) -> None:
        """Record a step that took `seconds` and verified `drafted` draft tokens, of which `accepted` were chosen."""
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted
        self._payoff.observe(seconds, drafted, accepted)


class Payoff:
    """Which lengths of drafts have made tokens faster, as far as it was observed."""

    def __init__(self) -> None:
        self._times = defaultdict[int, _StepTimes](_StepTimes)  # by the bit length of the draft's length: 0, 4 to 7, …

    def observe(self, seconds: float, drafted: int, accepted: int) -> None:
        """See `PromptLookup.observe`."""
        self._times[drafted.bit_length()].add(seconds, 1 + accepted)

    def expected(self, count: int) -> bool:
        """Whether a draft of `count` tokens makes tokens faster, or may, or is to be tried again."""
        plain, drafted = self._times[0].seconds_per_token, self._times[count.bit_length()]
        if plain is None or drafted.seconds_per_token is None or drafted.seconds_per_token < plain:
            return True
        drafted.skipped += 1
        return drafted.skipped % RETRY_AFTER == 0


class _StepTimes:
    """Durations of the latest steps with one draft length."""

    def __init__(self) -> None:
        self.skipped = 0  # proposals of this length that were not made because they did not pay off
        self._latest = deque[tuple[float, int]](maxlen=WINDOW)

    def add(self, seconds: float, tokens: int) -> None:
        self._latest.append((seconds, tokens))

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time per generated token; None until there are `WARM_UP` steps."""
        if len(self._latest) < WARM_UP:
            return None
        return sum(seconds for seconds, _ in self._latest) / sum(tokens for _, tokens in self._latest)

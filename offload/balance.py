"""How the experts of a step that have no slot are shared between the link and the CPU. Pure, no torch.

Over the link an expert takes the same time for any number of tokens; the CPU reads it once, and then works for each
token. So the experts with the most tokens are fetched, and as many of them as let both sides end together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Streamed layers are copied while others compute, which the time of their copies does not show.
OVERLAP_GAIN = 1.1
# Observed times are averaged over about this many; costs that are off by more than `TOLERANCE` give way to them.
MEMORY, TOLERANCE = 32, 0.25


@dataclass(frozen=True)
class Costs:
    """Seconds, measured while link and CPU both work."""

    fetch: float
    """Of an expert over the link."""
    read: float
    """Of an expert on the CPU, for one token."""
    token: float
    """Of each further token that the CPU's expert works for."""

    def host(self, tokens: float) -> float:
        """Of an expert on the CPU."""
        return self.read + (tokens - 1) * self.token


def divide(counts: Sequence[int], costs: Costs) -> int:
    """How many experts to fetch, the first ones; the CPU takes the rest.

    `counts` are their tokens, the most first. Of divisions that are equally fast it is the one that fetches least.
    """
    rest = sum(map(costs.host, counts))
    best, fetched = rest, 0
    for number, count in enumerate(counts, 1):
        rest -= costs.host(count)
        longer = max(number * costs.fetch, rest)
        if longer < best:
            best, fetched = longer, number
    return fetched


def streaming_pays(
    tokens: int, experts: int, per_token: int, resident: float, costs: Costs, *, shared: bool = True
) -> bool:
    """Whether a layer is sooner through when all of its experts come over the link, without waiting to be chosen.

    Args:
        tokens: of the step.
        experts: of the layer; each token takes `per_token` of them.
        resident: the share of them that have slots.
        costs: of this machine.
        shared: whether the CPU computes some of those that the step chose, or all are fetched.
    """
    if tokens == 1:  # whose few experts come sooner alone than with the rest of the layer
        return False
    chosen = experts * (1 - (1 - per_token / experts) ** tokens)
    missed = round(chosen * (1 - resident))
    count = max(1, round(tokens * per_token / chosen))
    fetched = divide([count] * missed, costs) if shared else missed
    split = max(fetched * costs.fetch, (missed - fetched) * costs.host(count))
    return experts * (1 - resident) * costs.fetch <= OVERLAP_GAIN * split


class Watch:
    """Compares what something takes with what it was said to take.

    Attributes:
        ratio: observed over expected, averaged; 1 until something was observed.
    """

    def __init__(self) -> None:
        self.ratio = 1.0
        self._count = 0

    def observe(self, expected: float, seconds: float) -> None:
        """Take in one observation; the average's memory is short at first."""
        self._count += 1
        self.ratio += (seconds / expected - self.ratio) / min(self._count, MEMORY)

    def correction(self) -> float | None:
        """What to multiply the expectation by where it is off by more than a quarter; then it begins anew."""
        if self._count < MEMORY or 1 / (1 + TOLERANCE) <= self.ratio <= 1 + TOLERANCE:
            return None
        ratio = self.ratio
        self.ratio, self._count = 1.0, 0
        return ratio

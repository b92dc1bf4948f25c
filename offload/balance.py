"""How the missing experts of a step are split between PCIe copies and the CPU. Pure, no torch.

Copying an expert takes the same time however many tokens use it; the CPU reads it once and then computes for each
token. So the experts with the most tokens are copied, as many as let both sides finish at the same time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# A streamed layer is copied while the layer before it computes, a gain that the time of the copies does not show. And a
# layer shared with the CPU takes twice as long as its costs say: the host sorts pairs, brings outputs to the GPU and
# queues many small pieces of work (docs/log.md).
OVERLAP_GAIN, SHARED_GAIN = 1.1, 2.0
# Measured times are averaged over about this many samples; costs that are off by more than `TOLERANCE` are corrected.
MEMORY, TOLERANCE = 32, 0.25


@dataclass(frozen=True)
class Costs:
    """Seconds for one expert, measured while the PCIe link and the CPU are both busy."""

    fetch: float
    """To copy the expert over the PCIe link."""
    read: float
    """To compute the expert on the CPU for one token."""
    token: float
    """To compute it for each further token."""
    start: float = 0.0
    """To start the CPU's threads and to bring the outputs of one layer to the GPU, whatever the number of experts."""

    def host(self, tokens: float) -> float:
        """Seconds to compute the expert on the CPU for this many tokens."""
        return self.read + (tokens - 1) * self.token


def divide(counts: Sequence[int], costs: Costs) -> int:
    """How many of the missing experts to copy, from the front of the list; the CPU computes the rest.

    `counts` are the tokens of each expert, in descending order. Among equally fast splits, the one with the fewest
    copies is chosen.
    """
    host_seconds = sum(map(costs.host, counts))
    best, fetched = host_seconds + (costs.start if counts else 0.0), 0
    for number, count in enumerate(counts, 1):
        host_seconds -= costs.host(count)
        longer = max(number * costs.fetch, costs.start + host_seconds if number < len(counts) else 0.0)
        if longer < best:
            best, fetched = longer, number
    return fetched


def streaming_pays(
    tokens: int, experts: int, per_token: int, resident: float, costs: Costs, *, shared: bool = True
) -> bool:
    """Whether copying all experts of a layer ahead of time beats waiting for the router and copying what it chose.

    Args:
        tokens: tokens of the step.
        experts: routed experts of the layer.
        per_token: routed experts that each token uses.
        resident: fraction of the layer's experts that have a slot.
        costs: seconds for one expert on this machine.
        shared: whether the missing experts are split with the CPU; False if all of them are copied.
    """
    # Distinct experts that the step is expected to choose if routing is even.
    chosen = experts * (1 - (1 - per_token / experts) ** tokens)
    missed = round(chosen * (1 - resident))
    count = max(1, round(tokens * per_token / chosen))
    fetched = divide([count] * missed, costs) if shared else missed
    on_host = missed - fetched
    split = max(fetched * costs.fetch, costs.start + on_host * costs.host(count) if on_host else 0.0)
    gain = SHARED_GAIN if shared else OVERLAP_GAIN
    return experts * (1 - resident) * costs.fetch <= gain * split


class Watch:
    """Compares measured times with the expected ones.

    Attributes:
        ratio: measured over expected time, averaged; 1 before the first sample.
    """

    def __init__(self) -> None:
        self.ratio = 1.0
        self._count = 0

    def observe(self, expected: float, seconds: float) -> None:
        """Add a sample to the average: a plain one for the first `MEMORY` samples, then an exponential one."""
        self._count += 1
        self.ratio += (seconds / expected - self.ratio) / min(self._count, MEMORY)

    def correction(self) -> float | None:
        """The factor to multiply the expected time by if it is off by more than `TOLERANCE`, else None.

        Returning a factor starts a new average.
        """
        if self._count < MEMORY or 1 / (1 + TOLERANCE) <= self.ratio <= 1 + TOLERANCE:
            return None
        ratio = self.ratio
        self.ratio, self._count = 1.0, 0
        return ratio

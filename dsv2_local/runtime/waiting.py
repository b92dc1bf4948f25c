"""Sequences as the scheduler sees them, those that wait to be computed, and their deadlines. Pure Python, no torch."""

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from typing import Generic, TypeVar

from dsv2_local.runtime.sequence import Sequence

_place = attrgetter("place")
PATIENCE = 2  # calls of the scheduler at which a reader wants nothing before it pauses
POLLED = 32  # readers that are asked again in each step whether they want tokens


class State(Enum):
    """What becomes of a sequence; one that was preempted is WAITING again."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


@dataclass(eq=False)
class Scheduled:
    """A sequence that a `Scheduler` has been given. Whoever computes it may add to this class.

    While it is DECODING, all its tokens but the newest are in the KV cache.

    Attributes:
        sequence: its tokens and blocks.
        most_tokens: how many tokens it may have in the end, the prompt included.
        priority: those of a higher priority come first.
        deadline: when it ends if it has not finished, in seconds of the caller's clock; None: never.
        prompt_only: whether no token follows the prompt; it is to be finished when its prompt is computed.
        draft: draft tokens to verify in its next decode step; the scheduler empties it if there is no room for them.
        state: changed by the scheduler alone.
        arrival: how many were submitted before it.
        overtaken: how many were started before it although they came later.
        preemptions: how often its blocks were taken away.
        in_pass: whether it is part of the prefill pass in flight.
    """

    sequence: Sequence
    most_tokens: int
    priority: int = field(default=0, kw_only=True)
    deadline: float | None = field(default=None, kw_only=True)
    prompt_only: bool = field(default=False, kw_only=True)
    draft: list[int] = field(default_factory=list, kw_only=True)
    state: State = field(default=State.WAITING, init=False)
    arrival: int = field(default=-1, init=False)
    overtaken: int = field(default=0, init=False)
    preemptions: int = field(default=0, init=False)
    in_pass: bool = field(default=False, init=False)
    begun: bool = field(default=False, init=False)  # whether its sequence has looked into the prefix cache before
    # When it had its last turn: a number of passes, or of rows if it decodes.
    served: int = field(default=0, init=False)
    idle: int = field(default=0, init=False)  # how many calls of the scheduler its reader has wanted nothing for
    reusable: bool = field(default=True, init=False)  # whether what is computed may go into the prefix cache

    @property
    def wants(self) -> bool:
        """Whether its reader wants tokens now; else it is not computed.

        A reader that wants none at two calls of the scheduler in a row pauses: its sequence is the first to lose its
        blocks, and others are started in its place.
        """
        return True

    @property
    def pauses(self) -> bool:
        """Whether its reader has wanted no tokens for a while."""
        return self.idle >= PATIENCE

    @property
    def needs_step(self) -> bool:
        """Whether it takes part in the next decode step; not if it still has logits to draw a token from."""
        return True

    def preempted(self) -> None:
        """Called when its blocks were taken away; what was computed beyond `sequence.length`, as drafts, is lost.

        When it is resumed, all its tokens but the newest are computed, even if the newest was, too. It may go on to
        draw a token from logits that it has, but must not `advance` for what these were computed with.
        """

    @property
    def rank(self) -> tuple[int, int]:
        """Orders the sequences: blocks may be taken from those behind for those before, never the other way round."""
        return -self.priority, self.arrival

    @property
    def place(self) -> tuple[int, bool, int]:
        """Orders those that wait: by priority, then preempted ones before new ones, then by arrival."""
        return -self.priority, not self.preemptions, self.arrival

    @property
    def target(self) -> int:
        """How many tokens a prefill computes: the prompt, or all but the newest token of a preempted sequence."""
        return max(self.sequence.prompt, len(self.sequence.tokens) - 1)

    @property
    def missing(self) -> int:
        """How many tokens the prefill still has to compute."""
        return self.target - self.sequence.length


Item = TypeVar("Item", bound=Scheduled)


class Waiting(Generic[Item]):
    """Sequences that wait, in the order of `Scheduled.place`; apart from them, those whose readers pause.

    Attributes:
        changes: counts what has changed among the first ones.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._items: list[Item] = []
        self._paused: deque[Item] = deque()

    def __len__(self) -> int:
        return len(self._items) + len(self._paused)

    def __iter__(self) -> Iterator[Item]:
        yield from self._items
        yield from self._paused

    def first(self, count: int) -> list[Item]:
        """The first `count` of those whose readers want tokens, or wanted some when last asked."""
        return self._items[:count]

    def add(self, item: Item) -> None:
        insort(self._items, item, key=_place)
        self.changes += 1

    def pause(self, item: Item) -> None:
        """Leave a waiting sequence out until its reader wants tokens."""
        self._remove(item)
        self._paused.append(item)

    def poll(self) -> None:
        """Ask some of the paused readers whether they want tokens, each in its turn."""
        for _ in range(min(POLLED, len(self._paused))):
            item = self._paused.popleft()
            if item.wants:
                self.add(item)
            else:
                self._paused.append(item)

    def discard(self, item: Item) -> None:
        """Remove a sequence, wherever it waits."""
        if not self._remove(item):
            self._paused.remove(item)

    def _remove(self, item: Item) -> bool:
        at = bisect_left(self._items, item.place, key=_place)
        found = at < len(self._items) and self._items[at] is item
        if found:
            del self._items[at]
            self.changes += 1
        return found


class Deadlines(Generic[Item]):
    """The sequences that have a deadline, the earliest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Item]] = []
        self._ended = 0  # how many of them have ended before their deadline

    def add(self, item: Item) -> None:
        if item.deadline is not None:
            heapq.heappush(self._heap, (item.deadline, item.arrival, item))

    def ended(self, item: Item) -> None:
        """Forget a sequence; call it once."""
        self._ended += item.deadline is not None
        if self._ended > 16 + len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if entry[2].state is not State.FINISHED]
            heapq.heapify(self._heap)
            self._ended = 0

    def first_over(self, now: float) -> Item | None:
        """The sequence whose deadline was over first, unless it has ended by now."""
        while self._heap and self._heap[0][0] <= now:
            if (item := self._heap[0][2]).state is not State.FINISHED:
                return item
            heapq.heappop(self._heap)
            self._ended -= 1
        return None

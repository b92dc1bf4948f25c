"""The sequences that hold blocks, and who gives way to whom when blocks run out. Pure Python, no torch."""

from bisect import insort
from collections.abc import Iterator
from operator import attrgetter
from typing import Generic

from dsv2_local.runtime.block_pool import BlockPool
from dsv2_local.runtime.waiting import PATIENCE, Item, State, Waiting


class Running(Generic[Item]):
    """Sequences that are being prefilled or decode, in the order of `Scheduled.rank`.

    Blocks are taken from sequences whose readers pause, then from the last in rank, and never for the sake of one
    behind; nor from those in the prefill pass in flight, which writes to them.
    """

    def __init__(self, pool: BlockPool, waiting: Waiting[Item]) -> None:
        """None yet; those that are preempted go to `waiting`."""
        self._pool, self._waiting = pool, waiting
        self._items: list[Item] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def add(self, item: Item) -> None:
        insort(self._items, item, key=attrgetter("rank"))

    def remove(self, item: Item) -> None:
        self._items.remove(item)

    def poll(self, *, at_once: bool = False) -> None:
        """Ask all readers whether they want tokens; `at_once`: one that does not pauses already."""
        for item in self._items:
            item.idle = 0 if item.wants else PATIENCE if at_once else item.idle + 1

    def active(self) -> list[Item]:
        """Those whose readers do not pause."""
        return [item for item in self._items if not item.pauses]

    def prompts(self) -> list[Item]:
        """Those of them that are being prefilled."""
        return [item for item in self._items if item.state is State.PREFILLING and not item.pauses]

    def computes(self, item: Item, matched: int) -> bool:
        """Whether a prompt in progress begins like `item`, for a whole block more than the `matched` cached tokens."""
        size, tokens = self._pool.block_size, item.sequence.tokens
        end = (matched // size + 1) * size
        return end <= item.sequence.reusable and any(
            other.priority >= item.priority
            and end <= other.target
            and tokens[:size] == other.sequence.tokens[:size]
            and tokens[:end] == other.sequence.tokens[:end]
            for other in self.prompts()
        )

    def make_room(self, item: Item, tokens: int) -> bool:
        """Preempt sequences until `item` can reserve blocks for `tokens` more; returns whether it can."""
        while not item.sequence.fits(tokens):
            if not self.preempt_one(item):
                return False
        return True

    def preempt_one(self, item: Item | None = None) -> bool:
        """Preempt the last whose reader pauses, else the last in rank, but for `item` none before it in rank.

        Returns:
            Whether there was one.
        """
        others = [other for other in reversed(self._items) if not other.in_pass and other is not item]
        victim = next((other for other in others if other.pauses), None)
        if victim is None and others and (item is None or others[0].rank > item.rank):
            victim = others[0]
        if victim is not None:
            self.preempt(victim)
        return victim is not None

    def shortage(self, blocks: int) -> int:
        """How many blocks are lacking to start a sequence that takes `blocks`; 0 or less if it can be started.

        There must also be blocks for all prompts in progress, and one for each sequence whose reader does not pause.
        """
        prompts = [item.sequence for item in self.prompts()]
        promised = sum(prompt.lacking(len(prompt.tokens) - prompt.length) for prompt in prompts)
        return blocks + promised + len(self.active()) - self._pool.available

    def preempt_paused(self, shortage: int) -> bool:
        """Preempt the last whose reader pauses, if all of these hold `shortage` blocks; returns whether it did."""
        paused = [item for item in self._items if not item.in_pass and item.pauses]
        if not paused or shortage > sum(len(item.sequence.blocks) for item in paused):
            return False
        self.preempt(paused[-1])
        return True

    def preempt(self, item: Item) -> None:
        """Take a sequence's blocks away; it waits to be resumed, and has its turn before prompts in progress."""
        self._items.remove(item)
        item.sequence.insert_prefix()
        item.sequence.release()
        item.state, item.served = State.WAITING, 0
        item.preemptions += 1
        item.preempted()
        self._waiting.add(item)

"""The scheduler: which sequences the next decode step computes, and which chunks of prompts the next prefill pass.

Pure Python, no torch: it decides, and whoever computes tells it what was done. It is not safe for several threads.

Blocks of the KV cache are what sequences compete for. A sequence is started when the pool has blocks for all its
tokens, besides those that prompts in progress still need and one for each sequence that is being computed. If blocks
run out all the same, some sequence is preempted: first one whose reader pauses, then the last one in the order of
priority and arrival (`Scheduled.rank`). Its blocks stay in the prefix cache until they are needed, and it is resumed
before new ones are started. Blocks are never taken from a sequence for the sake of one behind it, so the first one
always finishes.
"""

from collections import deque
from enum import Enum, auto
from operator import attrgetter
from typing import Generic

from dsv2_local.errors import ContextLengthError, QueueFullError
from dsv2_local.runtime.block_pool import BlockPool
from dsv2_local.runtime.running import Running
from dsv2_local.runtime.waiting import Deadlines, Item, Scheduled, State, Waiting

OVERTAKING = 8  # how often a waiting sequence is overtaken before nothing is started until it is
CANDIDATES = 32  # waiting sequences that are looked at for one prefill pass


class _Outcome(Enum):
    """What became of a waiting sequence that could be started."""

    STARTED = auto()
    KEPT_BACK = auto()  # its reader pauses, or a prompt in progress begins like it
    NO_ROOM = auto()  # those behind it may overtake it
    NO_ROW = auto()  # nor for those behind it


class Scheduler(Generic[Item]):
    """Sequences that wait, are prefilled, or decode.

    Attributes:
        rows: the most sequences in a decode step. No more are started while as many of their priority or a higher one
            run, not counting those whose readers pause.
        chunk: the most tokens in a prefill pass, and in a chunk of a prompt.
        queue: the most sequences that may wait when one is submitted.
    """

    def __init__(self, pool: BlockPool, rows: int, chunk: int, queue: int) -> None:
        self._pool, self.rows, self.chunk, self.queue = pool, rows, chunk, queue
        self._waiting, self._deadlines = Waiting[Item](), Deadlines[Item]()
        self._running = Running(pool, self._waiting)
        self._pass: list[tuple[Item, int]] = []  # the pass in flight: sequences, and how many tokens of each
        self._arrivals = self._turns = self._passes = self._ends = 0
        self._seen: tuple[object, int] = None, 0  # the state, and available blocks, when the waiting were looked at

    def __len__(self) -> int:
        """How many sequences have not ended."""
        return len(self._waiting) + len(self._running)

    @property
    def waiting(self) -> int:
        """How many sequences wait, preempted ones included."""
        return len(self._waiting)

    @property
    def running(self) -> tuple[Item, ...]:
        """The sequences that are being prefilled or decode, the first in rank first."""
        return tuple(self._running)

    @property
    def pass_in_flight(self) -> tuple[tuple[Item, int], ...]:
        """The sequences of the pass in flight, and how many tokens of each it computes."""
        return tuple(self._pass)

    @property
    def pass_is_useless(self) -> bool:
        """Whether a pass is in flight of which every sequence has ended, so that it should be abandoned."""
        return bool(self._pass) and all(item.state is State.FINISHED for item, _ in self._pass)

    def submit(self, item: Item) -> None:
        """Let a new sequence wait, to be computed in its turn.

        Raises:
            ContextLengthError: it can never fit in the KV cache.
            QueueFullError: as many sequences wait as may wait.
        """
        room = min(item.sequence.context, self._pool.count * self._pool.block_size)
        if max(item.most_tokens, item.sequence.prompt + (not item.prompt_only)) > room:
            raise ContextLengthError(max(item.most_tokens - 1, item.sequence.prompt), room)
        if len(self._waiting) >= self.queue:
            raise QueueFullError(len(self._waiting))
        item.arrival, item.served = self._arrivals, self._passes
        self._arrivals += 1
        self._waiting.add(item)
        self._deadlines.add(item)

    def finish(self, item: Item, *, reusable: bool = True) -> None:
        """End a sequence, whatever its state, and give back its blocks; does nothing if it has ended.

        This is how a sequence is cancelled, too. The blocks of one in the pass in flight are given back when the pass
        ends.

        Args:
            reusable: put what is computed of it into the prefix cache.
        """
        if item.state is State.FINISHED:
            return
        if item.arrival >= 0:  # else it was never submitted, or was refused
            (self._waiting.discard if item.state is State.WAITING else self._running.remove)(item)
            self._deadlines.ended(item)
        item.state, item.reusable = State.FINISHED, reusable
        self._ends += 1
        if not item.in_pass:
            self._give_back(item)

    @property
    def everything(self) -> tuple[Item, ...]:
        """The sequences that have not ended, in no particular order."""
        return (*self._running, *self._waiting)

    def make_room(self, blocks: int) -> bool:
        """Preempt sequences until so many blocks are available, for something else; returns whether they are."""
        self._running.poll(at_once=True)
        while blocks > self._pool.available:
            if not self._running.preempt_one():
                return False
        return True

    def overdue(self, now: float) -> Item | None:
        """The sequence whose deadline was over first, and which should be ended; None if there is none."""
        return self._deadlines.first_over(now)

    def decode(self) -> list[Item]:
        """Choose the sequences of the next decode step, and reserve blocks for their newest tokens and drafts.

        If there are more than `rows`, those of the highest priority are chosen, and among them those whose last turn
        was the longest ago. The first in rank is the first row.
        """
        self._running.poll()
        ready = []
        for item in self._running:
            if item.state is State.DECODING and not item.idle and item.needs_step:
                if item.missing > 0:  # it was preempted, and got a token from logits that it had before
                    item.state, item.served = State.PREFILLING, 0
                else:
                    ready.append(item)
        if len(ready) > self.rows:
            ready = sorted(ready, key=_turn)[: self.rows]
            for item in ready:
                self._turns += 1
                item.served = self._turns
            ready.sort(key=attrgetter("rank"))
        chosen = []
        for item in ready:
            if item.state is not State.DECODING:  # preempted for one before it
                continue
            if self._running.make_room(item, 1):
                item.sequence.reserve(1)
                chosen.append(item)
            elif not self._pass:  # else there may be room when the pass ends
                self._running.preempt(item)
        for item in chosen:
            if item.draft:
                self._reserve_draft(item)
        return chosen

    def prefill(self) -> list[tuple[Item, int]]:
        """Choose the chunks of the next prefill pass, which is then in flight: sequences, and how many tokens of each.

        Empty if there is nothing to prefill, or if a pass is in flight. Call `prefilled` or `abandon` in the end.
        Prompts take turns; a chunk is never cut short because of others in its pass. A preempted sequence whose blocks
        are all in the prefix cache decodes on at once.
        """
        if self._pass:
            return []
        self._passes += 1
        self._waiting.poll()
        self._running.poll()
        prompts = deque(sorted((item for item in self._running.prompts() if not item.idle), key=_turn))
        if not prompts and not self._waiting:
            return []
        state, available = self._state(), self._pool.available
        seen = state == self._seen[0] and available <= self._seen[1]
        waiting = deque([] if seen else self._waiting.first(CANDIDATES))
        passed = list[Item]()  # those that wait on, though others may be started
        while (prompts or waiting) and self._left:
            if waiting and (not prompts or _turn(waiting[0]) <= _turn(prompts[0])):
                item = waiting.popleft()
                outcome = self._start(item)
                if outcome is _Outcome.STARTED:
                    for other in passed:
                        other.overtaken += 1
                elif outcome is _Outcome.NO_ROOM:
                    passed.append(item)
                if outcome is _Outcome.NO_ROW or any(other.overtaken >= OVERTAKING for other in passed):
                    waiting.clear()
            else:
                self._continue(prompts.popleft())
        self._seen = state, available
        return list(self._pass)

    def prefilled(self) -> list[Item]:
        """The pass in flight has ended: count its tokens and publish whole blocks.

        Returns:
            Those that decode from now on. One without generated tokens gets its first one now, from the logits of the
            pass; it must be appended to its tokens, or the sequence finished, before the next decode step.
        """
        complete = []
        for item, tokens in self._pass:
            item.sequence.advance(tokens)
            if item.state is State.FINISHED:
                continue
            item.sequence.insert_prefix(whole_blocks=True)
            if not item.missing:
                item.state, item.served = State.DECODING, self._turns
                complete.append(item)
        self.abandon()
        return complete

    def abandon(self) -> None:
        """The pass in flight was dropped, and nothing of it counts."""
        for item, _ in self._pass:
            item.in_pass = False
            if item.state is State.FINISHED:
                self._give_back(item)
        self._pass = []
        self._ends += 1

    @property
    def _left(self) -> int:
        """How many more tokens the pass may have."""
        return self.chunk - sum(tokens for _, tokens in self._pass)

    def _state(self) -> object:
        """What decides whether a waiting sequence can be started, the number of available blocks apart."""
        return self._ends, self._waiting.changes, [item.arrival for item in self._running.active()]

    def _start(self, item: Item) -> _Outcome:
        """Start a waiting sequence, or resume it: its first chunk becomes part of the pass, if it fits."""
        if not item.wants:
            self._waiting.pause(item)
            return _Outcome.KEPT_BACK
        if sum(other.priority >= item.priority for other in self._running.active()) >= self.rows:
            return _Outcome.NO_ROW
        sequence = item.sequence
        while True:
            matched, blocks = sequence.foresee()
            if self._running.computes(item, matched):
                return _Outcome.KEPT_BACK
            tokens = sequence.next_chunk(self.chunk, matched)[0] if item.begun else self.chunk
            tokens = min(tokens, item.target - matched)
            shortage = self._running.shortage(blocks)
            if tokens <= self._left and shortage <= 0:
                break
            if tokens > self._left or not self._running.preempt_paused(shortage):
                return _Outcome.NO_ROOM
        if item.begun:
            found = sequence.resume()
        else:
            found = sequence.begin()
            item.begun = True
        self._waiting.discard(item)
        self._running.add(item)
        item.state, item.served, item.idle = State.DECODING, self._turns, 0
        if item.missing:
            item.state = State.PREFILLING
            if found >= matched:
                self._take(item, tokens)
            else:  # the block store has lost some
                self._continue(item)
        return _Outcome.STARTED

    def _continue(self, item: Item) -> None:
        """Make the next chunk of a prompt in progress part of the pass, if it fits."""
        if item.state is State.PREFILLING:  # not preempted for one before it
            tokens = min(item.sequence.next_chunk(self.chunk)[0], item.missing)
            if tokens <= self._left and self._running.make_room(item, tokens):
                self._take(item, tokens)

    def _take(self, item: Item, tokens: int) -> None:
        """Make a chunk part of the pass."""
        item.sequence.reserve(tokens)
        item.in_pass, item.served = True, self._passes
        self._pass.append((item, tokens))

    def _give_back(self, item: Item) -> None:
        """Give back the blocks of a sequence that has ended."""
        if item.reusable and item.sequence.blocks:
            item.sequence.insert_prefix()
        item.sequence.release()

    def _reserve_draft(self, item: Item) -> None:
        """Reserve blocks for a draft, or drop it if they are not available."""
        tokens, sequence = 1 + len(item.draft), item.sequence
        if sequence.length + tokens <= item.most_tokens and sequence.fits(tokens):
            sequence.reserve(tokens)
        else:
            item.draft = []


def _turn(item: Scheduled) -> tuple[int, int]:
    """Orders sequences that take turns."""
    return -item.priority, item.served

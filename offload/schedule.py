"""Routed experts between a GPU and RAM: who computes what, and what is copied meanwhile.

A step of few tokens (decoding) learns its experts from the router: those with slots run on the device, the others are
shared between the link and the CPU. A step of many tokens streams whole layers through the staging buffers instead,
the next layer's experts while this one computes. Either way the outputs of all experts are computed alone and added in
the order of the experts' numbers, so that placement does not change the sum.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from dsv2_local.errors import DeviceError
from dsv2_local.kernels import ops
from dsv2_local.kernels.format import ExpertLayout, Format
from dsv2_local.kernels.graphs import capturing
from dsv2_local.offload.captured import Buffers, CapturedExperts
from dsv2_local.offload.device import Event
from dsv2_local.offload.pairs import Ints, Pairs
from dsv2_local.offload.plan import PIECE, Mode
from dsv2_local.offload.slots import BUFFERS, Slots
from dsv2_local.offload.split import Costs, Watch, divide, streaming_pays
from dsv2_local.offload.stream import Stream

FAILURES = 8  # layers' steps in a row that failed on a device and were done without it, before that is an error

Result = Callable[[], Tensor]


@dataclass
class Figures:
    """What happened to the experts of a run."""

    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0
    """Over the link, streamed layers included."""
    fetch_seconds: float = 0.0
    host_experts: int = 0
    """That the CPU computed, counted anew in each layer and step."""
    host_seconds: float = 0.0
    streamed_layers: int = 0
    retries: int = 0
    """Layers' steps that failed on a device and were done again on the CPU."""

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __sub__(self, other: "Figures") -> "Figures":
        return Figures(**{name: value - getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True)
class _Step:
    """What a layer is to compute: x [T, D], ids and weights [T, K] on the device, and their pairs, rows there, too."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    pairs: Pairs
    rows: Tensor

    @classmethod
    def of(cls, x: Tensor, ids: Tensor, weights: Tensor, pairs: Pairs) -> "_Step":
        return cls(x, ids, weights, pairs, _to(x, pairs.rows))

    def places(self, part: slice, indices: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Of some pairs the token, and the index of the expert's record; int64 [n], on the device."""
        of_experts = [indices[expert] for expert in self.pairs.experts[part].tolist()]
        return _to(self.x, self.pairs.tokens[part]), _to(self.x, np.array(of_experts, dtype=np.int64))


class Lane:
    """One device, with the layers whose experts it computes.

    Attributes:
        costs: what fetching and computing an expert take, corrected where observation says otherwise.
        corrected: whether it did.
    """

    def __init__(
        self, slots: Slots, layout: ExpertLayout, records: dict[int, Tensor], mode: Mode, costs: Costs
    ) -> None:
        """`records`: uint8 [E, layout.nbytes] in RAM, of each of its layers, ascending."""
        self.slots, self.layout, self.records, self.mode, self.costs = slots, layout, records, mode, costs
        self._device = slots.device
        self._stream = Stream(slots, records)
        self._figures = Figures()
        self._failures = 0
        self._buffers: Buffers | None = None
        self.corrected = False
        self._fetch_watch, self._host_watch = Watch(), Watch()

    @property
    def figures(self) -> Figures:
        counters = self.slots.cache.counters.values()
        return replace(
            self._figures,
            hits=sum(counter.hits for counter in counters),
            misses=sum(counter.misses for counter in counters),
            fetched_bytes=self.slots.fetched,
            fetch_seconds=self.slots.fetch_seconds,
        )

    def begin(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Result:
        """See `OffloadedExperts.begin`."""
        if self.mode is Mode.CPU:
            return lambda: self._alone(layer, x, ids, weights)
        if len(x) == 1 and x.is_cuda and self._buffers is None:  # a captured step may follow, which cannot make them
            self._buffers = Buffers(self._device, x, ids)
        streams = self._streams(layer, *ids.shape)
        if not streams and ids.numel() > PIECE:
            parts = [torch.split(whole, PIECE // ids.shape[1]) for whole in (x, ids, weights)]
            return lambda: torch.cat([self.begin(layer, *part)() for part in zip(*parts, strict=True)])
        self.slots.cache.release()
        try:
            finish = (self._begin_streamed if streams else self._begin_split)(layer, x, ids, weights)
        except DeviceError as error:
            failed = error
            return lambda: self._again(failed, layer, x, ids, weights)
        return lambda: self._finish(finish, layer, x, ids, weights)

    def captured(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> CapturedExperts | None:
        """What captures this layer's experts, once a token has passed; None where Python has to compute them."""
        plain = self.layout.format is Format.BF16  # whose products do not skip absent slots
        if self._buffers is None or plain or ids.numel() > self.slots.buffer * BUFFERS:
            return None
        return CapturedExperts(self, self._buffers, layer, x, ids, weights)

    def _streams(self, layer: int, tokens: int, per_token: int) -> bool:
        if tokens == 1:
            return False
        experts = len(self.records[layer])
        resident = sum(self.slots.cache.peek((layer, expert)) is not None for expert in range(experts)) / experts
        shared = self.mode is not Mode.STREAM
        return streaming_pays(tokens, experts, per_token, resident, self.costs, shared=shared)

    def _finish(self, finish: Result, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        try:
            y = finish().to(x.dtype)
        except DeviceError as error:
            return self._again(error, layer, x, ids, weights)
        self._failures = 0
        return y

    def _again(self, error: DeviceError, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """A step that failed on the device, without it; the experts whose copies failed are given up."""
        self._failures += 1
        if self._failures > FAILURES:
            raise error
        self._figures.retries += 1
        self._stream.reset()
        self.slots.drop_failed()
        return self._alone(layer, x, ids, weights)

    def _alone(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The whole step on the CPU."""
        chosen = ids.cpu()
        start = perf_counter()
        y = ops.experts(x.cpu(), self.records[layer], self.layout, chosen, weights.cpu())
        self._count(len(torch.unique(chosen)), perf_counter() - start)
        return y.to(x.device)

    def _begin_split(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Result:
        """A step of few tokens."""
        self._stream.reset()
        chosen = ids.cpu().numpy()  # waits for the router, and so for all work before
        self._observe()
        counts = Counter(chosen.ravel().tolist())
        hits, misses = self.slots.cache.use(layer, sorted(counts))
        fetched, on_host = self._divide(layer, misses, counts)
        batches = [fetched[i : i + self.slots.buffer] for i in range(0, len(fetched), self.slots.buffer)]
        pairs = Pairs(chosen, counts, [sorted(hits), *batches, on_host])
        step, out = _Step.of(x, ids, weights, pairs), torch.empty(chosen.size, x.shape[1], device=x.device)
        indices = [self._fetch(layer, batch) for batch in batches[:BUFFERS]]
        given = [self._outputs(step, pairs.parts[0], hits, out)] if hits else []
        x_host = x.cpu() if on_host else x

        def finish() -> Tensor:
            for number in range(len(batches)):
                given.append(self._outputs(step, pairs.parts[1 + number], indices[number], out))
                if number + BUFFERS < len(batches):
                    indices.append(self._fetch(layer, batches[number + BUFFERS]))
            part = pairs.parts[-1]
            here = self._host_outputs(layer, x_host, pairs) if on_host else out
            y = torch.zeros(x.shape, device=x.device)

            def add_up() -> None:
                if on_host:
                    out[part].copy_(here)
                ops.combine(out, step.rows, ids, weights, y)

            self._device.join(self.slots.compute(add_up, after=given))
            return y

        return finish

    def _begin_streamed(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Result:
        """A step of many tokens: all experts of the layer pass, group by group."""
        self._observe()
        groups = self._stream.enter(layer)

        def finish() -> Tensor:
            chosen = ids.cpu().numpy()
            counts = dict(enumerate(np.bincount(chosen.ravel()).tolist()))
            pairs = Pairs(chosen, counts, groups)
            step = _Step.of(x, ids, weights, pairs)
            y = torch.zeros(x.shape, device=x.device)
            given: list[Event] = []
            for number in range(len(groups)):
                indices, whole = self._stream.take(), pairs.parts[number]
                for start in range(whole.start, whole.stop, PIECE):
                    part = slice(start, min(start + PIECE, whole.stop))
                    given = [self._added(step, part, indices, y, given)]
                self._stream.advance()
            self._device.join(given[0])
            self._figures.streamed_layers += 1
            return y

        return finish

    def placed(self, layer: int, experts: list[int]) -> tuple[dict[int, int], dict[int, int], list[int]]:
        """See `captured.Placing`."""
        self._stream.reset()
        self._observe()
        self.slots.cache.release()
        hits, misses = self.slots.cache.use(layer, sorted(experts))
        fetched, on_host = self._divide(layer, misses, dict.fromkeys(experts, 1))
        indices: dict[int, int] = {}
        for start in range(0, len(fetched), self.slots.buffer):
            indices |= self._fetch(layer, fetched[start : start + self.slots.buffer])
        return hits, indices, on_host

    def compute_on_host(self, layer: int, x: Tensor, tokens: Tensor, experts: Tensor, out: Tensor) -> None:
        """See `captured.Placing`."""
        start = perf_counter()
        ops.expert_outputs(x, self.records[layer], self.layout, tokens, experts, out)
        seconds = perf_counter() - start
        counts = Counter(experts.tolist()).values()
        self._count(len(counts), seconds)
        self._host_watch.observe(sum(map(self.costs.host, counts)), seconds)

    def _divide(self, layer: int, misses: list[int], counts: Mapping[int, int]) -> tuple[list[int], list[int]]:
        """Which of the experts without slots to fetch, and which the CPU computes; both ascending."""
        if self.mode is Mode.STREAM:
            return misses, []
        worth = self.slots.cache.worth
        misses.sort(key=lambda expert: (counts[expert], worth((layer, expert))), reverse=True)
        fetched = divide([counts[expert] for expert in misses], self.costs)
        return sorted(misses[:fetched]), sorted(misses[fetched:])

    def _fetch(self, layer: int, experts: Sequence[int]) -> dict[int, int]:
        return self.slots.fetch(layer, self.records[layer], experts, free_only=False)

    def _outputs(self, step: _Step, part: slice, indices: dict[int, int], out: Tensor) -> Event:
        """Have the device compute some pairs into their rows of `out`."""
        tokens, slots = step.places(part, indices)
        x, records, layout, target = step.x, self.slots.records, self.layout, out[part]
        return self.slots.compute(
            lambda: ops.expert_outputs(x, records, layout, tokens, slots, target), reads=indices.values()
        )

    def _added(self, step: _Step, part: slice, indices: dict[int, int], y: Tensor, after: Sequence[Event]) -> Event:
        """Have the device compute some pairs and add them to `y`, once the events are done."""
        tokens, slots = step.places(part, indices)
        x, rows, records, layout = step.x, step.rows, self.slots.records, self.layout

        def work() -> None:
            out = torch.empty(len(tokens), x.shape[1], device=x.device)
            ops.expert_outputs(x, records, layout, tokens, slots, out)
            here = torch.where((rows >= part.start) & (rows < part.stop), rows - part.start, -1)
            ops.combine(out, here, step.ids, step.weights, y)

        return self.slots.compute(work, reads=indices.values(), after=after)

    def _host_outputs(self, layer: int, x: Tensor, pairs: Pairs) -> Tensor:
        """Compute the last group of pairs on the CPU: x [T, D] in RAM -> fp32 [n, D]."""
        part = pairs.parts[-1]
        out = torch.empty(part.stop - part.start, x.shape[1])
        tokens, experts = torch.from_numpy(pairs.tokens[part]), torch.from_numpy(pairs.experts[part])
        self.compute_on_host(layer, x, tokens, experts, out)
        return out

    def _count(self, experts: int, seconds: float) -> None:
        self._figures.host_experts += experts
        self._figures.host_seconds += seconds

    def _observe(self) -> None:
        """Take in how long copies took, and correct the costs where they are off."""
        nbytes, seconds = self.slots.settle()
        if nbytes:
            self._fetch_watch.observe(nbytes / self.layout.nbytes * self.costs.fetch, seconds)
        fetch, host = self._fetch_watch.correction(), self._host_watch.correction()
        if fetch or host:
            self.corrected, costs = True, self.costs
            self.costs = Costs(costs.fetch * (fetch or 1), costs.read * (host or 1), costs.token * (host or 1))


class OffloadedExperts:
    """The routed experts of a model whose other weights lie on one device or several."""

    replayable = False

    def __init__(self, lanes: Sequence[Lane]) -> None:
        """Each layer belongs to one lane."""
        self.lanes = lanes
        self._lane = {layer: lane for lane in lanes for layer in lane.records}

    @property
    def figures(self) -> Figures:
        """What happened so far."""
        return sum((lane.figures for lane in self.lanes), Figures())

    def begin(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Result:
        """Start what need not wait for anybody; the rest, Σₖ weights[t, k] · expert[ids[t, k]](x[t]), by the result.

        Args:
            layer: of the model.
            x: [T, D]; it and the others lie on the layer's device.
            ids: int64 [T, K].
            weights: fp32 [T, K].

        Returns:
            A function to be called once, before the next `begin`: -> [T, D]. It raises DeviceError where a device
            keeps failing.
        """
        lane, graphs = self._lane[layer], capturing()
        if not graphs:
            return lane.begin(layer, x, ids, weights)
        if captured := lane.captured(layer, x, ids, weights):
            captured.begin(graphs)
            return lambda: captured.finish(graphs)
        y, begun = torch.empty_like(x), list[Result]()

        def begin() -> None:
            begun[:] = [lane.begin(layer, x, ids, weights)]

        def finish() -> Tensor:
            graphs.between(lambda: y.copy_(begun[0]()))
            return y

        graphs.between(begin)
        return finish

    def close(self) -> None:
        """Give back the devices."""
        for lane in self.lanes:
            lane.slots.device.close()


def _to(like: Tensor, array: Ints) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if like.is_cpu else tensor.to(like.device)

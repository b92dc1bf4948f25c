"""Routed experts between a GPU and RAM: who computes what, and what is copied meanwhile.

A step of few tokens learns its experts from the router: those with slots run on the device, and the misses are split
between PCIe copies and the CPU so that both finish at the same time. A step of many tokens streams whole layers through
the staging buffers instead, the next layer's experts while this one computes. Either way every expert's output is
computed alone and added in the order of the experts' numbers, so that placement does not change the sum.
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
from dsv2_local.kernels.format import ExpertLayout
from dsv2_local.kernels.graphs import PiecewiseGraph
from dsv2_local.offload.balance import Costs, Watch, divide, streaming_pays
from dsv2_local.offload.device import Event
from dsv2_local.offload.dispatch import Dispatch, Ints
from dsv2_local.offload.expert_slots import ExpertSlots
from dsv2_local.offload.graph_experts import GraphBuffers, GraphExperts
from dsv2_local.offload.layer_stream import LayerStream
from dsv2_local.offload.plan_request import Mode
from dsv2_local.offload.sizes import PAIRS_AT_ONCE, STAGING_BUFFERS

FAILURES = 8  # layers' steps in a row that failed on a device and were done without it, before that is an error

Result = Callable[[], Tensor]


@dataclass
class ExpertStats:
    """What happened to the experts of a run.

    Attributes:
        hits, misses: experts of a layer and step that had a slot, and that had none.
        fetched_bytes, fetch_seconds: copied over the link, streamed layers included.
        host_experts, host_seconds: computed by the CPU, counted anew in each layer and step.
        streamed_layers: layers whose experts were all streamed.
        retries: layers of a step that failed on a device and were computed again on the CPU.
    """

    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0
    fetch_seconds: float = 0.0
    host_experts: int = 0
    host_seconds: float = 0.0
    streamed_layers: int = 0
    retries: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    def __add__(self, other: "ExpertStats") -> "ExpertStats":
        return ExpertStats(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __sub__(self, other: "ExpertStats") -> "ExpertStats":
        return ExpertStats(**{name: value - getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True)
class _Step:
    """What a layer is to compute: x [T, D], ids and weights [T, K] on the device, and their pairs, rows there, too."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    dispatch: Dispatch
    rows: Tensor

    @classmethod
    def of(cls, x: Tensor, ids: Tensor, weights: Tensor, dispatch: Dispatch) -> "_Step":
        return cls(x, ids, weights, dispatch, _to(x, dispatch.rows))

    def places(self, part: slice, indices: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Of some pairs the token, and the index of the expert's record; int64 [n], on the device."""
        of_experts = [indices[expert] for expert in self.dispatch.experts[part].tolist()]
        return _to(self.x, self.dispatch.tokens[part]), _to(self.x, np.array(of_experts, dtype=np.int64))


class DeviceExperts:
    """One device, with the layers whose experts it computes.

    Attributes:
        costs: what fetching and computing an expert take, corrected where observation says otherwise.
        corrected: whether it did.
    """

    def __init__(
        self,
        slots: ExpertSlots,
        layout: ExpertLayout,
        records: dict[int, Tensor],
        mode: Mode,
        costs: Costs,
        graph_buffers: GraphBuffers | None = None,
    ) -> None:
        """The layers of one device.

        Args:
            slots: where experts lie on the device.
            layout: of an expert.
            records: uint8 [E, layout.nbytes] in RAM, by layer, ascending.
            mode: who computes the experts.
            costs: of fetching and computing one.
            graph_buffers: what captured steps work with; None where Python computes the experts between the graphs.
        """
        self.slots, self.layout, self.records, self.mode, self.costs = slots, layout, records, mode, costs
        self.graph_buffers = graph_buffers
        self._device = slots.device
        self._stream = LayerStream(slots, records)
        self._stats = ExpertStats()
        self._failures = 0
        self.corrected = False
        self._fetch_watch, self._host_watch = Watch(), Watch()

    @property
    def stats(self) -> ExpertStats:
        counters = self.slots.cache.counters.values()
        return replace(
            self._stats,
            hits=sum(counter.hits for counter in counters),
            misses=sum(counter.misses for counter in counters),
            fetched_bytes=self.slots.fetched,
            fetch_seconds=self.slots.fetch_seconds,
        )

    def start(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Result:
        """See `model.Experts`; not while a step is captured."""
        if self.mode is Mode.CPU:
            return lambda: self._alone(layer, x, ids, weights)
        streams = self._streams(layer, *ids.shape)
        if not streams and ids.numel() > PAIRS_AT_ONCE:
            parts = [torch.split(whole, PAIRS_AT_ONCE // ids.shape[1]) for whole in (x, ids, weights)]
            return lambda: torch.cat([self.start(layer, *part)() for part in zip(*parts, strict=True)])
        self.slots.cache.release()
        try:
            finish = (self._start_streamed if streams else self._start_split)(layer, x, ids, weights)
        except DeviceError as error:
            failed = error
            return lambda: self._again(failed, layer, x, ids, weights)
        return lambda: self._finish(finish, layer, x, ids, weights)

    def _streams(self, layer: int, tokens: int, per_token: int) -> bool:
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
        self._stats.retries += 1
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

    def _start_split(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Result:
        """A step of few tokens."""
        self._stream.reset()
        chosen = ids.cpu().numpy()  # waits for the router, and so for all work before
        self._observe()
        counts = Counter(chosen.ravel().tolist())
        hits, misses = self.slots.cache.use(layer, sorted(counts))
        fetched, on_host = self._divide(layer, misses, counts)
        batches = [fetched[i : i + self.slots.buffer] for i in range(0, len(fetched), self.slots.buffer)]
        dispatch = Dispatch(chosen, counts, [sorted(hits), *batches, on_host])
        step, out = _Step.of(x, ids, weights, dispatch), torch.empty(chosen.size, x.shape[1], device=x.device)
        indices = [self._fetch(layer, batch) for batch in batches[:STAGING_BUFFERS]]
        given = [self._outputs(step, dispatch.parts[0], hits, out)] if hits else []
        x_host = x.cpu() if on_host else x

        def finish() -> Tensor:
            for number in range(len(batches)):
                given.append(self._outputs(step, dispatch.parts[1 + number], indices[number], out))
                if number + STAGING_BUFFERS < len(batches):
                    indices.append(self._fetch(layer, batches[number + STAGING_BUFFERS]))
            part = dispatch.parts[-1]
            here = self._host_outputs(layer, x_host, dispatch) if on_host else out
            y = torch.zeros(x.shape, device=x.device)

            def add_up() -> None:
                if on_host:
                    out[part].copy_(here)
                ops.combine(out, step.rows, ids, weights, y)

            self._device.join(self.slots.compute(add_up, after=given))
            return y

        return finish

    def _start_streamed(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Result:
        """A step of many tokens: all experts of the layer pass, group by group."""
        self._observe()
        groups = self._stream.enter(layer)

        def finish() -> Tensor:
            chosen = ids.cpu().numpy()
            counts = dict(enumerate(np.bincount(chosen.ravel()).tolist()))
            dispatch = Dispatch(chosen, counts, groups)
            step = _Step.of(x, ids, weights, dispatch)
            y = torch.zeros(x.shape, device=x.device)
            given: list[Event] = []
            for number in range(len(groups)):
                indices, whole = self._stream.take(), dispatch.parts[number]
                for start in range(whole.start, whole.stop, PAIRS_AT_ONCE):
                    part = slice(start, min(start + PAIRS_AT_ONCE, whole.stop))
                    given = [self._added(step, part, indices, y, given)]
                self._stream.advance()
            self._device.join(given[0])
            self._stats.streamed_layers += 1
            return y

        return finish

    def place(self, layer: int, experts: list[int]) -> tuple[dict[int, int], dict[int, int], list[int]]:
        """See `graph_experts.ExpertPlacer`."""
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
        """See `graph_experts.ExpertPlacer`."""
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

    def _host_outputs(self, layer: int, x: Tensor, dispatch: Dispatch) -> Tensor:
        """Compute the last group of pairs on the CPU: x [T, D] in RAM -> fp32 [n, D]."""
        part = dispatch.parts[-1]
        out = torch.empty(part.stop - part.start, x.shape[1])
        tokens, experts = torch.from_numpy(dispatch.tokens[part]), torch.from_numpy(dispatch.experts[part])
        self.compute_on_host(layer, x, tokens, experts, out)
        return out

    def _count(self, experts: int, seconds: float) -> None:
        self._stats.host_experts += experts
        self._stats.host_seconds += seconds

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

    def __init__(self, devices: Sequence[DeviceExperts]) -> None:
        """Each layer belongs to one device."""
        self.devices = devices
        self._owner = {layer: device for device in devices for layer in device.records}

    @property
    def stats(self) -> ExpertStats:
        """What happened so far."""
        return sum((device.stats for device in self.devices), ExpertStats())

    def start(
        self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, capture: PiecewiseGraph | None = None
    ) -> Result:
        """See `model.Experts`. The result raises DeviceError where a device keeps failing."""
        owner = self._owner[layer]
        if capture is None:
            return owner.start(layer, x, ids, weights)
        if owner.graph_buffers:
            in_graphs = GraphExperts(owner, owner.graph_buffers, layer, x, ids, weights)
            in_graphs.capture_hits(capture)
            return lambda: in_graphs.capture_misses(capture)
        y, started = torch.empty_like(x), list[Result]()

        def start() -> None:
            started[:] = [owner.start(layer, x, ids, weights)]

        def finish() -> Tensor:
            capture.call_between(lambda: y.copy_(started[0]()))
            return y

        capture.call_between(start)
        return finish

    def close(self) -> None:
        """Give back the devices."""
        for device in self.devices:
            device.slots.device.close()


def _to(like: Tensor, array: Ints) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if like.is_cpu else tensor.to(like.device)

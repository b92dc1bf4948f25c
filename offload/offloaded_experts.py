"""Routed experts split between a GPU and RAM: which device computes an expert, and which experts are copied meanwhile.

A step of few tokens waits for the router's choice: cached experts run on the GPU, and missing experts are split between
PCIe copies and the CPU so that both finish at the same time. A step of many tokens streams whole layers through the
staging buffers instead, copying the next layer's experts while this layer computes. In both cases each expert's output
is computed separately and the outputs are added in the order of the experts' numbers, so placement does not change the
sum.
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
from dsv2_local.kernels.graphs import PiecewiseGraph, to_device
from dsv2_local.offload import native_placing
from dsv2_local.offload.balance import Costs, Watch, divide, streaming_pays
from dsv2_local.offload.device import Event
from dsv2_local.offload.dispatch import Dispatch, Ints
from dsv2_local.offload.expert_cache import ON_HOST
from dsv2_local.offload.expert_slots import ExpertSlots
from dsv2_local.offload.graph_experts import GraphBuffers, GraphExperts
from dsv2_local.offload.layer_stream import LayerStream
from dsv2_local.offload.native_placing import NativePlacing
from dsv2_local.offload.plan_request import Mode
from dsv2_local.offload.sizes import PAIRS_AT_ONCE, STAGING_BUFFERS
from dsv2_local.offload.streamed_layer import StreamedLayer

FAILURES = 8  # consecutive layers that may fail on a device and be computed on the CPU; one more raises the error

Result = Callable[[], Tensor]


@dataclass
class ExpertStats:
    """Counters of what happened to the routed experts.

    An expert counts once for every layer and step that uses it.

    Attributes:
        hits, misses: experts that had a slot, and experts that had none.
        fetched_bytes, fetch_seconds: copies over the PCIe link, including those of streamed layers.
        host_experts, host_seconds: experts computed by the CPU.
        streamed_layers: layers whose experts were all streamed.
        retries: layers that failed on a device and were computed again on the CPU.
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
class LayerExperts:
    """What happened to the routed experts of one layer, since loading.

    An expert counts once for every step that uses it.

    Attributes:
        layer: index of the layer in the model.
        experts: how many the layer has.
        resident: those that are in GPU memory now, ascending.
        hits: experts that had a slot when a step of few tokens used them.
        fetched: experts that were copied to the GPU; all that have no slot, if the layer was streamed.
        cpu: experts that the CPU computed.
    """

    layer: int
    experts: int
    resident: list[int]
    hits: int
    fetched: int
    cpu: int


@dataclass(frozen=True)
class _Step:
    """The input of a layer's experts: x [T, D], ids and weights [T, K], the dispatch, and its rows on the device."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    dispatch: Dispatch
    rows: Tensor

    @classmethod
    def of(cls, x: Tensor, ids: Tensor, weights: Tensor, dispatch: Dispatch) -> "_Step":
        return cls(x, ids, weights, dispatch, _to(x, dispatch.rows))

    def pairs(self, part: slice, indices: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Token and record index of the pairs in this range: int64 [n], on the device."""
        records = [indices[expert] for expert in self.dispatch.experts[part].tolist()]
        return _to(self.x, self.dispatch.tokens[part]), _to(self.x, np.array(records, dtype=np.int64))


class DeviceExperts:
    """The routed experts of the layers that belong to one device.

    Attributes:
        costs: seconds to copy and to compute an expert, corrected when measured times disagree.
        corrected: whether the costs have been corrected.
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
        """Join a device's slots with the records in RAM.

        Args:
            slots: expert records on the device.
            layout: layout of one expert's record.
            records: uint8 [E, layout.nbytes] in RAM, by layer, ascending.
            mode: where experts are computed.
            costs: seconds to copy and to compute one expert.
            graph_buffers: buffers of captured steps; None if Python computes the experts between the graphs.
        """
        self.slots, self.layout, self.records, self.mode, self.costs = slots, layout, records, mode, costs
        self.graph_buffers = graph_buffers
        self._device = slots.device
        self.native = self._native_placing()
        self._compiled = set[int]()  # numbers of tokens for which a step can be captured
        self._stream = LayerStream(slots, records)
        self._stats = ExpertStats()
        self._failures = 0
        self._native_step = False  # whether native code ran a step since this last waited for the device
        self.corrected = False
        self._fetch_watch, self._host_watch = Watch(), Watch()

    def _native_placing(self) -> NativePlacing | None:
        """Native code for captured steps, if there is any for this device and these experts."""
        handles = self._device.native_handles() if self.graph_buffers else None
        if not self.graph_buffers or not handles:
            return None
        if not native_placing.usable(self.layout, self.graph_buffers.ids.numel()):
            return None
        return NativePlacing(self.slots, self.layout, handles, self.graph_buffers, self.mode is Mode.STREAM)

    @property
    def stats(self) -> ExpertStats:
        self._count_native()
        total = self.slots.cache.total
        return replace(
            self._stats,
            hits=total.hits,
            misses=total.misses,
            fetched_bytes=self.slots.fetched,
            fetch_seconds=self.slots.fetch_seconds,
        )

    def start(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Result:
        """See `model.Experts`; not for use while a step is being captured."""
        if self.graph_buffers and len(x) <= self.graph_buffers.max_rows and len(x) not in self._compiled:
            self._compiled.add(len(x))
            self.graph_buffers.compile(x, ids, self.slots.records, self.layout)
        if self.mode is Mode.CPU:
            return lambda: self._compute_on_cpu(layer, x, ids, weights)
        streams = self._streams(layer, *ids.shape)
        if not streams and ids.numel() > PAIRS_AT_ONCE:
            parts = [torch.split(whole, PAIRS_AT_ONCE // ids.shape[1]) for whole in (x, ids, weights)]
            return lambda: torch.cat([self.start(layer, *part)() for part in zip(*parts, strict=True)])
        if self._native_step:  # its last graphs may still be reading what copies would overwrite
            self._device.synchronize()
            self._native_step = False
        self.slots.cache.release()
        try:
            finish = (self._start_streamed if streams else self._start_split)(layer, x, ids, weights)
        except DeviceError as error:
            failed = error
            return lambda: self._retry_on_cpu(failed, layer, x, ids, weights)
        return lambda: self._finish(finish, layer, x, ids, weights)

    def _streams(self, layer: int, tokens: int, per_token: int) -> bool:
        if tokens == 1:  # its few experts arrive sooner than the whole layer; counting residents would only delay them
            return False
        experts = len(self.records[layer])
        resident = sum(self.slots.cache.peek((layer, expert)) is not None for expert in range(experts)) / experts
        shared = self.mode is not Mode.STREAM
        return streaming_pays(tokens, experts, per_token, resident, self.costs, shared=shared)

    def _finish(self, finish: Result, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        try:
            y = finish().to(x.dtype)
        except DeviceError as error:
            return self._retry_on_cpu(error, layer, x, ids, weights)
        self._failures = 0
        return y

    def _retry_on_cpu(self, error: DeviceError, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Compute a layer that failed on the device without it, and evict the experts whose copies failed."""
        self._failures += 1
        if self._failures > FAILURES:
            raise error
        self._stats.retries += 1
        self._stream.reset()
        self.slots.drop_failed()
        return self._compute_on_cpu(layer, x, ids, weights)

    def _compute_on_cpu(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Compute all experts of a layer on the CPU."""
        chosen = ids.cpu()
        start = perf_counter()
        y = ops.experts(x.cpu(), self.records[layer], self.layout, chosen, weights.cpu())
        self._count_host(layer, len(torch.unique(chosen)), perf_counter() - start)
        return y.to(x.device)

    def _start_split(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Result:
        """Start a step of few tokens: missing experts are split between PCIe copies and the CPU."""
        self._stream.reset()
        chosen = ids.cpu().numpy()  # waits for the router, and so for all earlier work
        self._observe()
        counts = Counter(chosen.ravel().tolist())
        hits, misses = self.slots.cache.use(layer, sorted(counts))
        fetched, on_host = self._divide(layer, misses, counts)
        batches = [fetched[i : i + self.slots.buffer] for i in range(0, len(fetched), self.slots.buffer)]
        dispatch = Dispatch(chosen, counts, [sorted(hits), *batches, on_host])
        step, out = _Step.of(x, ids, weights, dispatch), torch.empty(chosen.size, x.shape[1], device=x.device)
        indices = [self._fetch(layer, batch) for batch in batches[:STAGING_BUFFERS]]
        queued = [self._queue_outputs(step, dispatch.parts[0], hits, out)] if hits else []
        x_host = x.cpu() if on_host else x

        def finish() -> Tensor:
            for number in range(len(batches)):
                queued.append(self._queue_outputs(step, dispatch.parts[1 + number], indices[number], out))
                if number + STAGING_BUFFERS < len(batches):
                    indices.append(self._fetch(layer, batches[number + STAGING_BUFFERS]))
            part = dispatch.parts[-1]
            host_out = self._host_outputs(layer, x_host, dispatch) if on_host else out
            y = torch.zeros(x.shape, device=x.device)

            def add_up() -> None:
                if on_host:
                    out[part].copy_(host_out, non_blocking=True)
                ops.combine(out, step.rows, ids, weights, y)

            self._device.join(self.slots.compute(add_up, after=queued))
            return y

        return finish

    def _start_streamed(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Result:
        """Start a step of many tokens: all experts of the layer pass through the staging buffers, group by group."""
        self._observe()
        groups = self._stream.enter(layer)
        streamed = StreamedLayer(self.slots, self.layout, len(self.records[layer]), x, ids, weights)

        def finish() -> Tensor:
            y = streamed.through(groups, self._stream)
            self._stats.streamed_layers += 1
            return y

        return finish

    def begin_step(self) -> None:
        """See `graph_experts.ExpertPlacer`."""
        assert self.native is not None
        self._native_step = True
        self._stream.reset()
        self.slots.finish_copies()
        self._count_native()
        self._correct_costs()
        self.native.set_costs(self.costs)

    def _count_native(self) -> None:
        """Add what native code did to the counters, and record how long it took."""
        done = self.native.take_done() if self.native else None
        if done and done.fetched:
            self.slots.count_fetched(done.fetched, done.fetch_seconds)
            self._fetch_watch.observe(done.fetch_expected, done.fetch_seconds)
        if done and done.on_host:
            self._count(done.on_host, done.host_seconds)  # by layers it has counted them itself
            self._host_watch.observe(done.host_expected, done.host_seconds)

    def place(self, layer: int, counts: Mapping[int, int]) -> tuple[dict[int, int], dict[int, int], list[int]]:
        """See `graph_experts.ExpertPlacer`. What the staging buffers cannot hold is left to the CPU."""
        self._stream.reset()
        self._observe()
        self.slots.cache.release()
        hits, misses = self.slots.cache.use(layer, sorted(counts))
        fetched, on_host = self._divide(layer, misses, counts, self.slots.staged)
        indices: dict[int, int] = {}
        for start in range(0, len(fetched), max(1, self.slots.buffer)):
            indices |= self._fetch(layer, fetched[start : start + self.slots.buffer])
        return hits, indices, on_host

    def compute_on_host(self, layer: int, x: Tensor, tokens: Tensor, experts: Tensor, out: Tensor) -> None:
        """See `graph_experts.ExpertPlacer`."""
        start = perf_counter()
        ops.expert_outputs(x, self.records[layer], self.layout, tokens, experts, out)
        seconds = perf_counter() - start
        counts = Counter(experts.tolist()).values()
        self._count_host(layer, len(counts), seconds)
        self._host_watch.observe(self.costs.start + sum(map(self.costs.host, counts)), seconds)

    def _divide(
        self, layer: int, misses: list[int], counts: Mapping[int, int], most: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Split missing experts into those to copy, at most `most`, and those for the CPU, both in ascending order."""
        most = len(misses) if most is None else most
        if self.mode is Mode.STREAM and len(misses) <= most:
            return misses, []
        if self.mode is Mode.CPU:
            return [], misses
        worth = self.slots.cache.worth
        misses.sort(key=lambda expert: (counts[expert], worth((layer, expert))), reverse=True)
        wanted = most if self.mode is Mode.STREAM else divide([counts[expert] for expert in misses], self.costs)
        fetched = min(wanted, most)
        return sorted(misses[:fetched]), sorted(misses[fetched:])

    def _fetch(self, layer: int, experts: Sequence[int]) -> dict[int, int]:
        return self.slots.fetch(layer, self.records[layer], experts, free_only=False)

    def _queue_outputs(self, step: _Step, part: slice, indices: dict[int, int], out: Tensor) -> Event:
        """Queue the computation of some pairs on the device, into their rows of `out`."""
        tokens, slots = step.pairs(part, indices)
        x, records, layout, target = step.x, self.slots.records, self.layout, out[part]
        return self.slots.compute(
            lambda: ops.expert_outputs(x, records, layout, tokens, slots, target, len(indices)), reads=indices.values()
        )

    def _host_outputs(self, layer: int, x: Tensor, dispatch: Dispatch) -> Tensor:
        """Compute the last group of pairs on the CPU: x [T, D] in RAM -> fp32 [n, D]."""
        part = dispatch.parts[-1]
        out = self._device.page_locked((part.stop - part.start, x.shape[1]), torch.float32)
        tokens, experts = torch.from_numpy(dispatch.tokens[part]), torch.from_numpy(dispatch.experts[part])
        self.compute_on_host(layer, x, tokens, experts, out)
        return out

    def by_layer(self) -> list[LayerExperts]:
        """What happened to the experts of each layer, ascending. Any thread may ask, while steps are computed too."""
        cache, found = self.slots.cache, []
        for layer, records in self.records.items():
            counts = cache.counter(layer)
            found.append(
                LayerExperts(layer, len(records), cache.residents(layer), counts.hits, counts.copies, counts.on_host)
            )
        return found

    def _count_host(self, layer: int, experts: int, seconds: float) -> None:
        self.slots.cache.counts[layer, ON_HOST] += experts
        self._count(experts, seconds)

    def _count(self, experts: int, seconds: float) -> None:
        self._stats.host_experts += experts
        self._stats.host_seconds += seconds

    def _observe(self) -> None:
        """Record how long finished copies took, and correct the costs if they are off by much."""
        nbytes, seconds = self.slots.settle()
        if nbytes:
            self._fetch_watch.observe(nbytes / self.layout.nbytes * self.costs.fetch, seconds)
        self._correct_costs()

    def _correct_costs(self) -> None:
        fetch, host = self._fetch_watch.correction(), self._host_watch.correction()
        if fetch or host:
            self.corrected, costs = True, self.costs
            on_host = (seconds * (host or 1) for seconds in (costs.read, costs.token, costs.start))
            self.costs = Costs(costs.fetch * (fetch or 1), *on_host)


class OffloadedExperts:
    """The routed experts of a model whose dense weights are on one or several devices."""

    replayable = False

    def __init__(self, devices: Sequence[DeviceExperts]) -> None:
        """Combine the experts of several devices; each layer belongs to one of them."""
        self.devices = devices
        self._owner = {layer: device for device in devices for layer in device.records}

    @property
    def stats(self) -> ExpertStats:
        """The counters of all devices since loading."""
        return sum((device.stats for device in self.devices), ExpertStats())

    def by_layer(self) -> list[LayerExperts]:
        """What happened to the experts of each layer, ascending. Any thread may ask, while steps are computed too."""
        return [layer for device in self.devices for layer in device.by_layer()]

    def start(
        self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, capture: PiecewiseGraph | None = None
    ) -> Result:
        """See `model.Experts`. The returned function raises DeviceError if a device keeps failing."""
        owner = self._owner[layer]
        if capture is None:
            return owner.start(layer, x, ids, weights)
        if owner.graph_buffers:
            graph_experts = GraphExperts(owner, owner.graph_buffers, layer, x, ids, weights)
            graph_experts.capture_hits(capture)
            return lambda: graph_experts.capture_misses(capture)
        y, started = torch.empty_like(x), list[Result]()

        def start() -> None:
            started[:] = [owner.start(layer, x, ids, weights)]

        def finish() -> Tensor:
            capture.call_between(lambda: y.copy_(started[0]()))
            return y

        capture.call_between(start)
        return finish

    def close(self) -> None:
        """Release the devices."""
        for device in self.devices:
            device.slots.device.close()


def _to(like: Tensor, array: Ints) -> Tensor:
    return to_device(torch.from_numpy(array), like.device)

"""Routing traces: the experts that a model chose for a text, and the hit rates of expert caches on them.

A trace is a text file. Its first line is JSON with the model's name and its numbers of MoE layers and of experts per
layer. Each further line is a token: the experts of the first MoE layer, a semicolon, those of the second, and so on;
within a layer, the highest-scoring expert comes first.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

from dsv2_local.errors import InputError
from dsv2_local.offload.expert_cache import ExpertCache, Key, Policy

FORMAT = "dsv2 routing trace 1"


@dataclass(frozen=True)
class Trace:
    """The experts that a model chose.

    Attributes:
        model: name of the model.
        layers, experts: number of MoE layers, and of experts in each.
        tokens: `tokens[t][l]` are the experts of token t in the l-th MoE layer.
    """

    model: str
    layers: int
    experts: int
    tokens: list[list[list[int]]]

    def save(self, path: Path) -> None:
        """Write the trace to a file."""
        head = {"format": FORMAT, "model": self.model, "layers": self.layers, "experts": self.experts}
        lines = (";".join(" ".join(map(str, layer)) for layer in token) for token in self.tokens)
        path.write_text("\n".join([json.dumps(head), *lines]) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Read a trace from a file.

        Raises:
            InputError: the file cannot be read, is not a trace, or has a damaged line, which the message names.
        """
        try:
            head, *lines = path.read_text(encoding="utf-8").splitlines()
            described = json.loads(head)
            if described.pop("format") != FORMAT:
                raise KeyError
            trace = cls(**described, tokens=[])
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is not a routing trace; `dsv2 bench --record-trace {path}` writes one") from None
        for number, line in enumerate(lines, 2):
            trace.tokens.append(_token(line, trace, f"{path}, line {number}"))
        return trace

    def uses(self) -> Iterator[Key]:
        """Every use of an expert, in order."""
        for token in self.tokens:
            for layer, chosen in enumerate(token):
                yield from ((layer, expert) for expert in chosen)


def _token(line: str, trace: Trace, where: str) -> list[list[int]]:
    try:
        token = [[int(expert) for expert in layer.split()] for layer in line.split(";")]
    except ValueError:
        raise InputError(f"{where}: not a list of expert numbers: {line[:40]!r}") from None
    if len(token) != trace.layers or not all(0 <= expert < trace.experts for layer in token for expert in layer):
        raise InputError(f"{where}: not {trace.layers} layers of expert numbers below {trace.experts}")
    return token


def hit_rate(trace: Trace, slots: int, policy: Policy) -> float:
    """Hits over uses of an expert cache that starts empty and fetches every miss that its policy admits."""
    cache = ExpertCache(slots, trace.layers, trace.experts, policy)
    for token in trace.tokens:
        for layer, chosen in enumerate(token):
            _, misses = cache.use(layer, chosen)
            for expert in misses:
                cache.admit((layer, expert))
            cache.release()
    return cache.hit_rate


def best_hit_rate(trace: Trace, slots: int) -> float:
    """Hits over uses of the optimal cache, which evicts the expert whose next use is furthest away (Belady, 1966)."""
    uses = list(trace.uses())
    following = _next_uses(uses)
    cached: dict[Key, int] = {}  # position of the next use
    latest: list[tuple[int, Key]] = []  # heap with the furthest next use first, and stale entries
    hits = 0
    for position, key in enumerate(uses):
        if key in cached:
            hits += 1
        elif slots == 0:
            continue
        elif len(cached) >= slots:
            while cached.get(latest[0][1]) != -latest[0][0]:
                heappop(latest)
            if -latest[0][0] <= following[position]:
                continue  # the new expert's own next use is the furthest away
            del cached[heappop(latest)[1]]
        cached[key] = following[position]
        heappush(latest, (-following[position], key))
    return hits / max(1, len(uses))


def _next_uses(uses: list[Key]) -> list[int]:
    """For each use the position of the next use of the same expert; `len(uses)` if there is none."""
    later: dict[Key, int] = {}
    never, found = len(uses), [0] * len(uses)
    for position in range(len(uses) - 1, -1, -1):
        found[position] = later.get(uses[position], never)
        later[uses[position]] = position
    return found

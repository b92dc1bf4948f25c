"""Which experts a model chose for a text, token by token, and what a cache of experts would have made of it.

A trace is a text file: a first line of JSON with the model's name, layers, experts and experts per token, then a line
for each token: the experts of the first MoE layer, a semicolon, those of the second, and so on; best first.
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
    """Experts by token and MoE layer: `tokens[t][l]` are the experts of token t in the l-th MoE layer."""

    model: str
    layers: int
    experts: int
    tokens: list[list[list[int]]]

    def save(self, path: Path) -> None:
        head = {"format": FORMAT, "model": self.model, "layers": self.layers, "experts": self.experts}
        lines = (";".join(" ".join(map(str, layer)) for layer in token) for token in self.tokens)
        path.write_text("\n".join([json.dumps(head), *lines]) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Raises InputError for what is no trace, or a damaged one, naming the line."""
        try:
            head, *lines = path.read_text(encoding="utf-8").splitlines()
            described = json.loads(head)
            if described.pop("format") != FORMAT:
                raise KeyError
            trace = cls(**described, tokens=[])
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is no routing trace; `dsv2 bench --trace {path}` writes one") from None
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
        raise InputError(f"{where}: not the numbers of experts: {line[:40]!r}") from None
    if len(token) != trace.layers or not all(0 <= expert < trace.experts for layer in token for expert in layer):
        raise InputError(f"{where}: not {trace.layers} layers of experts below {trace.experts}")
    return token


def hit_rate(trace: Trace, slots: int, policy: Policy) -> float:
    """Hits over uses of a cache that fetches every miss it lets in, from empty."""
    cache = ExpertCache(slots, policy)
    for token in trace.tokens:
        for layer, chosen in enumerate(token):
            _, misses = cache.use(layer, chosen)
            for expert in misses:
                cache.admit((layer, expert))
            cache.release()
    return cache.hit_rate


def best_hit_rate(trace: Trace, slots: int) -> float:
    """Hits over uses of a cache that knows the future: out goes what is used again last (Belady, 1966)."""
    uses = list(trace.uses())
    following = _next_uses(uses)
    held: dict[Key, int] = {}  # the place of its next use
    latest: list[tuple[int, Key]] = []  # by that place, the last first; with stale entries
    hits = 0
    for place, key in enumerate(uses):
        if key in held:
            hits += 1
        elif slots == 0:
            continue
        elif len(held) >= slots:
            while held.get(latest[0][1]) != -latest[0][0]:
                heappop(latest)
            if -latest[0][0] <= following[place]:
                continue  # the newcomer is the one that is used last
            del held[heappop(latest)[1]]
        held[key] = following[place]
        heappush(latest, (-following[place], key))
    return hits / max(1, len(uses))


def _next_uses(uses: list[Key]) -> list[int]:
    """For each place the next one of the same expert; what never comes again comes after all others."""
    later: dict[Key, int] = {}
    never, found = len(uses), [0] * len(uses)
    for place in range(len(uses) - 1, -1, -1):
        found[place] = later.get(uses[place], never)
        later[uses[place]] = place
    return found

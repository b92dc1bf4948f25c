"""Hit rates of expert cache policies on a routing trace, by number of slots, as a table and a plot.

    dsv2 bench -m MODEL --record-trace model.trace < text.txt
    python benchmarks/expert_cache.py model.trace [--slots 12,24,48] [--png plot.png]

"even" is the hit rate of even routing with any policy, slots over experts; "best" is the optimal cache, which knows
future uses (Belady). --png needs matplotlib, which is not a dependency of the package.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsv2_local.errors import Dsv2Error
from dsv2_local.offload.expert_cache import Policy
from dsv2_local.offload.trace import Trace, best_hit_rate, hit_rate

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
HEIGHT = 16
MARKS = {"best": "B", Policy.LRU: "L", Policy.LFU: "F", Policy.LFU_AGEING: "A", Policy.LRFU: "R", "even": "."}


def rates(trace: Trace, slots: list[int]) -> dict[str, list[float]]:
    """Hit rates by policy, one per number of slots."""
    curves = {"best": [best_hit_rate(trace, count) for count in slots]}
    curves |= {policy: [hit_rate(trace, count, policy) for count in slots] for policy in Policy}
    return curves | {"even": [count / (trace.layers * trace.experts) for count in slots]}


def show(trace: Trace, slots: list[int], curves: dict[str, list[float]]) -> None:
    """Print a table and a plot of characters."""
    console = Console(highlight=False)
    experts = trace.layers * trace.experts
    console.print(f"{trace.model}: {len(trace.tokens):,} tokens, {trace.layers} layers of {trace.experts} experts")
    table = Table("slots", "of all", *curves)
    for column, count in enumerate(slots):
        values = (f"{curve[column]:.1%}" for curve in curves.values())
        table.add_row(f"{count:,}", f"{count / experts:.0%}", *values)
    console.print(table)
    rows = [[" "] * (6 * len(slots)) for _ in range(HEIGHT + 1)]
    for name in reversed(curves):
        for column, value in enumerate(curves[name]):
            rows[HEIGHT - round(HEIGHT * value)][6 * column + 2] = MARKS[name]
    for number, row in enumerate(rows):
        share = f"{1 - number / HEIGHT:>5.0%}" if number % 4 == 0 else ""
        console.print(f"{share:>5} |{''.join(row)}", markup=False)
    console.print(" " * 7 + "".join(f"{count:^6,}" for count in slots) + "slots")
    console.print(" " * 7 + ", ".join(f"{mark} {name}" for name, mark in MARKS.items()), markup=False)


def draw(trace: Trace, slots: list[int], curves: dict[str, list[float]], file: Path) -> None:
    """Draw the plot as a PNG."""
    import matplotlib  # type: ignore[import-not-found]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found]

    for name, curve in curves.items():
        pyplot.plot(slots, curve, "k:" if name == "even" else "o-", label=str(name), markersize=3)
    pyplot.xlabel(f"slots, of {trace.layers * trace.experts:,} experts")
    pyplot.ylabel("hit rate")
    pyplot.title(f"{trace.model}, {len(trace.tokens):,} tokens")
    pyplot.legend()
    pyplot.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="routing trace written by `dsv2 bench --record-trace`")
    parser.add_argument("--slots", help="numbers of slots, separated by commas (default: 5 to 90 %% of all experts)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the plot to this file too")
    args = parser.parse_args()
    try:
        trace = Trace.load(args.trace)
    except Dsv2Error as error:
        sys.exit(str(error))
    experts = trace.layers * trace.experts
    slots = [int(part) for part in args.slots.split(",")] if args.slots else [round(experts * s) for s in SHARES]
    curves = rates(trace, slots)
    show(trace, slots, curves)
    if args.png:
        draw(trace, slots, curves, args.png)


if __name__ == "__main__":
    main()

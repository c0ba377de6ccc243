#!/usr/bin/env python3
"""Charts of what the benchmarks measured, as PNG.

    python bench/charts.py RUN.json ... [--to docs/img]

Each file was written by --json of bench/run.py, peers.py, growth.py or stages.py; a chart is made for each, under the
name of its kind. Needs requirements-bench.txt. Exit status: 0 made, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

PROJECT: Final = Path(__file__).resolve().parent.parent
DPI: Final = 100
SIZE_IN: Final = (8.0, 3.6)
# Distinct in grey and for those who see few colours.
COLOURS: Final = ("#1b4f72", "#e67e22", "#7fb3d5", "#7b7d7d", "#196f3d")
SERVICE_ROWS: Final = ("echo", "get_memory", "reference add", "add_memory", "semantic_search again", "search_memory")
PEER_ROWS: Final = (
    ("add, acknowledged", "add 8", "per_s"),
    ("add, searchable", "add 8", "searchable_per_s"),
    ("batches, searchable", "batch", "searchable_per_s"),
    ("search", "search 8", "per_s"),
    ("search again", "search again", "per_s"),
)


def bars(axes: Axes, places: Sequence[str], series: dict[str, list[tuple[float, float, float]]]) -> None:
    """Grouped bars with the extremes as lines; each value is (median, least, most)."""
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        at = [place + (number - (len(series) - 1) / 2.0) * width for place in range(len(values))]
        middle = [value[0] for value in values]
        below = [value[0] - value[1] for value in values]
        above = [value[2] - value[0] for value in values]
        colour = COLOURS[number % len(COLOURS)]
        axes.bar(at, middle, width, label=name, color=colour, yerr=(below, above), ecolor="#333333", capsize=2)
    axes.set_xticks(range(len(places)), places)
    axes.legend(frameon=False, fontsize="small")


def of_service(run: dict[str, Any], axes: Axes) -> None:
    rows = {(row["workload"], row["clients"]): row for row in run["rows"]}
    clients = sorted({row["clients"] for row in run["rows"]})
    names = [name for name in SERVICE_ROWS if all((name, count) in rows for count in clients)]
    series = {}
    for count in clients:
        found = [rows[name, count] for name in names]
        label = f"{count} client{'s' if count > 1 else ''}"
        series[label] = [(row["per_s"], row["least_per_s"], row["most_per_s"]) for row in found]
    bars(axes, names, series)
    axes.set_yscale("log")
    axes.set_ylabel("requests per second")
    axes.set_title("The service beside a bare echo and a minimal durable store", fontsize="medium")


def of_peers(run: dict[str, Any], axes: Axes) -> None:
    series = {}
    for name, repeats in run["measured"].items():
        recall = statistics.median(one["recall"] for one in repeats)
        values = [[one[step][figure] for one in repeats] for _, step, figure in PEER_ROWS]
        series[f"{name} (recall@10 {recall:.2f})"] = [(statistics.median(v), min(v), max(v)) for v in values]
    bars(axes, [row[0] for row in PEER_ROWS], series)
    axes.set_yscale("log")
    axes.set_ylabel("per second, 8 clients")
    axes.set_title("The same turns, questions and weights", fontsize="medium")


def of_growth(run: dict[str, Any], axes: Axes) -> None:
    sizes = [row["memories"] for row in run["rows"]]
    for colour, name in zip(COLOURS, ("get_memory", "add_memory"), strict=False):
        values = [row[f"{name}: of the smallest"] for row in run["rows"]]
        axes.plot(sizes, values, marker="o", color=colour, label=name)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("memories in the store")
    axes.set_ylabel("requests per second,\nof those of the smallest store")
    axes.legend(frameon=False, fontsize="small")
    axes.set_title("What growth costs", fontsize="medium")


def of_stages(run: dict[str, Any], axes: Axes) -> None:
    actions = list(run["measured"])
    left = [0.0] * len(actions)
    for number, stage in enumerate(run["measured"][actions[0]]["stages"]):
        values = [run["measured"][action]["stages"][stage] for action in actions]
        colour = matplotlib.colormaps["tab10"](number)
        axes.barh(actions, values, left=left, label=stage, color=colour)
        left = [before + value for before, value in zip(left, values, strict=True)]
    axes.set_xlabel("microseconds of one request")
    axes.legend(frameon=False, fontsize="small", ncol=2)
    axes.set_title("Where a request's time goes", fontsize="medium")


CHARTS: Final[dict[str, Callable[[dict[str, Any], Axes], None]]] = {
    "service": of_service,
    "peers": of_peers,
    "growth": of_growth,
    "stages": of_stages,
}


def make(run: dict[str, Any], folder: Path) -> Path:
    """Draw one run. Raises KeyError for a file of no benchmark that has a chart."""
    kind = run.get("kind", "service")
    figure, axes = pyplot.subplots(figsize=SIZE_IN, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize="small")
    CHARTS[kind](run, axes)
    path = folder / f"{kind}.png"
    # Without the library's version in it, so that the same figures give the same file.
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    pyplot.close(figure)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw what the benchmarks measured.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.json", help="written by --json")
    parser.add_argument("--to", type=Path, default=PROJECT / "docs" / "img", metavar="DIR", help="%(default)s")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    for path in options.runs:
        try:
            print(make(json.loads(path.read_text("utf-8")), options.to))
        except (OSError, ValueError, KeyError) as error:
            print(f"{path}: not the JSON of a benchmark that has a chart ({error!r})", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

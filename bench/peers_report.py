"""Tables of the benchmark of peers: medians of the repetitions with their extremes, and ratios to each peer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Final

from peers_process import OURS
from rich import box
from rich.console import Console
from rich.table import Table

Measured = dict[str, list[dict[str, Any]]]

# Heading, then where a figure stands in what was measured in one repetition.
RATES: Final = (
    ("add, 1 client", "add 1", "per_s"),
    ("add, 8 clients", "add 8", "per_s"),
    ("add, 1 client, searchable", "add 1", "searchable_per_s"),
    ("add, 8 clients, searchable", "add 8", "searchable_per_s"),
    ("batches of 100", "batch", "per_s"),
    ("batches of 100, searchable", "batch", "searchable_per_s"),
    ("search, 1 client", "search 1", "per_s"),
    ("search, 8 clients", "search 8", "per_s"),
    ("search again, 8 clients", "search again", "per_s"),
)
TIMES: Final = ("add 1", "add 8", "search 1", "search 8", "search again")
TARGETS: Final = {"add, 1 client": 50.0, "add, 8 clients": 50.0, "search, 8 clients": 5.0}


def ratios(measured: Measured) -> dict[str, dict[str, float]]:
    """Peer -> row -> how many times as much this service does: the median of the ratios within the repetitions."""
    found: dict[str, dict[str, float]] = {}
    for name, theirs in measured.items():
        if name == OURS:
            continue
        pairs = list(zip(measured[OURS], theirs, strict=True))
        found[name] = {
            heading: statistics.median(ours[step][figure] / other[step][figure] for ours, other in pairs)
            for heading, step, figure in RATES
        }
        found[name]["recall@10"] = statistics.median(ours["recall"] / other["recall"] for ours, other in pairs)
        found[name]["resident memory"] = statistics.median(
            ours["resident_mb"] / other["resident_mb"] for ours, other in pairs
        )
    return found


def show(console: Console, figures: dict[str, Any], *, markdown: bool) -> None:
    measured: Measured = figures["measured"]
    console.print(f"{figures['turns']:,} turns, {figures['questions']:,} questions; each table: medians (min to max)")
    titled = (
        ("Per second", _rates(measured)),
        ("Waits, p50 / p95 in ms", _waits(measured)),
        ("Recall and memory", _others(measured)),
        ("This service over each peer", _ratio_rows(figures["ratios"])),
        ("What each does", _facts(figures["facts"], figures["versions"])),
    )
    for title, rows in titled:
        table = Table(*rows[0], title=title, title_justify="left", box=box.MARKDOWN if markdown else box.HEAVY_HEAD)
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)


def _rates(measured: Measured) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("", *measured)]
    for heading, step, figure in RATES:
        cells = (_spread([one[step][figure] for one in found], _rate) for found in measured.values())
        rows.append((heading, *cells))
    return rows


def _waits(measured: Measured) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("", *measured)]
    for step in TIMES:
        pairs = (
            [statistics.median(one[step][name] for one in found) for name in ("p50_ms", "p95_ms")]
            for found in measured.values()
        )
        rows.append((step, *(f"{p50:.1f} / {p95:.1f}" for p50, p95 in pairs)))
    return rows


def _others(measured: Measured) -> list[Sequence[str]]:
    return [
        ("", *measured),
        ("recall@10", *(_spread([one["recall"] for one in found], "{:.3f}".format) for found in measured.values())),
        (
            "resident MB",
            *(_spread([one["resident_mb"] for one in found], "{:,.0f}".format) for found in measured.values()),
        ),
    ]


def _ratio_rows(found: dict[str, dict[str, float]]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("", *found, "target")]
    for heading in next(iter(found.values()), {}):
        target = TARGETS.get(heading)
        cells = (f"{ratio[heading]:.3g}" for ratio in found.values())
        rows.append((heading, *cells, "" if target is None else f">= {target:g}"))
    return rows


def _facts(facts: dict[str, dict[str, str]], versions: dict[str, str]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("", "version", "an acknowledged add", "embeds", "clients")]
    for name, fact in facts.items():
        rows.append((name, versions.get(name, ""), fact["durable"], fact["embeds"], fact["clients"]))
    return rows


def _spread(values: list[float], shown: Callable[[float], str]) -> str:
    middle = shown(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({shown(min(values))} to {shown(max(values))})"


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 10.0 else f"{per_s:.1f}"

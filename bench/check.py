#!/usr/bin/env python3
"""Has the service become slower than what was last published?

    python bench/check.py RUN.json [--published bench/published.json] [--fall 0.15]
    python bench/check.py RUN.json ... --publish

RUN.json is what `bench/run.py --json` or `bench/peers.py --json` wrote. Only ratios are compared: to the echo, to the
reference, to the peers, each measured beside them in its own run. So another machine, or other programs at work, change
them far less than the figures themselves. Every ratio here is the better the larger it is. `--publish` makes the ratios
of the run the published ones: those of its kind (service or peers) are replaced, the others stay.

Exit status: 0 nothing fell, or published; 1 a ratio fell by more than `--fall`, or is not measured any more; 2 bad
arguments, or nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

PUBLISHED: Final = Path(__file__).resolve().parent / "published.json"
FALL: Final = 0.15
DIGITS: Final = 4
# What a ratio is to each peer for the better when it is small.
_SMALLER_IS_BETTER: Final = frozenset({"resident memory"})

Ratios = dict[str, float]


class BadRun(Exception):
    """A file that is not of the benchmark, or has no ratios."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One ratio; `change` is relative, below 0 where it fell. None where one of the two runs has not got it."""

    name: str
    published: float | None
    now: float | None

    @property
    def change(self) -> float | None:
        return self.now / self.published - 1.0 if self.now is not None and self.published else None


def kind_of(run: dict[str, Any]) -> str:
    return str(run.get("kind", "service"))


def ratios_of(run: dict[str, Any]) -> Ratios:
    """The ratios of a run by their names. Raises BadRun."""
    try:
        found = _of_peers(run) if kind_of(run) == "peers" else _of_service(run["rows"])
    except (KeyError, TypeError, AttributeError) as error:
        raise BadRun(f"it is not the JSON of a benchmark ({type(error).__name__}: {error})") from None
    if not found:
        raise BadRun("it has no ratios")
    return {name: round(value, DIGITS) for name, value in found.items()}


def _of_service(rows: Sequence[dict[str, Any]]) -> Ratios:
    """Requests per second, and processor time of the echo over that of the service, for each workload."""
    found: Ratios = {}
    echoes = {row["clients"]: row for row in rows if row["workload"] == "echo"}
    for row in rows:
        if row["workload"] in ("echo", "reference add"):
            continue
        name = f"{row['workload']}, {row['clients']} clients"
        if row["of_echo"] is not None:
            found[f"{name}: of echo"] = row["of_echo"]
        if row["of_reference"] is not None:
            found[f"{name}: of reference"] = row["of_reference"]
        echo = echoes.get(row["clients"])
        if echo is not None and echo["cpu_us"] and row["cpu_us"]:
            found[f"{name}: echo's processor time over its own"] = echo["cpu_us"] / row["cpu_us"]
    return found


def _of_peers(run: dict[str, Any]) -> Ratios:
    """A ratio of 0 that is the better the smaller has no inverse, and is left out."""
    return {
        f"{row}, over {peer}": 1.0 / value if row in _SMALLER_IS_BETTER else value
        for peer, rows in run["ratios"].items()
        for row, value in rows.items()
        if value or row not in _SMALLER_IS_BETTER
    }


def compare(published: Ratios, now: Ratios) -> list[Compared]:
    """All ratios of either, in the order of the published ones, then the new ones."""
    return [Compared(name, published.get(name), now.get(name)) for name in dict.fromkeys([*published, *now])]


def fallen(compared: Sequence[Compared], fall: float) -> list[Compared]:
    return [one for one in compared if one.change is not None and one.change < -fall]


def missing(compared: Sequence[Compared]) -> list[Compared]:
    """What was published and is not measured any more."""
    return [one for one in compared if one.published is not None and one.now is None]


def read(path: Path) -> dict[str, Any]:
    """Raises BadRun."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadRun(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadRun(f"{path}: no JSON ({error})") from None
    if not isinstance(found, dict):
        raise BadRun(f"{path}: no map")
    return found


def publish(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Replace the published ratios of the kinds of these runs, with the machine that they were measured on."""
    known = read(path) if path.exists() else {}
    for run in runs:
        known[kind_of(run)] = {"machine": run.get("machine", {}), "ratios": ratios_of(run)}
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", "utf-8")


def show(console: Console, compared: Sequence[Compared], fall: float) -> None:
    table = Table("ratio", "published", "now", "change", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for one in compared:
        fell = one.change is not None and one.change < -fall
        cells = ("-" if value is None else f"{value:.3g}" for value in (one.published, one.now))
        change = "not measured" if one.now is None else "not compared" if one.change is None else f"{one.change:+.0%}"
        table.add_row(one.name, *cells, change, style="red" if fell or one.now is None else None)
    console.print(table)


def check(options: argparse.Namespace, console: Console) -> int:
    runs = [read(path) for path in options.runs]
    if options.publish:
        publish(options.published, runs)
        console.print(f"published in {options.published}")
        return 0
    known = read(options.published)
    compared: list[Compared] = []
    for run in runs:
        compared += compare(known.get(kind_of(run), {}).get("ratios", {}), ratios_of(run))
    show(console, compared, options.fall)
    both = [one for one in compared if one.change is not None]
    if not both:
        raise BadRun(f"{options.published} has no ratio of these runs")
    fell, gone = fallen(compared, options.fall), missing(compared)
    for one in fell:
        console.print(f"fell by {-one.change:.0%}: {one.name}" if one.change is not None else "", style="red")
    for one in gone:
        console.print(f"not measured: {one.name}", style="red")
    console.print(f"{len(both)} ratios compared, {len(fell)} fell by more than {options.fall:.0%}")
    return 1 if fell or gone else 0


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare a run with the published ratios.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.json", help="written by --json")
    parser.add_argument("--published", type=Path, default=PUBLISHED, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--fall", type=float, default=FALL, metavar="SHARE", help="at most so much (%(default)s)")
    parser.add_argument("--publish", action="store_true", help="make the ratios of these runs the published ones")
    options = parser.parse_args(given)
    if not 0.0 < options.fall < 1.0:
        parser.error("--fall is a share between 0 and 1")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    try:
        return check(options, console)
    except BadRun as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())

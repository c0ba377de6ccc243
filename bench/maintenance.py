#!/usr/bin/env python3
"""How long do requests take while maintenance runs, beside the same load without it?

    python bench/maintenance.py [--due N] [--fading N] [--clients N] [--seconds S] [--rounds N] [--jobs A,B]
                                [--json FILE]

Memories that are due (to be archived, promoted, merged with their kin, or looked at again) are imported with the times
of ten days ago into namespaces of their own. Then clients read memories and others add some, at the same time, first
without a run and then during a decay and a consolidation that were begun together; and that in several rounds, by
turns, each with a namespace full of what is due. The figure is the median of the rounds. Exit status: 0 measured, 1 the
99th percentile of a read or of an add rose to more than twice, or a server failed, 2 bad arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import report
import servers
from clients import Load, LoadFailure, Sample, process_count
from corpus import Corpus
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from run import INTERRUPTS, WIDTH, interrupt

DAY_S: Final = 86_400.0
AGE_S: Final = 10 * DAY_S
JOBS: Final = ("run_decay", "run_consolidation")
LOADS: Final = ("get_memory", "add_memory")
LIVE_MEMORIES: Final = 5000
BATCH: Final = 1000
MAX_RATIO: Final = 2.0
# A run that ends before the measurement does would flatter it.
LEAST_SHARE: Final = 0.9
# Importance and accesses of what decay finds due: archived, promoted, archived.
DUE: Final = ((0.2, 0), (1.0, 3), (0.25, 1))
# A run may take longer than any other request.
RUN_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Of one round: memories due for decay, and fading; `clients` of each load, `seconds` of each measurement."""

    jobs: tuple[str, ...]
    due: int
    fading: int
    clients: int
    seconds: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement of one load. `share`: the part of it during which both runs, or one of them, were under way."""

    load: str
    number: int
    running: bool
    calls_per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    share: float


@dataclass
class Bench:
    """One service with what is due in it, its load, and what was measured so far."""

    plan: Plan
    server: servers.Server
    loads: dict[str, Load]
    progress: Progress
    measured: list[Measured] = field(default_factory=list)
    changes: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        self._task = self.progress.add_task("storing", total=1 + 3 * self.plan.rounds)
        self._ids = servers.fill(self.server, LIVE_MEMORIES, seed=1)[:1000]
        self.progress.advance(self._task)
        for number in range(self.plan.rounds):
            self._say(f"storing what is due, {number + 1} of {self.plan.rounds}")
            fill_due(self.server, f"due-{number}", self.plan, seed=100 + number)
            self.progress.advance(self._task)
        self._measure(-1, running=False)  # warms up, and is not counted
        for number in range(self.plan.rounds):
            self._say("without a run")
            self.measured += self._measure(number, running=False)
            self.progress.advance(self._task)
            self._say("during the runs")
            self.measured += self._during(number)
            self.progress.advance(self._task)

    def _during(self, number: int) -> list[Measured]:
        """Measure during both jobs, then wait for their end."""
        with ThreadPoolExecutor(len(self.plan.jobs)) as pool:
            runs = [pool.submit(self._maintain, action, f"due-{number}") for action in self.plan.jobs]
            time.sleep(0.2)
            samples = self._measure(number, running=True, runs=runs)
            self._say("waiting for the runs to end")
            for action, run in zip(self.plan.jobs, runs, strict=True):
                self.changes[action] = self.changes.get(action, 0) + run.result()[0]
        return samples

    def _maintain(self, action: str, namespace: str) -> tuple[int, float]:
        """How many memories a run changed, and when it ended."""
        with servers.Asker(self.server.endpoint, RUN_S) as asker:
            changes: int = asker.ask(action, {"namespaces": [namespace], "limit": 1})["changes"]
            return changes, time.monotonic()

    def _measure(self, number: int, *, running: bool, runs: Sequence[Future[tuple[int, float]]] = ()) -> list[Measured]:
        """Both loads at the same time, each from a process of its own."""
        began_s = time.monotonic()
        with ThreadPoolExecutor(len(LOADS)) as pool:
            asked = [pool.submit(self._sample, name, number) for name in LOADS]
            samples = [each.result() for each in asked]
        ended_s = time.monotonic()
        self.server.check_alive()
        last_s = max((ended_s if not run.done() else run.result()[1] for run in runs), default=ended_s)
        share = min(1.0, (last_s - began_s) / (ended_s - began_s))
        return [_measured(name, number, running, sample, share) for name, sample in zip(LOADS, samples, strict=True)]

    def _sample(self, name: str, number: int) -> Sample:
        seed = 1000 + 10 * number + LOADS.index(name)
        return self.loads[name].measure(
            name, self.server.endpoint, self.plan.clients, self.plan.seconds, seed, self._ids
        )

    def _say(self, text: str) -> None:
        self.progress.update(self._task, description=text)


def _measured(name: str, number: int, running: bool, sample: Sample, share: float) -> Measured:
    return Measured(
        load=name,
        number=number,
        running=running,
        calls_per_s=sample.calls_per_s,
        p50_ms=sample.percentile_ms(50),
        p99_ms=sample.percentile_ms(99),
        max_ms=sample.percentile_ms(100),
        share=share,
    )


# -- what is due -------------------------------------------------------------------------------------------------


def due_lines(namespace: str, plan: Plan, seed: int, now_s: float) -> Iterator[dict[str, Any]]:
    """The lines of an export with memories of ten days ago: those that decay finds due, and those that fade.

    Of four that fade two are kin, one has only the parent in common with others, and one not even that.
    """
    corpus = Corpus(seed)
    since_s = now_s - AGE_S
    for number in range(plan.due):
        importance, accesses = DUE[number % len(DUE)]
        yield {
            **_line(namespace, f"due-{number}", corpus.sentence(), since_s + number * 0.001, importance),
            "access_count": accesses,
        }
    parent = _line(namespace, "parent", "What was talked about", now_s, 1.0) | {"memory_tier": "long"}
    yield parent
    for number in range(plan.fading):
        if number % 4 != 1:
            text = corpus.sentence()
        said = f"{text} {'Then' if number % 4 == 1 else 'First'}."
        line = _line(namespace, f"fading-{number}", said, since_s + number * 60.0, 0.5)
        yield line if number % 4 == 3 else line | {"parent_id": parent["memory_id"]}


def _line(namespace: str, name: str, content: str, at_s: float, importance: float) -> dict[str, Any]:
    return {
        "kind": "memory",
        "namespace": namespace,
        "memory_id": f"mem-{namespace}-{name}",
        "content": content,
        "importance": importance,
        "created_at": at_s,
    }


def fill_due(server: servers.Server, namespace: str, plan: Plan, seed: int) -> None:
    """Import what is due, and wait until it has its vectors."""
    lines = list(due_lines(namespace, plan, seed, time.time()))
    with servers.Asker(server.endpoint) as asker:
        for start in range(0, len(lines), BATCH):
            asker.ask("import_memories", {"records": lines[start : start + BATCH]}, namespace=namespace)
        end_s = time.monotonic() + servers.FILL_S
        while asker.ask("stats", {}, namespace=namespace)["pending"]:
            if time.monotonic() > end_s:
                raise servers.ServerFailure(f"vectors are still missing after {servers.FILL_S:.0f} s")
            time.sleep(0.05)


# -- figures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of one load over the rounds. `ratio`: its 99th percentile during runs over that without."""

    load: str
    without: Measured
    during: Measured
    ratio: float
    ratios: tuple[float, ...]


def rows(measured: Sequence[Measured]) -> list[Row]:
    found = []
    for load in LOADS:
        without = [each for each in measured if each.load == load and not each.running]
        during = [each for each in measured if each.load == load and each.running]
        ratios = tuple(b.p99_ms / a.p99_ms for a, b in zip(without, during, strict=True))
        before, after = _median(without), _median(during)
        found.append(Row(load, before, after, after.p99_ms / before.p99_ms, ratios))
    return found


def _median(measured: Sequence[Measured]) -> Measured:
    names = ("calls_per_s", "p50_ms", "p99_ms", "max_ms", "share")
    values = {name: statistics.median(getattr(each, name) for each in measured) for name in names}
    first = measured[0]
    return Measured(load=first.load, number=-1, running=first.running, **values)


def show(console: Console, bench: Bench, found: Sequence[Row]) -> None:
    plan = bench.plan
    table = Table(title=f"{plan.clients} clients read and {plan.clients} add at the same time", title_justify="left")
    table.add_column("")
    for heading in ("per s", "p50 ms", "p99 ms", "max ms", "p99 ratio", "rounds"):
        table.add_column(heading, justify="right")
    for row in found:
        for name, each in (("without", row.without), ("during runs", row.during)):
            last = (f"{row.ratio:.2f}", ", ".join(f"{ratio:.2f}" for ratio in row.ratios)) if each.running else ("", "")
            values = (f"{each.calls_per_s:,.0f}", f"{each.p50_ms:.2f}", f"{each.p99_ms:.2f}", f"{each.max_ms:.1f}")
            table.add_row(f"{row.load}, {name}", *values, *last)
    console.print(table)
    changed = ", ".join(f"{action} {count:,}" for action, count in bench.changes.items())
    share = min(each.share for each in bench.measured if each.running)
    console.print(f"memories changed: {changed}; a run was under way for at least {share:.0%} of each measurement")


def verdict(console: Console, bench: Bench, found: Sequence[Row]) -> int:
    if min(each.share for each in bench.measured) < LEAST_SHARE:
        console.print("the runs ended too early to say anything; give more --due", style="red")
        return 1
    worst = max(row.ratio for row in found)
    console.print(f"worst p99 ratio {worst:.2f}, at most {MAX_RATIO:g}", style="green" if worst <= MAX_RATIO else "red")
    return 0 if worst <= MAX_RATIO else 1


# -- the program -------------------------------------------------------------------------------------------------


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure reads and adds while maintenance runs, and without it.")
    parser.add_argument("--due", type=int, default=12000, metavar="N", help="memories due for decay (%(default)s)")
    parser.add_argument("--fading", type=int, default=2000, metavar="N", help="for consolidation (%(default)s)")
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="clients of each load (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of one measurement (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds, by turns (%(default)s)")
    parser.add_argument("--jobs", default=",".join(JOBS), metavar="A,B", help="the runs (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(given)
    if min(options.due, options.fading, options.clients, options.rounds) < 1 or options.seconds <= 0.0:
        parser.error("all numbers have to be above 0")
    options.jobs = tuple(options.jobs.split(","))
    if not set(options.jobs) <= set(JOBS):
        parser.error(f"--jobs takes some of {', '.join(JOBS)}")
    return options


def main(given: Sequence[str] | None = None) -> int:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    options = arguments(given)
    for number in INTERRUPTS:
        signal.signal(number, interrupt)
    try:
        return measure(options, console)
    except (servers.ServerFailure, LoadFailure) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130


def measure(options: argparse.Namespace, console: Console) -> int:
    plan = Plan(options.jobs, options.due, options.fading, options.clients, options.seconds, options.rounds)
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(servers.data_folder())
        facts = report.machine(servers.file_system(folder))
        console.print(report.machine_line(facts), style="dim")
        server = stack.enter_context(servers.start_service(folder, "maintenance", "stub"))
        loads = {name: stack.enter_context(Load(process_count(plan.clients))) for name in LOADS}
        progress = stack.enter_context(Progress(*columns, console=console, transient=True))
        bench = Bench(plan, server, loads, progress)
        bench.run()
        progress.stop()
        found = rows(bench.measured)
        show(console, bench, found)
        if options.json is not None:
            figures = {"machine": facts, "plan": asdict(plan), "measured": [asdict(each) for each in bench.measured]}
            options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
        return verdict(console, bench, found)


if __name__ == "__main__":
    sys.exit(main())

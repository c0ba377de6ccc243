#!/usr/bin/env python3
"""Measures round trips and throughput of the service beside a bare echo, in one run.

    python bench/run.py [--quick] [--clients 1,8,64] [--seconds S] [--repeats N] [--only NAME,...] [--json FILE]

docs/performance.md says how to read the figures. Exit status: 0 measured, 1 a server or a request failed, 2 bad
arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import report
import servers
from clients import Load, LoadFailure, process_count
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from workloads import WORKLOADS, Workload

CLIENTS: Final = (1, 8, 64)
MEMORIES: Final = 5000
MODEL_MEMORIES: Final = 500
OVERHEAD_S: Final = 3.0
# 64 clients with a batch each are 64,000 memories: too many for a quick look.
QUICK_BATCH_CLIENTS: Final = 8
WIDTH: Final = 120
INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What each workload is divided by is measured with it.
ALWAYS: Final = frozenset({"echo", "reference add"})


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: `seconds` for each workload, number of clients and repetition."""

    workloads: tuple[Workload, ...]
    clients: tuple[int, ...]
    seconds: float
    repeats: int
    memories: int
    model_memories: int
    overhead_s: float
    most_batch_clients: int
    profiles: Path | None = None

    def counts(self, workload: Workload) -> tuple[int, ...]:
        if workload.only_clients is not None:
            return (workload.only_clients,)
        return tuple(count for count in self.clients if workload.items == 1 or count <= self.most_batch_clients)

    def on(self, *names: str) -> tuple[Workload, ...]:
        """The workloads that run on these servers."""
        return tuple(workload for workload in self.workloads if workload.server in names)

    @property
    def steps(self) -> int:
        return self.repeats * sum(len(self.counts(workload)) for workload in self.workloads)


@dataclass
class Bench:
    """One run: its servers, its load, and what was measured so far."""

    plan: Plan
    folder: Path
    load: Load
    progress: Progress
    measured: list[report.Measured] = field(default_factory=list)
    overhead_us: list[float] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def run(self) -> None:
        self._task = self.progress.add_task("starting", total=self.plan.steps)
        with contextlib.ExitStack() as stack:
            running = {"echo": stack.enter_context(servers.start_echo(self.folder))}
            ids: list[str] = []
            if self.plan.on("reads"):
                self._say(f"storing {self.plan.memories} memories")
                running["reads"] = stack.enter_context(self._service("reads", "stub"))
                ids = servers.fill(running["reads"], self.plan.memories, seed=1)
                self._say("MemoryClient's overhead")
                self.overhead_us = self.load.client_overhead(running["reads"].endpoint, ids, self.plan.overhead_s)
            for repeat in range(self.plan.repeats):
                with self._emptied(repeat) as fresh:
                    self._round(repeat, running | fresh, ids)
        if self.plan.on("model"):
            self._model()

    @contextlib.contextmanager
    def _emptied(self, repeat: int) -> Iterator[dict[str, servers.Server]]:
        """Servers that are written to start each repetition with an empty database."""
        fresh = {}
        with contextlib.ExitStack() as stack:
            if self.plan.on("reference"):
                fresh["reference"] = stack.enter_context(servers.start_reference(self.folder, repeat))
            if self.plan.on("writes"):
                fresh["writes"] = stack.enter_context(self._service(f"writes-{repeat}", "off"))
            yield fresh

    def _round(self, repeat: int, running: dict[str, servers.Server], ids: list[str]) -> None:
        for workload_clients in self.plan.clients:
            for workload in self.plan.on(*running):
                if workload_clients in self.plan.counts(workload):
                    self._measure(workload, workload_clients, repeat, running[workload.server], ids)

    def _measure(self, workload: Workload, clients: int, repeat: int, server: servers.Server, ids: list[str]) -> None:
        self._say(f"{workload.name}, {clients} clients")
        seed = 1000 * repeat + 10 * clients + 1
        before_s = server.cpu_s()
        sample = self.load.measure(workload.name, server.endpoint, clients, self.plan.seconds, seed, ids[:1000])
        after_s = server.cpu_s()
        server.check_alive()
        cpu_s = None if before_s is None or after_s is None else after_s - before_s
        self.measured.append(report.Measured(workload.name, clients, repeat, sample, cpu_s))
        self.progress.advance(self._task)

    def _model(self) -> None:
        """With the real model, last: what it has not embedded yet would disturb everything after it."""
        self._say("loading the model")
        with self._service("model", "sentence-transformers") as server:
            try:
                servers.wait_for_embedder(server)
            except servers.ServerFailure as failure:
                self.skipped.append(f"with the real model: {failure}")
                return
            self._say(f"embedding {self.plan.model_memories} memories")
            servers.fill(server, self.plan.model_memories, seed=1)
            for workload in self.plan.on("model"):
                for clients in self.plan.counts(workload):
                    for repeat in range(self.plan.repeats):
                        self._measure(workload, clients, repeat, server, [])

    def _service(self, name: str, provider: str) -> servers.Server:
        return servers.start_service(self.folder, name, provider, self.plan.profiles)

    def _say(self, text: str) -> None:
        self.progress.update(self._task, description=text)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the service beside a bare echo.")
    parser.add_argument("--quick", action="store_true", help="one short repetition, no model; under a minute")
    parser.add_argument("--clients", default=",".join(map(str, CLIENTS)), metavar="N,...", help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=1.5, metavar="S", help="length of one measurement (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="repetitions, interleaved (%(default)s)")
    parser.add_argument("--only", metavar="NAME,...", help=f"of: {', '.join(workload.name for workload in WORKLOADS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="run the services under cProfile, results there")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown too")
    return parser.parse_args(given)


def planned(options: argparse.Namespace) -> Plan:
    """Raises ValueError with the reason."""
    clients = tuple(int(part) for part in options.clients.split(","))
    if min(clients) < 1 or options.repeats < 1 or options.seconds <= 0.0:
        raise ValueError("--clients, --repeats and --seconds take numbers above 0")
    chosen = chosen_workloads(options.only)
    if options.quick:
        quick = tuple(workload for workload in chosen if workload.server != "model")
        return Plan(quick, clients, 0.5, 1, 1000, 0, 0.5, QUICK_BATCH_CLIENTS, options.profile)
    most = max(clients)
    return Plan(
        chosen, clients, options.seconds, options.repeats, MEMORIES, MODEL_MEMORIES, OVERHEAD_S, most, options.profile
    )


def chosen_workloads(only: str | None) -> tuple[Workload, ...]:
    names = [workload.name for workload in WORKLOADS]
    wanted = set(names) if only is None else {name.strip() for name in only.split(",")}
    if unknown := wanted - set(names):
        raise ValueError(f"there is no workload {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return tuple(workload for workload in WORKLOADS if workload.name in wanted | ALWAYS)


def main(given: Sequence[str] | None = None) -> int:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    options = arguments(given)
    try:
        plan = planned(options)
    except ValueError as error:
        console.print(f"error: {error}", style="red")
        return 2
    if options.profile is not None:
        options.profile.mkdir(parents=True, exist_ok=True)
    for number in INTERRUPTS:
        signal.signal(number, interrupt)
    try:
        return measure(plan, options, console)
    except (servers.ServerFailure, LoadFailure) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130


def interrupt(*_: object) -> None:
    """Stop once: a second signal must not cut short the stopping of the servers."""
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def measure(plan: Plan, options: argparse.Namespace, console: Console) -> int:
    started_s = time.monotonic()
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with servers.data_folder() as folder:
        facts = report.machine(servers.file_system(folder))
        console.print(report.machine_line(facts), style="dim")
        if facts["file_system"] in ("tmpfs", "ramfs"):
            console.print("the data folder is in memory: durable writes cost nothing there", style="red")
        with (
            Load(max(map(process_count, plan.clients))) as load,
            Progress(*columns, console=console, transient=True) as progress,
        ):
            bench = Bench(plan, folder, load, progress)
            bench.run()
        facts["load_after"] = report.load_average()
    show(bench, facts, options, console)
    console.print(f"took {time.monotonic() - started_s:.0f} s", style="dim")
    return 0


def show(bench: Bench, facts: dict[str, Any], options: argparse.Namespace, console: Console) -> None:
    table = report.rows(bench.measured)
    report.print_table(console, table)
    if bench.overhead_us:
        console.print(report.overhead_line(bench.overhead_us))
    for line in bench.skipped:
        console.print(f"not measured: {line}", style="red")
    if options.markdown:
        sys.stdout.write(report.markdown(table) + "\n")
    if options.json is not None:
        more = {"client_overhead_us": bench.overhead_us, "not_measured": bench.skipped}
        figures = report.as_json(facts, table, bench.measured, more)
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())

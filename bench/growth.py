#!/usr/bin/env python3
"""Do requests become slower as the store grows?

    python bench/growth.py [FILE] [--sizes 1000,10000,100000] [--repeats N] [--seconds S] [--json FILE]

FILE is in the LoCoMo format (examples/locomo.py); texts are made of its turns. A store of **synthetic** memories for
each size (synthetic.py), each with a service of its own; all run at the same time, and a repetition measures each once,
so a ratio to the smallest compares what was measured moments apart. A million takes 4 GB of disk and of memory.
Measured:

- get_memory and add_memory, 8 clients: requests per second;
- search_memory, 1 client: new queries; semantic_search, 1 client: one query again, as answered from the cache;
- the service's resident memory for each memory beyond that with the smallest store.

Exit status: 0 measured, 1 a server or a request failed, 2 bad arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

PROJECT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
sys.path.append(str(PROJECT / "examples"))

import locomo  # noqa: E402
import report  # noqa: E402
import scale_load  # noqa: E402
import synthetic  # noqa: E402
from clients import Load, LoadFailure, process_count  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402
from run import INTERRUPTS, WIDTH, interrupt  # noqa: E402
from scale import some_questions  # noqa: E402
from servers import Asker, Server, ServerFailure, data_folder, file_system, start_service  # noqa: E402

SIZES: Final = "1000,10000,100000"
CLIENTS: Final = 8
READ: Final = 1000
RATES: Final = ("get_memory", "add_memory")
TIMES: Final = ("search_memory", "semantic_search again")
AGAIN: Final = 100


@dataclass
class Size:
    """One store. Lists have one value for each repetition: requests per second of RATES, p50 in ms of TIMES."""

    memories: int
    figures: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in (*RATES, *TIMES)})
    resident_bytes: int = 0


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path, progress: Progress) -> None:
        conversations = locomo.load(options.file or locomo.default_file())
        self._turns = [t.content for each in conversations for session in each.sessions for t in session.turns]
        asked = [question.text for each in conversations for question in each.questions]
        self._questions = some_questions(asked, self._turns, options.queries * options.repeats)
        self._options, self._folder, self._progress = options, folder, progress
        self.sizes = [Size(memories) for memories in options.sizes]

    def run(self) -> None:
        for size in self.sizes:
            self._fill(size.memories)
        task = self._progress.add_task("starting", total=self._options.repeats * len(self.sizes))
        with contextlib.ExitStack() as stack:
            load = stack.enter_context(Load(process_count(CLIENTS)))
            servers = [stack.enter_context(self._server(size)) for size in self.sizes]
            for repeat in range(self._options.repeats):
                for size, server in zip(self.sizes, servers, strict=True):
                    self._progress.update(task, description=f"{size.memories:,} memories")
                    self._measure(size, server, load, repeat)
                    self._progress.advance(task)

    def _fill(self, memories: int) -> None:
        task = self._progress.add_task(f"{memories:,}: making", total=memories)
        database = self._folder / f"growth-{memories}" / "memory.db"
        database.parent.mkdir()
        synthetic.fill(database, self._turns, memories, lambda steps: self._progress.update(task, advance=steps))
        self._progress.remove_task(task)

    def _server(self, size: Size) -> Server:
        """A service that answers every search in full, and has done what it does by itself."""
        sessions = max(1, size.memories // synthetic.session_turns(size.memories))
        settings = {"search.snapshot_s": "86400"}
        program = ["bench/scale_server.py", str(sessions)]
        server = start_service(self._folder, f"growth-{size.memories}", "stub", settings=settings, program=program)
        try:
            scale_load.ready(server, self._questions[0])
            scale_load.wait_quiet(server)
            with Asker(server.endpoint) as asker:
                size.resident_bytes = asker.ask("health_check", {})["memory_bytes"]
        except BaseException:  # also an interrupt: what was started is stopped
            server.stop()
            raise
        return server

    def _measure(self, size: Size, server: Server, load: Load, repeat: int) -> None:
        ids = [f"mem-{number:09d}" for number in range(0, size.memories, max(1, size.memories // READ))][:READ]
        for name in RATES:
            sample = load.measure(name, server.endpoint, CLIENTS, self._options.seconds, repeat + 1, ids)
            size.figures[name].append(sample.calls_per_s)
        queries = self._options.queries
        mine = self._questions[repeat * queries : (repeat + 1) * queries]
        with Asker(server.endpoint) as asker:
            times = [_asked_ms(asker, "search_memory", text) for text in mine]
            size.figures["search_memory"].append(statistics.median(times))
            times = [_asked_ms(asker, "semantic_search", mine[0]) for _ in range(AGAIN)]
            size.figures["semantic_search again"].append(statistics.median(times[1:]))


def _asked_ms(asker: Asker, action: str, query: str) -> float:
    began_s = time.perf_counter()
    asker.ask(action, {"query": query, "touch": False})
    return 1000.0 * (time.perf_counter() - began_s)


def rows(sizes: Sequence[Size]) -> list[dict[str, Any]]:
    """Medians of the repetitions; of RATES also the median of the ratios to the smallest store."""
    first, found = sizes[0], []
    for size in sizes:
        row: dict[str, Any] = {"memories": size.memories}
        for name, values in size.figures.items():
            row[name] = statistics.median(values)
            row[f"{name}: least"], row[f"{name}: most"] = min(values), max(values)
        for name in RATES:
            pairs = zip(size.figures[name], first.figures[name], strict=True)
            row[f"{name}: of the smallest"] = statistics.median(one / other for one, other in pairs)
        more = size.memories - first.memories
        row["bytes_each"] = (size.resident_bytes - first.resident_bytes) / more if more else None
        found.append(row)
    return found


def show(console: Console, found: Sequence[dict[str, Any]]) -> None:
    table = Table("memories", box=box.MARKDOWN)
    for name in RATES:
        for heading in (f"{name} per s", "min to max", "of the smallest"):
            table.add_column(heading, justify="right")
    for name in (*(f"{name} p50 ms" for name in TIMES), "kB each"):
        table.add_column(name, justify="right")
    for row in found:
        cells = [f"{row['memories']:,}"]
        for name in RATES:
            spread = f"{row[f'{name}: least']:,.0f} to {row[f'{name}: most']:,.0f}"
            cells += [f"{row[name]:,.0f}", spread, f"{row[f'{name}: of the smallest']:.2f}"]
        cells += [f"{row[name]:.2f}" for name in TIMES]
        each = row["bytes_each"]
        table.add_row(*cells, "" if each is None else f"{each / 1000.0:.2f}")
    console.print(table)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure requests in stores of several sizes.")
    parser.add_argument("file", type=Path, nargs="?", help="conversations in the LoCoMo format")
    parser.add_argument("--sizes", default=SIZES, metavar="N,...", help="default: %(default)s; up to 1000000")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="repetitions, interleaved (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, metavar="S", help="of one measurement (%(default)s)")
    parser.add_argument("--queries", type=int, default=100, metavar="N", help="searches of each repetition")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(given)
    try:
        options.sizes = sorted({int(size) for size in options.sizes.split(",")})
    except ValueError:
        parser.error("--sizes takes numbers")
    if min(*options.sizes, options.repeats, options.queries) < 1 or options.seconds <= 0.0:
        parser.error("all numbers have to be above 0")
    return options


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH + 40)
    for number in INTERRUPTS:
        signal.signal(number, interrupt)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with data_folder() as folder:
            facts = report.machine(file_system(folder))
            console.print(report.machine_line(facts), style="dim")
            with Progress(*columns, console=console, transient=True, refresh_per_second=1) as progress:
                bench = Bench(options, folder, progress)
                bench.run()
    except (locomo.BadFile, ServerFailure, LoadFailure) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    found = rows(bench.sizes)
    show(console, found)
    if options.json is not None:
        options.json.write_text(
            json.dumps({"kind": "growth", "machine": facts, "rows": found}, indent=1) + "\n", "utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

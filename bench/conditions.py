#!/usr/bin/env python3
"""Requests while memories are embedded, the time to start, and what a client costs.

    python bench/conditions.py [--parts embedding,start,client] [--repeats N] [--memories N] [--json FILE]

- embedding: get_memory with 8 clients and add_memory with 1 while 10,000 memories wait for their vectors, beside the
  same on a service with embedding off; by turns. The figures are the 99th percentile of get and the median of add.
- start: from the program's start until it answers, and until semantic_search answers in full, over a store of 200
  memories, with all-MiniLM-L6-v2. Files that were read before may still be in the system's memory.
- client: the time to import memory_client, and the resident memory after a first call, each in fresh interpreters, and
  beside a bare REQ socket with msgpack; then what a call costs beyond that bare REQ.

Tables give medians with the extremes. Exit status: 0 measured, 1 a server or a request failed, or what was to be
embedded was done too early, 2 bad arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

PROJECT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import report  # noqa: E402
import servers  # noqa: E402
from clients import Load, LoadFailure, process_count  # noqa: E402
from corpus import Corpus  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402
from run import INTERRUPTS, WIDTH, interrupt  # noqa: E402

PARTS: Final = ("embedding", "start", "client")
MODEL: Final = "sentence-transformers"
GET_CLIENTS: Final = 8
STORED: Final = 1000
SEARCHED: Final = 200
WINDOWS: Final = 2
BATCH: Final = 500
IMPORTS: Final = 15
OVERHEAD_S: Final = 3.0

# Each prints one number of its own interpreter: seconds, or KiB.
_TIMED: Final = "import time; clock = time.{}; began = clock(); import {}; print(clock() - began)"
_RESIDENT: Final = (
    "import sys\n{}\nwith open('/proc/self/status') as file:\n"
    "    print(next(line.split()[1] for line in file if line.startswith('VmRSS:')))"
)
_CLIENT: Final = (
    "from memory_client import MemoryClient\nclient = MemoryClient({!r}, raise_on_error=True)\nclient.health_check()"
)
_BARE: Final = (
    "import msgpack, zmq\nsocket = zmq.Context().socket(zmq.REQ)\nsocket.connect({!r})\n"
    "socket.send(msgpack.packb({{'action': 'health_check'}}))\nmsgpack.unpackb(socket.recv())\n"
)


@dataclass
class Bench:
    """One run: `figures` has the values of each row, one for each repetition, and `ratios` those between two rows."""

    options: argparse.Namespace
    folder: Path
    progress: Progress
    figures: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)

    def run(self) -> None:
        parts: dict[str, Callable[[], None]] = {
            "embedding": self._embedding,
            "start": self._start,
            "client": self._client,
        }
        self._task = self.progress.add_task("starting", total=self.options.repeats * len(self.options.parts))
        for part in self.options.parts:
            parts[part]()

    def _note(self, row: str, value: float) -> None:
        self.figures.setdefault(row, []).append(value)

    def _step(self, text: str, steps: int = 0) -> None:
        self.progress.update(self._task, description=text, advance=steps)

    # -- while memories are embedded -----------------------------------------------------------------------------

    def _embedding(self) -> None:
        with Load(process_count(GET_CLIENTS)) as load:
            for repeat in range(self.options.repeats):
                self._step("without embedding")
                with servers.start_service(self.folder, f"off-{repeat}", "off") as server:
                    idle = self._requests(server, load, repeat, _stored(server, STORED))
                self._step(f"while {self.options.memories:,} are embedded")
                with servers.start_service(self.folder, f"model-{repeat}", MODEL) as server:
                    servers.wait_for_embedder(server)
                    ids = _stored(server, self.options.memories)
                    busy = self._requests(server, load, repeat, ids[:STORED])
                    with servers.Asker(server.endpoint) as asker:
                        if not asker.ask("stats", {})["pending"]:
                            raise servers.ServerFailure("all was embedded before the end; give more --memories")
                for name, value in idle.items():
                    self._note(f"{name}, embedding off", value)
                    self._note(f"{name}, embedding", busy[name])
                    self.ratios.setdefault(f"{name}: embedding over off", []).append(busy[name] / value)
                self._step("", 1)

    def _requests(self, server: servers.Server, load: Load, repeat: int, ids: list[str]) -> dict[str, float]:
        found: dict[str, list[float]] = {"get_memory p99 ms": [], "add_memory p50 ms": []}
        for window in range(WINDOWS + 1):
            seed = 10 * repeat + window + 1
            gets = load.measure("get_memory", server.endpoint, GET_CLIENTS, self.options.seconds, seed, ids)
            adds = load.measure("add_memory", server.endpoint, 1, self.options.seconds, seed, ids)
            if window:  # the first one warms up
                found["get_memory p99 ms"].append(gets.percentile_ms(99))
                found["add_memory p50 ms"].append(adds.percentile_ms(50))
        return {name: statistics.median(values) for name, values in found.items()}

    # -- start ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._step("making a store")
        with servers.start_service(self.folder, "start", MODEL) as server:
            servers.wait_for_embedder(server)
            servers.fill(server, SEARCHED, seed=1)
        for _ in range(self.options.repeats):
            self._step("starting the service")
            began_s = time.perf_counter()
            with servers.start_service(self.folder, "start", MODEL) as server:
                self._note("start to the first answer, s", time.perf_counter() - began_s)
                _wait_for_search(server)
                self._note("start to semantic search, s", time.perf_counter() - began_s)
            self._step("", 1)

    # -- the client ----------------------------------------------------------------------------------------------

    def _client(self) -> None:
        with servers.start_service(self.folder, "client", "off") as server, Load(1) as load:
            ids = _stored(server, STORED)
            for _ in range(self.options.repeats):
                self._step("fresh interpreters with the client")
                for _ in range(IMPORTS):
                    for modules in ("memory_client", "zmq, msgpack"):
                        for clock, what in (("perf_counter", "ms"), ("process_time", "ms of processor time")):
                            self._note(f"import {modules}, {what}", 1000.0 * _printed(_TIMED.format(clock, modules)))
                for name, code in (("MemoryClient", _CLIENT), ("a bare REQ", _BARE)):
                    resident = _printed(_RESIDENT.format(code.format(server.endpoint)))
                    self._note(f"resident with {name}, MB", resident * 1024 / 1e6)
                for value in load.client_overhead(server.endpoint, ids, OVERHEAD_S):
                    self._note("a call through MemoryClient beyond a bare REQ, us", value)
                self._step("", 1)


def _stored(server: servers.Server, memories: int) -> list[str]:
    """Store memories in batches, without waiting for their vectors; their ids."""
    corpus, ids = Corpus(5), list[str]()
    with servers.Asker(server.endpoint) as asker:
        while len(ids) < memories:
            batch = [corpus.memory() for _ in range(min(BATCH, memories - len(ids)))]
            ids += asker.ask("batch_add_memories", {"memories": batch})["memory_ids"]
    return ids


def _wait_for_search(server: servers.Server) -> None:
    end_s = time.monotonic() + servers.FILL_S
    query = Corpus(1).query()
    with servers.Asker(server.endpoint) as asker:
        while time.monotonic() < end_s:
            reply = asker.ask("semantic_search", {"query": query, "touch": False})
            if reply["count"] and not reply["degraded"] and not reply["pending"]:
                return
            server.check_alive()
            time.sleep(0.02)
    raise servers.ServerFailure("semantic search does not become ready")


def _printed(code: str) -> float:
    """The number that a fresh interpreter prints. Raises ServerFailure."""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        raise servers.ServerFailure((done.stderr.strip().splitlines() or ["it printed nothing"])[-1])
    return float(done.stdout)


def show(console: Console, bench: Bench) -> None:
    table = Table("what", "median", "min to max", box=box.MARKDOWN)
    for name, values in (*bench.figures.items(), *bench.ratios.items()):
        cells = (f"{value:.3g}" for value in (statistics.median(values), min(values), max(values)))
        middle, least, most = cells
        table.add_row(name, middle, f"{least} to {most}")
    console.print(table)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure requests beside embedding, the start, and the client.")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="NAME,...", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="repetitions (%(default)s)")
    parser.add_argument("--memories", type=int, default=10_000, metavar="N", help="to be embedded (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of one measurement (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(given)
    options.parts = [part.strip() for part in options.parts.split(",")]
    if not set(options.parts) <= set(PARTS):
        parser.error(f"--parts takes some of {', '.join(PARTS)}")
    if options.repeats < 1 or options.memories < STORED or options.seconds <= 0.0:
        parser.error(f"--repeats is at least 1, --memories {STORED}, --seconds above 0")
    return options


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    for number in INTERRUPTS:
        signal.signal(number, interrupt)
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with servers.data_folder() as folder:
            facts = report.machine(servers.file_system(folder))
            console.print(report.machine_line(facts), style="dim")
            with Progress(*columns, console=console, transient=True) as progress:
                bench = Bench(options, folder, progress)
                bench.run()
    except (servers.ServerFailure, LoadFailure) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    show(console, bench)
    if options.json is not None:
        found: dict[str, Any] = {
            "kind": "conditions",
            "machine": facts,
            "figures": bench.figures,
            "ratios": bench.ratios,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

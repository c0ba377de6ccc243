#!/usr/bin/env python3
"""How long a search takes among 1,000 to 1,000,000 memories, how much of the nearest it finds, what an index costs.

    python bench/scale.py [FILE] [--sizes 1000,10000,...] [--queries N] [--json FILE]

FILE is in the LoCoMo format (examples/locomo.py); texts are made of its turns. Memories are **synthetic**: texts of
halves of turns, vectors of no model (synthetic.py), inserted straight into the tables of a store. Each is said in a
session of up to twenty, and belongs to one of 1,000 users, whose sessions take turns; a filter by users lets .1 %, 1 %
or 10 % pass.
Measured, for each size:

- start: from the program's start until every search is answered in full, without a snapshot and after a clean stop;
- a default search (hybrid, k 10) through the service, 1 client and 8: the time at the client, with results not kept and
  a query embedded in microseconds; and the same search in the engine alone, in the benchmark's own process, with its
  processor time, which suffers least from other programs;
- recall: of the nearest that comparing all vectors finds, as many as the ranking takes from the vector side, the share
  that the search finds;
- the service's memory beyond that with an empty store, for each memory;
- searches of 8 clients, and adds beside them, while snapshots are made one after the other, and without.

Exit status: 0 measured, 1 a recall is below .98 or a start after a clean stop takes longer than 3 s at 100,000 or less,
2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

PROJECT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
sys.path.append(str(PROJECT / "examples"))

import locomo  # noqa: E402
import scale_load  # noqa: E402
import synthetic  # noqa: E402
from report import load_average  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402
from servers import Asker, Server, ServerFailure, data_folder, start_service  # noqa: E402

from memory_system.filters import parse_filter  # noqa: E402
from memory_system.lifecycle_settings import LifecycleSettings  # noqa: E402
from memory_system.search.engine import SearchEngine, SearchQuery  # noqa: E402
from memory_system.search.index import SearchIndex  # noqa: E402
from memory_system.settings import SearchSettings  # noqa: E402
from memory_system.storage.database import connect_reader  # noqa: E402

SIZES: Final = "1000,10000,100000,1000000"
SHARES: Final = (0.001, 0.01, 0.1, 1.0)
CLIENTS: Final = (1, 8)
K: Final = 10
MAX_START_S: Final = 3.0
MIN_RECALL: Final = 0.98
SNAPSHOT_LOAD_S: Final = 6.0
NOW_S: Final = synthetic.START_S + 1e8


@dataclass
class Point:
    """Times in ms, of searches with a filter that lets `share` pass."""

    share: float
    engine_ms: list[float] = field(default_factory=list)
    engine_cpu_ms: list[float] = field(default_factory=list)
    service_ms: dict[int, list[float]] = field(default_factory=dict)
    recall: float = 0.0


@dataclass
class Result:
    memories: int
    points: list[Point]
    fill_s: float = 0.0
    first_start_s: float = 0.0
    start_s: float = 0.0
    graph_s: float = 0.0
    bytes_each: float = 0.0
    idle_ms: list[float] = field(default_factory=list)
    snapshot_ms: list[float] = field(default_factory=list)
    snapshots: int = 0


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100.0))] if ordered else float("nan")


def users_of(share: float) -> dict[str, Any]:
    """A filter that lets about this share pass."""
    number = round(share * synthetic.USERS)
    if number >= synthetic.USERS:
        return {}
    users = [f"user-{user}" for user in range(number)]
    return {"user_id": users[0] if number == 1 else {"in": users}}


def some_questions(questions: Sequence[str], turns: Sequence[str], wanted: int) -> list[str]:
    """The file's own questions in random order, then some words of turns."""
    rng = random.Random(5)
    chosen = rng.sample(list(questions), min(wanted, len(questions)))
    while len(chosen) < wanted:
        words = rng.choice(turns).split()
        chosen.append(" ".join(rng.sample(words, min(len(words), 7))) + "?")
    return chosen


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path, progress: Progress) -> None:
        conversations = locomo.load(options.file or locomo.default_file())
        self._turns = [t.content for each in conversations for session in each.sessions for t in session.turns]
        asked = [question.text for each in conversations for question in each.questions]
        self._questions = some_questions(asked, self._turns, options.queries)
        self._folder = folder
        self._progress = progress
        self._empty_bytes = 0

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        task = self._progress.add_task(title, total=total)
        yield lambda steps: self._progress.update(task, advance=steps)
        self._progress.remove_task(task)

    def measure(self, memories: int) -> Result:
        result = Result(memories, [Point(share) for share in SHARES])
        name = f"scale-{memories}"
        database = self._folder / name / "memory.db"
        database.parent.mkdir()
        began_s = time.perf_counter()
        with self._bar(f"{memories:,}: making", memories) as advance:
            synthetic.fill(database, self._turns, memories, advance)
        result.fill_s = time.perf_counter() - began_s
        self._through_service(name, result)
        self._in_process(database, result)
        return result

    # ---- through the service ----

    def _through_service(self, name: str, result: Result) -> None:
        with self._bar(f"{result.memories:,}: asking the service", 5 + len(SHARES) * len(CLIENTS)) as advance:
            if not self._empty_bytes:
                with self._server("scale-empty", 1) as server:
                    self._empty_bytes = scale_load.ready(server, None)["memory_bytes"]
            sessions = max(1, result.memories // synthetic.session_turns(result.memories))
            for number in (1, 2):  # the second start finds what the first has kept
                began_s = time.perf_counter()
                with self._server(name, sessions) as server:
                    health = scale_load.ready(server, self._questions[0])
                    taken_s = time.perf_counter() - began_s
                    advance(1)
                    if number == 1:
                        result.first_start_s = taken_s
                        scale_load.wait_quiet(server)
                        continue
                    result.start_s = taken_s
                    scale_load.wait_quiet(server)
                    with Asker(server.endpoint) as asker:
                        health = asker.ask("health_check", {})
                    result.bytes_each = (health["memory_bytes"] - self._empty_bytes) / result.memories
                    self._ask_all(server, result, advance)
                    self._during_snapshots(server, result)
                    advance(2)

    def _server(self, name: str, sessions: int) -> Server:
        settings = {"cache.result_ttl_s": "0", "search.snapshot_s": "86400"}
        command = ["bench/scale_server.py", str(sessions)]
        return start_service(self._folder, name, "stub", settings=settings, program=command)

    def _ask_all(self, server: Server, result: Result, advance: Callable[[int], None]) -> None:
        for point in result.points:
            for clients in CLIENTS:
                filters = users_of(point.share)
                requests = [{"query": text, "k": K, "filters": filters, "touch": False} for text in self._questions]
                point.service_ms[clients] = scale_load.closed_loop(server, clients, requests)
                advance(1)

    def _during_snapshots(self, server: Server, result: Result) -> None:
        """Searches of 8 clients beside an adder, for some seconds without snapshots and some with."""
        requests = [{"query": text, "k": K, "filters": {}, "touch": False} for text in self._questions]
        many = requests * 50
        for during in (False, True):
            ends_s = time.monotonic() + SNAPSHOT_LOAD_S
            with ThreadPoolExecutor(2) as beside:
                added = beside.submit(scale_load.add_until, server, ends_s, f"{during}")
                saved = beside.submit(scale_load.snapshots_until, server, ends_s) if during else None
                times = scale_load.closed_loop(server, CLIENTS[-1], many, ends_s)
                added.result()
                result.snapshots = saved.result() if saved else 0
            setattr(result, "snapshot_ms" if during else "idle_ms", times)

    # ---- in this process ----

    def _in_process(self, database: Path, result: Result) -> None:
        settings = SearchSettings()
        connect = partial(connect_reader, database)
        index = SearchIndex(settings, database, connect)
        index.set_model(synthetic.MODEL_ID, synthetic.DIMENSION)
        engine = SearchEngine(settings, LifecycleSettings(), database, index, connect, query_s=60.0)
        embedder = synthetic.SyntheticEmbedder(max(1, result.memories // synthetic.session_turns(result.memories)))
        index.start()
        try:
            with self._bar(f"{result.memories:,}: searching alone", len(SHARES)) as advance:
                began_s = time.perf_counter()
                while index.state != "ready" or index.words_lacking or not _made(index, settings):
                    time.sleep(0.02)
                result.graph_s = time.perf_counter() - began_s
                for point in result.points:
                    self._alone(engine, index, embedder, point, settings.candidates)
                    advance(1)
        finally:
            engine.close()
            index.close()

    def _alone(
        self,
        engine: SearchEngine,
        index: SearchIndex,
        embedder: synthetic.SyntheticEmbedder,
        point: Point,
        wanted: int,
    ) -> None:
        scope = parse_filter(users_of(point.share))
        shares = []
        for text in self._questions:
            vector = embedder.vector(text)
            query = SearchQuery(
                synthetic.NAMESPACE, text, NOW_S, k=K, vector=vector, vector_model=synthetic.MODEL_ID, filter=scope
            )
            began_s, began_cpu_s = time.perf_counter(), time.thread_time()
            outcome = engine.search(query)
            point.engine_ms.append(1000.0 * (time.perf_counter() - began_s))
            point.engine_cpu_ms.append(1000.0 * (time.thread_time() - began_cpu_s))
            assert not outcome.degraded, outcome.reason
            with index.reading() as view:
                assert view is not None and view.vectors is not None
                mask = view.columns.mask(query.scope)
                assert mask is not None
                found, exact = (find(vector, mask, wanted)[0] for find in (view.vectors.search, view.vectors.nearest))
            shares.append(len(set(found.tolist()) & set(exact.tolist())) / max(1, len(exact)))
        point.recall = statistics.mean(shares)


def _made(index: SearchIndex, settings: SearchSettings) -> bool:
    """Whether all that makes searches faster is there."""
    with index.reading() as view:
        if view is None or view.vectors is None:
            return False
        vectors = view.vectors
        rest = vectors.count - vectors.graph.count
        return not vectors.improving and (vectors.count < settings.graph_from or rest < vectors.graph.least)


def show(console: Console, results: list[Result]) -> None:
    searches = [f"{name} {figure}" for name in ("engine", "CPU", "1 client", "8 clients") for figure in ("p50", "p95")]
    table = Table("memories", "passing", "recall", *searches, box=box.MARKDOWN)
    for result in results:
        for point in result.points:
            times = [point.engine_ms, point.engine_cpu_ms, *(point.service_ms.get(clients, []) for clients in CLIENTS)]
            figures = [f"{percentile(one, percent):.1f}" for one in times for percent in (50, 95)]
            table.add_row(f"{result.memories:,}", f"{point.share:.1%}", f"{point.recall:.3f}", *figures)
    console.print("Synthetic memories and vectors; times in ms; searches of the default mode, k 10", table)
    headings = (
        "memories",
        "made s",
        "start s",
        "after a clean stop s",
        "kB each",
        "idle p99",
        "snapshots p99",
        "snapshots",
    )
    table = Table(*headings, box=box.MARKDOWN)
    for one in results:
        p99 = [f"{percentile(times, 99):.1f}" for times in (one.idle_ms, one.snapshot_ms)]
        seconds = [f"{value:.1f}" for value in (one.fill_s, one.first_start_s, one.start_s)]
        table.add_row(f"{one.memories:,}", *seconds, f"{one.bytes_each / 1000.0:.2f}", *p99, f"{one.snapshots}")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure searches among many memories.")
    parser.add_argument("file", type=Path, nargs="?", help="conversations in the LoCoMo format")
    parser.add_argument("--sizes", default=SIZES, help="how many memories, one store for each number")
    parser.add_argument("--queries", type=int, default=200, help="searches for each figure")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        sizes = [int(size) for size in options.sizes.split(",")]
        console.print(f"load average before: {load_average()}")
        with (
            data_folder() as folder,
            Progress(*columns, console=console, transient=True, refresh_per_second=1) as progress,
        ):
            bench = Bench(options, folder, progress)
            results = [bench.measure(size) for size in sizes]
    except (locomo.BadFile, ServerFailure, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    show(console, results)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results]))
    slow = any(one.start_s > MAX_START_S for one in results if one.memories <= 100_000)
    return 1 if slow or any(point.recall < MIN_RECALL for one in results for point in one.points) else 0


if __name__ == "__main__":
    sys.exit(main())

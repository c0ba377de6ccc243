#!/usr/bin/env python3
"""Does the cost of a decay run grow with what is due, or with what there is?

    python bench/due.py [--sizes 10000,100000,1000000] [--due 1000] [--runs 7] [--folder DIR]

For each size it makes a store of synthetic memories, which are inserted directly (without vectors: ageing does not look
at them), of which the same number is due: some to be promoted, some to be archived, some to be looked at again. Then it
times one decay run, select and apply, in slices of 200 (the service takes `maintenance.slice_rows`, 25 by default),
with a commit and its sync for each slice. The same due rows are put back, and the stores take turns, so that what else
the machine does falls on all of them; the figure is the shortest run of each, since what disturbs only adds.
Exit status 1 when a larger store takes more than twice as long as the smallest.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from memory_system import lifecycle
from memory_system.digest import content_digest
from memory_system.lifecycle import Kind
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.storage import ageing, database
from memory_system.storage.ageing import DECAY, DueRow
from memory_system.storage.context import WriteContext
from memory_system.storage.readers import Readers
from memory_system.storage.rows import RecordView

AS_OF_S = 1_700_000_000.0
SLICE_ROWS = 200
KINDS: frozenset[Kind] = frozenset((*DECAY, "consolidate"))
SETTINGS = LifecycleSettings()
DAY_S = lifecycle.SECONDS_PER_DAY
# What distinguishes the memories: importance, accesses, days since they were made. All but the first are due.
NOT_DUE = (0.9, 0, 1.0)
DUE = ((1.0, 3, 8.0), (0.15, 0, 6.0), (0.6, 0, 8.0))  # promoted, archived, fading
MAX_RATIO = 2.0

_COLUMNS = (
    "namespace", "memory_id", "content", "content_digest", "memory_type", "memory_tier", "importance", "importance_at",
    "access_count", "created_at", "updated_at", "tier_since", "due_at", "created_by",
)  # fmt: skip
_INSERT = f"INSERT INTO memories ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"


@dataclass(frozen=True)
class Aged:
    """The values that ageing looks at, to compute when such a memory is due."""

    importance: float
    access_count: int
    importance_at: float
    memory_type: str = "general"
    memory_tier: str = "short"
    tier_accesses: int = 0
    expires_at: float | None = None
    archived_at: float | None = None
    promote_at: float | None = None

    @property
    def tier_since(self) -> float:
        return self.importance_at


@dataclass(frozen=True)
class Result:
    memories: int
    due: int
    changed: int
    select_ms: float
    apply_ms: float
    file_mb: float

    @property
    def total_ms(self) -> float:
        return self.select_ms + self.apply_ms


def synthetic(size: int, due: int) -> Iterator[tuple[object, ...]]:
    """Rows of `_INSERT`; the due ones lie evenly among the others."""
    every = size // due
    for number in range(size):
        is_due = number % every == 0 and number // every < due
        importance, accesses, days = DUE[number // every % len(DUE)] if is_due else NOT_DUE
        since_s = AS_OF_S - days * DAY_S - (number % 1000) * 0.001
        due_at = lifecycle.due_at(SETTINGS, Aged(importance, accesses, since_s))
        content = f"Synthetic memory {number} of the benchmark of due memories, as long as a usual sentence is."
        yield (
            "bench", f"mem-{number:012x}", content, content_digest(content), "general", "short", importance, since_s,
            accesses, since_s, since_s, since_s, due_at, "bench",
        )  # fmt: skip


def fill(path: Path, size: int, due: int) -> None:
    with contextlib.closing(database.open_store(path)) as db:
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        with database.transaction(db):
            for name, _ in triggers:
                db.execute(f"DROP TRIGGER {name}")
            db.executemany(_INSERT, synthetic(size, due))
            for _, sql in triggers:
                db.execute(sql)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


async def select(readers: Readers) -> list[DueRow]:
    """Everything that is due, slice by slice."""
    rows: list[DueRow] = []
    after = None
    while found := await ageing.due_rows(readers, AS_OF_S, after=after, limit=SLICE_ROWS):
        rows += found
        after = found[-1].position
    return rows


def apply(db: sqlite3.Connection, rows: list[DueRow]) -> int:
    """Carry out what is decided, slice by slice; how many memories were changed."""
    changed = 0
    for start in range(0, len(rows), SLICE_ROWS):
        context = WriteContext(db, AS_OF_S, "bench", SETTINGS, RecordView(SETTINGS))
        with database.transaction(db):
            part = [row.row_id for row in rows[start : start + SLICE_ROWS]]
            changed += len(ageing.apply(context, part, AS_OF_S, KINDS))
            db.executemany("INSERT INTO index_log (row_id, op) VALUES (?, ?)", context.log)
    return changed


def put_back(db: sqlite3.Connection, rows: list[DueRow]) -> None:
    """Undo a run, so that the next one finds the same."""
    names = [name for name in DueRow.__struct_fields__ if name not in ("row_id", "namespace", "memory_id")]
    sql = f"UPDATE memories SET {', '.join(f'{name} = ?' for name in names)} WHERE row_id = ?"
    with database.transaction(db):
        db.executemany(sql, [[*(getattr(row, name) for name in names), row.row_id] for row in rows])
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


async def one_run(path: Path) -> tuple[float, float, list[DueRow], int]:
    """Milliseconds of select and of apply, what was due, and how many memories were changed."""
    readers = Readers(path, 1, query_s=60.0)
    await readers.start()
    db = database.connect_writer(path)
    try:
        began = time.perf_counter()
        rows = await select(readers)
        selected = time.perf_counter()
        changed = apply(db, rows)
        ended = time.perf_counter()
        if await select(readers):
            raise SystemExit("bench/due.py: a run left something due")
        put_back(db, rows)
    finally:
        db.close()
        await readers.close()
    return (selected - began) * 1000.0, (ended - selected) * 1000.0, rows, changed


def measure(stores: dict[int, Path], runs: int) -> list[Result]:
    """The shortest of several runs over each store, the stores in turn."""
    best: dict[int, Result] = {}
    for _ in range(runs):
        for size, path in stores.items():
            select_ms, apply_ms, rows, changed = asyncio.run(one_run(path))
            found = Result(size, len(rows), changed, select_ms, apply_ms, path.stat().st_size / 2**20)
            best[size] = min(best.get(size, found), found, key=lambda result: result.total_ms)
    return list(best.values())


def report(results: list[Result]) -> float:
    """Print the figures; how many times longer the slowest store took than the smallest."""
    print("One decay run (select + apply, slices of 200, a commit each) over synthetic memories, the shortest run:\n")
    print(
        f"{'memories':>10} {'file MiB':>9} {'due':>6} {'changed':>8} {'select ms':>10} {'apply ms':>9} {'total ms':>9}"
    )
    for found in results:
        print(
            f"{found.memories:>10,} {found.file_mb:>9.0f} {found.due:>6,} {found.changed:>8,} "
            f"{found.select_ms:>10.1f} {found.apply_ms:>9.1f} {found.total_ms:>9.1f}"
        )
    ratio = max(found.total_ms for found in results) / results[0].total_ms
    print(f"\nslowest / smallest: {ratio:.2f} (at most {MAX_RATIO:g})")
    return ratio


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time a decay run over stores of different size with equally many due."
    )
    parser.add_argument("--sizes", default="10000,100000,1000000", help="memories in each store, smallest first")
    parser.add_argument("--due", type=int, default=1000, help="how many of them are due")
    parser.add_argument("--runs", type=int, default=7, help="runs over each store")
    parser.add_argument("--folder", help="where the stores are made, and removed again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        stores = {int(size): Path(folder) / f"{size}.db" for size in arguments.sizes.split(",")}
        for size, path in stores.items():
            fill(path, size, arguments.due)
        return 0 if report(measure(stores, arguments.runs)) <= MAX_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())

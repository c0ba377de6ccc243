"""Reading and writing many rows of `memories` in few steps."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import msgspec
import pytest

from memory_system.models import Memory
from memory_system.storage import rows
from tests.integration.test_rebase import opened, path

__all__ = ["path"]  # a fixture

NUMBERS = (1, 2, rows.AT_ONCE - 1, rows.AT_ONCE, rows.AT_ONCE + 1, 3 * rows.AT_ONCE, 100)
CLOCKS = rows.RowUpdate("importance", "access_count", "last_accessed_at", "memory_tier")


def some(db: sqlite3.Connection, count: int) -> list[int]:
    return [row_id for (row_id,) in db.execute("SELECT row_id FROM memories ORDER BY random() LIMIT ?", (count,))]


def one_by_one(db: sqlite3.Connection) -> dict[int, Memory]:
    return {row[0]: rows.memory_from_row(row) for row in db.execute(f"SELECT {rows.COLUMNS} FROM memories")}


@pytest.mark.parametrize("count", NUMBERS)
def test_rows_are_read_as_they_are_in_the_order_asked_for(path: Path, count: int) -> None:
    with opened(path) as db:
        row_ids = some(db, count)
        every = one_by_one(db)
        assert rows.fetch_rows(db, row_ids) == [every[row_id] for row_id in row_ids]


def test_rows_that_are_not_there_are_left_out_and_none_comes_twice(path: Path) -> None:
    with opened(path) as db:
        first, second = some(db, 2)
        found = rows.fetch_rows(db, [10**9, first, second, 10**9 + 1, first])
        assert [memory.row_id for memory in found] == [first, second]
        assert rows.fetch_rows(db, []) == []


@pytest.mark.parametrize("count", NUMBERS)
def test_fields_are_written_to_the_bit_and_nothing_else_is(path: Path, count: int) -> None:
    with opened(path) as db:
        before = one_by_one(db)
        changed = {
            row_id: msgspec.structs.replace(
                before[row_id],
                importance=random.random(),
                access_count=number,
                last_accessed_at=None if number % 2 else random.uniform(1.7e9, 1.8e9),
                memory_tier="long",
            )
            for number, row_id in enumerate(some(db, count))
        }
        unwritten = [msgspec.structs.replace(memory, content="not among the fields") for memory in changed.values()]
        CLOCKS.write(db, unwritten)
        assert one_by_one(db) == before | changed
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize(("count", "steps"), [(1, 1), (rows.AT_ONCE, 1), (100, 7), (31, 5)])
def test_so_many_rows_are_few_steps(path: Path, count: int, steps: int) -> None:
    with opened(path) as db:
        memories = rows.fetch_rows(db, some(db, count))
        statements = list[str]()
        db.set_trace_callback(statements.append)
        rows.fetch_rows(db, [memory.row_id for memory in memories])
        CLOCKS.write(db, memories)
        assert len([each for each in statements if "memories" in each]) == 2 * steps


def test_parts_are_of_few_lengths_and_miss_nothing() -> None:
    for count in range(100):
        found = [list(part) for part in rows.parts(range(count))]
        assert [item for part in found for item in part] == list(range(count))
        assert {len(part) for part in found} <= {1, 2, 4, 8, 16}
        assert len(found) <= count // rows.AT_ONCE + 4


@pytest.mark.parametrize("count", NUMBERS)
def test_inserted_rows_are_as_they_were_given(path: Path, count: int) -> None:
    with opened(path) as db:
        last = max(one_by_one(db))
        given = [
            msgspec.structs.replace(
                memory, row_id=last + number + 1, memory_id=f"mem-new-{number}", metadata={"a": [1]}
            )
            for number, memory in enumerate(rows.fetch_rows(db, some(db, count)))
        ]
        rows.insert_all(db, given)
        assert rows.fetch_rows(db, [memory.row_id for memory in given]) == given
        assert rows.insert(db, msgspec.structs.replace(given[0], memory_id="mem-next")) == last + count + 1


def test_rows_are_found_by_their_key(path: Path) -> None:
    with opened(path) as db:
        row_ids, statements = some(db, rows.AT_ONCE), list[str]()
        db.set_trace_callback(statements.append)
        CLOCKS.write(db, rows.fetch_rows(db, row_ids))
        db.set_trace_callback(None)
        plans = [str(row[3]) for each in statements for row in db.execute(f"EXPLAIN QUERY PLAN {each}")]
        assert [plan for plan in plans if plan.startswith("SCAN") and "memories" in plan] == []
        assert len([plan for plan in plans if "USING INTEGER PRIMARY KEY" in plan]) == rows.AT_ONCE + 1

"""Memories and keys of a group go to SQLite together; no request may notice."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memory_system.digest import content_digest
from memory_system.errors import IdempotencyMismatch, InternalError, MemoryNotFound, StorageFailed
from memory_system.storage import memories, rows
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.jobs import WriteJob
from memory_system.storage.memories import NewMemory
from tests.integration.test_writer import Bench, Reader, key, run, running


def new(content: str, **fields: Any) -> NewMemory:
    given = {
        "content": content,
        "content_digest": content_digest(content),
        "memory_type": "general",
        "memory_tier": None,
        "importance": None,
        "metadata": {},
        "tags": [],
        "parent_id": None,
        "session_id": None,
        "user_id": None,
        "occurred_at": None,
        "expires_at": None,
        "created_by": "test",
    }
    return NewMemory(**given | fields)


def adding(content: str, **fields: Any) -> WriteJob:
    request_id = fields.pop("request_id", f"{content}-{random.random()}")
    return WriteJob(lambda context: memories.add(context, new(content, **fields)), "default", key=key(request_id))


def stored(path: Path) -> dict[str, int]:
    """The row_id of each content."""
    with Reader(path) as db:
        return dict(db.execute("SELECT content, row_id FROM memories"))


def counted(bench: Bench, start: str) -> int:
    return sum(event.startswith(start) for event in bench.spy.events)


def test_adds_that_wait_together_are_few_statements(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as bench:
            await bench.group([adding(f"m{number}") for number in range(40)])
            # 16, 16 and 8 of each kind
            assert counted(bench, "INSERT INTO memories") == counted(bench, "INSERT INTO idempotency") == 3
            assert sum("LEFT JOIN idempotency" in event for event in bench.spy.events) == 3
            found = stored(bench.path)
            assert [found[f"m{number}"] for number in range(40)] == list(range(1, 41))
            with Reader(bench.path) as db:
                assert db.execute("SELECT count(*) FROM idempotency").fetchone() == (40,)
                assert [row[0] for row in db.execute("SELECT row_id FROM index_log ORDER BY seq")] == [*range(1, 41)]
            written = [memory for changes in bench.changes for memory in changes.written]
            with Reader(bench.path) as db:
                assert rows.fetch_rows(db, range(1, 41)) == written

    run(scenario)


def test_a_request_sees_what_was_added_before_it_in_its_group(tmp_path: Path) -> None:
    seen = list[Any]()

    def look(context: WriteContext) -> Reply:
        seen.append(context.db.execute("SELECT content FROM memories ORDER BY row_id").fetchall())
        return {}

    def child(context: WriteContext) -> Reply:
        parent = memories.insert(context, new("parent", user_id="ada"))
        return memories.add(context, new("child", parent_id=parent.memory_id))

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            await bench.group([adding("first"), WriteJob(look, "default"), WriteJob(child, "default"), adding("last")])
            assert seen == [[("first",)]]
            assert list(stored(bench.path)) == ["first", "parent", "child", "last"]
            with Reader(bench.path) as db:
                query = "SELECT c.user_id FROM memories AS c JOIN memories AS p ON p.memory_id = c.parent_id"
                assert db.execute(query).fetchall() == [("ada",)]

    run(scenario)


@pytest.mark.parametrize(
    ("wrong", "error"), [({"importance": 2.0}, StorageFailed), ({"content": "\ud800"}, InternalError)]
)
def test_a_row_that_is_refused_fails_its_own_request_alone(
    tmp_path: Path, wrong: dict[str, Any], error: type[Exception]
) -> None:
    def bad(context: WriteContext) -> Reply:
        return memories.add(context, msgspec.structs.replace(new("bad"), **wrong))

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            jobs = [adding("1"), adding("2"), WriteJob(bad, "default", key=key("of the bad one")), adding("3")]
            *done, refused, last = await bench.group(jobs)
            assert isinstance(refused, error)
            assert [reply["commit_seq"] for reply in (*done, last)] == [1, 2, 3]  # type: ignore[index,call-overload]
            assert list(stored(bench.path)) == ["1", "2", "3"]
            with Reader(bench.path) as db:
                assert db.execute("SELECT count(*) FROM idempotency").fetchone() == (3,)
                assert db.execute("SELECT row_id FROM index_log").fetchall() == [(r,) for (r,) in _row_ids(db)]
            assert bench.fatal == []
            await bench.group([adding(str(number)) for number in range(4, 30)])
            assert list(stored(bench.path)) == [str(number) for number in range(1, 30)]

    run(scenario)


def _row_ids(db: sqlite3.Connection) -> list[tuple[int]]:
    return db.execute("SELECT row_id FROM memories ORDER BY row_id").fetchall()


def test_a_request_that_fails_without_writing_costs_the_others_nothing(tmp_path: Path) -> None:
    def missing(context: WriteContext) -> Reply:
        rows.fetch(context.db, "default", "mem-of-nobody", context.now_s)
        return {}

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            first, gone, second = await bench.group([adding("1"), WriteJob(missing, "default"), adding("2")])
            assert isinstance(gone, MemoryNotFound)
            assert isinstance(first, dict) and isinstance(second, dict)
            assert "ROLLBACK" not in bench.spy.events

    run(scenario)


def test_a_request_that_fails_after_it_added_leaves_nothing(tmp_path: Path) -> None:
    def half(context: WriteContext) -> Reply:
        memories.add(context, new("half"))
        raise MemoryNotFound("gone")

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            _, gone, _ = await bench.group([adding("1"), WriteJob(half, "default"), adding("2")])
            assert isinstance(gone, MemoryNotFound)
            assert list(stored(bench.path)) == ["1", "2"]

    run(scenario)


def test_a_key_used_twice_in_a_group_is_one_effect(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as bench:
            first, other, again = await bench.group(
                [adding("1", request_id="same"), adding("2"), adding("1", request_id="same")]
            )
            assert again == first | {"replayed": True}  # type: ignore[operator]
            assert isinstance(other, dict)
            assert await bench.writer.submit(adding("1", request_id="same")) == again
            mismatch = adding("1", request_id="same")
            assert mismatch.key is not None
            mismatch.key = key("same", b"other payload")
            with pytest.raises(IdempotencyMismatch):
                await bench.writer.submit(mismatch)
            assert list(stored(bench.path)) == ["1", "2"]

    run(scenario)


def test_a_number_is_never_given_twice(tmp_path: Path) -> None:
    def delete(context: WriteContext) -> Reply:
        context.db.execute("DELETE FROM memories")
        return {}

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            await bench.group([adding("1"), adding("2"), WriteJob(delete, "default"), adding("3")])
            assert stored(bench.path) == {"3": 3}
            await bench.writer.submit(WriteJob(delete, "default"))
            await bench.group([adding("4"), adding("5")])
            assert stored(bench.path) == {"4": 4, "5": 5}

    run(scenario)

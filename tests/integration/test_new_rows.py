"""Memories and keys of a group go to SQLite together; no request may notice."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memory_system.digest import content_digest
from memory_system.errors import IdempotencyMismatch, InternalError, MemoryNotFound, StorageFailed
from memory_system.storage import memories, rows
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.idempotency import Key
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
        async with running(tmp_path, group_ms=10_000.0) as bench:
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


@pytest.mark.parametrize("bad_key", [Key("agent", "\ud800", b"-" * 16), Key(None, "no caller", b"-" * 16)])  # type: ignore[arg-type]
def test_a_key_that_is_refused_fails_its_own_request_alone(tmp_path: Path, bad_key: Key) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as bench:
            bad = adding("bad")
            bad.key = bad_key
            first, refused, second = await bench.group([adding("1"), bad, adding("2")])
            assert isinstance(refused, InternalError | StorageFailed)
            assert isinstance(first, dict) and isinstance(second, dict)
            assert list(stored(bench.path)) == ["1", "2"]
            assert bench.fatal == []
            assert isinstance(await bench.writer.submit(adding("3")), dict)

    run(scenario)


def test_the_log_blames_nobody_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def look(context: WriteContext) -> Reply:
        return {"count": context.db.execute("SELECT count(*) FROM memories").fetchone()[0]}

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            bad = WriteJob(
                lambda context: memories.add(context, new("bad", importance=2.0)), "default", key=key("guilty")
            )
            refused, counted_ = await bench.group([bad, WriteJob(look, "default", key=key("innocent"))])
            assert isinstance(refused, StorageFailed)
            assert counted_ == {"count": 0, "commit_seq": 1}

    run(scenario)
    assert "guilty" in caplog.text
    assert "innocent" not in caplog.text


def test_one_id_twice_is_refused_by_the_table(tmp_path: Path) -> None:
    def same(context: WriteContext) -> Reply:
        return {"row_id": memories.insert(context, new("same"), "mem-same").row_id}

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            first, second = await bench.group([WriteJob(same, "default"), WriteJob(same, "default")])
            assert first == {"row_id": 1, "commit_seq": 1}
            assert isinstance(second, StorageFailed)
            with Reader(bench.path) as db:
                assert db.execute("SELECT row_id FROM index_log").fetchall() == _row_ids(db) == [(1,)]

    run(scenario)


def test_a_count_that_lags_behind_the_table_gives_no_number_that_is_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as bench:
            await bench.group([adding("1"), adding("2")])
            for damage in ("DELETE FROM sqlite_sequence WHERE name = 'memories'", "UPDATE sqlite_sequence SET seq = 1"):
                bench.spy.db.execute(damage)
                assert isinstance(await bench.writer.submit(adding(damage)), dict)
            assert list(stored(bench.path).values()) == [1, 2, 3, 4]

    run(scenario)


def test_a_newcomer_waits_for_a_turn_and_not_for_sixteen(tmp_path: Path) -> None:
    done = list[str]()

    def work(name: str) -> WriteJob:
        def slow(_: WriteContext) -> Reply:
            done.append(name)
            time.sleep(0.01)
            return {}

        return WriteJob(slow, "default", key=key(f"{name}-{random.random()}"), client=name.encode())

    async def scenario() -> None:
        async with running(tmp_path, group_ms=5.0) as bench:
            release, held = await bench.hold()
            busy = [bench.writer.submit(work("a")) for _ in range(40)]
            newcomer = bench.writer.submit(work("b"))
            release.set()
            await asyncio.gather(held, newcomer, *busy)
            assert done.index("b") <= 2

    run(scenario)


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

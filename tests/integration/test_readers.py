"""The pool of reading connections, and that reads never wait for writes."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from memory_system import housekeeping
from memory_system.access import AccessBuffer
from memory_system.errors import DeadlineExceeded, StorageFailed
from memory_system.search.connections import Connections
from memory_system.storage import database
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.readers import Readers
from memory_system.storage.writer import WriteJob
from tests.support.service import eventually, running_service

# Counts to the number given: a query that takes as long as one likes.
COUNT = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) SELECT count(*) FROM n"


@asynccontextmanager
async def pool(tmp_path: Path, count: int = 2) -> AsyncIterator[Readers]:
    path = tmp_path / "memory.db"
    database.open_store(path).close()
    readers = Readers(path, count)
    await readers.start()
    try:
        yield readers
    finally:
        await readers.close()


def test_queries_of_many_callers_share_the_pool(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(tmp_path) as readers:
            found = await asyncio.gather(*(readers.fetch("SELECT ?", (number,)) for number in range(50)))
            assert found == [[(number,)] for number in range(50)]
            assert repr(readers) == "Readers(2 of 2 free)"

    asyncio.run(scenario())


def test_no_query_can_write(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(tmp_path) as readers:
            for statement in ("DELETE FROM meta", "INSERT INTO namespaces VALUES ('default', 1) RETURNING 1"):
                with pytest.raises(StorageFailed, match="readonly"):
                    await readers.fetch(statement)
            assert await readers.fetch("SELECT count(*) FROM meta") == [(1,)]

    asyncio.run(scenario())


def test_a_failed_query_gives_its_connection_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(tmp_path, count=1) as readers:
            for _ in range(5):
                with pytest.raises(StorageFailed, match="cannot be read"):
                    await readers.fetch("SELECT * FROM no_such_table")
            assert await asyncio.wait_for(readers.fetch("SELECT 1"), 5.0) == [(1,)]

    asyncio.run(scenario())


def test_a_caller_who_gives_up_harms_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(tmp_path, count=1) as readers:
            for _ in range(5):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(readers.fetch(COUNT, (300_000,)), 0.005)
            waiting = asyncio.create_task(readers.fetch("SELECT 1"))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert await asyncio.wait_for(readers.fetch("SELECT 2"), 20.0) == [(2,)]
            assert repr(readers) == "Readers(1 of 1 free)"

    asyncio.run(scenario())


def test_a_reader_sees_a_commit_at_once_and_nothing_before_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pool(tmp_path) as readers:
            with contextlib.closing(database.connect_writer(tmp_path / "memory.db")) as db:
                db.execute("BEGIN IMMEDIATE")
                db.execute("INSERT INTO namespaces VALUES ('default', 1)")
                assert await readers.fetch("SELECT * FROM namespaces") == []
                db.execute("COMMIT")
                assert await readers.fetch("SELECT * FROM namespaces") == [("default", 1)]

    asyncio.run(scenario())


# -- in the service -------------------------------------------------------------------------------------------------


def test_reads_do_not_wait_for_a_busy_writer(tmp_path: Path) -> None:
    entered, release = threading.Event(), threading.Event()

    def hold(context: WriteContext) -> Reply:
        entered.set()
        assert release.wait(20.0)
        return {}

    async def scenario() -> None:
        async with running_service(tmp_path) as service:
            memory_id = await service.add("a memory to read", tags=["x"])
            service.runtime._caches.records.clear()
            held = service.runtime._writer.submit(WriteJob(hold, "default", counted=False))
            try:
                await asyncio.to_thread(entered.wait, 20.0)
                async with asyncio.timeout(5.0):
                    for _ in range(3):
                        assert (await service.ok("get_memory", memory_id=memory_id))["memory"]["tags"] == ["x"]
                        assert (await service.ok("list_memories"))["count"] == 1
                        assert (await service.ok("search_memory", query="memory"))["count"] == 1
                    writing = asyncio.create_task(service.ask("add_memory", content="waits"))
                    await asyncio.sleep(0.05)
                    assert not writing.done()
            finally:
                release.set()
            await held
            assert (await writing)["status"] == "success"

    asyncio.run(scenario())


def test_accesses_are_counted_in_memory_and_written_together(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_service(tmp_path, storage__access_flush_s=0.05) as service:
            ids = [await service.add(f"memory {number}") for number in range(10)]
            traced: list[str] = []
            service.runtime._writer._db.set_trace_callback(traced.append)
            for _ in range(5):
                for memory_id in ids:
                    await service.ok("get_memory", memory_id=memory_id)
                    await service.ok("get_memory", memory_id=memory_id, touch=False)

            async def flushed() -> bool:
                written = service.rows("SELECT sum(access_count) FROM memories") == [(50,)]
                return written and (await service.record(ids[0]))["access_count"] == 5

            await eventually(flushed)
            service.runtime._writer._db.set_trace_callback(None)
            # 50 counted reads, at most one transaction for each time the interval passed.
            assert 1 <= traced.count("COMMIT") <= 25
            assert [count for (count,) in service.rows("SELECT access_count FROM memories")] == [5] * 10
            assert (await service.ok("get_commit_seq"))["commit_seq"] == 10

    asyncio.run(scenario())


def test_accesses_that_are_not_written_yet_are_written_at_the_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_service(tmp_path, storage__access_flush_s=3600) as service:
            memory_id = await service.add("read and then stopped")
            for _ in range(3):
                await service.ok("get_memory", memory_id=memory_id)
            assert service.rows("SELECT access_count FROM memories") == [(0,)]
        with contextlib.closing(database.connect_reader(tmp_path / "memory.db")) as db:
            assert db.execute("SELECT access_count FROM memories").fetchall() == [(3,)]

    asyncio.run(scenario())


def test_accesses_survive_a_flush_that_fails(tmp_path: Path) -> None:
    """The disk is full for a while: what was counted then is written when there is room again."""

    async def scenario() -> None:
        async with running_service(tmp_path, storage__access_flush_s=3600) as service:
            memory_id = await service.add("read while the disk is full")
            await service.ok("get_memory", memory_id=memory_id)
            db = service.runtime._writer._db
            db.execute("PRAGMA query_only = 1")
            with pytest.raises(StorageFailed):
                await service.runtime._housekeeping.flush_accesses()
            await service.ok("get_memory", memory_id=memory_id)
            db.execute("PRAGMA query_only = 0")
            await service.runtime._housekeeping.flush_accesses()
            assert service.rows("SELECT access_count FROM memories") == [(2,)]

    asyncio.run(scenario())


def test_no_read_takes_longer_than_its_limit(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "memory.db"
        database.open_store(path).close()
        readers = Readers(path, 1, query_s=0.2)
        await readers.start()
        try:
            with pytest.raises(DeadlineExceeded, match="query_s"):
                await asyncio.wait_for(readers.fetch(COUNT, (10**12,)), 20.0)
            assert await readers.fetch("SELECT 1") == [(1,)]
        finally:
            await readers.close()

    asyncio.run(scenario())


def test_no_query_of_a_search_takes_longer_than_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    database.open_store(path).close()
    connections = Connections(lambda: database.connect_reader(path), query_s=0.2)
    began_s = time.monotonic()
    with pytest.raises(sqlite3.OperationalError, match="interrupted"), connections.one() as db:
        db.execute(COUNT, (10**12,)).fetchone()
    # Far above the limit, far below what pytest would interrupt.
    assert time.monotonic() - began_s < 20.0
    with connections.one() as db:
        assert db.execute("SELECT 1").fetchone() == (1,)
    connections.close()


def test_accesses_put_back_are_added_to_those_counted_meanwhile() -> None:
    buffer = AccessBuffer()
    buffer._accesses = {7: (1, 1.0, 10.0)}
    taken = buffer.take()
    buffer._accesses = {7: (1, 0.5, 20.0)}
    buffer.put_back(taken)
    assert buffer.take() == {7: (2, 1.5, 20.0)}


def test_the_log_is_kept_as_far_as_the_index_has_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "_LOG_KEPT", 0)

    async def scenario() -> None:
        async with running_service(tmp_path) as service:
            keeping = service.runtime._housekeeping
            applied = 0
            keeping._applied_seq = lambda: applied
            for number in range(3):
                await service.add(f"memory {number}")
            await service.settled()
            logged = service.count("index_log")
            await keeping.prune()
            assert service.count("index_log") == logged >= 3
            applied = service.rows("SELECT max(seq) FROM index_log")[0][0]
            await keeping.prune()
            assert service.count("index_log") == 1

    asyncio.run(scenario())

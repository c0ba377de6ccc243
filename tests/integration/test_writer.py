"""The writing thread: groups, savepoints, acknowledgement, limits, and what becomes of callers when SQLite fails."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memory_system.errors import (
    DeadlineExceeded,
    IdempotencyMismatch,
    InternalError,
    MemoryNotFound,
    MemorySystemError,
    ShuttingDown,
    StorageFailed,
    StorageFull,
)
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.settings import StorageSettings
from memory_system.storage import database, writer
from memory_system.storage.context import Changes, Reply, WriteContext
from memory_system.storage.idempotency import Key
from memory_system.storage.writer import WriteJob, Writer

WAIT_S = 20.0


def sqlite_error(code: int, text: str = "injected") -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


class Spy:
    """A connection that notes when each statement returned, and can be told to fail or to wait before one."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.events: list[str] = []
        self.before: Callable[[str], None] = lambda sql: None

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        self.before(sql)
        cursor = self.db.execute(sql, *arguments)
        self.events.append(sql)
        return cursor

    def executemany(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        return self.db.executemany(sql, *arguments)

    @property
    def in_transaction(self) -> bool:
        return self.db.in_transaction

    @property
    def total_changes(self) -> int:
        return self.db.total_changes

    def close(self) -> None:
        self.db.close()

    @property
    def commits(self) -> int:
        return self.events.count("COMMIT")

    def fail_at(self, start: str, code: int, times: int = 1) -> None:
        """Raise this error instead of running the next `times` statements that start so."""
        left = [times]

        def before(sql: str) -> None:
            if sql.startswith(start) and left[0]:
                left[0] -= 1
                raise sqlite_error(code)

        self.before = before


class Bench:
    """A running writer on a new store, with everything it reports."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path = path
        self.spy = Spy(database.open_store(path))
        self.changes: list[Changes] = []
        self.fatal: list[Exception] = []
        self.ended = asyncio.Event()
        self.on_commit: Callable[[Changes], None] = self.changes.append
        connection: Any = self.spy
        self.writer = Writer(
            connection,
            replace(StorageSettings(), **settings),
            LifecycleSettings(),
            on_commit=lambda changes: self.on_commit(changes),
            on_fatal=self._on_fatal,
        )

    def _on_fatal(self, error: Exception) -> None:
        self.fatal.append(error)
        self.ended.set()

    def rows(self) -> list[str]:
        """The values written by `note`, as another connection sees them, in order."""
        with Reader(self.path) as db:
            return [value for (value,) in db.execute("SELECT value FROM meta WHERE key LIKE 'note-%' ORDER BY key")]

    async def hold(self) -> tuple[threading.Event, asyncio.Future[Reply]]:
        """Keep the thread busy inside a request until the event is set, so that what is submitted forms a group."""
        entered, release = threading.Event(), threading.Event()

        def run(context: WriteContext) -> Reply:
            entered.set()
            assert release.wait(WAIT_S)
            return {}

        future = self.writer.submit(WriteJob(run, "held", counted=False))
        await asyncio.to_thread(entered.wait, WAIT_S)
        return release, future

    async def group(self, jobs: list[WriteJob]) -> list[Reply | BaseException]:
        """Submit jobs that wait together; their replies or errors. The spy's events then start after the hold's."""
        release, held = await self.hold()
        futures = [self.writer.submit(job) for job in jobs]
        release.set()
        await held
        return await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), WAIT_S)


class Reader:
    """A connection of one's own that is closed at the end of the block."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> sqlite3.Connection:
        self._db = database.connect_reader(self._path)
        return self._db

    def __exit__(self, *_: object) -> None:
        self._db.close()


@asynccontextmanager
async def running(tmp_path: Path, **settings: Any) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path / "memory.db", **settings)
    bench.writer.start()
    try:
        yield bench
    finally:
        bench.spy.before = lambda sql: None
        await bench.writer.close()


def run(scenario: Callable[[], Any]) -> None:
    """Run a coroutine; an exception that reaches the event loop's handler is a failure."""
    unhandled: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        await scenario()

    asyncio.run(main())
    assert unhandled == []


def note(name: str, **fields: Any) -> WriteJob:
    """A request that writes one row."""

    def work(context: WriteContext) -> Reply:
        context.db.execute("INSERT INTO meta (key, value) VALUES (?, ?)", (f"note-{name}", name))
        return {"name": name}

    return WriteJob(work, fields.pop("namespace", "default"), **fields)


def failing(error: Exception, name: str = "half-done") -> WriteJob:
    """A request that writes a row and then fails."""

    def work(context: WriteContext) -> Reply:
        context.db.execute("INSERT INTO meta (key, value) VALUES (?, ?)", (f"note-{name}", name))
        raise error

    return WriteJob(work, "default")


def key(request_id: str, payload: bytes = b"payload") -> Key:
    return Key("agent", request_id, payload.ljust(16, b"-"))


# -- groups ---------------------------------------------------------------------------------------------------------


def test_a_namespace_that_only_failing_writes_name_is_not_kept(tmp_path: Path) -> None:
    def refuse(context: WriteContext) -> Reply:
        raise MemoryNotFound("no such memory")

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            await bench.group([note("a", namespace="home")])
            half_done = replace(failing(MemoryNotFound("late")), namespace="half-done")
            names = ("home", "nobody", "no one")
            await bench.group([*(WriteJob(refuse, name) for name in names), half_done, note("b", namespace="new")])
            bench.spy.fail_at("COMMIT", sqlite3.SQLITE_FULL)
            with pytest.raises(StorageFull):
                await bench.writer.submit(note("c", namespace="unkept"))
            assert bench.writer._runner.sequences == {"home": 1, "new": 1}

    run(scenario)


def test_what_waits_together_is_one_transaction(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, group_ms=10_000.0) as bench:
            bench.spy.db.set_trace_callback(traced.append)
            replies = await bench.group([note(f"{number:02}") for number in range(40)])
            bench.spy.db.set_trace_callback(None)
            assert [reply["commit_seq"] for reply in replies if isinstance(reply, dict)] == list(range(1, 41))
            assert bench.rows() == [f"{number:02}" for number in range(40)]

    traced: list[str] = []
    run(scenario)
    # One for the request that held the thread and one for the forty.
    assert traced.count("COMMIT") == 2
    # Savepoints are taken only when one of the group has to be taken back.
    assert traced.count("SAVEPOINT request") == 0


@pytest.mark.parametrize(
    ("settings", "rows", "commits"),
    [
        ({"group_jobs": 8}, [1] * 20, 3),
        ({"group_rows": 100}, [60, 60, 30, 10], 2),
        ({"group_rows": 100}, [10, 5000, 10, 10], 3),
    ],
)
def test_a_group_ends_at_its_limit(tmp_path: Path, settings: dict[str, int], rows: list[int], commits: int) -> None:
    async def scenario() -> None:
        async with running(tmp_path, **settings) as bench:
            await bench.group([note(f"{number:02}", rows=count) for number, count in enumerate(rows)])
            assert bench.spy.commits == commits + 1
            assert len(bench.rows()) == len(rows)

    run(scenario)


def test_a_group_takes_no_more_after_its_time(tmp_path: Path) -> None:
    def slow(context: WriteContext) -> Reply:
        time.sleep(0.02)
        return {}

    async def scenario() -> None:
        async with running(tmp_path, group_ms=5.0) as bench:
            await bench.group([WriteJob(slow, "default") for _ in range(5)])
            assert bench.spy.commits == 5 + 1

    run(scenario)


def test_one_request_fails_alone(tmp_path: Path) -> None:
    bad_row = WriteJob(lambda c: c.db.execute("INSERT INTO namespaces VALUES ('x', 'not a number')") and {}, "default")

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            jobs = [note("1"), failing(MemoryNotFound("gone")), note("2"), bad_row, note("3")]
            first, gone, second, refused, third = await bench.group(jobs)
            assert isinstance(gone, MemoryNotFound)
            assert isinstance(refused, StorageFailed)
            assert [reply["commit_seq"] for reply in (first, second, third)] == [1, 2, 3]  # type: ignore[index]
            # The request that held the thread; the group that had to be run again, in savepoints; the rest.
            assert bench.spy.commits == 3 and "SAVEPOINT request" in bench.spy.events
            assert bench.rows() == ["1", "2", "3"]
            assert bench.fatal == []

    run(scenario)


def test_a_defect_in_one_request_fails_it_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as bench:
            jobs = [note("1"), failing(TypeError("a defect")), failing(OverflowError("2**64")), note("2")]
            first, broken, overflow, second = await bench.group(jobs)
            assert isinstance(broken, InternalError)
            assert isinstance(overflow, InternalError)
            assert isinstance(first, dict) and isinstance(second, dict)
            assert bench.rows() == ["1", "2"]
            assert bench.fatal == []

    run(scenario)


def test_a_rollback_of_the_whole_transaction_is_told_to_the_whole_group(tmp_path: Path) -> None:
    def roll_back(context: WriteContext) -> Reply:
        context.db.execute("INSERT OR ROLLBACK INTO meta (key, value) VALUES ('store_epoch', 'again')")
        return {}

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            before = await bench.writer.submit(note("0"))
            jobs = [note("1", key=key("first")), note("2"), WriteJob(roll_back, "default")]
            outcomes = await bench.group(jobs)
            assert [type(outcome) for outcome in outcomes] == [StorageFailed] * 3
            assert bench.rows() == ["0"]
            assert bench.writer.commit_seq("default") == before["commit_seq"] == 1
            again = await bench.writer.submit(note("1", key=key("first")))
            assert again == {"name": "1", "commit_seq": 2}
            assert bench.fatal == []

    run(scenario)


# -- acknowledgement ------------------------------------------------------------------------------------------------


def test_nothing_is_told_before_commit_has_returned(tmp_path: Path) -> None:
    reached, release = threading.Event(), threading.Event()

    def before(sql: str) -> None:
        if sql == "COMMIT":
            reached.set()
            assert release.wait(WAIT_S)

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            bench.spy.before = before
            futures = [bench.writer.submit(note(name)) for name in "abc"]
            for future in futures:
                future.add_done_callback(lambda _: bench.spy.events.append("reply"))
            await asyncio.to_thread(reached.wait, WAIT_S)
            await asyncio.sleep(0.05)
            assert not any(future.done() for future in futures)
            assert bench.changes == []
            assert bench.writer.commit_seq("default") == 0
            assert bench.rows() == []
            release.set()
            await asyncio.gather(*futures)
            await asyncio.sleep(0)
            assert bench.writer.commit_seq("default") == 3
            events = bench.spy.events
            assert events.index("COMMIT") < events.index("reply")

    run(scenario)


def test_caches_hear_of_a_commit_before_its_caller(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as bench:
            order: list[str] = []
            bench.on_commit = lambda changes: order.append(f"caches {changes.caller[1]}")
            future = bench.writer.submit(note("1", caller="ada"))
            future.add_done_callback(lambda _: order.append("caller"))
            await future
            await asyncio.sleep(0)
            assert order == ["caches ada", "caller"]

    run(scenario)


def test_a_listener_that_fails_leaves_no_caller_without_an_answer(tmp_path: Path) -> None:
    def broken(changes: Changes) -> None:
        raise RuntimeError("a defect in a cache")

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            bench.on_commit = broken
            replies = await asyncio.wait_for(asyncio.gather(*(bench.writer.submit(note(n)) for n in "ab")), 2.0)
            assert [reply["commit_seq"] for reply in replies] == [1, 2]

    run(scenario)


def test_commit_seq_is_per_namespace_and_survives_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as bench:
            jobs = [note("1"), note("2", namespace="other"), note("3"), note("4", counted=False)]
            replies = await bench.group(jobs)
            assert [reply.get("commit_seq") for reply in replies if isinstance(reply, dict)] == [1, 1, 2, None]
        async with running(tmp_path) as bench:
            assert bench.writer.commit_seq("default") == 2
            assert bench.writer.commit_seq("other") == 1
            assert bench.writer.commit_seq("unknown") == 0
            assert (await bench.writer.submit(note("5")))["commit_seq"] == 3

    run(scenario)


def test_callers_who_went_away_change_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as bench:
            release, held = await bench.hold()
            futures = [bench.writer.submit(note(str(number))) for number in range(4)]
            failed = bench.writer.submit(failing(MemoryNotFound("gone")))
            for future in (held, futures[0], futures[2], failed):
                future.cancel()
            release.set()
            assert [(await futures[number])["commit_seq"] for number in (1, 3)] == [2, 4]
            assert bench.rows() == ["0", "1", "2", "3"]

    run(scenario)


# -- once -----------------------------------------------------------------------------------------------------------


def test_a_repeated_key_is_done_once_also_within_one_group(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as bench:
            first, second, other = await bench.group(
                [note("1", key=key("same")), note("1", key=key("same")), note("1", key=key("same", b"other payload"))]
            )
            assert first == {"name": "1", "commit_seq": 1}
            assert second == {"name": "1", "commit_seq": 1, "replayed": True}
            assert isinstance(other, IdempotencyMismatch)
            assert await bench.writer.submit(note("1", key=key("same"))) == second
            assert bench.rows() == ["1"]
            assert bench.writer.commit_seq("default") == 1

    run(scenario)


def test_only_success_is_kept_under_a_key(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as bench:
            failed = replace(failing(MemoryNotFound("gone")), key=key("retried"))
            with pytest.raises(MemoryNotFound):
                await bench.writer.submit(failed)
            assert await bench.writer.submit(note("1", key=key("retried"))) == {"name": "1", "commit_seq": 1}

    run(scenario)


def test_a_deadline_that_passed_in_the_queue(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as bench:
            await bench.writer.submit(note("0", key=key("done before")))
            past_s = time.monotonic() - 0.001
            late, in_time, replay = await bench.group(
                [
                    note("late", deadline_s=past_s),
                    note("in time", deadline_s=time.monotonic() + 60.0),
                    note("0", key=key("done before"), deadline_s=past_s),
                ]
            )
            assert isinstance(late, DeadlineExceeded)
            assert isinstance(in_time, dict) and in_time["commit_seq"] == 2
            assert isinstance(replay, dict) and replay["replayed"]
            assert bench.rows() == ["0", "in time"]

    run(scenario)


# -- the end --------------------------------------------------------------------------------------------------------


def test_close_runs_what_was_submitted_and_empties_the_log(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, group_jobs=4) as bench:
            release, _ = await bench.hold()
            futures = [bench.writer.submit(note(f"{number:02}")) for number in range(30)]
            closing = asyncio.create_task(bench.writer.close())
            await asyncio.sleep(0)
            refused = bench.writer.submit(note("too late"))
            release.set()
            await closing
            assert [reply["commit_seq"] for reply in await asyncio.gather(*futures)] == list(range(1, 31))
            with pytest.raises(ShuttingDown):
                await refused
            await bench.writer.close()
            assert len(bench.rows()) == 30

    run(scenario)
    log = tmp_path / "memory.db-wal"
    assert not log.exists() or log.stat().st_size == 0


# -- faults ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_refuses_writes_and_heals_by_itself(tmp_path: Path) -> None:
    def large(context: WriteContext) -> Reply:
        context.db.execute("INSERT INTO meta (key, value) VALUES ('note-large', ?)", ("x" * 4_000_000,))
        return {}

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            await bench.writer.submit(note("0"))
            (pages,) = bench.spy.db.execute("PRAGMA page_count").fetchone()
            bench.spy.db.execute(f"PRAGMA max_page_count = {pages + 8}")
            for _ in range(3):
                outcomes = await bench.group([note("1"), WriteJob(large, "default")])
                assert [type(outcome) for outcome in outcomes] == [StorageFull] * 2
            assert bench.rows() == ["0"]
            assert bench.writer.commit_seq("default") == 1
            bench.spy.db.execute("PRAGMA max_page_count = 1000000")
            first, second = await bench.group([note("1"), WriteJob(large, "default")])
            assert isinstance(first, dict) and isinstance(second, dict)
            assert (first["commit_seq"], second["commit_seq"]) == (2, 3)
            assert bench.fatal == []

    run(scenario)


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE])
@pytest.mark.parametrize("statement", ["BEGIN", "INSERT INTO meta", "COMMIT"])
def test_an_error_of_the_transaction_itself_is_answered_and_passes(tmp_path: Path, statement: str, code: int) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as bench:
            release, held = await bench.hold()
            futures = [bench.writer.submit(note(name)) for name in "ab"]
            await asyncio.sleep(0.01)
            release.set()
            await held
            await asyncio.wait(futures, timeout=WAIT_S)
            bench.spy.fail_at(statement, code, times=1_000_000)
            futures = [bench.writer.submit(note(name)) for name in "cd"]
            outcomes = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 3.0)
            expected = StorageFull if code == sqlite3.SQLITE_FULL else StorageFailed
            assert [type(outcome) for outcome in outcomes] == [expected] * 2
            bench.spy.before = lambda sql: None
            assert (await asyncio.wait_for(bench.writer.submit(note("e")), 3.0))["commit_seq"] == 3
            assert bench.rows() == ["a", "b", "e"]
            assert bench.fatal == []

    run(scenario)


def test_an_idle_checkpoint_that_fails_does_not_end_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_CHECKPOINT_IDLE_S", 0.01)
    tried = threading.Event()

    def before(sql: str) -> None:
        if sql.startswith("PRAGMA wal_checkpoint(PASSIVE)"):
            tried.set()
            raise sqlite_error(sqlite3.SQLITE_FULL, "database or disk is full")

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            bench.spy.before = before
            await bench.writer.submit(note("0"))
            await asyncio.to_thread(tried.wait, WAIT_S)
            assert (await asyncio.wait_for(bench.writer.submit(note("1")), WAIT_S))["commit_seq"] == 2
            assert bench.fatal == []

    run(scenario)


@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC])
def test_after_a_failed_sync_nothing_is_acknowledged_any_more(tmp_path: Path, code: int) -> None:
    """What was in the group is in doubt: a restart may find it in the log. What had not begun is to be asked again."""

    async def scenario() -> None:
        async with running(tmp_path, group_jobs=2) as bench:
            await bench.writer.submit(note("0"))
            release, held = await bench.hold()
            futures = [bench.writer.submit(note(str(number))) for number in range(1, 8)]
            bench.spy.fail_at("COMMIT", code)
            release.set()
            outcomes = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 3.0)
            assert not held.done()
            for outcome in outcomes:
                assert isinstance(outcome, MemorySystemError)
                assert outcome.retryable and outcome.details["retry_after_ms"] > 0
            await asyncio.wait_for(bench.ended.wait(), WAIT_S)
            assert [error.sqlite_errorcode for error in bench.fatal] == [code]  # type: ignore[attr-defined]
            with pytest.raises(MemorySystemError) as late:
                await bench.writer.submit(note("late"))
            assert late.value.retryable and late.value.details["retry_after_ms"] > 0
            assert bench.rows() == ["0"]
            assert bench.writer.commit_seq("default") == 1

    run(scenario)


def test_a_writer_shows_its_state(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as bench:
            assert repr(bench.writer) == "Writer(open, 0 waiting)"
            assert bench.writer.depth == 0
            assert bench.writer.last_commit_at is None
            await bench.writer.submit(note("1"))
            assert bench.writer.last_commit_at == pytest.approx(time.time(), abs=60.0)
            await bench.writer.close()
            assert repr(bench.writer) == "Writer(closed, 0 waiting)"

    run(scenario)


def test_errors_of_requests_are_errors_of_the_wire(tmp_path: Path) -> None:
    """Whatever a request does, its caller gets an error with a code."""

    async def scenario() -> None:
        async with running(tmp_path) as bench:
            for error in (sqlite3.IntegrityError("constraint"), sqlite3.ProgrammingError("misuse"), KeyError("defect")):
                with pytest.raises(MemorySystemError):
                    await asyncio.wait_for(bench.writer.submit(failing(error)), 3.0)
            assert bench.fatal == []
            assert bench.rows() == []

    run(scenario)

"""The error history on real files: what was acknowledged is there, once, whatever becomes of manager or disk."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from memory_system.errors import CannotStart, InvalidField
from memory_system.events import Event, make_event
from memory_system.health import history as history_module
from memory_system.health.folding import ROW_KEYS, VARIOUS
from memory_system.health.history import History
from memory_system.health.records import Committed, HistoryFailed
from memory_system.health.store import Store
from memory_system.health_settings import ErrorBusSettings
from tests.acceptance.test_disk import must_work
from tests.support.process import PROJECT, wait_until

DAY_S = 86_400.0
NOW_S = 1_800_000_000.0


class Clock:
    """A wall clock that a test sets."""

    def __init__(self, now_s: float = NOW_S) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@contextlib.asynccontextmanager
async def opened(folder: Path, **options: Any) -> AsyncIterator[History]:
    """A history below `folder`; options other than clock and on_commit are settings."""
    own = {name: options.pop(name) for name in ("clock", "on_commit") if name in options}
    history = History(folder / "health.db", ErrorBusSettings(**options), **own)
    await history.start()
    try:
        yield history
    finally:
        await history.close()


def events(number: int, kind: str = "t", **fields: Any) -> list[Event]:
    return [make_event("agent", kind, f"message {each}", **fields) for each in range(number)]


def counted(committed: Committed) -> int:
    return sum(event.count for _, event in committed.rows)


def rows_of(path: Path, table: str = "events") -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


# -- writing and reading --------------------------------------------------------------------------------------------


def test_an_event_comes_back_as_it_was(tmp_path: Path) -> None:
    sent = make_event(
        "agent", "storage_error", "cannot write", "critical", request_id="r-1", details={"n": 1}, now_s=5.5, count=3
    )

    async def use() -> None:
        async with opened(tmp_path, clock=Clock()) as history:
            committed = await history.submit([sent])
            assert committed == Committed(((1, sent),), 0)
            page = await history.get_errors()
            assert [stored.event for stored in page.results] == [sent]
            assert page.results[0].fields() == {"seq": 1, "received_at": NOW_S, **sent.fields()}
            assert (page.last_seq, page.oldest_seq, page.total, page.next_since_seq) == (1, 1, 3, None)

    asyncio.run(use())


def test_filters_and_pages(tmp_path: Path) -> None:
    async def use() -> None:
        async with opened(tmp_path) as history:
            empty = await history.get_errors()
            assert (empty.last_seq, empty.oldest_seq, empty.total) == (0, 1, 0)
            for number in range(20):
                severity = ("info", "warning", "error", "critical")[number % 4]
                agent, kind = f"a{number % 2}", f"t{number % 5}"
                await history.submit([make_event(agent, kind, "m", severity, now_s=1000.0 + number)])

            async def seqs(**query: Any) -> list[int]:
                page = await history.get_errors(**query)
                assert page.total >= len(page.results)
                return [stored.seq for stored in page.results]

            assert await seqs(agent="a1") == list(range(2, 21, 2))
            assert await seqs(error_type="t3") == [4, 9, 14, 19]
            assert await seqs(severity="error") == [3, 4, 7, 8, 11, 12, 15, 16, 19, 20]
            assert await seqs(since=1018.0) == [19, 20]
            assert await seqs(since_seq=18) == [19, 20]
            assert await seqs(agent="a1", severity="critical", since_seq=8) == [12, 16, 20]
            assert await seqs(limit=3, newest=True) == [18, 19, 20]
            assert await seqs(agent="nobody") == []

            page = await history.get_errors(severity="error", limit=4)
            assert (page.total, page.next_since_seq) == (10, 8)
            found = [stored.seq for stored in page.results]
            while page.next_since_seq is not None:
                page = await history.get_errors(since_seq=page.next_since_seq, severity="error", limit=4)
                found += [stored.seq for stored in page.results]
            assert found == [3, 4, 7, 8, 11, 12, 15, 16, 19, 20]

            for wrong in ({"limit": 0}, {"limit": 1001}, {"severity": "bad"}):
                with pytest.raises(InvalidField):
                    await history.get_errors(**wrong)  # type: ignore[arg-type]

    asyncio.run(use())


def test_a_page_is_bounded_by_its_size(tmp_path: Path) -> None:
    async def use() -> None:
        async with opened(tmp_path) as history:
            large = [make_event("a", "t", "x" * 2000, details={"k": "y" * 4000}) for _ in range(300)]
            await history.submit(large)
            page = await history.get_errors(limit=1000)
            assert 10 < len(page.results) < 300
            assert page.next_since_seq == page.results[-1].seq
            assert page.total == 300
            newest = await history.get_errors(limit=1000, newest=True)
            assert newest.results[-1].seq == 300

    asyncio.run(use())


def test_totals_by_severity(tmp_path: Path) -> None:
    async def use() -> None:
        clock = Clock()
        async with opened(tmp_path, clock=clock) as history:
            await history.submit(events(3, now_s=NOW_S - 5) + events(2, severity="info", now_s=NOW_S - 5, count=10))
            await history.submit(events(1, now_s=NOW_S - 500))
            assert await history.totals(60) == {"info": 20, "warning": 0, "error": 3, "critical": 0}
            assert (await history.totals(600))["error"] == 4

    asyncio.run(use())


def test_what_waits_is_one_transaction_and_questions_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    groups: list[int] = []
    write = Store.write

    def slow_write(self: Store, batches: Any, *times: float) -> Any:
        groups.append(len(batches) - 1)
        assert gate.wait(20)
        return write(self, batches, *times)

    monkeypatch.setattr(Store, "write", slow_write)

    async def use() -> None:
        async with opened(tmp_path, rows_per_s=100_000) as history:
            first = history.submit(events(1))
            await asyncio.to_thread(wait_until, lambda: groups == [1], "the first group begins")
            others = [history.submit(events(1)) for _ in range(300)]
            many = [history.submit(events(500)) for _ in range(6)]
            order: list[str] = []
            question = asyncio.ensure_future(history.get_errors())
            question.add_done_callback(lambda _: order.append("question"))
            others[0].add_done_callback(lambda _: order.append("next group"))
            await asyncio.sleep(0)  # the question has been put
            gate.set()
            page = await question
            assert page.total == 1
            await asyncio.gather(first, *others, *many)
            assert order == ["question", "next group"]
            assert groups[:2] == [1, 301]
            assert len(groups) <= 6
            assert (await history.get_errors()).total == 3301

    asyncio.run(use())


def test_commits_are_told_in_order_before_they_are_acknowledged(tmp_path: Path) -> None:
    told: list[int] = []

    def on_commit(rows: list[tuple[int, Event]]) -> None:
        told.extend(seq for seq, _ in rows)
        if 3 in told:
            raise ValueError("a listener's own trouble")

    async def use() -> None:
        async with opened(tmp_path, on_commit=on_commit) as history:
            for number in range(1, 6):
                await history.submit(events(1))
                assert told[-1] == number == history.last_seq
            assert told == [1, 2, 3, 4, 5]

    asyncio.run(use())


def test_a_waiting_storm_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    write = Store.write

    def slow_write(self: Store, *arguments: Any) -> Any:
        assert gate.wait(20)
        return write(self, *arguments)

    monkeypatch.setattr(Store, "write", slow_write)
    batch = events(500)

    async def use() -> None:
        async with opened(tmp_path) as history:
            accepted = [history.submit(batch)]
            while not history.is_full:
                accepted.append(history.submit(batch))
            assert history.depth == history_module.FULL_EVENTS
            while history.depth + 500 <= history_module.REFUSED_EVENTS:
                accepted.append(history.submit(batch))
            with pytest.raises(HistoryFailed):
                await history.submit(batch)
            gate.set()
            done = await asyncio.gather(*accepted)
            assert sum(map(counted, done)) == 500
            assert sum(each.known for each in done) == 500 * (len(accepted) - 1)
            assert history.depth == 0
            assert not history.is_full

    asyncio.run(use())


# -- once -----------------------------------------------------------------------------------------------------------


def test_an_event_that_is_sent_again_is_known(tmp_path: Path) -> None:
    batch = [*events(5), make_event("agent", "t", "odd\0id")]
    batch.append(Event("not hex \0 at all", NOW_S, "agent", "t", "m"))

    async def use() -> None:
        async with opened(tmp_path) as history:
            assert await history.submit([*batch, batch[0]]) == Committed(
                tuple((seq, each) for seq, each in enumerate(batch, 1)), 1
            )
            twice = await asyncio.gather(history.submit(batch), history.submit([*events(1), batch[3]]))
            assert [(len(each.rows), each.known) for each in twice] == [(0, 7), (1, 1)]
        async with opened(tmp_path) as history:
            assert (await history.submit(batch)).known == 7
            assert (await history.get_errors()).total == 8

    asyncio.run(use())


def test_events_that_were_only_counted_are_known_as_well(tmp_path: Path) -> None:
    batches = [
        [make_event(f"a{number % 3}", "t", "m", now_s=NOW_S) for number in range(200)]
        + [make_event(f"b{number}", "t", "m", now_s=NOW_S) for number in range(2 * ROW_KEYS)]
        for _ in range(3)
    ]

    async def use() -> None:
        async with opened(tmp_path, rows_per_s=10) as history:
            done = [await history.submit(batch) for batch in batches]
            assert [counted(each) for each in done] == [400, 400, 400]
            assert [each.known for each in done] == [0, 0, 0]
            again = [await history.submit(batch) for batch in batches]
            assert [(each.rows, each.known) for each in again] == [((), 400)] * 3
        async with opened(tmp_path, rows_per_s=10) as history:
            again = [await history.submit(batch) for batch in batches]
            assert [(each.rows, each.known) for each in again] == [((), 400)] * 3
            assert (await history.get_errors(limit=1000)).total == 1200

    asyncio.run(use())


def test_a_second_has_a_bounded_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [500.0]
    write = Store.write
    monkeypatch.setattr(Store, "write", lambda self, batches, at, _: write(self, batches, at, now_s[0]))

    async def use() -> None:
        async with opened(tmp_path, rows_per_s=100) as history:
            for _ in range(5):
                await history.submit(events(200, "a") + events(200, "b", severity="critical"))
            page = await history.get_errors(limit=1000)
            assert len(page.results) == 102
            assert page.total == 2000
            shared = [stored.event for stored in page.results if stored.event.count > 1]
            assert {(each.error_type, each.severity, each.count) for each in shared} == {
                ("a", "error", 900),
                ("b", "critical", 1000),
            }
            now_s[0] += 1.0
            assert [seq for seq, _ in (await history.submit(events(2))).rows] == [103, 104]

    asyncio.run(use())


def test_a_storm_of_kinds_keeps_a_bounded_number_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Store.write
    monkeypatch.setattr(Store, "write", lambda self, batches, at, _: write(self, batches, at, 500.0))

    async def use() -> None:
        async with opened(tmp_path, rows_per_s=10) as history:
            for number in range(0, 3000, 500):
                await history.submit([make_event("a", f"t{each}", "m") for each in range(number, number + 500)])
            page = await history.get_errors(limit=1000)
            assert page.total == 3000
            assert len(page.results) == 10 + ROW_KEYS + 1
            various = [stored.event for stored in page.results if stored.event.agent == VARIOUS]
            assert [each.count for each in various] == [3000 - 10 - ROW_KEYS]

    asyncio.run(use())


# -- retention ------------------------------------------------------------------------------------------------------


async def retained(history: History, condition: Any) -> None:
    """Poll until `await condition()` holds."""
    deadline_s = time.monotonic() + 20.0
    while not await condition():
        assert time.monotonic() < deadline_s, f"nothing was dropped: {history!r}"
        await asyncio.sleep(0.02)


def test_events_go_when_they_are_too_old(tmp_path: Path) -> None:
    async def use() -> None:
        clock = Clock()
        async with opened(tmp_path, clock=clock, rows_per_s=1000) as history:
            await history.submit(events(1500))
            clock.now_s += 9 * DAY_S
            await history.submit(events(3, "new"))
            assert rows_of(history_file(tmp_path), "folded") > 0
        clock.now_s += 2 * DAY_S
        async with opened(tmp_path, clock=clock, history_days=10.0) as history:

            async def done() -> bool:
                return (await history.get_errors()).total == 3

            await retained(history, done)
            page = await history.get_errors()
            assert [stored.event.error_type for stored in page.results] == ["new"]
            assert page.oldest_seq == page.last_seq == page.results[0].seq
            wait_until(lambda: rows_of(history_file(tmp_path), "folded") == 0, "counted ids go as well")

    asyncio.run(use())


def history_file(folder: Path) -> Path:
    return folder / "health.db"


def sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("health.db*"))


def test_the_file_obeys_its_limit(tmp_path: Path) -> None:
    largest = 0

    async def use() -> None:
        nonlocal largest
        async with opened(tmp_path, history_mb=1.0, rows_per_s=100_000) as history:
            for _ in range(100):
                await history.submit([make_event("a", "t", "x" * 200, details={"n": 1}) for _ in range(200)])
                largest = max(largest, history_file(tmp_path).stat().st_size)
            page = await history.get_errors(limit=1, newest=True)
            assert page.last_seq == page.results[0].seq == 20_000
            assert 500 < page.total < 4000
            assert page.oldest_seq == 20_001 - page.total
            # What is left of the log beside it is small, and goes when nothing comes.
            assert sizes(tmp_path) < 2 * 2**20
            wait_until(lambda: sizes(tmp_path) <= 2**20 + 64 * 1024, "the log is moved into the database", 20.0)
            assert (await history.submit(events(1))).rows[0][0] == 20_001

    asyncio.run(use())
    assert largest <= 2**20


def test_very_large_events_do_not_empty_the_history(tmp_path: Path) -> None:
    async def use() -> None:
        async with opened(tmp_path, history_mb=1.0) as history:
            for number in range(100):
                await history.submit([make_event("a", "t", "ü" * 2000, details={"k": "y" * 4000}) for _ in range(3)])
                assert min(3 * (number + 1), 20) <= (await history.get_errors(limit=1)).total < 150
        assert history_file(tmp_path).stat().st_size <= 2**20

    asyncio.run(use())


def test_a_lower_limit_shrinks_the_file(tmp_path: Path) -> None:
    async def use() -> None:
        async with opened(tmp_path, rows_per_s=100_000) as history:
            await asyncio.gather(*(history.submit(events(500, details={"n": "x" * 200})) for _ in range(40)))
        assert history_file(tmp_path).stat().st_size > 4 * 2**20
        async with opened(tmp_path, history_mb=1.0) as history:

            async def done() -> bool:
                return history.figures()["file_bytes"] <= 2**20

            await retained(history, done)
            assert (await history.get_errors(limit=1, newest=True)).results[0].seq == 20_000
        assert history_file(tmp_path).stat().st_size <= 2**20

    asyncio.run(use())


def test_ids_of_counted_events_are_bounded(tmp_path: Path) -> None:
    async def use() -> None:
        async with opened(tmp_path, history_mb=1.0, rows_per_s=1) as history:
            last = events(500)
            for _ in range(60):
                last = events(500)
                await history.submit(last)
            assert rows_of(history_file(tmp_path), "folded") <= 2**20 // 4 // 32
            assert (await history.submit(last)).known == 500
        assert history_file(tmp_path).stat().st_size <= 2**20

    asyncio.run(use())


def test_ids_that_cannot_come_again_are_not_kept(tmp_path: Path) -> None:
    async def use() -> None:
        async with opened(tmp_path, rows_per_s=1) as history:
            assert counted(await history.submit(events(500), may_return=False)) == 500
            assert rows_of(history_file(tmp_path), "folded") == 0

    asyncio.run(use())


# -- life -----------------------------------------------------------------------------------------------------------


def test_values_are_kept_for_the_next_start(tmp_path: Path) -> None:
    async def use() -> None:
        async with opened(tmp_path) as history:
            assert history.was_clean
            assert history.previous == {}
            await history.set_meta("boot_id", "first")
        async with opened(tmp_path) as history:
            assert history.was_clean
            assert history.previous["boot_id"] == "first"
            assert "other" not in history.previous
        with pytest.raises(HistoryFailed):
            await history.submit(events(1))
        with pytest.raises(HistoryFailed):
            await history.get_errors()
        await history.close()

    asyncio.run(use())


KILLED = """
import asyncio, sys
from memory_system.events import make_event
from memory_system.health.history import History
from memory_system.health_settings import ErrorBusSettings

async def main():
    history = History(sys.argv[1], ErrorBusSettings())
    await history.start()
    while True:
        batch = [make_event("a", "t", "m") for _ in range(20)]
        await history.submit(batch)
        print(*(event.event_id for event in batch), flush=True)

asyncio.run(main())
"""


def child(code: str, *arguments: object, wrapper: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*wrapper, sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    process = child(KILLED, history_file(tmp_path))
    try:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline() for _ in range(60)]
        process.send_signal(signal.SIGKILL)
        acknowledged += process.stdout.readlines()
    finally:
        process.kill()
        process.communicate(timeout=30)
    ids = {each for line in acknowledged if line.endswith("\n") for each in line.split()}

    async def use() -> None:
        async with opened(tmp_path) as history:
            assert not history.was_clean
            found: list[str] = []
            page = await history.get_errors(limit=1000)
            found += [stored.event.event_id for stored in page.results]
            while page.next_since_seq is not None:
                page = await history.get_errors(since_seq=page.next_since_seq, limit=1000)
                found += [stored.event.event_id for stored in page.results]
            assert len(found) == len(set(found))
            kept = ids & set(found)
            again = await history.submit([Event(each, NOW_S, "a", "t", "m") for each in ids])
            assert len(kept) >= 1000
            assert (again.rows, again.known) == ((), len(ids))

    assert len(ids) >= 1200
    asyncio.run(use())


def test_only_one_manager_has_the_file(tmp_path: Path) -> None:
    async def use() -> None:
        async with opened(tmp_path) as history:
            with pytest.raises(CannotStart, match="in use by another health manager"):
                async with opened(tmp_path):
                    pass
            await history.submit(events(1))
        async with opened(tmp_path) as history:
            assert history.last_seq == 1

    asyncio.run(use())


# -- files that are not as they should be -----------------------------------------------------------------------------


async def starting(folder: Path) -> None:
    async with opened(folder):
        pass


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    asyncio.run(starting(tmp_path))
    with contextlib.closing(sqlite3.connect(history_file(tmp_path))) as db:
        db.execute("PRAGMA user_version = 2")
        db.execute("PRAGMA journal_mode = DELETE")
    before = history_file(tmp_path).read_bytes()
    with pytest.raises(CannotStart, match="schema version 2, this program knows up to 1"):
        asyncio.run(starting(tmp_path))
    assert history_file(tmp_path).read_bytes() == before


def test_a_database_of_another_kind_is_refused_and_left_alone(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(history_file(tmp_path))) as db:
        db.execute("CREATE TABLE memories (content TEXT)")
    before = history_file(tmp_path).read_bytes()
    with pytest.raises(CannotStart, match="no error history"):
        asyncio.run(starting(tmp_path))
    assert history_file(tmp_path).read_bytes() == before
    assert list(tmp_path.glob("*corrupt*")) == []


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path) -> None:
    history_file(tmp_path).mkdir()
    with pytest.raises(CannotStart, match="is a folder"):
        asyncio.run(starting(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotStart, match=r"error_bus\.history_path"):
        asyncio.run(starting(tmp_path / "file"))


def damage_middle(path: Path) -> None:
    """Overwrite every page but the first with what is no page."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xee" * (size - 4096))


def damage_end(path: Path) -> None:
    """Overwrite the later half, which has nothing that opening the file reads."""
    half = path.stat().st_size // 8192 * 4096
    with path.open("r+b") as file:
        file.seek(half)
        file.write(b"\xee" * (path.stat().st_size - half))


def damage_all(path: Path) -> None:
    path.write_bytes(b"this is no database " * 1000)


@pytest.mark.parametrize("damage", [damage_middle, damage_end, damage_all])
def test_a_damaged_file_is_set_aside_at_the_start(tmp_path: Path, damage: Any) -> None:
    async def fill() -> None:
        async with opened(tmp_path) as history:
            await history.submit(events(200))
            await asyncio.to_thread(shutil.copy, history_file(tmp_path), tmp_path / "copy")

    asyncio.run(fill())
    with contextlib.closing(sqlite3.connect(history_file(tmp_path), isolation_level=None)) as db:
        db.execute("UPDATE meta SET value = '0' WHERE key = 'clean_shutdown'")
    damage(history_file(tmp_path))
    damaged = history_file(tmp_path).read_bytes()
    told: list[Event] = []

    async def use() -> None:
        async with opened(tmp_path, on_commit=lambda rows: told.extend(event for _, event in rows)) as history:
            committed = await history.submit(events(1))
            assert [(event.error_type, event.severity) for event in told[:1]] == [("history_corrupt", "critical")]
            assert committed.rows[0][0] > time.time() * 1000 - 60_000
            page = await history.get_errors()
            assert [stored.event.error_type for stored in page.results] == ["history_corrupt", "t"]
            assert page.oldest_seq == page.results[0].seq

    asyncio.run(use())
    (kept,) = tmp_path.glob("health.db.corrupt-*")
    assert kept.read_bytes() == damaged
    assert told[0].details["file"] == kept.name


@pytest.mark.parametrize("how", ["deleted", "with its folder", "replaced"])
def test_a_file_that_is_taken_away_is_noticed_and_a_new_one_begun(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()

    async def use() -> None:
        async with opened(folder) as history:
            last_seq = (await history.submit(events(3))).rows[-1][0]
            if how == "with its folder":
                shutil.rmtree(folder)
            elif how == "replaced":
                with contextlib.closing(sqlite3.connect(tmp_path / "other")):
                    (tmp_path / "other").touch()
                os.replace(tmp_path / "other", history_file(folder))
            else:
                for path in glob.glob(str(history_file(folder)) + "*"):
                    os.remove(path)
            found: list[Any] = []
            for _ in range(100):
                with contextlib.suppress(HistoryFailed):
                    found = list((await history.get_errors()).results)
                if found and found[0].event.error_type == "history_gone":
                    break
                await asyncio.sleep(0.05)
            assert [(stored.event.error_type, stored.event.severity) for stored in found] == [
                ("history_gone", "critical")
            ]
            assert found[0].seq > last_seq
            await history.submit(events(1))
        async with opened(folder) as history:
            assert (await history.get_errors()).total == 2

    asyncio.run(use())


def test_a_file_that_proves_damaged_later_is_set_aside_then(tmp_path: Path) -> None:
    async def use() -> None:
        async with opened(tmp_path) as history:
            await history.submit(events(500))
        damage_end(history_file(tmp_path))
        async with opened(tmp_path) as history:
            failures = 0
            deadline_s = time.monotonic() + 20.0
            while time.monotonic() < deadline_s:
                try:
                    page = await history.get_errors()
                    if page.total:
                        break
                except HistoryFailed:
                    failures += 1
                await asyncio.sleep(0.02)
            assert [stored.event.error_type for stored in page.results] == ["history_corrupt"]
            assert (await history.submit(events(1))).rows
            assert history.failing is None
            assert failures + history.figures()["failures"] > 0
        assert len(glob.glob(str(tmp_path / "health.db.corrupt-*"))) == 1

    asyncio.run(use())


# -- disks that are not as they should be -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE])
def test_a_failing_commit_acknowledges_nothing(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = False
    forget = Store._forget_folded

    def failing(self: Store) -> None:
        if fails:
            error = sqlite3.OperationalError("injected")
            error.sqlite_errorcode, error.sqlite_errorname = code, "SQLITE_INJECTED"
            raise error
        forget(self)

    monkeypatch.setattr(Store, "_forget_folded", failing)

    async def use() -> None:
        nonlocal fails
        async with opened(tmp_path, rows_per_s=10) as history:
            batch = events(30)
            await history.submit(events(30))
            fails = True
            for _ in range(2):
                with pytest.raises(HistoryFailed):
                    await history.submit(batch)
                assert history.failing
                assert (await history.get_errors(agent="agent")).total == 30
            fails = False
            committed = await history.submit(batch)
            assert (counted(committed), committed.known) == (30, 0)
            assert history.failing is None
            assert (await history.submit(batch)).known == 30
            assert (await history.get_errors(agent="agent")).total == 60
            assert (await history.get_errors(error_type="history_failed")).total == 1

    asyncio.run(use())


def test_a_failure_is_told_and_ends_though_nothing_more_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = sqlite3.OperationalError("injected")
    broken.sqlite_errorcode, broken.sqlite_errorname = sqlite3.SQLITE_FULL, "SQLITE_FULL"

    def failing(self: Store, *_: Any) -> None:
        raise broken

    async def use() -> None:
        async with opened(tmp_path) as history:
            for _ in range(2):
                with monkeypatch.context() as patch:
                    patch.setattr(Store, "write", failing)
                    with pytest.raises(HistoryFailed):
                        await history.submit(events(1))
                deadline_s = time.monotonic() + 10.0
                while history.failing and time.monotonic() < deadline_s:
                    await history.set_meta("last_alive_at", "1")
                    await asyncio.sleep(0.05)
                assert history.failing is None
            page = await history.get_errors(error_type="history_failed")
            assert [stored.event.message for stored in page.results] == ["the disk is full"]

    asyncio.run(use())


def test_a_damaged_file_is_set_aside_once_though_there_is_no_room_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, full = sqlite3.DatabaseError("injected"), sqlite3.OperationalError("injected")
    damaged.sqlite_errorcode, full.sqlite_errorcode = sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FULL
    tries = 0

    def no_write(self: Store, *_: Any) -> None:
        raise damaged

    def no_room(path: Path, *_: Any, **__: Any) -> None:
        nonlocal tries
        tries += 1
        path.touch()
        raise full

    async def use() -> None:
        async with opened(tmp_path) as history:
            (last_seq, _) = (await history.submit(events(1))).rows[0]
            with monkeypatch.context() as patch:
                patch.setattr(Store, "write", no_write)
                patch.setattr("memory_system.health.history_file.open_database", no_room)
                deadline_s = time.monotonic() + 10.0
                while tries < 3 and time.monotonic() < deadline_s:
                    with pytest.raises(HistoryFailed):
                        await history.submit(events(1))
                    await asyncio.sleep(0.05)
            for _ in range(200):
                if history.failing is None:
                    break
                await asyncio.sleep(0.05)
            found = [
                (stored.seq > last_seq, stored.event.error_type) for stored in (await history.get_errors()).results
            ]
            assert found == [(True, "history_corrupt"), (True, "history_failed")]

    asyncio.run(use())
    assert tries >= 3
    assert len(glob.glob(str(tmp_path / "health.db.corrupt-*"))) == 1


def test_a_size_that_cannot_be_read_after_a_commit_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(store: Store) -> int:
        raise sqlite3.OperationalError("disk I/O error")

    async def use() -> None:
        async with opened(tmp_path) as history:
            with monkeypatch.context() as meanwhile:
                meanwhile.setattr(Store, "size_bytes", fails)
                assert counted(await asyncio.wait_for(history.submit(events(1)), 5.0)) == 1
            assert counted(await asyncio.wait_for(history.submit(events(2)), 5.0)) == 2

    asyncio.run(use())


def test_shared_rows_of_a_failed_commit_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another event takes the row id that was rolled back, and must not be counted for."""
    fail = [False]
    write, forget = Store.write, Store._forget_folded

    def failing(self: Store) -> None:
        if fail[0]:
            raise sqlite3.OperationalError("injected")
        forget(self)

    monkeypatch.setattr(Store, "write", lambda self, batches, at, _: write(self, batches, at, 500.0))
    monkeypatch.setattr(Store, "_forget_folded", failing)

    async def use() -> None:
        async with opened(tmp_path, rows_per_s=1) as history:
            await history.submit(events(1, "first"))
            fail[0] = True
            with pytest.raises(HistoryFailed):
                await history.submit(events(5, "failed"))
            fail[0] = False
            await history.submit(events(3, "other"))
            await history.submit(events(5, "failed"))
            page = await history.get_errors(agent="agent")
            found = {stored.event.error_type: stored.event.count for stored in page.results}
            assert found == {"first": 1, "other": 3, "failed": 5}

    asyncio.run(use())


FULL_DISK = """
import asyncio, contextlib, sys
from pathlib import Path
from memory_system.events import make_event
from memory_system.health.history import History
from memory_system.health.records import HistoryFailed
from memory_system.health_settings import ErrorBusSettings

folder = Path(sys.argv[1])

def batch():
    return [make_event("a", "t", "x" * 500) for _ in range(100)]

def fill():
    with (folder / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)

def free():
    (folder / "ballast").unlink()

async def submit_until_refused(history):
    acknowledged = []
    for _ in range(2000):
        each = batch()
        try:
            await history.submit(each)
        except HistoryFailed as error:
            assert "full" in error.message, error.message
            return acknowledged, each
        acknowledged += each
    raise AssertionError("the disk never filled")

async def check(history, acknowledged):
    page = await history.get_errors(limit=1000, agent="a")
    assert page.total == acknowledged, (page.total, acknowledged)

async def eventually(history, events):
    for _ in range(500):
        try:
            return await history.submit(events)
        except HistoryFailed:
            await asyncio.sleep(0.02)
    raise AssertionError("there is room, and it still refuses: " + str(history.failing))

async def full_while_running():
    history = History(folder / "health.db", ErrorBusSettings(rows_per_s=100_000))
    await history.start()
    total = 0
    for _ in range(2):
        fill()
        acknowledged, refused = await submit_until_refused(history)
        total += len(acknowledged)
        await check(history, total)
        await asyncio.sleep(2.5)  # long enough for what the history does by itself
        await check(history, total)
        free()
        done = await eventually(history, refused)
        assert (len(done.rows), done.known) == (100, 0)
        total += 100
        await check(history, total)
    await history.close()
    return total

async def full_at_the_start(total):
    for path in (folder / "health.db", folder / "new" / "health.db"):
        fill()
        history = History(path, ErrorBusSettings(rows_per_s=100_000))
        await history.start()
        refused = batch()
        for _ in range(2000):
            try:
                await history.submit(refused)
            except HistoryFailed:
                break
            total, refused = total + 100, batch()
        assert history.failing
        free()
        assert (await eventually(history, refused)).known == 0
        await check(history, total + 100)
        await history.close()
        total = 0

async def main():
    await full_at_the_start(await full_while_running())

asyncio.run(main())
print("done")
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A folder, and the wrapper under which it is a file system of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = f'mount -t tmpfs -o size=3m tmpfs "{folder}" && exec "$@"'
    wrapper = ("unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh")
    must_work([*wrapper, "true"], "no file system of one's own can be mounted")
    yield folder, wrapper


def test_a_full_disk_refuses_and_needs_no_restart(small_disk: tuple[Path, tuple[str, ...]]) -> None:
    folder, wrapper = small_disk
    process = child(FULL_DISK, folder, wrapper=wrapper)
    try:
        out, errors = process.communicate(timeout=50)
    finally:
        process.kill()
        process.wait(30)
    assert (out, process.returncode) == ("done\n", 0), errors

"""Changed lifecycle settings: importance goes on from where it was, also after a kill in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from memory_system import lifecycle, runtime
from memory_system.digest import content_digest
from memory_system.errors import ShuttingDown, StorageFailed
from memory_system.lifecycle_settings import LifecycleSettings, TierSettings
from memory_system.models import Memory
from memory_system.settings import load_settings
from memory_system.storage import database, rebase, rows
from tests.support.ageing import DAY_S
from tests.support.service import PROJECT, environment, eventually, running_orchestrator, wait_until

OLD = LifecycleSettings()
NEW = replace(
    OLD,
    short=TierSettings(0.3, 5.0, 0.4, 0.2),
    medium=TierSettings(0.01, 60.0, 0.6, 0.05),
    delete_enabled=True,
    delete_after_days=30.0,
)
NOW_S = 1_700_000_000.0
CHANGE_S = NOW_S + 6 * DAY_S

# Re-bases a store slowly, so that it can be killed in the midst of it.
SLOW = """
import sys, time
from pathlib import Path
from memory_system.storage import database, rebase
from tests.integration.test_rebase import NEW
inner = rebase._slice
def slow(*arguments):
    time.sleep(0.05)
    return inner(*arguments)
rebase._slice = slow
rebase.bring_up(database.open_store(Path(sys.argv[1])), NEW, float(sys.argv[2]), slice_rows=20)
"""


def memory(number: int, chance: random.Random) -> Memory:
    is_archived, kind = chance.random() < 0.2, "session" if chance.random() < 0.1 else "general"
    since_s = NOW_S - chance.uniform(0.0, 5 * DAY_S)
    made = Memory(
        row_id=0, namespace=f"n{number % 3}", memory_id=f"mem-{number}", content=f"memory {number}",
        content_digest=content_digest(f"memory {number}"), memory_type=kind,
        memory_tier=chance.choice(["short", "medium", "long"]), importance=chance.uniform(0.3, 1.0),
        importance_at=since_s, access_count=chance.choice([0, 1, 10]), last_accessed_at=None, created_at=since_s,
        updated_at=since_s, occurred_at=None, expires_at=chance.choice([None, NOW_S + 100 * DAY_S]),
        tier_since=since_s, due_at=None, metadata={}, tags=[], parent_id=None, session_id=None, user_id=None,
        created_by="test", version=1, state="archived" if is_archived else "active",
        archived_at=since_s if is_archived else None,
    )  # fmt: skip
    return msgspec.structs.replace(made, due_at=lifecycle.due_at(OLD, made))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of 400 memories that were written under OLD."""
    path = tmp_path / "memory.db"
    chance = random.Random(4)
    with opened(path) as db, database.transaction(db):
        for number in range(400):
            rows.insert(db, memory(number, chance))
    with opened(path) as db:
        assert rebase.bring_up(db, OLD, NOW_S) == 0  # a store without settings takes those that it is opened with
    return path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(database.open_store(path)) as db:
        yield db


def stored(path: Path) -> list[Memory]:
    with contextlib.closing(database.connect_reader(path)) as db:
        return [rows.memory_from_row(row) for row in db.execute(f"SELECT {rows.COLUMNS} FROM memories ORDER BY row_id")]


def meta(path: Path, key: str) -> dict[str, object] | None:
    with contextlib.closing(database.connect_reader(path)) as db:
        found = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if found is None else json.loads(found[0])


def importances(settings: LifecycleSettings, memories: list[Memory], now_s: float) -> list[float]:
    return [lifecycle.importance_now(settings, memory, now_s) for memory in memories]


def assert_rebased(before: list[Memory], after: list[Memory], as_of_s: float) -> None:
    assert importances(NEW, after, as_of_s) == pytest.approx(importances(OLD, before, as_of_s), rel=1e-12)
    for old, new in zip(before, after, strict=True):
        if new.memory_type != "session":
            assert new.importance_at == as_of_s
        assert new.due_at == lifecycle.due_at(NEW, new)
        kept = {"importance": 0.0, "importance_at": 0.0, "due_at": 0.0, "promote_at": None}
        assert msgspec.structs.replace(new, **kept) == msgspec.structs.replace(old, **kept)


def test_importance_goes_on_from_where_it_was(path: Path) -> None:
    before = stored(path)
    sessions = sum(memory.memory_type == "session" for memory in before)
    with opened(path) as db:
        assert rebase.bring_up(db, NEW, CHANGE_S, slice_rows=33) == 400 - sessions > 300
    after = stored(path)
    assert_rebased(before, after, CHANGE_S)
    # Before the change it faded as of old, from then on as of new: the rates tell the two apart.
    later_s = CHANGE_S + 20 * DAY_S
    assert importances(NEW, after, later_s) != pytest.approx(importances(OLD, before, later_s), rel=1e-3)
    with opened(path) as db:
        assert rebase.bring_up(db, NEW, CHANGE_S + DAY_S) == 0
    assert stored(path) == after
    assert meta(path, rebase.REBASE_KEY) is None


def test_there_and_back_changes_no_importance(path: Path) -> None:
    before = stored(path)
    with opened(path) as db:
        rebase.bring_up(db, NEW, CHANGE_S)
        rebase.bring_up(db, OLD, CHANGE_S)
    assert importances(OLD, stored(path), CHANGE_S) == pytest.approx(importances(OLD, before, CHANGE_S), rel=1e-12)


def test_settings_that_change_no_stored_value_re_base_nothing(path: Path) -> None:
    other = replace(OLD, access_weight_get=0.5, early_promote_accesses=1, recheck_days=1.0, restore_importance=0.9)
    with opened(path) as db:
        assert rebase.bring_up(db, other, CHANGE_S) == 0


def test_a_memory_used_after_the_instant_keeps_its_clock(path: Path) -> None:
    """The clock was set back between the use and the start."""
    before = stored(path)
    with opened(path) as db:
        rebase.bring_up(db, NEW, NOW_S - 10 * DAY_S)
    for old, new in zip(before, stored(path), strict=True):
        assert (new.importance, new.importance_at) == (old.importance, old.importance_at)
        assert new.due_at == lifecycle.due_at(NEW, new)


def test_a_promotion_that_was_due_is_kept(path: Path) -> None:
    """Its clock starts anew, and by then less than promote_importance may be left."""
    as_of_s = NOW_S + 9 * DAY_S
    due = {row.memory_id for row in stored(path) if lifecycle.decide(OLD, row, as_of_s).kind == "promote"}
    assert len(due) > 5
    with opened(path) as db:
        rebase.bring_up(db, replace(OLD, delete_after_days=30.0), as_of_s)
    assert {row.memory_id for row in stored(path) if row.promote_at == as_of_s} == due


def test_a_kill_in_between_loses_nothing(path: Path) -> None:
    before = stored(path)
    command = [sys.executable, "-c", SLOW, str(path), str(CHANGE_S)]
    process = subprocess.Popen(command, cwd=PROJECT)
    try:
        wait_until(lambda: ((meta(path, rebase.REBASE_KEY) or {}).get("row_id") or 0) >= 100, "a hundred rows")
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait(30)
    under_way = meta(path, rebase.REBASE_KEY)
    assert under_way is not None and under_way["as_of"] == CHANGE_S
    half = stored(path)
    moved = sum(row.importance_at == CHANGE_S for row in half)
    assert 50 < moved < 350
    # Two days later it goes on, as of the same instant, before the settings of that day are looked at.
    with opened(path) as db:
        assert 0 < rebase.bring_up(db, NEW, CHANGE_S + 2 * DAY_S) < 400 - moved + 1
    assert_rebased(before, stored(path), CHANGE_S)
    assert meta(path, rebase.REBASE_KEY) is None


def test_other_settings_after_a_kill_come_after_the_ones_before(path: Path) -> None:
    before = stored(path)
    third = replace(OLD, short=TierSettings(1.0, 7.0, 0.5, 0.1))
    with opened(path) as db:
        old = db.execute("SELECT value FROM meta WHERE key = ?", (rebase.SETTINGS_KEY,)).fetchone()[0]
        with pytest.raises(KeyboardInterrupt):
            _interrupted(db)
        assert db.execute("SELECT value FROM meta WHERE key = ?", (rebase.SETTINGS_KEY,)).fetchone()[0] == old
    as_of_s = CHANGE_S + 3 * DAY_S
    with opened(path) as db:
        rebase.bring_up(db, third, as_of_s)
    expected = [
        lifecycle.importance_at(
            lifecycle.importance_now(OLD, row, CHANGE_S), CHANGE_S, row.access_count,
            lifecycle.decay_rate(NEW, row.memory_type, row.memory_tier), as_of_s,
        )
        for row in before
    ]  # fmt: skip
    assert importances(third, stored(path), as_of_s) == pytest.approx(expected, rel=1e-12)


def _interrupted(db: sqlite3.Connection) -> None:
    """A rebase to NEW that ends in its fourth slice."""
    inner, calls = rebase._slice, iter(range(100))

    def breaking(*arguments: Any) -> list[rebase.DueRow]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return inner(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebase, "_slice", breaking)
        rebase.bring_up(db, NEW, CHANGE_S, slice_rows=50)


def test_only_tiers_that_change_are_re_based(path: Path) -> None:
    before = {row.memory_id: row for row in stored(path)}
    with opened(path) as db:
        done = rebase.bring_up(db, replace(OLD, medium=NEW.medium), CHANGE_S)
    after = stored(path)
    medium = [row for row in after if row.memory_tier == "medium" and row.memory_type != "session"]
    assert 0 < done == len(medium) < len(after)
    assert all(row == before[row.memory_id] for row in after if row not in medium)
    assert all(row.importance_at == CHANGE_S for row in medium)


def test_one_that_is_stopped_goes_on_at_the_next_start(path: Path) -> None:
    before, looks = stored(path), iter([False, False, True])
    with opened(path) as db, pytest.raises(ShuttingDown):
        rebase.bring_up(db, NEW, CHANGE_S, slice_rows=50, stopped=lambda: next(looks))
    moved = sum(row.importance_at == CHANGE_S for row in stored(path))
    assert 0 < moved <= 100
    with opened(path) as db:
        assert rebase.bring_up(db, NEW, CHANGE_S + DAY_S, stopped=lambda: False) > 0
    assert_rebased(before, stored(path), CHANGE_S)


def test_what_cannot_be_read_is_left_alone(path: Path) -> None:
    before = stored(path)
    with opened(path) as db:
        db.execute("UPDATE meta SET value = '{}' WHERE key = ?", (rebase.SETTINGS_KEY,))
        with pytest.raises(StorageFailed, match="lifecycle cannot be read"):
            rebase.bring_up(db, NEW, CHANGE_S)
        db.execute("DELETE FROM meta WHERE key = ?", (rebase.SETTINGS_KEY,))
        begun = rebase.Rebase(to=rebase.base_of(NEW), as_of=CHANGE_S)
        rebase._write(db, rebase.REBASE_KEY, begun)
        with pytest.raises(StorageFailed, match="missing in meta"):
            rebase.bring_up(db, NEW, CHANGE_S)
    assert stored(path) == before


def test_while_it_lasts_the_service_says_that_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who hears nothing of a program for long takes it for hung, and has it killed."""
    beats: list[Any] = []
    ends = threading.Event()
    settings = load_settings(environ={**environment(tmp_path, {}), "MEMORY_CONFIG": os.devnull})

    def endless(*_: Any, stopped: Callable[[], bool]) -> int:
        while not stopped():
            time.sleep(0.01)
        raise ShuttingDown("stopped")

    async def started() -> None:
        service = runtime.Runtime(settings, on_fatal=print, health=dict)
        start = asyncio.create_task(service.start(ends.is_set))

        async def beaten() -> bool:
            return bool(beats)

        try:
            await eventually(beaten)
            assert beats[0]() == {"state": "starting", "readiness": {"store": "loading"}}
            ends.set()
            with pytest.raises(ShuttingDown):
                await start
        finally:
            ends.set()
            await service.close()

    monkeypatch.setattr(rebase, "bring_up", endless)
    monkeypatch.setattr(runtime, "_QUICK_START_S", 0.01)
    monkeypatch.setattr(runtime.Reporting, "start", lambda _self, figures: beats.append(figures))
    asyncio.run(started())


def test_a_start_that_is_given_up_meanwhile_lets_go_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(environ={**environment(tmp_path, {}), "MEMORY_CONFIG": os.devnull})
    store = Path(settings.storage.path)
    running, waits = threading.Event(), threading.Event()

    def endless(*_: Any, stopped: Callable[[], bool]) -> int:
        running.set()
        while not stopped():
            time.sleep(0.01)
        raise ShuttingDown("stopped")

    async def given_up() -> None:
        service = runtime.Runtime(settings, on_fatal=print, health=dict)
        start = asyncio.create_task(service.start())

        async def is_waiting() -> bool:
            return running.is_set() and waits.is_set()

        await eventually(is_waiting)
        await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        await service.close()

    monkeypatch.setattr(rebase, "bring_up", endless)
    monkeypatch.setattr(runtime, "_QUICK_START_S", 0.01)
    monkeypatch.setattr(runtime.Reporting, "start", lambda *_: waits.set())
    asyncio.run(given_up())
    database.lock_store(store).release()


def test_the_service_re_bases_before_it_answers(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path) as first:
        memory_id = first.ask("add_memory", content="x", importance=0.8)["memory_id"]
        assert first.terminate() == 0
    with contextlib.closing(sqlite3.connect(first.database)) as db, db:
        db.execute("UPDATE memories SET importance_at = importance_at - ?", (5 * DAY_S,))
    with running_orchestrator(tmp_path, lifecycle__short__decay_rate=5.0) as second:
        record = second.ask("get_memory", memory_id=memory_id, touch=False)["memory"]
        assert record["importance"] == pytest.approx(0.8 * math.exp(-0.5), rel=0.01)
    kept = meta(first.database, rebase.SETTINGS_KEY)
    assert kept is not None and kept["short"]["decay_rate"] == 5.0  # type: ignore[index]

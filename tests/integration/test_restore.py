"""Restoring: nothing is touched before the backup is checked, and a crash leaves the old store or the new one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from memory_system.errors import StorageFailed, StorageFull
from memory_system.storage import backup
from memory_system.storage.backup import back_up
from memory_system.storage.database import StoreLock, open_store
from memory_system.storage.migrations import CURRENT_VERSION
from memory_system.storage.restore import restore
from tests.acceptance.test_disk import must_work
from tests.support.crash import damage
from tests.support.service import PROJECT, running_service
from tests.support.stores import Holdings, holdings, make_store

NOW_S = 1_773_154_800.0
OLD = ("what was there", "and more of it")
NEW = tuple(f"memory number {number} of the backup" for number in range(30))
KEPT = "memory.db.before-restore-20260310T150000Z"


@dataclass(frozen=True)
class Made:
    """A store as kill -9 left it, and a backup of another."""

    folder: Path
    backup: Path
    old: Holdings
    new: Holdings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    make_store(folder / "old", *OLD, crashed=True)
    other = make_store(folder / "other", *NEW)
    taken, _ = back_up(other, folder / "backups", NOW_S)
    shutil.copytree(folder / "old", folder / "looked-at")
    return Made(folder, taken.path, holdings(folder / "looked-at" / "memory.db"), holdings(taken.path))


@pytest.fixture
def store(made: Made, tmp_path: Path) -> Path:
    """The store that is to be replaced: most of it stands in its log."""
    shutil.copytree(made.folder / "old", tmp_path / "store")
    (tmp_path / "store" / "memory.db.index").mkdir()
    (tmp_path / "store" / "memory.db.index" / "manifest.json").write_text("{}")
    return tmp_path / "store" / "memory.db"


def contents_of(folder: Path) -> dict[str, bytes]:
    """Every file; SQLite's shared memory is no part of a store."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in found if not path.name.endswith(("-shm", ".lock"))
    }


def damage_of(database: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(database)) as db:
        return damage(db)


def test_the_store_holds_what_the_backup_holds_and_the_old_one_is_kept(made: Made, store: Path) -> None:
    done = restore(made.backup, store, NOW_S)
    assert done.contents.memories == len(NEW)
    assert done.kept == store.with_name(KEPT)
    assert sorted(path.name for path in store.parent.iterdir()) == ["memory.db", KEPT, "memory.db.lock"]
    restored = holdings(store)
    assert restored.texts == made.new.texts
    assert restored.epoch not in (made.new.epoch, made.old.epoch)
    assert holdings(store.with_name(KEPT)) == made.old
    assert damage_of(store) == damage_of(store.with_name(KEPT)) == []


def test_a_replaced_store_can_be_restored_again(made: Made, store: Path) -> None:
    kept = restore(made.backup, store, NOW_S).kept
    assert kept is not None
    assert restore(kept, store, NOW_S).kept == store.with_name(f"{KEPT}-2")
    assert holdings(store).texts == made.old.texts


def test_where_there_was_no_store_nothing_is_kept(made: Made, tmp_path: Path) -> None:
    store = tmp_path / "new" / "memory.db"
    assert restore(made.backup, store, NOW_S).kept is None
    assert holdings(store).texts == made.new.texts
    assert sorted(path.name for path in store.parent.iterdir()) == ["memory.db", "memory.db.lock"]


def test_the_log_of_a_store_that_is_gone_does_not_meet_the_new_one(made: Made, store: Path) -> None:
    store.unlink()
    assert restore(made.backup, store, NOW_S).kept is None
    assert holdings(store).texts == made.new.texts
    assert store.with_name(f"{KEPT}-wal").exists()


def test_numbers_of_changes_never_go_back(made: Made, store: Path) -> None:
    with contextlib.closing(open_store(store)) as db:
        db.execute("UPDATE namespaces SET commit_seq = 1000")
        db.execute("INSERT INTO namespaces VALUES ('gone', 7)")
    restore(made.backup, store, NOW_S)
    with contextlib.closing(sqlite3.connect(store)) as db:
        found = dict(db.execute("SELECT namespace, commit_seq FROM namespaces"))
    assert found == {"default": 1001, "gone": 8}


def test_the_service_goes_on_with_a_restored_store(made: Made, store: Path) -> None:
    restore(made.backup, store, NOW_S)
    shutil.move(store, store.parent.parent / "memory.db")

    async def go_on() -> None:
        async with running_service(store.parent.parent) as service:
            found = await service.ok("search_memory", query="number 7")
            assert found["results"][0]["content"] == "memory number 7 of the backup"
            await service.add("one more")
            await service.settled()
            assert (await service.ok("stats"))["memories"] == len(NEW) + 1

    asyncio.run(go_on())


def test_a_backup_of_an_older_schema_is_restored_and_brought_up(made: Made, store: Path, tmp_path: Path) -> None:
    older = tmp_path / "older.db"
    with contextlib.closing(sqlite3.connect(older, isolation_level=None)) as db:
        db.executescript((PROJECT / "tests" / "data" / "schema-v1.sql").read_text())
        db.execute("INSERT INTO meta VALUES ('store_epoch', 'an old one')")
    done = restore(older, store, NOW_S)
    assert done.contents.schema_version == 1
    with contextlib.closing(open_store(store)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (CURRENT_VERSION,)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_refused_while_an_orchestrator_has_the_store(made: Made, store: Path) -> None:
    lock = StoreLock(store)
    before = contents_of(store.parent)
    try:
        with pytest.raises(StorageFailed, match=rf"in use .*\(pid {os.getpid()}\); stop it first"):
            restore(made.backup, store, NOW_S)
    finally:
        lock.release()
    assert contents_of(store.parent) == before


def test_refused_while_another_program_has_the_store_open(made: Made, store: Path) -> None:
    with contextlib.closing(sqlite3.connect(store)) as other:
        other.execute("SELECT count(*) FROM memories").fetchone()
        with pytest.raises(StorageFailed, match=r"another program has .* open; close it first"):
            restore(made.backup, store, NOW_S)
    assert holdings(store) == made.old


@pytest.fixture
def spoilt(made: Made, tmp_path: Path) -> Path:
    copy = tmp_path / "spoilt.db"
    shutil.copy(made.backup, copy)
    return copy


def change(database: Path, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute(sql)


SPOILERS = {
    "UPDATE memories SET content = 'memory number X of the backup' WHERE row_id = 3": "content of mem-.* is not what",
    "PRAGMA user_version = 99": f"schema version 99, this program knows up to {CURRENT_VERSION}",
    "PRAGMA application_id = 7": "is not a memory store",
}


@pytest.mark.parametrize("sql", SPOILERS)
def test_a_backup_that_is_not_sound_is_refused_and_nothing_touched(spoilt: Path, store: Path, sql: str) -> None:
    change(spoilt, sql)
    refused(spoilt, store, SPOILERS[sql])


def test_nor_one_with_a_damaged_page(spoilt: Path, store: Path) -> None:
    with contextlib.closing(sqlite3.connect(spoilt)) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'relationships'").fetchone()
    with spoilt.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(os.urandom(4096))
    refused(spoilt, store, "damaged|malformed")


def test_nor_one_that_was_cut_off_or_is_something_else(spoilt: Path, store: Path, tmp_path: Path) -> None:
    os.truncate(spoilt, spoilt.stat().st_size // 2)
    refused(spoilt, store, "damaged|malformed")
    spoilt.write_text("these are my notes, and no database at all" * 100)
    refused(spoilt, store, "not a database")
    refused(tmp_path / "missing.db", store, "there is no backup")
    refused(store, store, "is the store itself")


def refused(source: Path, store: Path, told: str) -> None:
    before = contents_of(store.parent)
    with pytest.raises(StorageFailed, match=told):
        restore(source, store, NOW_S)
    assert contents_of(store.parent) == before


def test_refused_without_room(made: Made, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "disk_free_bytes", lambda folder: 1000)
    before = contents_of(store.parent)
    with pytest.raises(StorageFull, match=r"there is no room in .*/store: a copy needs"):
        restore(made.backup, store, NOW_S)
    assert contents_of(store.parent) == before


def test_a_store_that_cannot_be_opened_any_more_is_replaced_and_kept_with_its_log(made: Made, store: Path) -> None:
    """Which is what backups are for."""
    log = b"nor a log" * 1000
    ruin = b"no database any more" * 1000
    store.write_bytes(ruin)
    store.with_name("memory.db-wal").write_bytes(log)
    restore(made.backup, store, NOW_S)
    assert holdings(store).texts == made.new.texts
    assert damage_of(store) == []
    assert store.with_name(KEPT).read_bytes() == ruin
    assert store.with_name(f"{KEPT}-wal").read_bytes() == log


# -- killed -----------------------------------------------------------------------------------------------------------


def script(made: Made, folder: Path, *before: str) -> subprocess.CompletedProcess[str]:
    """scripts/restore.py on the store in `folder`, under the command `before`."""
    return subprocess.run(
        [*before, str(PROJECT / "scripts" / "restore.py"), str(made.backup)],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")},
            "MEMORY_CONFIG": os.devnull,
            "MEMORY__STORAGE__PATH": str(folder / "memory.db"),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


def was_killed(done: subprocess.CompletedProcess[str]) -> bool:
    assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    return done.returncode != 0


def which(made: Made, folder: Path) -> str:
    """`old` or `new`: what a store is that was left by a kill. Looked at in a copy, so that it stays as it is."""
    look = folder.with_name(f"{folder.name}-look")
    shutil.copytree(folder, look)
    try:
        found = holdings(look / "memory.db")
        assert damage_of(look / "memory.db") == []
        if found == made.old:
            return "old"
        assert found.texts == made.new.texts
        assert found.epoch not in (made.old.epoch, made.new.epoch)
        kept = [path for path in look.iterdir() if ".before-restore-" in path.name and not path.name.endswith("-wal")]
        assert any(holdings(path) == made.old for path in kept)
        return "new"
    finally:
        shutil.rmtree(look)


def check_left(made: Made, folder: Path) -> str:
    """What a kill left is the one or the other, and a repeated restore comes to its end."""
    found = which(made, folder)
    assert script(made, folder, sys.executable).returncode == 0
    assert which(made, folder) == "new"
    assert not list(folder.glob("*.restoring*"))
    return found


@pytest.fixture
def stores(made: Made, tmp_path: Path) -> Iterator[Path]:
    """One fresh store after another."""

    def fresh() -> Iterator[Path]:
        number = 0
        while True:
            number += 1
            shutil.copytree(made.folder / "old", tmp_path / f"store-{number}")
            yield tmp_path / f"store-{number}"

    return fresh()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_killed_before_any_of_its_steps_it_leaves_the_old_store_or_the_new(made: Made, stores: Iterator[Path]) -> None:
    left = []
    for step in range(1, 100):
        folder = next(stores)
        under = (sys.executable, str(PROJECT / "tests" / "support" / "killed.py"), str(step), str(folder))
        if not was_killed(script(made, folder, *under)):
            break
        left.append(which(made, folder) if step % 4 else check_left(made, folder))
    print(json.dumps(left))  # noqa: T201  pytest shows it when the test fails
    assert len(left) > 8
    assert left == sorted(left, reverse=True)  # old up to one moment, new from then on
    assert set(left) == {"old", "new"}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("call", ["fsync", "fdatasync", "ftruncate", "unlink", "rename", "link", "pwrite64"])
def test_killed_in_the_midst_of_sqlites_own_work_too(made: Made, stores: Iterator[Path], call: str) -> None:
    """The system calls of the database library, which no hook of Python sees."""
    must_work(["strace", "-o", os.devnull, "true"], "strace cannot be used")
    step, times = (31, 6) if call == "pwrite64" else (1, 6)
    kills = 0
    for number in range(times):
        folder = next(stores)
        inject = f"inject={call}:signal=SIGKILL:when={1 + number * step}"
        done = script(
            made, folder, "strace", "-f", "-o", os.devnull, "-e", f"trace={call}", "-e", inject, sys.executable
        )
        if not was_killed(done):
            assert which(made, folder) == "new"
            break
        kills += 1
        which(made, folder) if number % 3 else check_left(made, folder)
    assert kills or call in ("ftruncate", "fdatasync")


def test_the_checker_of_kills_can_fail(made: Made, stores: Iterator[Path]) -> None:
    """Negative control: the old store without its log, the new one under the old one's, and with an epoch of before."""
    folder = next(stores)
    assert which(made, folder) == "old"
    (folder / "memory.db-wal").unlink()
    with pytest.raises((AssertionError, sqlite3.Error)):
        which(made, folder)
    folder = next(stores)
    shutil.copy(made.backup, folder / "memory.db")
    with pytest.raises((AssertionError, sqlite3.Error)):
        which(made, folder)
    (folder / "memory.db-wal").unlink()
    with pytest.raises((AssertionError, sqlite3.Error)):
        which(made, folder)

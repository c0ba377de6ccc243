"""Backups of a store that is written to: whole, checked, and nothing left of one that fails."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_system.errors import StorageFailed, StorageFull
from memory_system.storage import backup
from memory_system.storage.backup import back_up, backups, contents, plan, reading, rotate
from memory_system.storage.database import open_store
from tests.support.crash import damage
from tests.support.stores import holdings, make_store

NOW_S = 1_773_154_800.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("made"), *(f"memory number {number}" for number in range(40)))


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "memory.db"
    copy.write_bytes(made.read_bytes())
    return copy


@contextlib.contextmanager
def opened(store: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(open_store(store)) as db:
        yield db


def write(db: sqlite3.Connection, seq: int, *, text: str = "one more memory") -> None:
    """A committed change, as the service makes it."""
    db.executescript(
        f"""BEGIN IMMEDIATE;
        INSERT INTO memories (namespace, memory_id, content, content_digest, memory_type, memory_tier, importance,
            importance_at, created_at, updated_at, tier_since, created_by)
        VALUES ('default', 'mem-more-{seq}', '{text}', zeroblob(16), 'general', 'short', 0.5, 0, 0, 0, 0, '');
        UPDATE namespaces SET commit_seq = commit_seq + 1 WHERE namespace = 'default';
        COMMIT;"""
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_backup_holds_everything_and_is_for_its_owner_alone(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    with opened(store) as db:
        write(db, 1)  # stands in the log alone
        made, found = back_up(store, folder, NOW_S)
    assert made.path == folder / "memory-20260310T150000.000Z.db"
    assert files(folder) == [made.path.name]
    assert (made.path.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
    assert holdings(made.path) == holdings(store)
    assert (found.memories, found.commit_seqs) == (41, {"default": 41})
    with contextlib.closing(sqlite3.connect(made.path)) as copy:
        assert contents(copy) == found
    assert [each.path for each in backups(folder, store)] == [made.path]


def test_what_was_deleted_is_not_in_it(store: Path, tmp_path: Path) -> None:
    with opened(store) as db:
        db.execute("PRAGMA secure_delete = OFF")
        write(db, 1, text="a secret that is deleted soon")
        db.execute("DELETE FROM memories WHERE memory_id = 'mem-more-1'")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        made, _ = back_up(store, tmp_path, NOW_S)
    assert b"a secret" in store.read_bytes()
    assert b"a secret" not in made.path.read_bytes()


def test_writes_go_on_while_it_is_taken(store: Path, tmp_path: Path) -> None:
    with opened(store) as db:
        for _ in range(3):
            db.execute("CREATE TABLE IF NOT EXISTS ballast (x BLOB)")
            db.execute("INSERT INTO ballast SELECT randomblob(4000000)")
        done, written = threading.Event(), list[int]()

        def go_on() -> None:
            while not done.is_set() or not written:
                write(db, len(written))
                written.append(len(written))

        writer = threading.Thread(target=go_on)
        writer.start()
        try:
            taken = [back_up(store, tmp_path / "backups", NOW_S + number) for number in range(3)]
        finally:
            done.set()
            writer.join()
    assert [found.covers(earlier) for (_, earlier), (_, found) in itertools.pairwise(taken)] == [True, True]
    for made, found in taken:
        with contextlib.closing(sqlite3.connect(made.path)) as copy:
            assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert copy.execute("SELECT count(*) FROM memories").fetchone() == (found.memories,)


def test_a_backup_that_lacks_changes_is_not_kept(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the copy of an older state, or of another store, it would be noticed."""
    older = tmp_path / "older.db"
    with reading(store) as db:
        db.execute("VACUUM INTO ?", (str(older),))

    def copy_the_older(db: sqlite3.Connection, target: Path) -> None:
        target.write_bytes(older.read_bytes())

    monkeypatch.setattr(backup, "write_copy", copy_the_older)
    with opened(store) as db:
        back_up(store, tmp_path / "backups", NOW_S)
        write(db, 1)
        with pytest.raises(StorageFailed, match="lacks changes"):
            back_up(store, tmp_path / "backups", NOW_S + 1)
    assert len(files(tmp_path / "backups")) == 1


def test_a_store_with_damaged_pages_is_not_taken_for_a_backup(store: Path, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(store)) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'memories'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    with store.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(StorageFailed, match="malformed"):
        back_up(store, tmp_path / "backups", NOW_S)
    assert files(tmp_path / "backups") == []


def test_without_room_nothing_is_begun(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "disk_free_bytes", lambda folder: backup.SPARE_BYTES)
    for attempt in (back_up, plan_of):
        with pytest.raises(StorageFull, match=r"a copy needs 32 MiB with some to spare, 32 MiB are free") as caught:
            attempt(store, tmp_path / "backups", NOW_S)
        assert caught.value.details["needed_bytes"] > caught.value.details["free_bytes"]
        assert files(tmp_path / "backups") == []


def plan_of(store: Path, folder: Path, now_s: float) -> dict[str, object]:
    return plan(store, folder, 1, 0, now_s)


def test_one_that_is_broken_off_leaves_nothing(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "_LOOK_STEPS", 10)
    looks = iter([False] * 20)
    with pytest.raises(StorageFailed, match="broken off"):
        back_up(store, tmp_path / "backups", NOW_S, stopped=lambda: next(looks, True))
    assert files(tmp_path / "backups") == []


def test_a_folder_that_cannot_be_made_is_named(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match=r"/file/backups cannot be made: .*; set backup.dir"):
        back_up(store, tmp_path / "file" / "backups", NOW_S)


def test_what_a_killed_backup_left_is_removed(store: Path, tmp_path: Path) -> None:
    left = tmp_path / "memory-20260101T000000.000Z.db.partial"
    others = tmp_path / "notes.partial"
    left.write_text("half of a copy")
    others.write_text("of somebody else")
    back_up(store, tmp_path, NOW_S)
    assert not left.exists()
    assert others.exists()


def test_old_backups_go_once_a_new_one_stands(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    for number in range(4):
        back_up(store, folder, NOW_S + number)
    names = files(folder)
    assert plan(store, folder, 2, 0, NOW_S + 9)["removed"] == [names[2], names[1], names[0]]
    assert files(folder) == names
    assert rotate(folder, store, 2, 0, NOW_S + 9) == [names[1], names[0]]
    assert files(folder) == names[2:]


def test_a_store_left_by_a_crash_is_read_with_its_log(tmp_path: Path) -> None:
    store = make_store(tmp_path / "crashed", "first", "second", crashed=True)
    log = store.with_name("memory.db-wal")
    before = (store.read_bytes(), log.read_bytes())
    made, found = back_up(store, tmp_path / "backups", NOW_S)
    assert holdings(made.path).texts == {"first", "second"}
    assert found.memories == 2
    assert (store.read_bytes(), log.read_bytes()) == before
    with contextlib.closing(sqlite3.connect(made.path)) as copy:
        assert damage(copy) == []


def test_the_connection_of_a_backup_cannot_write(store: Path) -> None:
    with reading(store) as db, pytest.raises(sqlite3.OperationalError, match="readonly"):
        db.execute("DELETE FROM memories")

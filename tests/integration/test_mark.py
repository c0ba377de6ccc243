"""The mark beside a store: never ahead of it; and a store that ends before it is refused until it is accepted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from memory_system.digest import content_digest
from memory_system.errors import StorageFailed
from memory_system.storage import accept, inspection, mark
from memory_system.storage.database import StoreLock, open_store
from memory_system.storage.mark import Mark, MarkFile, Unmarked

STATES = [(1, 1), (0, 3), (5, 0)]  # commits and log rows of one group after the other


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store that was closed in order, with a mark."""
    path = tmp_path / "memory.db"
    with contextlib.closing(open_store(path)) as db:
        kept = MarkFile(path, mark.state_of(db))
        for commits, logged in STATES:
            advance(db, commits, logged)
            kept.advance(commits, logged)
        kept.close()
    return path


def advance(db: sqlite3.Connection, commits: int, logged: int) -> None:
    db.execute("BEGIN")
    db.execute(
        "INSERT INTO namespaces VALUES ('a', ?1) ON CONFLICT (namespace) DO UPDATE SET commit_seq = commit_seq + ?1",
        (commits,),
    )
    db.executemany("INSERT INTO index_log (row_id, op) VALUES (1, ?)", [("put",)] * logged)
    db.execute("COMMIT")


def put_back(path: Path, commits: int, logged: int) -> None:
    """Make the store one that ends earlier."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE namespaces SET commit_seq = commit_seq - ?", (commits,))
        db.execute("UPDATE sqlite_sequence SET seq = seq - ? WHERE name = 'index_log'", (logged,))


def state(path: Path) -> Mark:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return mark.state_of(db)


def test_it_follows_the_store(path: Path) -> None:
    assert mark.read(path) == state(path)
    assert (state(path).commits, state(path).log_seq) == (6, 4)
    inspection.inspect(path)
    assert mark.path_of(path).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("commits", "logged"), [(1, 0), (0, 1), (6, 4)])
def test_a_store_that_ends_before_it_is_refused_and_left_as_it_is(path: Path, commits: int, logged: int) -> None:
    put_back(path, commits, logged)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir() if not file.name.endswith("-shm")}
    with pytest.raises(StorageFailed) as refused:
        open_store(path)
    assert f"lacks the last {max(1, commits)} acknowledged writes" in refused.value.message
    assert "make restore FROM=latest" in refused.value.message
    assert "make accept-store" in refused.value.message
    after = {file.name: file.read_bytes() for file in path.parent.iterdir() if not file.name.endswith("-shm")}
    assert {**after, "memory.db-wal": b""} == {**before, "memory.db-wal": b""}


def test_a_store_that_is_ahead_of_it_is_taken(path: Path) -> None:
    """The process ended between a commit and its mark."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        advance(db, 1, 1)
    inspection.inspect(path)


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_store_that_is_gone_is_not_replaced_by_an_empty_one(path: Path, is_empty: bool) -> None:
    path.unlink()
    if is_empty:
        path.touch()
    with pytest.raises(StorageFailed, match=r"is (gone|empty), though it held 6 acknowledged writes"):
        open_store(path)
    assert path.exists() == is_empty
    assert accept.accept(path) == accept.Accepted(6, is_gone=True)
    open_store(path).close()


def test_a_new_store_has_no_need_of_it(tmp_path: Path) -> None:
    inspection.inspect(tmp_path / "memory.db")
    (tmp_path / "memory.db").touch()
    inspection.inspect(tmp_path / "memory.db")


def test_one_that_was_about_to_get_its_log_when_the_process_was_killed_is_taken(path: Path, tmp_path: Path) -> None:
    """A restored store has none until its first start, which writes that down under a rollback journal."""
    killed = tmp_path / "killed" / path.name
    killed.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        before = state(path)
        db.execute("PRAGMA cache_size = 1")
        db.execute("BEGIN IMMEDIATE")
        db.execute("CREATE TABLE unfinished (x)")
        db.executemany("INSERT INTO unfinished VALUES (?)", [("x" * 2000,)] * 100)
        for suffix in ("", "-journal", ".mark"):
            shutil.copy(f"{path}{suffix}", f"{killed}{suffix}")
        db.execute("ROLLBACK")
    assert Path(f"{killed}-journal").stat().st_size
    open_store(killed).close()
    assert state(killed) == before


def test_what_a_start_found_is_synced_before_the_mark_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed within a commit, a process leaves one that can be read and was never synced."""
    synced: list[str] = []
    really = os.fsync

    def noted(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        really(fd)

    with contextlib.closing(open_store(path)) as db:
        advance(db, 1, 1)
        monkeypatch.setattr(os, "fsync", noted)
        mark.keeper(path, db, "full").close()
    assert synced == ["memory.db-wal", "memory.db.mark"]


def test_a_log_that_cannot_be_synced_is_not_vouched_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    with contextlib.closing(open_store(path)) as db:
        advance(db, 1, 1)
        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(StorageFailed, match=r"memory\.db-wal cannot be synced: Input/output error"):
            mark.keeper(path, db, "full")


def test_what_is_accepted_begins_a_history_of_its_own(path: Path) -> None:
    before = state(path)
    put_back(path, 2, 1)
    assert accept.accept(path) == accept.Accepted(2)
    after = state(path)
    assert after.store_epoch != before.store_epoch
    assert after.commits > before.commits  # no number that was given out is given out again
    assert not mark.path_of(path).exists()
    open_store(path).close()


def test_a_store_that_lacks_nothing_is_not_changed_by_accepting_it(path: Path) -> None:
    before = state(path)
    assert accept.accept(path) == accept.Accepted(0)
    assert (state(path), mark.read(path)) == (before, before)


def test_an_open_store_is_not_accepted(path: Path) -> None:
    lock = StoreLock(path)
    try:
        with pytest.raises(StorageFailed, match="in use by another orchestrator"):
            accept.accept(path)
    finally:
        lock.release()


def test_nor_is_one_that_cannot_be_read(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StorageFailed, match=r"cannot be read.*make restore"):
        accept.accept(path)
    with pytest.raises(StorageFailed, match="there is no folder"):
        accept.accept(path / "below" / "memory.db")


def test_a_damaged_mark_is_made_anew_and_keeps_nobody_from_starting(path: Path) -> None:
    good = mark.path_of(path).read_bytes()
    text = good.rstrip()
    for at in range(len(text)):
        for changed in (good[:at] + bytes([good[at] ^ 0x5A]) + good[at + 1 :], good[:at]):
            mark.path_of(path).write_bytes(changed)
            assert mark.read(path) in (None, state(path))
    body = json.dumps({"of_another": "version"})
    for data in (b"\xff" * 100, f"{body}\n{content_digest(body).hex()}\n".encode()):
        mark.path_of(path).write_bytes(data)
        assert mark.read(path) is None
        inspection.inspect(path)


def test_the_mark_of_another_store_says_nothing(path: Path) -> None:
    found = state(path)
    other = Mark("another", found.commits + 100, found.log_seq + 100)
    MarkFile(path, other).close()
    inspection.inspect(path)
    assert accept.accept(path) == accept.Accepted(0)


def test_a_mark_that_cannot_be_written_costs_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = MarkFile(path, state(path))

    def fails(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fails)
        patched.setattr(os, "fsync", fails)
        kept.advance(1, 1)
        kept.advance(1, 1)
        kept.sync()
    assert mark.read(path) == state(path)
    kept.advance(1, 1)
    assert json.loads(mark.path_of(path).read_text().splitlines()[0])["commits"] == 9
    kept.close()


def test_a_store_that_may_lose_its_last_writes_has_none(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        kept = mark.keeper(path, db, "normal")
        kept.advance(1, 1)
        kept.sync_when_due()
        kept.close()
    assert type(kept) is Unmarked
    assert not mark.path_of(path).exists()


def test_a_store_with_damaged_pages_is_refused(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 * 3 + 3 : 4096 * 3 + 5] = b"\xff\xff"  # how many cells the page has
    path.write_bytes(data)
    with pytest.raises(StorageFailed, match=r"(is damaged|malformed)"):
        open_store(path)

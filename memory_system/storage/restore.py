"""Putting a backup in the place of the store, so that a crash at any moment leaves the one or the other.

The new store is made ready beside the old one: a copy of the backup under an epoch of its own, checked and synced. The
old one's write-ahead log is moved into its file, so that it is one file too; that file gets a second name, and the new
one is renamed over the first. What is derived from the old store (index snapshots, cached results) belongs to the old
epoch and is refused by whoever finds it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from memory_system.digest import content_digest
from memory_system.errors import StorageFailed
from memory_system.storage import backup, inspection, mark, migrations
from memory_system.storage.backup import Contents
from memory_system.storage.database import APPLICATION_ID, StoreLock

ASIDE: Final = ".restoring"
_DAMAGED: Final = frozenset({sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT})

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did. `kept`: where the replaced store lies now, None when there was none."""

    contents: Contents
    kept: Path | None


def restore(source: Path, store: Path, now_s: float, say: Say = lambda text: None) -> Restored:
    """Make the store what the backup `source` holds. `say` is told what is being done.

    Raises StorageFailed when an orchestrator has the store open, or the backup is damaged, no store, or of a newer
    schema; StorageFull without room. Nothing is changed then.
    """
    if not source.is_file():
        raise StorageFailed(f"there is no backup {source}")
    if store.exists() and source.samefile(store):
        raise StorageFailed(f"{source} is the store itself")
    store.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(store)
    try:
        with _translated(source):
            return _restore(source, store, now_s, say)
    finally:
        lock.release()


def _lock(store: Path) -> StoreLock:
    try:
        return StoreLock(store)
    except StorageFailed as error:
        raise StorageFailed(f"{error.message.partition(';')[0]}; stop it first (make stop-pc2)") from None


@contextlib.contextmanager
def _translated(source: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageFailed(f"{source} cannot be restored: {error}") from error
    except OSError as error:
        where = error.filename2 or error.filename or source
        raise StorageFailed(f"{source} cannot be restored: {where}: {error.strerror}") from error


def _restore(source: Path, store: Path, now_s: float, say: Say) -> Restored:
    say(f"checking {source}")
    with backup.reading(source) as db:
        found = verify(db, source)
        backup.check_room(db, store.parent)
        aside = store.with_name(store.name + ASIDE)
        _remove(aside)
        say("making the new store")
        backup.write_copy(db, aside)
    _make_ready(aside, store, found)
    kept = _put_aside(store, now_s, say)
    backup.publish(aside, store)
    shutil.rmtree(f"{store}.index", ignore_errors=True)
    mark.remove(store)  # of the replaced store: it says nothing of this one
    return Restored(found, kept)


def verify(db: sqlite3.Connection, path: Path) -> Contents:
    """Check a backup from end to end, also one of an older schema. Raises StorageFailed, sqlite3.Error."""
    application, version = (
        int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("application_id", "user_version")
    )
    if application != APPLICATION_ID or version < 1:
        raise StorageFailed(f"{path} is not a memory store")
    migrations.check_version(path, version)
    verdict = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if verdict != "ok":
        raise StorageFailed(f"{path} is damaged: {verdict}")
    backup.check(db, path)
    # SQLite has no checksum of what a row holds: each text has to be the one that its digest was taken of.
    for memory_id, content, digest in db.execute("SELECT memory_id, content, content_digest FROM memories"):
        if content_digest(content) != digest:
            raise StorageFailed(f"{path} is damaged: the content of {memory_id} is not what was stored")
    return backup.contents(db)


def _make_ready(aside: Path, store: Path, found: Contents) -> None:
    """Give the copy a life of its own, and see that nothing was lost on the way."""
    epoch = uuid.uuid4().hex
    with contextlib.closing(sqlite3.connect(aside, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = FULL")
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE meta SET value = ? WHERE key = 'store_epoch'", (epoch,))
        # Who remembers a commit_seq of the replaced store must not meet the same number with other contents.
        for namespace, commit_seq in _sequences(store).items():
            db.execute(
                "INSERT INTO namespaces (namespace, commit_seq) VALUES (?1, ?2 + 1) "
                "ON CONFLICT (namespace) DO UPDATE SET commit_seq = max(commit_seq, ?2) + 1",
                (namespace, commit_seq),
            )
        db.execute("COMMIT")
        backup.check(db, aside)
        ready = backup.contents(db)
    if ready != replace(found, store_epoch=epoch, commit_seqs=ready.commit_seqs):
        raise StorageFailed(f"the copy {aside} is not what the backup holds")
    _take_owner(aside, store)
    backup.sync(aside)
    backup.sync(aside.parent)


def _sequences(store: Path) -> dict[str, int]:
    """The numbers of the last changes in the store that is replaced; none from one that cannot be read."""
    if not store.exists():
        return {}
    with contextlib.suppress(sqlite3.Error), backup.reading(store) as db:
        lost = inspection.missing(mark.read(store), mark.state_of(db))
        return {name: seq + lost for name, seq in backup.contents(db).commit_seqs.items()}
    return {}


def _take_owner(aside: Path, store: Path) -> None:
    """Restored by root, the store has to stay readable by the user of the service."""
    like = (store if store.exists() else store.parent).stat()
    if store.exists():
        aside.chmod(like.st_mode & 0o777)
    with contextlib.suppress(PermissionError):
        os.chown(aside, like.st_uid, like.st_gid)


def _put_aside(store: Path, now_s: float, say: Say) -> Path | None:
    """Give the old store a second name, under which it stays when the new one takes the first."""
    kept = _free_name(store, now_s)
    if not store.exists():
        _move_log(store, kept)
        return None
    say(f"keeping the replaced store as {kept}")
    is_sound = _can_be_read(store)
    if is_sound:
        _fold_log(store)
    _link(store, kept)
    if not is_sound:
        _move_log(store, kept)
    backup.sync(store.parent)
    return kept


def _free_name(store: Path, now_s: float) -> Path:
    base = f"{store.name}.before-restore-{datetime.fromtimestamp(now_s, UTC).strftime('%Y%m%dT%H%M%SZ')}"
    names = [base, *(f"{base}-{number}" for number in range(2, 1000))]
    return next(path for path in map(store.with_name, names) if not path.exists())


def _can_be_read(store: Path) -> bool:
    """False for a store too damaged to be opened, which is then left exactly as it is. Raises sqlite3.Error."""
    try:
        with backup.reading(store) as db:
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            return False
        raise
    return True


def _fold_log(store: Path) -> None:
    """Move the write-ahead log into the database and remove it: a log is never to meet another database.

    Raises StorageFailed while another program has the store open, sqlite3.Error.
    """
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = FULL")
        is_held = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    if is_held or store.with_name(store.name + "-wal").exists():
        raise StorageFailed(f"another program has {store} open; close it first")


def _move_log(store: Path, kept: Path) -> None:
    """Keep the log of a store that it cannot be moved into, or that is gone, by the name that goes with `kept`."""
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            store.with_name(store.name + suffix).replace(kept.with_name(kept.name + suffix))


def _link(store: Path, kept: Path) -> None:
    try:
        os.link(store, kept)
    except OSError:  # a file system without links
        shutil.copyfile(store, kept)
        backup.sync(kept)


def _remove(aside: Path) -> None:
    """What an interrupted restore left."""
    for path in (aside, aside.with_name(aside.name + "-journal")):
        path.unlink(missing_ok=True)

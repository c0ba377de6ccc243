"""What is looked at before a store is opened for writing. Nothing here changes a file: what is refused stays as it is,
its write-ahead log included. Only a rollback journal is played back, without which SQLite reads nothing.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from memory_system.errors import StorageFailed
from memory_system.log import get_logger
from memory_system.storage import backup, mark, migrations
from memory_system.storage.mark import Mark

log = get_logger("storage.inspection")

# How long a start may look at the pages: a larger store is looked at as far as that, and by the job integrity_check.
_PAGES_S: Final = 1.0
# SQLite looks at all pages in one step, which versions before 3.42 do not end when they are told to.
_PAGES_BYTES: Final = 1 << 30
# Of SQLite's machine, between two looks at the time: at each, it waits for whoever has the interpreter.
_LOOK_STEPS: Final = 100_000
_WAYS: Final = (
    "put the missing file back, or restore a backup (make restore FROM=latest), "
    "or accept the store as it is (make accept-store)"
)


def inspect(path: Path) -> None:
    """Raise StorageFailed for a store that ends before its mark or whose pages are damaged; sqlite3.Error for one that
    cannot be read. A file that is no store is left to whoever opens it."""
    noted = mark.read(path)
    _play_back(path)
    if not backup.size_of(path):
        _check_gone(path, noted)
        return
    with _reading(path) as db:
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            _check_gone(path, noted)
        if db.execute("PRAGMA application_id").fetchone()[0] != migrations.APPLICATION_ID:
            return
        migrations.check_version(path, db.execute("PRAGMA user_version").fetchone()[0])
        found = mark.state_of(db)
    if noted is not None:
        _check_mark(path, noted, found)
    _check_pages(path)


def missing(noted: Mark | None, found: Mark) -> int:
    """How many acknowledged writes a store lacks, as far as can be told: 0 without a mark of this very store."""
    if noted is None or noted.store_epoch != found.store_epoch or found.covers(noted):
        return 0
    return max(1, noted.commits - found.commits)


def _play_back(path: Path) -> None:
    """Take back a transaction that was not finished while the store had no write-ahead log: when it was made, or was
    about to get one, as a restored store is. A read-only connection must not, and refuses the store for good."""
    sizes = [backup.size_of(_beside(path, suffix)) for suffix in ("", "-journal", "-wal")]
    if sizes[0] and sizes[1] and not sizes[2]:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()


def _reading(path: Path, stopped: backup.Stopped = backup.never) -> AbstractContextManager[sqlite3.Connection]:
    has_log = any(backup.size_of(_beside(path, suffix)) for suffix in ("-wal", "-journal"))
    return backup.reading(path, stopped, is_still=not has_log, look_steps=_LOOK_STEPS)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _check_gone(path: Path, noted: Mark | None) -> None:
    if noted is not None and noted.commits:
        what = "is empty" if path.exists() else "is gone"
        raise StorageFailed(f"the store {path} {what}, though it held {noted.commits} acknowledged writes; {_WAYS}")


def _check_mark(path: Path, noted: Mark, found: Mark) -> None:
    if noted.store_epoch != found.store_epoch:
        log.warning("commit_mark_of_another_store", reason="another store was put here", action="it is made anew")
    if lacking := missing(noted, found):
        raise StorageFailed(
            f"the store {path} lacks the last {lacking} acknowledged writes: it ends at {found.commits} "
            f"(log {found.log_seq}), and {noted.commits} (log {noted.log_seq}) were acknowledged. Its write-ahead log "
            f"({path.name}-wal) was removed or damaged, or an older copy was put in its place: {_WAYS}"
        )


def _check_pages(path: Path) -> None:
    if backup.size_of(path) > _PAGES_BYTES:
        _tell_not_all_seen()
        return
    ends_s = time.monotonic() + _PAGES_S
    try:
        with _reading(path, lambda: time.monotonic() > ends_s) as db:
            backup.check(db, path)
            backup.check(db, path, with_indexes=True)
    except StorageFailed as error:
        raise StorageFailed(f"{error.message}; restore a backup (make restore FROM=latest)") from None
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_INTERRUPT:
            raise
        _tell_not_all_seen()


def _tell_not_all_seen() -> None:
    log.info("store_pages_not_all_seen", reason="the store is large; the job integrity_check looks at all of it")

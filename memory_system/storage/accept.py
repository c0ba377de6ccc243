"""Taking a store as it is found, although acknowledged writes are missing from it: an operator's decision, once.

The store begins a history of its own, as a restored one does: what was derived from the longer one is dropped, and no
commit_seq that somebody remembers is given to another change.
"""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from dataclasses import dataclass
from pathlib import Path

from memory_system.errors import StorageFailed
from memory_system.storage import backup, inspection, mark
from memory_system.storage.database import StoreLock


@dataclass(frozen=True, slots=True)
class Accepted:
    """`missing`: how many acknowledged writes are given up; 0: the store lacked none, and nothing was changed."""

    missing: int
    is_gone: bool = False


def accept(database: Path) -> Accepted:
    """Raises StorageFailed when an orchestrator has the store open, or it cannot be read."""
    if not database.parent.is_dir():
        raise StorageFailed(f"there is no folder {database.parent}")
    lock = StoreLock(database)
    try:
        return _accept(database)
    except sqlite3.Error as error:
        raise StorageFailed(
            f"{database} cannot be read: {error}; restore a backup (make restore FROM=latest)"
        ) from error
    finally:
        lock.release()


def _accept(database: Path) -> Accepted:
    noted = mark.read(database)
    with backup.reading(database) if backup.size_of(database) else contextlib.nullcontext() as db:
        if db is None or not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            mark.remove(database)
            return Accepted(noted.commits if noted else 0, is_gone=True)
        lacking = inspection.missing(noted, mark.state_of(db))
    if lacking:
        _begin_anew(database, lacking)
        mark.remove(database)
    return Accepted(lacking)


def _begin_anew(database: Path, lacking: int) -> None:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = FULL")
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE meta SET value = ? WHERE key = 'store_epoch'", (uuid.uuid4().hex,))
        # Which namespaces lost how many is not known: none lost more than all together.
        db.execute("UPDATE namespaces SET commit_seq = commit_seq + ? + 1", (lacking,))
        db.execute("COMMIT")

"""The database file of the error history: its tables, and opening it."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from memory_system.errors import CannotStart
from memory_system.health_settings import ErrorBusSettings

APPLICATION_ID: Final = 0x4D454831
SCHEMA_VERSION: Final = 1
CLEAN: Final = "clean_shutdown"  # in meta: "1" when the file was closed in order
# What is wrong with the file itself, and not with the disk or the moment.
DAMAGE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

_MIB: Final = 1024 * 1024

# `timestamp` is when it happened, by the sender's clock; `received_at` by ours. Both epoch seconds.
_SCHEMA: Final = f"""
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE,
    timestamp REAL NOT NULL,
    received_at REAL NOT NULL,
    agent TEXT NOT NULL,
    error_type TEXT NOT NULL,
    severity TEXT NOT NULL,
    message TEXT NOT NULL,
    request_id TEXT,
    details TEXT,
    count INTEGER NOT NULL
) STRICT;
CREATE INDEX events_by_time ON events (timestamp, severity, count);
CREATE TABLE folded (event_id BLOB PRIMARY KEY, at REAL NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""


def open_database(path: Path, settings: ErrorBusSettings, first_seq: int = 0) -> sqlite3.Connection:
    """Open the file or create it; the rows of a new one are numbered from `first_seq` + 1.

    Raises CannotStart for a database of another kind or of a newer schema, which is left as it was, and sqlite3.Error
    for one that is damaged (a code of DAMAGE) or cannot be opened now.
    """
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=128)
    try:
        version = _check(db, path)
        if version == 0:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        limit_bytes = int(settings.history_mb * _MIB)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA wal_autocheckpoint = {max(16, min(1000, limit_bytes // 4096 // 8))}")
        db.execute(f"PRAGMA journal_size_limit = {max(65_536, min(4 * _MIB, limit_bytes // 8))}")
        if version == 0:
            _create(db, first_seq)
        elif _meta(db, CLEAN) != "1":
            _check_pages(db)
        return db
    except BaseException:
        db.close()
        raise


def _create(db: sqlite3.Connection, first_seq: int) -> None:
    numbered = f"INSERT INTO sqlite_sequence VALUES ('events', {first_seq});" if first_seq else ""
    db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}{numbered}COMMIT;")


def _check(db: sqlite3.Connection, path: Path) -> int:
    application: int = db.execute("PRAGMA application_id").fetchone()[0]
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    objects: int = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application == version == objects == 0:
        return 0
    if application != APPLICATION_ID or version == 0:
        raise CannotStart(f"{path} is a SQLite database, but no error history; set error_bus.history_path")
    if version > SCHEMA_VERSION:
        raise CannotStart(
            f"{path} has schema version {version}, this program knows up to {SCHEMA_VERSION}; "
            "use the newer program, or set error_bus.history_path to another file"
        )
    return version


def _check_pages(db: sqlite3.Connection) -> None:
    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        error = sqlite3.DatabaseError(found)
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


def _meta(db: sqlite3.Connection, key: str) -> str | None:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return None if row is None else row[0]

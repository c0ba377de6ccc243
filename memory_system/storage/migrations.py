"""Bringing an older database to schema.sql: one transaction a step, after a backup.

To change the schema: edit schema.sql, raise its user_version, and append the step that leads there to STEPS.
A test upgrades every older schema that is kept in tests/data and compares the result with schema.sql.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Final

from memory_system.errors import StorageFailed

APPLICATION_ID: Final = 0x4D454D31
SCHEMA_FILE: Final = Path(__file__).resolve().parents[2] / "schema.sql"

# STEPS[i] leads from user_version i + 1 to i + 2.
STEPS: Final[tuple[str, ...]] = (
    # list_sessions looked at every memory of the namespace.
    "CREATE INDEX sessions_by_creation ON memories (namespace, created_at) WHERE memory_type = 'session';",
    # Ageing: archived memories, early promotion, runs of maintenance, consolidation.
    """
ALTER TABLE memories ADD COLUMN archived_at REAL;
ALTER TABLE memories ADD COLUMN tier_accesses INTEGER NOT NULL DEFAULT 0;
ALTER TABLE memories ADD COLUMN promote_at REAL;
UPDATE memories SET archived_at = updated_at WHERE state = 'archived';
CREATE TABLE maintenance_runs (
    run_id      INTEGER PRIMARY KEY AUTOINCREMENT,
    job         TEXT    NOT NULL,
    request_id  TEXT    UNIQUE,
    asked       TEXT    NOT NULL,
    asked_by    TEXT    NOT NULL,
    as_of       REAL    NOT NULL,
    dry_run     INTEGER NOT NULL CHECK (dry_run IN (0, 1)),
    started_at  REAL    NOT NULL,
    finished_at REAL,
    state       TEXT    NOT NULL CHECK (state IN ('running', 'done', 'failed', 'interrupted')),
    result      TEXT,
    error       TEXT
) STRICT;
CREATE INDEX maintenance_runs_by_job ON maintenance_runs (job, run_id);
CREATE TABLE consolidations (
    row_id     INTEGER PRIMARY KEY REFERENCES memories (row_id) ON DELETE CASCADE,
    kind       TEXT NOT NULL CHECK (kind IN ('summary', 'duplicates')),
    summariser TEXT NOT NULL,
    pieces     TEXT,
    created_at REAL NOT NULL
) STRICT;
CREATE TABLE consolidation_members (
    row_id        INTEGER NOT NULL REFERENCES consolidations (row_id) ON DELETE CASCADE,
    member_row_id INTEGER NOT NULL REFERENCES memories (row_id) ON DELETE CASCADE,
    before        TEXT    NOT NULL,
    PRIMARY KEY (row_id, member_row_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX consolidation_members_by_member ON consolidation_members (member_row_id);
CREATE TABLE consolidations_undone (
    row_id    INTEGER PRIMARY KEY REFERENCES memories (row_id) ON DELETE CASCADE,
    undone_at REAL NOT NULL
) STRICT;
""",
    # Sessions that end by themselves, which asks for the newest memory of each.
    """
ALTER TABLE sessions ADD COLUMN idle_timeout_s REAL;
ALTER TABLE sessions ADD COLUMN resumed_at REAL;
DROP INDEX memories_by_session;
CREATE INDEX memories_by_session ON memories (namespace, session_id, created_at) WHERE session_id IS NOT NULL;
""",
    # Words are found in an index of their own, derived as that of vectors is: see memory_system/search/postings.py.
    """
DROP TRIGGER memories_fts_insert;
DROP TRIGGER memories_fts_delete;
DROP TRIGGER memories_fts_update;
DROP TABLE memory_terms;
DROP TABLE memory_fts;
DROP VIEW searchable_texts;
DELETE FROM meta WHERE key = 'full_text_rebuild';
""",
    # Quotas.
    """
ALTER TABLE memories ADD COLUMN owner TEXT NOT NULL DEFAULT '';
CREATE TABLE usage (
    owner    TEXT PRIMARY KEY,
    memories INTEGER NOT NULL,
    bytes    INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
""",
)
CURRENT_VERSION: Final = len(STEPS) + 1


def schema_text() -> str:
    return SCHEMA_FILE.read_text(encoding="utf-8")


def check_version(path: Path, version: int, current: int = CURRENT_VERSION) -> None:
    """Raise StorageFailed for a database of a newer schema, which is to be left as it is."""
    if version > current:
        raise StorageFailed(
            f"{path} has schema version {version}, this program knows up to {current}; "
            f"start the newer version of the program, or set storage.path to another file"
        )


def migrate(db: sqlite3.Connection, path: Path, version: int, steps: tuple[str, ...] = STEPS) -> None:
    """Run the steps that `version` lacks, if any. Raises StorageFailed for a newer schema."""
    current = len(steps) + 1
    check_version(path, version, current)
    if version == current:
        return
    back_up(db, path.with_name(f"{path.name}.v{version}.backup"))
    for number in range(version, current):
        _step(db, steps[number - 1], number + 1)


def _step(db: sqlite3.Connection, script: str, version: int) -> None:
    try:
        db.executescript(f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version = {version};\nCOMMIT;")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def back_up(db: sqlite3.Connection, target: Path) -> None:
    """A verified copy of the database at `target`: written aside, synced, then renamed."""
    aside = target.with_name(target.name + ".partial")
    aside.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", (str(aside),))
    with sqlite3.connect(aside) as copy:
        verdict = copy.execute("PRAGMA quick_check").fetchone()[0]
    copy.close()
    if verdict != "ok":
        raise StorageFailed(f"the backup {aside} is damaged ({verdict}); the database was not changed")
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

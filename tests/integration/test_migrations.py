"""Upgrading an older database: a verified backup, then one transaction a step, or nothing at all."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_system.errors import StorageFailed
from memory_system.storage import database, migrations
from tests.integration.test_database import schema_of

# A history of schemas made for this test: version 1 and the steps to 2 and 3.
FIRST = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT; PRAGMA user_version = 1;"
STEPS = (
    "ALTER TABLE notes ADD COLUMN made_at REAL; UPDATE notes SET made_at = 7.0;",
    "CREATE TABLE marks (id INTEGER PRIMARY KEY REFERENCES notes (id)) STRICT; INSERT INTO marks SELECT id FROM notes;",
)
BROKEN = "CREATE TABLE half (x TEXT) STRICT; INSERT INTO notes (text) VALUES ('half'); SELECT * FROM no_such_table;"

# Older schemas of the real store: user_version -> file in tests/data, each kept when schema.sql leaves it behind.
OLDER = sorted((Path(__file__).parents[1] / "data").glob("schema-v*.sql"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "memory.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(FIRST)
        db.executemany("INSERT INTO notes (text) VALUES (?)", [("one",), ("two",)])
        db.commit()
    return path


@contextlib.contextmanager
def store(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(database.connect_writer(path)) as db:
        yield db


def version_of(db: sqlite3.Connection) -> int:
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    return version


def test_an_older_database_is_brought_up_step_by_step(path: Path) -> None:
    with store(path) as db:
        migrations.migrate(db, path, 1, STEPS)
        assert version_of(db) == 3
        assert db.execute("SELECT text, made_at FROM notes").fetchall() == [("one", 7.0), ("two", 7.0)]
        assert db.execute("SELECT count(*) FROM marks").fetchone() == (2,)
        assert not db.in_transaction


def test_a_database_half_way_gets_only_what_it_lacks(path: Path) -> None:
    with store(path) as db:
        migrations.migrate(db, path, 1, STEPS[:1])
        db.execute("UPDATE notes SET made_at = 8.0")
        migrations.migrate(db, path, version_of(db), STEPS)
        assert version_of(db) == 3
        assert db.execute("SELECT DISTINCT made_at FROM notes").fetchall() == [(8.0,)]


def test_the_backup_holds_the_state_before(path: Path) -> None:
    with store(path) as db:
        db.execute("INSERT INTO notes (text) VALUES ('three')")  # still in the write-ahead log
        migrations.migrate(db, path, 1, STEPS)
    backup = path.with_name("memory.db.v1.backup")
    with contextlib.closing(sqlite3.connect(backup)) as copy:
        assert version_of(copy) == 1
        assert copy.execute("SELECT text FROM notes").fetchall() == [("one",), ("two",), ("three",)]
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert not list(path.parent.glob("*.partial"))


def test_a_failing_step_leaves_the_version_before_it_whole(path: Path) -> None:
    with store(path) as db:
        before = list(db.iterdump())
        with pytest.raises(sqlite3.OperationalError, match="no_such_table"):
            migrations.migrate(db, path, 1, (BROKEN,))
        assert not db.in_transaction
        assert version_of(db) == 1
        assert list(db.iterdump()) == before
        # The repaired program starts from there.
        migrations.migrate(db, path, 1, STEPS)
        assert version_of(db) == 3


def test_steps_before_a_failing_one_stand(path: Path) -> None:
    with store(path) as db:
        with pytest.raises(sqlite3.OperationalError):
            migrations.migrate(db, path, 1, (STEPS[0], BROKEN))
        assert version_of(db) == 2
        assert db.execute("SELECT count(*), min(made_at) FROM notes").fetchone() == (2, 7.0)


def test_a_backup_that_fails_stops_the_upgrade(path: Path) -> None:
    path.with_name("memory.db.v1.backup.partial").mkdir()
    with store(path) as db:
        with pytest.raises((OSError, StorageFailed, sqlite3.Error)):
            migrations.migrate(db, path, 1, STEPS)
        assert version_of(db) == 1


def test_what_an_interrupted_backup_left_is_no_obstacle(path: Path) -> None:
    path.with_name("memory.db.v1.backup.partial").write_bytes(b"half a backup")
    path.with_name("memory.db.v1.backup").write_bytes(b"an older one")
    with store(path) as db:
        migrations.migrate(db, path, 1, STEPS)
    with contextlib.closing(sqlite3.connect(path.with_name("memory.db.v1.backup"))) as copy:
        assert version_of(copy) == 1


def test_a_damaged_copy_is_no_backup(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is checked before anything is changed."""
    target = path.with_name("memory.db.v1.backup")
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript("CREATE INDEX by_text ON notes (text);")
        db.executescript(
            "PRAGMA writable_schema = 1;"
            "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master WHERE name = 'notes') "
            "WHERE name = 'by_text';"
        )
    with store(path) as db, pytest.raises((StorageFailed, sqlite3.DatabaseError)):
        migrations.migrate(db, path, 1, STEPS)
    assert not target.exists()
    with store(path) as db:
        assert version_of(db) == 1


def test_the_current_version_is_left_alone(path: Path) -> None:
    with store(path) as db:
        db.execute("PRAGMA user_version = 3")
        before = db.total_changes
        migrations.migrate(db, path, 3, STEPS)
        assert db.total_changes == before
    assert not path.with_name("memory.db.v3.backup").exists()


def test_a_newer_version_is_refused(path: Path) -> None:
    with store(path) as db, pytest.raises(StorageFailed, match=r"schema version 4.*up to 3"):
        migrations.migrate(db, path, 4, STEPS)


def test_the_version_of_the_schema_file_is_the_last_step_of_the_list() -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(migrations.schema_text())
        assert version_of(db) == migrations.CURRENT_VERSION == len(migrations.STEPS) + 1


def test_every_older_schema_is_kept() -> None:
    assert [file.stem for file in OLDER] == [f"schema-v{version}" for version in range(1, migrations.CURRENT_VERSION)]


def test_older_stores_upgrade_to_exactly_the_schema_file(tmp_path: Path) -> None:
    for script in OLDER:
        path = tmp_path / f"{script.stem}.db"
        with store(path) as db:
            db.executescript(script.read_text(encoding="utf-8"))
            db.execute("INSERT INTO meta (key, value) VALUES ('store_epoch', 'old')")
        with contextlib.closing(database.open_store(path)) as db:
            with contextlib.closing(sqlite3.connect(":memory:")) as reference:
                reference.executescript(migrations.schema_text())
                assert schema_of(db) == schema_of(reference), script.name
            assert version_of(db) == migrations.CURRENT_VERSION
            assert database.store_epoch(db) == "old"


@pytest.mark.parametrize("rebuilding", [False, True])
def test_a_store_with_a_full_text_index_is_brought_up_without_it(tmp_path: Path, rebuilding: bool) -> None:
    """Its tables, triggers and view go, also when it was just being made anew; no memory does, and writing goes on."""
    path = tmp_path / "memory.db"
    insert = (
        "INSERT INTO memories (namespace, memory_id, content, content_digest, memory_type, memory_tier, importance, "
        "importance_at, created_at, updated_at, tier_since, created_by) "
        "VALUES ('n', ?, 'a heron', x'00', 't', 'short', 0.5, 0, 0, 0, 0, '')"
    )
    with store(path) as db:
        db.executescript((OLDER[0].parent / "schema-v3.sql").read_text(encoding="utf-8"))
        db.execute("INSERT INTO meta (key, value) VALUES ('store_epoch', 'old')")
        if rebuilding:
            db.execute("INSERT INTO meta (key, value) VALUES ('full_text_rebuild', '{}')")
        db.execute(insert, ("one",))
        assert db.execute("SELECT count(*) FROM memory_fts WHERE memory_fts MATCH 'heron'").fetchone() == (1,)
    with contextlib.closing(database.open_store(path)) as db:
        left = "SELECT name FROM sqlite_master WHERE name LIKE 'memory_%s%' OR type IN ('view', 'trigger')"
        assert [name for (name,) in db.execute(left) if name != "memory_history"] == []
        assert db.execute("SELECT key FROM meta").fetchall() == [("store_epoch",)]
        db.execute(insert, ("two",))
        db.execute("UPDATE memories SET content = 'an egret' WHERE memory_id = 'one'")
        assert db.execute("SELECT content FROM memories").fetchall() == [("an egret",), ("a heron",)]
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_comparison_of_schemas_sees_what_matters() -> None:
    """Comments and spacing are no difference; a column, a constraint, an index or a trigger is."""
    same = "CREATE TABLE t (a INTEGER, -- a comment\n   b TEXT) STRICT;"
    others = (
        "CREATE TABLE t (a INTEGER, b TEXT, c TEXT) STRICT;",
        "CREATE TABLE t (a INTEGER, b TEXT);",
        "CREATE TABLE t (a INTEGER CHECK (a > 0), b TEXT) STRICT;",
        "CREATE TABLE t (a INTEGER, b TEXT) STRICT; CREATE INDEX i ON t (a);",
        "CREATE TABLE t (a INTEGER, b TEXT) STRICT; CREATE TRIGGER r AFTER DELETE ON t BEGIN SELECT 1; END;",
    )

    def schema(script: str) -> object:
        with contextlib.closing(sqlite3.connect(":memory:")) as db:
            db.executescript(script)
            return schema_of(db)

    expected = schema("CREATE TABLE t (a INTEGER, b TEXT) STRICT;")
    assert schema(same) == expected
    assert [script for script in others if schema(script) == expected] == []

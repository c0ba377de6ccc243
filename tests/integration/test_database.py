"""Opening the store: the lock, what is refused and left alone, the schema, the connections."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_system.errors import StorageFailed
from memory_system.storage import database, migrations
from tests.support.service import PROJECT, environment, free_port, running_orchestrator

HOLDER = """
import sys
from pathlib import Path
from memory_system.storage.database import StoreLock
lock = StoreLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def lock_holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the store's lock."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == "locked\n"
        yield holder
    finally:
        holder.kill()
        holder.wait(30)
        holder.stdin.close()
        holder.stdout.close()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(database.open_store(path)) as db:
        yield db


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# -- the lock -------------------------------------------------------------------------------------------------------


def test_the_lock_of_a_living_process_is_refused_with_its_pid(tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    with lock_holder(path) as holder:
        with pytest.raises(StorageFailed, match=rf"in use by another orchestrator \(pid {holder.pid}\).*storage\.path"):
            database.StoreLock(path)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(30)
        database.StoreLock(path).release()


def test_a_lock_is_free_after_release(tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    lock = database.StoreLock(path)
    assert lock.path.read_text() == str(os.getpid())
    assert lock.path.stat().st_mode & 0o077 == 0
    lock.release()
    lock.release()
    database.StoreLock(path).release()


@pytest.mark.acceptance
def test_a_second_orchestrator_on_one_store_ends_at_once_and_harms_nothing(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path) as first:
        memory_id = first.ask("add_memory", content="stays")["memory_id"]
        with running_orchestrator(tmp_path, start=False, network__port=free_port()) as second:
            process = second.launch()
            message = process.communicate(timeout=90)[1]
            assert process.returncode == 1
            assert f"in use by another orchestrator (pid {first.pid})" in message
            assert "Traceback" not in message
        assert first.ask("get_memory", memory_id=memory_id)["memory"]["content"] == "stays"
        first.kill()
        first.start()
        assert first.ask("get_memory", memory_id=memory_id)["memory"]["content"] == "stays"


@pytest.mark.acceptance
@pytest.mark.parametrize("path", ["file/memory.db", "folder"])
def test_a_path_that_cannot_be_a_store_is_one_clear_line(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with running_orchestrator(tmp_path, start=False, storage__path=tmp_path / path) as orchestrator:
        process = orchestrator.launch()
        message = process.communicate(timeout=90)[1]
    assert process.returncode == 1
    assert str(tmp_path / path) in message
    assert "Traceback" not in message


# -- what is no store of ours -----------------------------------------------------------------------------------------


def plain_database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript("CREATE TABLE people (name TEXT); INSERT INTO people VALUES ('Ada');")


def foreign_application(path: Path) -> None:
    plain_database(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript("PRAGMA application_id = 1; PRAGMA user_version = 1;")


def foreign_application_without_tables(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript("PRAGMA application_id = 77;")


def garbage(path: Path) -> None:
    path.write_bytes(b"This is no database, whatever its name says. " * 200)


def short_garbage(path: Path) -> None:
    path.write_bytes(b"notes\n")


def newer(path: Path) -> None:
    with opened(path) as db:
        db.execute(f"PRAGMA user_version = {migrations.CURRENT_VERSION + 1}")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (plain_database, "not a memory store; set storage.path"),
        (foreign_application, "not a memory store; set storage.path"),
        (foreign_application_without_tables, "not a memory store; set storage.path"),
        (garbage, "cannot be opened as a memory store"),
        (short_garbage, "cannot be opened as a memory store"),
        (newer, rf"schema version {migrations.CURRENT_VERSION + 1}.*knows up to {migrations.CURRENT_VERSION}"),
    ],
)
def test_a_file_that_is_no_store_of_ours_is_refused_and_left_as_it_is(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "memory.db"
    make(path)
    before = contents(tmp_path)
    with pytest.raises(StorageFailed, match=message) as refusal:
        database.open_store(path)
    assert str(path) in refusal.value.message
    assert contents(tmp_path) == before


def test_a_schema_that_is_no_text_any_more_is_refused_as_damage_is(tmp_path: Path) -> None:
    """SQLite quotes the statement that it cannot read, bytes and all."""
    path = tmp_path / "memory.db"
    database.open_store(path).close()
    whole = path.read_bytes()
    damaged = whole.replace(b"CREATE INDEX memories_by_due", b"CREATE \xc9NDEX memories_by_due", 1)
    assert damaged != whole
    path.write_bytes(damaged)
    with pytest.raises(StorageFailed, match="cannot be opened as a memory store"):
        database.open_store(path)
    assert path.read_bytes() == damaged


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    path.touch()
    with opened(path) as db:
        assert len(database.store_epoch(db)) == 32


def test_a_store_that_was_cut_short_while_it_was_made_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    with contextlib.closing(database.connect_writer(path)) as db:
        db.executescript(f"BEGIN IMMEDIATE;\n{migrations.schema_text()}")
        db.execute("ROLLBACK")
    with opened(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (migrations.CURRENT_VERSION,)


# -- the schema -------------------------------------------------------------------------------------------------------


def test_a_new_store_has_exactly_the_schema_of_the_file(tmp_path: Path) -> None:
    with opened(tmp_path / "memory.db") as db, contextlib.closing(sqlite3.connect(":memory:")) as reference:
        reference.executescript(migrations.schema_text())
        assert schema_of(db) == schema_of(reference)
        assert db.execute("PRAGMA application_id").fetchone() == (database.APPLICATION_ID,)
        assert db.execute("PRAGMA user_version").fetchone() == (migrations.CURRENT_VERSION,)


def schema_of(db: sqlite3.Connection) -> list[tuple[str, str, str]]:
    """Type, name and normalised SQL of everything in the schema."""
    found = db.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return sorted((kind, name, normalised(sql)) for kind, name, sql in found)


def normalised(sql: str) -> str:
    """SQL without comments and with single spaces, so that two ways to the same schema compare equal."""
    without_comments = re.sub(r"--[^\n]*", "", sql)
    spaced = re.sub(r"\s+", " ", without_comments).strip()
    return re.sub(r"\s*([(),=])\s*", r"\1", spaced).replace('"', "")


def test_every_table_is_strict(tmp_path: Path) -> None:
    with opened(tmp_path / "memory.db") as db:
        tables = db.execute(
            "SELECT name, strict FROM pragma_table_list WHERE schema = 'main' AND type = 'table' "
            "AND name NOT LIKE 'sqlite_%'"
        ).fetchall()
        assert len(tables) >= 10
        assert [name for name, strict in tables if not strict] == []
        with pytest.raises(sqlite3.IntegrityError, match="cannot store TEXT value in INTEGER column"):
            db.execute("INSERT INTO namespaces VALUES ('default', 'many')")


def test_the_epoch_is_of_one_store_and_stays(tmp_path: Path) -> None:
    epochs = []
    for name in ("a.db", "b.db", "a.db"):
        with opened(tmp_path / name) as db:
            epochs.append(database.store_epoch(db))
    assert epochs[0] == epochs[2] != epochs[1]


def test_a_deleted_row_id_never_comes_back(tmp_path: Path) -> None:
    insert = (
        "INSERT INTO memories (namespace, memory_id, content, content_digest, memory_type, memory_tier, importance, "
        "importance_at, created_at, updated_at, tier_since, created_by) "
        "VALUES ('n', ?, 'c', x'00', 't', 'short', 0.5, 0, 0, 0, 0, '') RETURNING row_id"
    )
    with opened(tmp_path / "memory.db") as db:
        (first,) = db.execute(insert, ("a",)).fetchone()
        db.execute("DELETE FROM memories")
        (second,) = db.execute(insert, ("b",)).fetchone()
        assert second > first


# -- connections ------------------------------------------------------------------------------------------------------


def test_the_writing_connection(tmp_path: Path) -> None:
    def pragma(db: sqlite3.Connection, name: str) -> object:
        return db.execute(f"PRAGMA {name}").fetchone()[0]

    path = tmp_path / "memory.db"
    with opened(path) as db:
        assert pragma(db, "journal_mode") == "wal"
        assert pragma(db, "synchronous") == 2
        assert pragma(db, "foreign_keys") == 1
        assert pragma(db, "busy_timeout") == database.BUSY_TIMEOUT_MS
        assert pragma(db, "mmap_size") == 0
    with contextlib.closing(database.open_store(path, "normal")) as db:
        assert pragma(db, "synchronous") == 1


def test_a_reading_connection_cannot_write(tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    with opened(path), contextlib.closing(database.connect_reader(path)) as reader:
        for statement in (
            "INSERT INTO namespaces VALUES ('default', 1)",
            "DELETE FROM meta",
            "CREATE TABLE mine (x)",
            "PRAGMA user_version = 9",
        ):
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                reader.execute(statement)
        assert reader.execute("SELECT count(*) FROM meta").fetchone() == (1,)


def test_exp_and_ln_are_there_on_every_connection(tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    with opened(path) as db, contextlib.closing(database.connect_reader(path)) as reader:
        for connection in (db, reader):
            assert connection.execute("SELECT exp(1.0), ln(10.0)").fetchone() == pytest.approx((math.e, math.log(10)))


class WithoutMath(sqlite3.Connection):
    """SQLite as it is built without SQLITE_ENABLE_MATH_FUNCTIONS: exp and ln are unknown until they are registered."""

    registered: frozenset[str] = frozenset()

    def execute(self, sql: str, *arguments: object) -> sqlite3.Cursor:
        if "exp(" in sql and "exp" not in self.registered:
            raise sqlite3.OperationalError("no such function: exp")
        return super().execute(sql, *arguments)

    def create_function(self, name: str, *arguments: object, **options: object) -> None:
        self.registered |= {name}
        super().create_function(name, *arguments, **options)  # type: ignore[arg-type]


def test_exp_and_ln_are_registered_where_sqlite_lacks_them() -> None:
    with contextlib.closing(sqlite3.connect(":memory:", factory=WithoutMath)) as db:
        database.register_math(db)
        assert db.registered == {"exp", "ln"}
        assert db.execute("SELECT exp(0.0), ln(1.0)").fetchone() == (1.0, 0.0)


def test_a_transaction_that_raises_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "memory.db") as db:
        with pytest.raises(RuntimeError), database.transaction(db):
            db.execute("INSERT INTO namespaces VALUES ('default', 1)")
            raise RuntimeError("interrupted")
        assert not db.in_transaction
        with database.transaction(db):
            db.execute("INSERT INTO namespaces VALUES ('other', 1)")
        assert db.execute("SELECT namespace FROM namespaces").fetchall() == [("other",)]


def test_settings_of_the_helpers_name_the_store(tmp_path: Path) -> None:
    assert environment(tmp_path, {})["MEMORY__STORAGE__PATH"] == str(tmp_path / "memory.db")

"""Opening the database: the lock, the pragmas, the schema. One connection writes, all others are query-only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from memory_system.errors import CannotStart, StorageFailed
from memory_system.storage import inspection, migrations

APPLICATION_ID: Final = migrations.APPLICATION_ID
BUSY_TIMEOUT_MS: Final = 5000


class StoreLock:
    """An exclusive lock beside the database, so that two orchestrators never open one store.

    The kernel drops it with the process, however that ends. Raises StorageFailed when another holds it.
    """

    def __init__(self, database: Path) -> None:
        self.path = database.with_name(database.name + ".lock")
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
            os.close(self._fd)
            raise StorageFailed(
                f"the store {database} is in use by another orchestrator (pid {holder or 'unknown'}); "
                f"stop it, or set storage.path to another file"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def lock_store(path: Path) -> StoreLock:
    """The lock of the store at `path`, in a folder that is made if need be.

    Raises CannotStart where nothing can be written, StorageFailed when another orchestrator holds it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return StoreLock(path)
    except OSError as error:
        raise CannotStart(
            f"the store {path} cannot be opened: {error.strerror}; set storage.path to a file in a writable folder"
        ) from error


def connect_writer(path: Path, synchronous: str = "full") -> sqlite3.Connection:
    """The one connection that writes and checkpoints; transactions are begun and ended by the caller."""
    db = _connect(path)
    _become_writer(db, synchronous)
    return db


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=512)


def _become_writer(db: sqlite3.Connection, synchronous: str) -> None:
    _prepare(db)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute(f"PRAGMA synchronous = {'NORMAL' if synchronous == 'normal' else 'FULL'}")
    db.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten, however SQLite was built
    db.execute(f"PRAGMA journal_size_limit = {64 * 1024 * 1024}")


def _check(db: sqlite3.Connection, path: Path) -> int:
    """The schema version, 0 for a new file; raises StorageFailed for what is not ours, before it is touched."""
    application: int = db.execute("PRAGMA application_id").fetchone()[0]
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    objects: int = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    is_new = application == 0 and version == 0 and objects == 0
    if not is_new and (application != APPLICATION_ID or version == 0):
        raise StorageFailed(f"{path} is a SQLite database, but not a memory store; set storage.path to another file")
    migrations.check_version(path, version)
    return version


def connect_reader(path: Path | str) -> sqlite3.Connection:
    """A query-only connection, for one thread at a time."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    _prepare(db)
    db.execute("PRAGMA query_only = 1")
    # Not for the writer: SQLite then refuses the triggers of an older schema, which has to be brought up.
    db.execute("PRAGMA trusted_schema = OFF")
    return db


def _prepare(db: sqlite3.Connection) -> None:
    db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    db.execute("PRAGMA foreign_keys = ON")
    register_math(db)


def register_math(db: sqlite3.Connection) -> None:
    """Give SQLite `exp` and `ln` where it was built without them."""
    try:
        db.execute("SELECT exp(0.0), ln(1.0)")
    except sqlite3.OperationalError:
        db.create_function("exp", 1, math.exp, deterministic=True)
        db.create_function("ln", 1, math.log, deterministic=True)


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """BEGIN IMMEDIATE ... COMMIT; rolled back when the block raises."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def look_at(path: Path) -> None:
    """What is to be done before a store is opened for writing; the file is left as it was.

    Raises StorageFailed for a file that is damaged, is of a newer schema, or lacks acknowledged writes.
    """
    try:
        inspection.inspect(path)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def open_store(path: Path, synchronous: str = "full", *, looked_at: bool = False) -> sqlite3.Connection:
    """Create the database, or migrate it after a backup, and return the writing connection. `looked_at`: just now.

    Raises StorageFailed for a file that is no store of ours, one of a newer schema, one that is damaged, or one that
    lacks acknowledged writes; it is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not looked_at:
        look_at(path)
    db = None
    try:
        db = _connect(path)
        version = _check(db, path)
        _become_writer(db, synchronous)
        if version == 0:
            create(db)
        else:
            migrations.migrate(db, path, version)
    except BaseException as error:
        if db is not None:
            db.close()
        if isinstance(error, (sqlite3.Error, UnicodeDecodeError)):
            raise _unreadable(path, error) from error
        raise
    return db


def _unreadable(path: Path, error: Exception) -> StorageFailed:
    # SQLite quotes what it cannot read, and damaged bytes of a schema need be no text at all.
    return StorageFailed(f"{path} cannot be opened as a memory store: {error}")


def create(db: sqlite3.Connection) -> None:
    """Execute schema.sql in one transaction and give the store its epoch."""
    epoch = uuid.uuid4().hex
    try:
        db.executescript(
            f"BEGIN IMMEDIATE;\n{migrations.schema_text()}\n"
            f"INSERT INTO meta (key, value) VALUES ('store_epoch', '{epoch}');\nCOMMIT;"
        )
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def store_epoch(db: sqlite3.Connection) -> str:
    """The random name of this store's history."""
    epoch: str = db.execute("SELECT value FROM meta WHERE key = 'store_epoch'").fetchone()[0]
    return epoch

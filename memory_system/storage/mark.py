"""How far the store has come, noted in a second place: a store that ends before its mark has lost acknowledged writes.

The database cannot tell that by itself: one whose write-ahead log was deleted, truncated or damaged is sound, and ends
earlier. The mark lies beside it. It is written after each commit and before that commit's replies leave, so it is never
ahead of what is durable, and survives the end of the process as it is; it is synced once in a while, not with each
commit, so a power cut can take it back by about the time between two syncs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from memory_system.digest import content_digest
from memory_system.errors import StorageFailed
from memory_system.log import get_logger

log = get_logger("storage.mark")

# Fixed, so that a later mark takes no room that a full disk has not.
_SIZE: Final = 256
_SYNC_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A state of a store. `commits`: the commit_seq of all namespaces together; `log_seq`: the end of index_log."""

    store_epoch: str
    commits: int
    log_seq: int

    def covers(self, earlier: Mark) -> bool:
        """Whether this state of the same store holds every change that `earlier` had."""
        return self.commits >= earlier.commits and self.log_seq >= earlier.log_seq


def path_of(database: Path) -> Path:
    return database.with_name(database.name + ".mark")


def state_of(db: sqlite3.Connection) -> Mark:
    """Where a database of ours is. Raises sqlite3.Error for any other."""
    epoch = db.execute("SELECT value FROM meta WHERE key = 'store_epoch'").fetchone()
    if epoch is None:
        raise sqlite3.DatabaseError("it is damaged: its epoch is gone; restore a backup (make restore FROM=latest)")
    commits = db.execute("SELECT coalesce(sum(commit_seq), 0) FROM namespaces").fetchone()[0]
    logged = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'index_log'").fetchone()
    return Mark(str(epoch[0]), int(commits), int(logged[0]) if logged else 0)


def read(database: Path) -> Mark | None:
    """The mark beside a database; None where there is none, or it is damaged, which is logged."""
    try:
        data = path_of(database).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("commit_mark_unreadable", reason=str(error.strerror), action="it is made anew")
        return None
    mark = _decoded(data)
    if mark is None:
        log.warning("commit_mark_unreadable", reason="it is damaged", action="it is made anew")
    return mark


def remove(database: Path) -> None:
    path_of(database).unlink(missing_ok=True)


def keeper(database: Path, db: sqlite3.Connection, synchronous: str) -> Unmarked:
    """Who keeps the mark of a store that was just opened. A store that may lose its last writes has none.

    Raises StorageFailed when the store cannot be synced.
    """
    if synchronous == "full":
        _sync_log(database)
        return MarkFile(database, state_of(db))
    with contextlib.suppress(OSError):
        remove(database)
    return Unmarked()


class Unmarked:
    """Keeps no mark."""

    def advance(self, commits: int, logged: int) -> None:
        """So many more were committed. To be called before anybody hears of them."""

    def sync_when_due(self) -> None:
        """Make the mark durable, unless that was done a moment ago."""

    def sync(self) -> None:
        """Make it durable."""

    def close(self) -> None:
        """Make it durable, and do no more."""


class MarkFile(Unmarked):
    """Keeps the mark of a store that is open. Used by the writer's thread alone; a mark that cannot be written is
    logged, and tried again with the next."""

    def __init__(self, database: Path, mark: Mark) -> None:
        self.mark = mark
        self._path = path_of(database)
        self._fd = -1
        self._dirty = False
        self._failed = False
        self._synced_s = time.monotonic()
        self._write()
        self.sync()

    def __repr__(self) -> str:
        return f"MarkFile({self._path}, {self.mark.commits} commits)"

    def advance(self, commits: int, logged: int) -> None:
        if commits or logged:
            self.mark = Mark(self.mark.store_epoch, self.mark.commits + commits, self.mark.log_seq + logged)
            self._write()

    def sync_when_due(self) -> None:
        if self._dirty and time.monotonic() - self._synced_s >= _SYNC_S:
            self.sync()

    def sync(self) -> None:
        if not self._dirty or self._fd < 0:
            return
        self._synced_s = time.monotonic()
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._tell(error)
        else:
            self._dirty = False

    def close(self) -> None:
        self.sync()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self) -> None:
        try:
            if self._fd < 0:
                self._fd = _opened(self._path)
            os.pwrite(self._fd, _encoded(self.mark), 0)
        except OSError as error:
            self._tell(error)
        else:
            self._dirty, self._failed = True, False

    def _tell(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            reason = f"{self._path} cannot be written: {error.strerror}; writes go on"
            log.warning("commit_mark_failed", reason=reason)


def _sync_log(database: Path) -> None:
    """Make durable what the store was opened with: a process that was killed within a commit leaves a whole one that
    was never synced. Neither the mark may be ahead of it, nor may its reply be given to who asks again."""
    try:
        fd = os.open(database.with_name(database.name + "-wal"), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        raise StorageFailed(f"{database}-wal cannot be synced: {error.strerror}") from error
    finally:
        os.close(fd)


def _opened(path: Path) -> int:
    is_new = not path.exists()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if is_new:
        with contextlib.suppress(OSError):  # without its name a power cut takes the mark, and nothing else
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    return fd


def _encoded(mark: Mark) -> bytes:
    body = json.dumps(asdict(mark))
    return f"{body}\n{content_digest(body).hex()}\n".encode().ljust(_SIZE)


def _decoded(data: bytes) -> Mark | None:
    body, _, rest = data.decode("utf-8", "replace").partition("\n")
    if rest.strip() != content_digest(body).hex():
        return None
    try:
        return Mark(**json.loads(body))
    except (TypeError, ValueError):  # of another version of the program
        return None

"""Copies of the database: taken while it is written to, checked before they count, and dropped in turn.

A copy is made by VACUUM INTO on a connection that does nothing else: it reads one state of the store, however many
writes go on meanwhile, and what was deleted is not in it. It is written under another name, synced, checked and only
then renamed, so that whatever has a backup's name is a whole one.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from memory_system.errors import StorageFailed, StorageFull
from memory_system.process_figures import disk_free_bytes
from memory_system.settings import Settings

# What is left free on the disk, so that a backup cannot stop what writes there.
SPARE_BYTES: Final = 32 * 1024 * 1024
PARTIAL: Final = ".partial"
_TIME: Final = "%Y%m%dT%H%M%S"
_BUSY_TIMEOUT_MS: Final = 5000
_LOOK_STEPS: Final = 50_000  # of SQLite's machine, between two looks at whether to stop

Stopped = Callable[[], bool]


def never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Contents:
    """What a database holds. `commit_seqs`: number of the last change by namespace; `log_seq`: end of the index log."""

    store_epoch: str
    schema_version: int
    memories: int
    sessions: int
    relationships: int
    context_groups: int
    log_seq: int
    commit_seqs: dict[str, int]

    def covers(self, earlier: Contents) -> bool:
        """Whether every change that `earlier` had is in this."""
        return (
            self.store_epoch == earlier.store_epoch
            and self.log_seq >= earlier.log_seq
            and all(self.commit_seqs.get(name, 0) >= seq for name, seq in earlier.commit_seqs.items())
        )

    def counts(self) -> dict[str, int]:
        return {
            "memories": self.memories,
            "sessions": self.sessions,
            "relationships": self.relationships,
            "context_groups": self.context_groups,
        }


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup in its folder. `taken_at_s`: when it was begun, epoch seconds, as its name says."""

    path: Path
    taken_at_s: float
    size_bytes: int


# -- taking one -------------------------------------------------------------------------------------------------------


def back_up(database: Path, folder: Path, now_s: float, *, stopped: Stopped = never) -> tuple[Backup, Contents]:
    """Copy the store to `folder`, while others write to it; every write committed before the call is in the copy.

    Raises StorageFull without room for it, StorageFailed when the copy is not what it should be or `stopped` says so;
    nothing is left then.
    """
    _make_folder(folder)
    for left in folder.glob(f"{database.stem}-*{PARTIAL}"):
        left.unlink(missing_ok=True)
    target = folder / name_of(database, now_s)
    partial = target.with_name(target.name + PARTIAL)
    try:
        with reading(database, stopped) as db:
            before = contents(db)
            check_room(db, folder)
            write_copy(db, partial)
        found = _checked(partial, before, stopped)
        publish(partial, target)
    except sqlite3.Error as error:
        raise _named(error, folder, stopped()) from error
    except OSError as error:
        raise StorageFailed(f"the backup cannot be written to {folder}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return Backup(target, _instant(target, database.stem) or now_s, target.stat().st_size), found


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFailed(f"the folder {folder} cannot be made: {error.strerror}; set backup.dir") from error


def _checked(copy: Path, before: Contents, stopped: Stopped) -> Contents:
    with reading(copy, stopped) as db:
        check(db, copy)
        found = contents(db)
    if not found.covers(before):
        raise StorageFailed(f"the copy {copy} lacks changes that the store had; it was not kept")
    return found


@contextlib.contextmanager
def reading(
    database: Path, stopped: Stopped = never, *, is_still: bool = False, look_steps: int | None = None
) -> Iterator[sqlite3.Connection]:
    """A connection that can change nothing of the file; what runs on it is broken off once `stopped` says so.
    `is_still`: nobody writes it meanwhile and it has no log, so that nothing need be made beside it either.

    Raises sqlite3.Error for what cannot be opened.
    """
    options = "immutable=1" if is_still else "mode=ro"
    db = sqlite3.connect(f"{database.absolute().as_uri()}?{options}", uri=True, isolation_level=None)
    try:
        db.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
        db.set_progress_handler(stopped, look_steps or _LOOK_STEPS)
        yield db
    finally:
        db.close()


def contents(db: sqlite3.Connection) -> Contents:
    """Raises sqlite3.Error for a database that is no store."""

    def number(sql: str) -> int:
        row = db.execute(sql).fetchone()
        return int(row[0]) if row else 0

    sessions = number("SELECT count(*) FROM sessions")
    return Contents(
        store_epoch=str(db.execute("SELECT value FROM meta WHERE key = 'store_epoch'").fetchone()[0]),
        schema_version=number("PRAGMA user_version"),
        memories=number("SELECT count(*) FROM memories") - sessions,
        sessions=sessions,
        relationships=number("SELECT count(*) FROM relationships"),
        context_groups=number("SELECT count(*) FROM context_groups"),
        log_seq=number("SELECT seq FROM sqlite_sequence WHERE name = 'index_log'"),
        commit_seqs=dict(db.execute("SELECT namespace, commit_seq FROM namespaces").fetchall()),
    )


def check(db: sqlite3.Connection, path: Path, *, with_indexes: bool = False) -> None:
    """Raise StorageFailed unless the pages are sound; `with_indexes`: and each index is that of its table."""
    verdict = db.execute(f"PRAGMA {'integrity' if with_indexes else 'quick'}_check(1)").fetchone()[0]
    if verdict != "ok":
        raise StorageFailed(f"{path} is damaged: {' '.join(verdict.split())}")


def needed_bytes(db: sqlite3.Connection) -> int:
    """About how large a copy will be."""
    pages, unused, size = (
        int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - unused) * size


def check_room(db: sqlite3.Connection, folder: Path) -> None:
    """Raise StorageFull unless a copy fits into the folder's disk, with some room to spare."""
    needed, free = needed_bytes(db) + SPARE_BYTES, disk_free_bytes(folder)
    if free is not None and free < needed:
        raise StorageFull(
            f"there is no room in {folder}: a copy needs {_mib(needed)} with some to spare, {_mib(free)} are free; "
            "make room, or choose a folder on another disk",
            needed_bytes=needed,
            free_bytes=free,
        )


def write_copy(db: sqlite3.Connection, target: Path) -> None:
    """VACUUM INTO a new file that its owner alone can read, and sync it. Raises sqlite3.Error, OSError."""
    target.unlink(missing_ok=True)
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    db.execute("VACUUM INTO ?", (str(target),))
    sync(target)


def publish(partial: Path, target: Path) -> None:
    partial.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _named(error: sqlite3.Error, folder: Path, stopped: bool) -> Exception:
    if stopped:
        return StorageFailed("the backup was broken off")
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return StorageFull(f"the disk of {folder} became full; make room, or choose a folder on another disk")
    return StorageFailed(f"the backup failed: {error}")


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


# -- where they are, and which go -------------------------------------------------------------------------------------


def folder_of(settings: Settings) -> Path:
    """Where the backups of the store go."""
    return Path(settings.backup.dir) if settings.backup.dir else Path(settings.storage.path).parent / "backups"


def name_of(database: Path, taken_at_s: float) -> str:
    """`memory-20260131T120000.250Z.db`: names sort by time, which is UTC."""
    millis = int(taken_at_s * 1000)
    then = datetime.fromtimestamp(millis // 1000, UTC)
    return f"{database.stem}-{then.strftime(_TIME)}.{millis % 1000:03d}Z.db"


def _instant(path: Path, stem: str) -> float | None:
    """The time in a backup's name; None for any other file."""
    match = re.fullmatch(re.escape(stem) + r"-(\d{8}T\d{6})\.(\d{3})Z\.db", path.name)
    if match is None:
        return None
    try:
        then = datetime.strptime(match[1], _TIME).replace(tzinfo=UTC)
    except ValueError:
        return None
    return then.timestamp() + int(match[2]) / 1000.0


def backups(folder: Path, database: Path) -> list[Backup]:
    """The backups of this store in a folder, newest first."""
    found = []
    for path in folder.glob(f"{database.stem}-*.db"):
        taken_at_s = _instant(path, database.stem)
        if taken_at_s is not None:
            with contextlib.suppress(FileNotFoundError):
                found.append(Backup(path, taken_at_s, path.stat().st_size))
    return sorted(found, key=lambda each: each.taken_at_s, reverse=True)


def spent(found: Sequence[Backup], keep: int, keep_days: int, now_s: float) -> list[Backup]:
    """Which of the backups (newest first) are to go: all but the newest `keep`, and the last of each UTC day for
    `keep_days` days, today's included."""
    today, seen = int(now_s // 86_400), set[int]()
    going = []
    for position, each in enumerate(found):
        day = int(each.taken_at_s // 86_400)
        is_last_of_day = day not in seen and day > today - keep_days
        seen.add(day)
        if position >= keep and not is_last_of_day:
            going.append(each)
    return going


def rotate(folder: Path, database: Path, keep: int, keep_days: int, now_s: float) -> list[str]:
    """Remove the backups whose time is over; their names. To be called after a new one stands."""
    going = spent(backups(folder, database), keep, keep_days, now_s)
    for each in going:
        each.path.unlink(missing_ok=True)
    if going:
        sync(folder)
    return [each.path.name for each in going]


def plan(database: Path, folder: Path, keep: int, keep_days: int, now_s: float) -> dict[str, object]:
    """What a backup taken now would need and remove. Raises StorageFull, StorageFailed as `back_up` does."""
    _make_folder(folder)
    try:
        with reading(database) as db:
            check_room(db, folder)
            needed = needed_bytes(db)
    except sqlite3.Error as error:
        raise _named(error, folder, False) from error
    new = Backup(folder / name_of(database, now_s), now_s, needed)
    going = spent([new, *backups(folder, database)], keep, keep_days, now_s)
    return {
        "path": str(new.path),
        "needed_bytes": needed,
        "free_bytes": disk_free_bytes(folder),
        "removed": [each.path.name for each in going],
    }


def size_of(path: Path) -> int:
    """0 for a file that is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return 0

"""Opening the error history, giving it up when it fails, and opening it again. Used by the history's thread alone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from memory_system.errors import CannotStart, MemorySystemError
from memory_system.events import Event, make_event
from memory_system.health.records import HistoryFailed
from memory_system.health.schema import DAMAGE, open_database
from memory_system.health.store import Store
from memory_system.health_settings import ErrorBusSettings
from memory_system.log import get_logger

# What the history says of itself is in `owed`, and thus in the history once it works: a failure that came back to it
# from the log would report itself for ever.
LOGGER: Final = "memory_system.health.history"
log = get_logger(LOGGER)

MANAGER: Final = "health_manager"

_AGAIN_S: Final = 1.0
_MAX_OWED: Final = 16
# A disk may be too full for a large group and have room for a small one, again and again.
_TELL_AGAIN_S: Final = 60.0
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
# After these the connection is not to be trusted: what it believes written may not be.
_SYNC_ERRORS: Final = frozenset({sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC})


class HistoryFile:
    """The file and its lock. A damaged one is kept under another name, and a new one begun.

    `store` is None while the file cannot be opened. `failing` says why the last use of it failed, until something was
    written. `owed` are events about the file itself, which are tried every second until they are written. `previous` is
    what the file had in `meta` when it was first opened.
    """

    def __init__(self, path: Path, settings: ErrorBusSettings, clock: Callable[[], float]) -> None:
        self.path = path
        self.store: Store | None = None
        self.previous: dict[str, str] = {}
        self.owed: list[Event] = []
        self.failing: str | None = None
        self.failures = 0
        self.last_seq = 0
        self.size_bytes = 0
        self._settings = settings
        self._clock = clock
        self._lock_fd: int | None = None
        self._damage: Exception | None = None
        self._first_seq = 0
        self._again_s = 0.0
        self._identity: tuple[int, int] | None = None
        self._told = ""
        self._told_s = 0.0

    def __repr__(self) -> str:
        return f"HistoryFile({self.path.name}, {self.failing or ('open' if self.store else 'closed')})"

    def start(self) -> None:
        """Open the file for the first time; stays without one when there is no room. Raises CannotStart."""
        try:
            self._open()
        except CannotStart:
            self._unlock()
            raise
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise CannotStart(
                    f"the error history {self.path} cannot be written: {error.strerror}; set error_bus.history_path"
                ) from None
            self.failed(error)
        except sqlite3.Error as error:
            self.failed(error)

    def opened(self) -> Store:
        """The open store; while there is none, opening it is tried once a second. Raises HistoryFailed."""
        if self.store is None:
            now_s = time.monotonic()
            if now_s < self._again_s:
                raise HistoryFailed(self.failing or "the history cannot be opened now")
            self._again_s = now_s + _AGAIN_S
            self._open()
        assert self.store is not None
        return self.store

    def wrote(self, owed: list[Event]) -> None:
        """Something was written, and with it `owed`."""
        self.failing = None
        if owed:
            self.owed = [event for event in self.owed if event not in owed]
        self.measure()

    def measure(self) -> None:
        """Note the size of the file, where it tells. What is wrong with it the next use finds out and tells."""
        if self.store is not None:
            with contextlib.suppress(sqlite3.Error):
                self.size_bytes = self.store.size_bytes()

    def failed(self, error: Exception) -> HistoryFailed:
        """Note a failure; the same for whoever waits. A connection that is not to be trusted is given up."""
        if isinstance(error, HistoryFailed):
            return error
        self.failures += 1
        reason = _reason(error)
        code = getattr(error, "sqlite_errorcode", None)
        now_s = time.monotonic()
        if self.failing != reason and (self._told != reason or now_s >= self._told_s + _TELL_AGAIN_S):
            self._told, self._told_s = reason, now_s
            defect = not isinstance(error, sqlite3.Error | OSError | CannotStart)
            log.error("history_failed", error=symbol(error), reason=reason, exc_info=error if defect else None)
            if code not in DAMAGE:  # what becomes of a damaged file is told when it is set aside
                self._owe("history_failed", reason, "error", error=symbol(error))
        self.failing = reason
        if self.store is not None and (code in DAMAGE or code in _SYNC_ERRORS):
            self._damage = error if code in DAMAGE else None
            self.store.close(clean=False)
            self.store = None
            self._again_s = 0.0
        return HistoryFailed(reason)

    def look(self) -> None:
        """Notice that the file was deleted or replaced, and give it up: what is written to it is lost."""
        if self.store is None or _identity(self.path) == self._identity:
            return
        log.critical("history_gone")
        message = (
            "the error history was deleted or replaced while it was in use; a new one has begun, or the other is used"
        )
        self._owe("history_gone", message, "critical", file=self.path.name)
        self._first_seq = max(self._first_seq, self.store.last_seq)
        self.store.close(clean=False)
        self.store = None
        self._again_s = 0.0
        self._unlock()  # the lock may be gone as well

    def close(self) -> None:
        """Note that the end was clean, and let others have the file. May be called at any time."""
        if self.store is not None:
            try:
                self.store.checkpoint()
                self.store.close(clean=True)
            except sqlite3.Error as error:
                log.warning("history_close_failed", error=symbol(error))
            self.store = None
        self._unlock()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_dir():
            raise CannotStart(f"{self.path} is a folder; set error_bus.history_path to a file")
        self._take_lock()
        if self._damage is not None:
            self._set_aside(self._damage)
        try:
            self.store = self._open_store()
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) not in DAMAGE:
                raise
            self._set_aside(error)
            self.store = self._open_store()
        self._identity = _identity(self.path)
        self.previous = self.previous or self.store.meta()
        self.last_seq = self.store.last_seq
        self.measure()
        self.store.say_open()

    def _open_store(self) -> Store:
        return Store(open_database(self.path, self._settings, first_seq=self._first_seq), self._settings)

    def _set_aside(self, error: Exception) -> None:
        """Keep a damaged file under another name. Rows go on above all that were ever numbered, so that readers need
        not know of it."""
        now_s = self._clock()
        moment = datetime.fromtimestamp(now_s, UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        kept = f"{self.path.name}.corrupt-{moment}"
        for suffix in ("", "-wal", "-shm"):
            part = self.path.with_name(self.path.name + suffix)
            if part.exists():
                part.rename(self.path.with_name(kept + suffix))
        self._damage = None
        self._first_seq = max(self.last_seq, int(now_s * 1000))
        log.critical("history_corrupt", error=symbol(error), kept=kept)
        message = f"the error history was damaged; it is kept as {kept}, and a new one has begun"
        self._owe("history_corrupt", message, "critical", file=kept, error=symbol(error))

    def _owe(self, error_type: str, message: str, severity: str, **details: str) -> None:
        if len(self.owed) < _MAX_OWED:
            event = make_event(MANAGER, error_type, message, severity, details=details, now_s=self._clock())
            self.owed = [*self.owed, event]

    def _take_lock(self) -> None:
        """The kernel drops the lock with the process, however that ends."""
        if self._lock_fd is not None:
            return
        path = self.path.with_name(self.path.name + ".lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise CannotStart(
                f"the error history {self.path} is in use by another health manager; "
                "stop it, or set error_bus.history_path to another file"
            ) from None
        self._lock_fd = fd

    def _unlock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file has this name; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def symbol(error: Exception) -> str:
    """A name without content: SQLite's symbolic code, else the exception's class."""
    return getattr(error, "sqlite_errorname", None) or type(error).__name__


def _reason(error: Exception) -> str:
    if isinstance(error, MemorySystemError):
        return error.message
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return "the disk is full"
    if isinstance(error, OSError):
        return f"the error history cannot be used: {error.strerror}"
    return f"the error history cannot be used: {symbol(error)}"

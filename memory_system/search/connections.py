"""Query-only connections for the search threads: one each while it searches, and none for ever."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Final

# Steps of SQLite's machine between two looks at the clock: some tenths of a millisecond.
_STEPS: Final = 10_000


class Connections:
    """Hands out connections that give up after `query_s`, or once `closing` is set."""

    def __init__(self, connect: Callable[[], sqlite3.Connection], query_s: float) -> None:
        self._connect = connect
        self._query_s = query_s
        self._idle: list[sqlite3.Connection] = []  # taken and given back by threads: each step of a list is one
        self.closing = False

    @contextlib.contextmanager
    def one(self) -> Iterator[sqlite3.Connection]:
        """A connection of one's own. A query that is given up raises sqlite3.OperationalError (SQLITE_INTERRUPT)."""
        try:
            conn = self._idle.pop()
        except IndexError:
            conn = self._connect()
        ends_s = time.monotonic() + self._query_s
        conn.set_progress_handler(lambda: self.closing or time.monotonic() > ends_s, _STEPS)
        try:
            yield conn
        except sqlite3.Error:
            conn.close()  # whatever state it is in, the next search gets a fresh one
            raise
        except BaseException:
            self._idle.append(conn)
            raise
        self._idle.append(conn)

    def warm(self, count: int) -> None:
        """Open so many, with their files: later there may be no file left to open them with."""
        for _ in range(count):
            conn = self._connect()
            conn.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            self._idle.append(conn)

    def close(self) -> None:
        """Close those that are idle; to be called when no search runs any more."""
        while self._idle:
            self._idle.pop().close()

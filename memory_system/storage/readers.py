"""A small pool of query-only aiosqlite connections: one query at a time on each, and none for ever."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiosqlite

from memory_system.errors import DeadlineExceeded, ShuttingDown, StorageFailed
from memory_system.storage.database import connect_reader
from memory_system.turns import Turns


class _Reader:
    """An aiosqlite connection and the connection inside, which another thread may interrupt."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inside: sqlite3.Connection | None = None
        self.connection = aiosqlite.Connection(self._connect, iter_chunk_size=256)

    def _connect(self) -> sqlite3.Connection:
        self._inside = connect_reader(self._path)
        # SQLite opens the log with the first query: later there may be no file left to open it with.
        self._inside.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        return self._inside

    def interrupt(self) -> None:
        if self._inside is not None:
            with contextlib.suppress(sqlite3.ProgrammingError):  # closed meanwhile
                self._inside.interrupt()


class Readers:
    """`fetch` runs one SELECT to its end on a free connection, for at most `query_s`; clients take turns."""

    def __init__(self, path: Path, count: int, query_s: float = 5.0) -> None:
        self._path = path
        self._count = count
        self._query_s = query_s
        self._all: list[_Reader] = []
        self._free: list[_Reader] = []
        self._turns = Turns(count)
        self._closed = False

    def __repr__(self) -> str:
        return f"Readers({len(self._free)} of {len(self._all)} free)"

    async def start(self) -> None:
        for _ in range(self._count):
            reader = _Reader(self._path)
            await reader.connection
            self._all.append(reader)
            self._free.append(reader)

    async def fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of one query.

        Raises DeadlineExceeded when it takes too long, ShuttingDown once closed, StorageFailed when the database cannot
        be read.
        """
        async with self._turns:
            if self._closed:
                raise ShuttingDown("the service is stopping; try again in a moment", retry_after_ms=500)
            reader = self._free.pop()
            try:
                return await self._run(reader, sql, parameters)
            finally:
                self._free.append(reader)

    async def _run(self, reader: _Reader, sql: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        alarm = asyncio.get_running_loop().call_later(self._query_s, reader.interrupt)
        try:
            return list(await reader.connection.execute_fetchall(sql, parameters))  # type: ignore[arg-type]
        except sqlite3.Error as error:
            if self._closed:
                raise ShuttingDown("the service is stopping; try again in a moment", retry_after_ms=500) from None
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
                raise too_slow(self._query_s) from None
            raise StorageFailed(f"the database cannot be read: {error}") from error
        finally:
            alarm.cancel()

    async def close(self) -> None:
        """Interrupt what runs and close the connections."""
        self._closed = True
        for reader in self._all:
            reader.interrupt()
        while self._all:
            await self._all.pop().connection.close()


def too_slow(limit_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the query took longer than {limit_s:g} s (limits.query_s) and was given up; make the filter simpler"
    )

"""The integrity check: in a thread of its own, on a connection that holds up nobody's writes."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

from memory_system.errors import ShuttingDown, StorageFailed, StorageFull
from memory_system.log import get_logger
from memory_system.search import feed
from memory_system.search.index import SearchIndex
from memory_system.service import Reply
from memory_system.service.run import Run
from memory_system.storage import integrity
from memory_system.storage.integrity import Problem

log = get_logger("service.checking")

# A damaged store may have a problem in every row; beyond this nothing more is learnt.
_ENOUGH: Final = 100_000
_DAMAGE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR})

Check = Callable[[], Iterator[Problem]]


class Checking:
    """The work of the job integrity_check. `share`: the part of the time that it goes through rows in Python."""

    def __init__(self, path: Path, index: SearchIndex, share: float) -> None:
        self._path = path
        self._index = index
        self._share = share

    async def check(self, full: bool, limit: int, run: Run) -> Reply:
        """Check everything; the reply has `ok` and the first `limit` problems.

        Raises StorageFailed, StorageFull when a check cannot be made.
        """
        stop = threading.Event()
        try:
            found = await asyncio.to_thread(self._find, full, run, stop)
        finally:
            stop.set()  # a run that is stopped leaves no thread behind
        by_check = Counter(problem.check for problem in found)
        _tell(found, by_check, run.run_id)
        run.counts.update({f"problems_{check}": count for check, count in by_check.items()})
        run.counts["problems"] = len(found)
        return {"ok": not found, "problems": [_shown(problem) for problem in found[:limit]]}

    def _find(self, full: bool, run: Run, stop: threading.Event) -> list[Problem]:
        """What is wrong; called in a thread."""
        try:
            db = integrity.connect(self._path, stop.is_set)
        except sqlite3.Error as error:
            raise StorageFailed(f"the database cannot be read: {error}") from error
        found: list[Problem] = []
        try:
            for check in self._checks(db, full, run, stop):
                found += _findings(check, _ENOUGH - len(found))
        finally:
            db.close()
        return found

    def _checks(self, db: sqlite3.Connection, full: bool, run: Run, stop: threading.Event) -> Iterator[Check]:
        """The checks, one after the other; each is made when the one before is through."""
        tables = integrity.tables(db)
        for number, table in enumerate(tables):
            run.progress("tables", number, len(tables))
            yield partial(integrity.pages, db, table)
            yield partial(integrity.foreign_keys, db, table)
        run.counts["tables"] = len(tables)
        if full:
            run.progress("indexes", 0)
            yield partial(integrity.pages, db, None)
        yield partial(integrity.texts, db, _Pace(run, "texts", self._share, stop).slice)
        yield partial(integrity.vectors, db, _Pace(run, "vectors", self._share, stop).slice)
        yield partial(_count_stale, db, run)
        yield partial(self._words, db, _Pace(run, "words", self._share, stop).slice)

    def _words(self, db: sqlite3.Connection, on_slice: integrity.Progress) -> Iterator[Problem]:
        """The index of words against the texts."""
        for found in integrity.searchable(db):
            with feed.snapshot(db):
                texts = feed.read_texts(db, [row_id for row_id, _, _ in found])
                wrong = set(self._index.wrong_words(db, texts))
            for row_id, namespace, memory_id in found:
                if row_id in wrong:
                    what = "it is not found by the words of its text; reindex makes the index of words anew"
                    yield Problem("full_text", what, row_id, namespace, memory_id)
            on_slice(len(found))


class _Pace:
    """Counts the rows of one part, and rests after each slice, as Python's lock is the event loop's too."""

    def __init__(self, run: Run, part: str, share: float, stop: threading.Event) -> None:
        self._run = run
        self._part = part
        self._rest = 1.0 / share - 1.0
        self._stop = stop
        self._began_s = time.monotonic()
        run.counts[part] = 0

    def slice(self, rows: int) -> None:
        self._run.counts[self._part] += rows
        self._run.progress(self._part, self._run.counts[self._part])
        if self._stop.wait((time.monotonic() - self._began_s) * self._rest):
            raise ShuttingDown("the check was stopped")
        self._began_s = time.monotonic()


def _findings(check: Check, limit: int) -> list[Problem]:
    """What one check finds. One that the damage itself breaks off is a finding too."""
    found: list[Problem] = []
    try:
        for problem in check():
            if len(found) >= limit:
                break
            found.append(problem)
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise StorageFull("no room for the check's temporary files; nothing was changed") from error
        if code not in _DAMAGE:
            raise StorageFailed(f"the check could not be made: {error}") from error
        found.append(Problem("pages", f"a check was broken off: {error}"))
    return found


def _count_stale(db: sqlite3.Connection, run: Run) -> Iterator[Problem]:
    run.counts["stale_vectors"] = integrity.count_stale_vectors(db)
    yield from ()


def _tell(found: list[Problem], by_check: Counter[str], run_id: int) -> None:
    """One line for each kind of problem, which the error bus gets too."""
    for check, count in by_check.items():
        first = next(problem for problem in found if problem.check == check)
        where = {"row_id": first.row_id, "run_id": run_id}
        log.error("integrity_problem", check=check, problems=count, reason=first.what, **where)


def _shown(problem: Problem) -> dict[str, Any]:
    return {name: value for name, value in asdict(problem).items() if value is not None}

"""Checking that the store is what it should be, on a connection that takes no lock a writer would wait for.

Pages and indexes by SQLite's own checks, foreign keys, texts and vectors against their digests. Each function yields
what is wrong, and no content. The index of words is compared with the texts by whoever has it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from memory_system.digest import content_digest

_ROWS: Final = 200
_LENGTH_TOLERANCE: Final = 1e-3
_STEPS: Final = 10_000  # of SQLite's machine between two looks at whether to stop

Progress = Callable[[int], None]
"""Hears how many rows have been looked at, after each slice."""
Searchable = tuple[int, str, str]
"""row_id, namespace, memory_id"""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong: found by which check, in which row where it is known."""

    check: str
    what: str
    row_id: int | None = None
    namespace: str | None = None
    memory_id: str | None = None


def connect(path: Path, is_stopped: Callable[[], bool]) -> sqlite3.Connection:
    """A connection that cannot write the store, but may have temporary tables; its queries end when `is_stopped`."""
    db = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False)
    db.set_progress_handler(is_stopped, _STEPS)
    return db


def tables(db: sqlite3.Connection) -> list[str]:
    """Those that have pages of their own."""
    found = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage > 0 ORDER BY name")
    return [name for (name,) in found]


def pages(db: sqlite3.Connection, table: str | None) -> Iterator[Problem]:
    """The pages of one table, without its indexes; None: the whole file with all indexes, in one long read."""
    sql = "PRAGMA integrity_check" if table is None else f"PRAGMA quick_check({_quoted(table)})"
    for (what,) in db.execute(sql):
        if what != "ok":
            yield Problem("pages", what)


def foreign_keys(db: sqlite3.Connection, table: str) -> Iterator[Problem]:
    """Rows that refer to none."""
    for name, row_id, parent, _ in db.execute(f"PRAGMA foreign_key_check({_quoted(table)})"):
        yield Problem("foreign_keys", f"a row of {name} refers to one of {parent} that is not there", row_id)


def texts(db: sqlite3.Connection, on_slice: Progress) -> Iterator[Problem]:
    """Every text against its digest, and what is kept as JSON."""
    sql = (
        "SELECT row_id, namespace, memory_id, content, content_digest, json_valid(metadata) AND json_valid(tags) "
        "FROM memories WHERE row_id > ? ORDER BY row_id LIMIT ?"
    )
    row_id = 0
    while found := db.execute(sql, (row_id, _ROWS)).fetchall():
        for row_id, namespace, memory_id, content, digest, is_json in found:
            if content_digest(content) != digest:
                yield Problem("content_digest", "the text is not that of its digest", row_id, namespace, memory_id)
            if not is_json:
                yield Problem("json", "metadata or tags are no JSON", row_id, namespace, memory_id)
        on_slice(len(found))


def vectors(db: sqlite3.Connection, on_slice: Progress) -> Iterator[Problem]:
    """Every vector: of the length of its model's others, of unit length, finite.

    One of another text than the memory's is no damage: it is never used, and replaced when its turn comes.
    """
    sql = (
        "SELECT e.row_id, m.namespace, m.memory_id, e.model_id, e.vector FROM embeddings AS e "
        "JOIN memories AS m ON m.row_id = e.row_id WHERE e.row_id > ? ORDER BY e.row_id LIMIT ?"
    )
    sizes: dict[str, int] = {}
    row_id = 0
    while found := db.execute(sql, (row_id, _ROWS)).fetchall():
        for row_id, namespace, memory_id, model_id, vector in found:
            what = _wrong_with(vector, sizes.setdefault(model_id, len(vector)))
            if what is not None:
                yield Problem("vector", what, row_id, namespace, memory_id)
        on_slice(len(found))


def count_stale_vectors(db: sqlite3.Connection) -> int:
    """Vectors of a text that the memory has no more."""
    joined = "embeddings AS e JOIN memories AS m ON m.row_id = e.row_id"
    return int(db.execute(f"SELECT count(*) FROM {joined} WHERE e.digest <> m.content_digest").fetchone()[0])


def searchable(db: sqlite3.Connection) -> Iterator[list[Searchable]]:
    """Every memory that is to be found by its words, in slices."""
    sql = (
        "SELECT row_id, namespace, memory_id FROM memories"
        " WHERE row_id > ? AND memory_type <> 'session' ORDER BY row_id LIMIT ?"
    )
    row_id = 0
    while found := db.execute(sql, (row_id, _ROWS)).fetchall():
        row_id = found[-1][0]
        yield found


def _wrong_with(vector: bytes, size: int) -> str | None:
    if len(vector) != size or size % 4 or not size:
        return f"the vector has {len(vector)} bytes, others of its model have {size}"
    length = float(np.linalg.norm(np.frombuffer(vector, "<f4").astype(np.float64)))
    return None if abs(length - 1.0) <= _LENGTH_TOLERANCE else f"the vector has length {length:.3g}, not 1"


def _quoted(name: str) -> str:
    return "'" + name.replace("'", "''") + "'"

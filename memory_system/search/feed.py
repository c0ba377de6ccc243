"""What the index reads from the database: rows with their valid vectors, and the log of changes."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from memory_system.search.rows import CODED, Embedded, Row, Rows

LOAD_BATCH: Final = 2000
# Vectors that SQLite puts together in one step: not more than stay in the processor's cache.
_VECTORS_BATCH: Final = 512
# SQLite's limit on bound parameters is far higher; this keeps one slice of work short.
LOG_BATCH: Final = 256

Entry = tuple[Row, bytes | None]
"""A row and its vector (float32, little-endian), None when it has none for its present content and the model."""

Text = tuple[int, bytes, str]
"""row_id, content digest, content"""


@contextmanager
def snapshot(conn: sqlite3.Connection) -> Iterator[int]:
    """One read transaction: all statements inside see the same state, whose `last_seq` it gives."""
    conn.execute("BEGIN")
    try:
        yield last_seq(conn)  # the state is fixed by the first read
    finally:
        conn.rollback()


def store_epoch(conn: sqlite3.Connection) -> str:
    row = conn.execute("SELECT value FROM meta WHERE key = 'store_epoch'").fetchone()
    return row[0] if row else ""


def last_seq(conn: sqlite3.Connection) -> int:
    """The last seq ever given out, whether or not its log row has been pruned."""
    row = conn.execute("SELECT seq FROM sqlite_sequence WHERE name = 'index_log'").fetchone()
    return row[0] if row else 0


def written_with(conn: sqlite3.Connection) -> tuple[str, int] | None:
    """The model that made the vector of the newest row that has one, and its dimension."""
    sql = "SELECT model_id, length(vector) / 4 FROM embeddings ORDER BY row_id DESC LIMIT 1"
    row: tuple[str, int] | None = conn.execute(sql).fetchone()
    return row if row is not None and row[1] > 0 else None


def read_log(conn: sqlite3.Connection, after_seq: int) -> list[tuple[int, int, str]]:
    """Up to LOG_BATCH changes (seq, row_id, op) after a seq, oldest first."""
    sql = "SELECT seq, row_id, op FROM index_log WHERE seq > ? ORDER BY seq LIMIT ?"
    return conn.execute(sql, (after_seq, LOG_BATCH)).fetchall()


_MERGED_INTO: Final = (
    "CASE WHEN m.state = 'archived' THEN (SELECT max(c.row_id) FROM consolidation_members AS c"
    " WHERE c.member_row_id = m.row_id) END"
)


def _select(with_metadata: bool) -> str:
    return (
        "SELECT m.row_id, m.namespace, m.memory_type, m.memory_tier, m.state, m.expires_at, m.parent_id, m.session_id,"
        f" m.user_id, m.content_digest, {'m.metadata' if with_metadata else 'NULL'}, m.occurred_at, m.created_at,"
        f" {_MERGED_INTO},"
        " CASE WHEN e.digest = m.content_digest AND e.model_id = ? THEN e.vector END"
        " FROM memories AS m LEFT JOIN embeddings AS e ON e.row_id = m.row_id WHERE m.memory_type <> 'session'"
    )


def read_all(conn: sqlite3.Connection, with_metadata: bool) -> Iterator[Rows]:
    """Every row that can be searched, in batches, in the order of row ids."""
    coded = ", ".join(f"m.{name}" for name in CODED)
    sql = (
        f"SELECT m.row_id, json_array({coded}), m.expires_at, m.content_digest, m.occurred_at, m.created_at,"
        f" {_MERGED_INTO}, {'m.metadata' if with_metadata else 'NULL'}"
        " FROM memories AS m WHERE m.memory_type <> 'session' ORDER BY m.row_id"
    )
    cursor = conn.execute(sql)
    while batch := cursor.fetchmany(LOAD_BATCH):
        columns: list[Any] = list(zip(*batch, strict=True))
        columns[-1] = [None if text is None else json.loads(text) for text in columns[-1]]
        yield Rows(*columns)


def read_vectors(conn: sqlite3.Connection, model_id: str, dimension: int) -> Iterator[Embedded]:
    """Every vector of the model and this length, in batches, in the order of row ids, whether or not it is of its row's
    present content.

    SQLite puts a batch together in one step, during which it needs no interpreter: row by row, this thread and another
    would wait for each other a hundred thousand times.
    """
    after = 0
    wanted = (model_id, 4 * dimension)
    while batch := _read_vectors(conn, after, *wanted):
        row_ids, digests, vectors = batch
        found = Embedded(
            np.array(json.loads(row_ids), np.int64),
            np.frombuffer(digests, "V16"),
            np.frombuffer(vectors, "<f4").reshape(-1, dimension),
        )
        if not len(found.row_ids) == len(found.digests) == len(found.vectors):
            raise ValueError("SQLite has not put the vectors together as they are")
        yield found
        after = int(found.row_ids[-1])


def _read_vectors(conn: sqlite3.Connection, after: int, model_id: str, size: int) -> tuple[str, bytes, bytes] | None:
    # Texts in UTF-8, as which group_concat takes blobs, keep their bytes.
    sql = (
        "SELECT json_group_array(row_id), CAST(group_concat(digest, '') AS BLOB),"
        " CAST(group_concat(vector, '') AS BLOB)"
        " FROM (SELECT row_id, digest, vector FROM embeddings WHERE row_id > ? AND model_id = ?"
        " AND length(vector) = ? AND length(digest) = 16 ORDER BY row_id LIMIT ?)"
    )
    row: tuple[str, bytes, bytes] = conn.execute(sql, (after, model_id, size, _VECTORS_BATCH)).fetchone()
    return row if row[1] is not None else None


def read_rows(
    conn: sqlite3.Connection, row_ids: Sequence[int], model_id: str | None, with_metadata: bool
) -> dict[int, Entry]:
    """Those of the rows that exist and can be searched."""
    marks = ", ".join("?" * len(row_ids))
    rows = conn.execute(f"{_select(with_metadata)} AND m.row_id IN ({marks})", (model_id, *row_ids))
    return {row[0]: _entry(row) for row in rows}


def read_texts(conn: sqlite3.Connection, row_ids: Sequence[int]) -> list[Text]:
    """The texts of those of the rows that exist and can be searched."""
    marks = ", ".join("?" * len(row_ids))
    sql = f"SELECT row_id, content_digest, content FROM memories WHERE row_id IN ({marks}) AND memory_type <> 'session'"
    return conn.execute(sql, list(row_ids)).fetchall()


def read_newest(conn: sqlite3.Connection, namespace: str, limit: int) -> list[int]:
    """The newest rows of a namespace that can be searched."""
    sql = (
        "SELECT row_id FROM memories WHERE namespace = ? AND memory_type <> 'session' ORDER BY created_at DESC LIMIT ?"
    )
    return [row_id for (row_id,) in conn.execute(sql, (namespace, limit))]


def count_pending(conn: sqlite3.Connection, namespace: str, model_id: str | None) -> int:
    """How many rows of a namespace have no valid vector, where the index cannot tell."""
    sql = (
        "SELECT count(*) FROM memories AS m LEFT JOIN embeddings AS e ON e.row_id = m.row_id AND e.model_id = ?"
        " AND e.digest = m.content_digest"
        " WHERE m.namespace = ? AND m.memory_type <> 'session' AND e.row_id IS NULL"
    )
    (count,) = conn.execute(sql, (model_id, namespace)).fetchone()
    return int(count)


def _entry(row: tuple[Any, ...]) -> Entry:
    *fields, metadata, occurred_at, created_at, merged_into, vector = row
    fields += [None if metadata is None else json.loads(metadata), occurred_at, created_at, merged_into]
    return Row(*fields), vector

"""A database built straight from schema.sql, written to as the store's writer would, for tests of the search side."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memory_system.search.rows import CODED, Row, Rows

SCHEMA = Path(__file__).parents[2] / "schema.sql"
NOW_S = 1_700_000_000.0
MODEL = "model-a"
DIMENSION = 16


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def unit_vectors(count: int, dimension: int = DIMENSION, seed: int = 1) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rows_of(rows: Sequence[Row]) -> Rows:
    """Many rows, as a load takes them in."""
    coded = [json.dumps([getattr(row, name) for name in CODED]) for row in rows]
    names = (field.name for field in dataclasses.fields(Rows) if field.name != "coded")
    return Rows(coded=coded, **{name: [getattr(row, name) for row in rows] for name in names})


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        time.sleep(0.005)


class SearchStore:
    """Direct writes, each in a transaction with its log row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        fresh = not path.exists()
        self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = OFF")
        self.db.execute("PRAGMA foreign_keys = ON")
        if fresh:
            self.db.executescript(SCHEMA.read_text())
            self.db.execute("INSERT INTO meta VALUES ('store_epoch', 'epoch-1')")

    def close(self) -> None:
        self.db.close()

    def connect(self) -> sqlite3.Connection:
        from memory_system.storage.database import connect_reader

        return connect_reader(self.path)

    def log(self, row_id: int, op: str) -> None:
        self.db.execute("INSERT INTO index_log (row_id, op) VALUES (?, ?)", (row_id, op))

    def add(self, content: str, vector: np.ndarray | None = None, *, model: str = MODEL, **fields: Any) -> int:
        values: dict[str, Any] = {
            "namespace": "default", "content": content, "content_digest": digest(content), "memory_type": "general",
            "memory_tier": "short", "importance": 0.5, "importance_at": NOW_S, "created_at": NOW_S,
            "updated_at": NOW_S, "tier_since": NOW_S, "created_by": "agent", "metadata": {}, "tags": [],
        } | fields  # fmt: skip
        (next_id,) = self.db.execute("SELECT coalesce(max(row_id), 0) + 1 FROM memories").fetchone()
        values.setdefault("memory_id", f"mem-{next_id}-{time.monotonic_ns()}")
        values["metadata"], values["tags"] = json.dumps(values["metadata"]), json.dumps(values["tags"])
        marks = ", ".join("?" * len(values))
        cursor = self.db.execute(f"INSERT INTO memories ({', '.join(values)}) VALUES ({marks})", [*values.values()])
        row_id = cursor.lastrowid
        assert row_id is not None
        self.log(row_id, "put")
        if vector is not None:
            self.embed(row_id, vector, model=model)
        return row_id

    def add_many(self, contents: list[str], vectors: np.ndarray, **fields: Any) -> list[int]:
        self.db.execute("BEGIN")
        rows = [self.add(text, vector, **fields) for text, vector in zip(contents, vectors, strict=True)]
        self.db.execute("COMMIT")
        return rows

    def embed(self, row_id: int, vector: np.ndarray, *, model: str = MODEL, of: bytes | None = None) -> None:
        (current,) = self.db.execute("SELECT content_digest FROM memories WHERE row_id = ?", (row_id,)).fetchone()
        self.db.execute(
            "INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?, ?)",
            (row_id, model, of or current, vector.astype("<f4").tobytes()),
        )
        self.log(row_id, "vector")

    def update(self, row_id: int, **fields: Any) -> None:
        if "content" in fields:
            fields["content_digest"] = digest(fields["content"])
        sets = ", ".join(f"{name} = ?" for name in fields)
        self.db.execute("BEGIN")
        self.db.execute(f"UPDATE memories SET {sets} WHERE row_id = ?", [*fields.values(), row_id])
        self.log(row_id, "put")
        self.db.execute("COMMIT")

    def delete(self, row_id: int) -> None:
        self.db.execute("BEGIN")
        self.db.execute("DELETE FROM memories WHERE row_id = ?", (row_id,))
        self.log(row_id, "delete")
        self.db.execute("COMMIT")

    def last_seq(self) -> int:
        (seq,) = self.db.execute("SELECT coalesce(max(seq), 0) FROM index_log").fetchone()
        return int(seq)


def open_store(path: Path) -> Iterator[SearchStore]:
    store = SearchStore(path)
    try:
        yield store
    finally:
        store.close()

"""LanceDB, embedded: a table of texts and vectors, compared with all that pass the filter (it has no index here)."""

from __future__ import annotations

import os
from typing import Any

import lancedb
import pyarrow as pa
from sentence_transformers import SentenceTransformer

DIMENSION = 384
SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in ("key", "text", "user", "session")]
    + [pa.field("occurred_at", pa.float64()), pa.field("vector", pa.list_(pa.float32(), DIMENSION))]
)


FACTS = {
    "durable": "a new version of the table for each add, in files that are written without a sync",
    "embeds": "before the acknowledgement, by the caller (sentence-transformers)",
    "clients": "threads of the process that has the store; no wire",
}


class Store:
    def __init__(self, folder: str, model: str) -> None:
        self._model = SentenceTransformer(model)
        self._table = lancedb.connect(folder).create_table("turns", schema=SCHEMA)

    def add(self, item: dict[str, Any]) -> None:
        self.add_many([item])

    def add_many(self, items: list[dict[str, Any]]) -> None:
        vectors = self._model.encode([item["text"] for item in items], normalize_embeddings=True)
        self._table.add([{**item, "vector": vector} for item, vector in zip(items, vectors, strict=True)])

    def settle(self) -> None:
        """Nothing is left to do after an add."""

    def search(self, question: str, user: str, k: int) -> list[str]:
        vector = self._model.encode(question, normalize_embeddings=True)
        quoted = user.replace("'", "''")
        found = self._table.search(vector).metric("cosine").where(f"user = '{quoted}'").select(["key"]).limit(k)
        return [row["key"] for row in found.to_list()]

    def pids(self) -> list[int]:
        return [os.getpid()]

    def close(self) -> None:
        """Nothing is kept open."""

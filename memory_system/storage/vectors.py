"""Storing vectors and the upkeep of the index log."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memory_system.storage import rows
from memory_system.storage.context import Reply, WriteContext


def store(context: WriteContext, model_id: str, vectors: list[tuple[int, bytes, NDArray[np.float32]]]) -> Reply:
    """Keep the vectors of texts that are still what was embedded: (row_id, content digest, vector)."""
    stored = 0
    for row_id, digest, vector in vectors:
        cursor = context.db.execute(
            "INSERT OR REPLACE INTO embeddings (row_id, model_id, digest, vector) "
            "SELECT row_id, ?, content_digest, ? FROM memories WHERE row_id = ? AND content_digest = ?",
            (model_id, vector.astype("<f4").tobytes(), row_id, digest),
        )
        if cursor.rowcount == 1:
            context.log_change(row_id, "vector")
            stored += 1
    return {"stored": stored}


def as_json(row_ids: Sequence[int]) -> str:
    """The one parameter of LOAD_TEXTS."""
    return rows.to_json(list(row_ids))


# row_id, content, content digest of those that are still there.
LOAD_TEXTS = (
    "SELECT row_id, content, content_digest FROM memories WHERE row_id IN (SELECT value FROM json_each(?)) "
    "AND memory_type <> 'session'"
)


def prune_log(context: WriteContext, up_to_seq: int, limit: int = 1000) -> Reply:
    """Drop the oldest entries that every index has applied; the newest entry stays, as the log's mark."""
    cursor = context.db.execute(
        "DELETE FROM index_log WHERE seq IN (SELECT seq FROM index_log WHERE seq <= ? "
        "AND seq < (SELECT max(seq) FROM index_log) ORDER BY seq LIMIT ?)",
        (up_to_seq, limit),
    )
    return {"pruned": cursor.rowcount}

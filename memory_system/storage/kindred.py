"""Finding the memories that a fading one may be merged with. Every query names the namespace and reads by an index."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memory_system.consolidation.rules import CONSOLIDATED, INTO
from memory_system.lifecycle import SESSION_TYPE
from memory_system.models import Memory
from memory_system.storage import rows
from memory_system.storage.consolidations import not_consolidated
from memory_system.storage.readers import Readers

Vectors = NDArray[np.float32]
Made = tuple[float, int]  # created_at, row_id

_M: Final = rows.columns("m")
# What can be merged at all; whether it fades is for consolidation/rules.py.
_POSSIBLE: Final = (
    f"m.state = 'active' AND m.expires_at IS NULL AND m.memory_type <> '{CONSOLIDATED}' "
    "AND NOT EXISTS (SELECT 1 FROM consolidations_undone u WHERE u.row_id = m.row_id) "
    "AND NOT EXISTS (SELECT 1 FROM consolidations c WHERE c.row_id = m.row_id)"  # whatever type it was given since
)
_BY_ROW_ID: Final = (
    f"SELECT {_M} FROM json_each(?) AS wanted CROSS JOIN memories AS m ON m.row_id = wanted.value WHERE {_POSSIBLE}"
)
_OF_PARENT: Final = (
    f"SELECT {_POSSIBLE}, {_M} FROM memories AS m INDEXED BY memories_by_parent WHERE m.namespace = ? "
    f"AND m.parent_id = ? AND m.memory_type NOT IN ('{SESSION_TYPE}', '{CONSOLIDATED}') "
)
_FROM: Final = (
    f"{_OF_PARENT} AND (m.created_at, m.row_id) >= (?, ?) AND m.created_at <= ? ORDER BY m.created_at, m.row_id LIMIT ?"
)
_BEFORE: Final = (
    f"{_OF_PARENT} AND (m.created_at, m.row_id) < (?, ?) AND m.created_at >= ? "
    "ORDER BY m.created_at DESC, m.row_id DESC LIMIT ?"
)
_BEFORE_SHARE: Final = 8
_RELATED: Final = (
    f"SELECT wanted.value, {_M} FROM json_each(?) AS wanted CROSS JOIN "
    "(SELECT source_row_id AS one, target_row_id AS other, relationship_type AS kind FROM relationships UNION ALL "
    "SELECT target_row_id, source_row_id, relationship_type FROM relationships) AS r ON r.one = wanted.value "
    "CROSS JOIN memories AS m ON m.row_id = r.other "
    f"WHERE r.kind <> '{INTO}' AND m.namespace = ? AND {_POSSIBLE} ORDER BY wanted.value, m.row_id LIMIT ?"
)
_VECTORS: Final = (
    "SELECT e.row_id, e.vector FROM json_each(?) AS wanted CROSS JOIN embeddings AS e ON e.row_id = wanted.value "
    "CROSS JOIN memories AS m ON m.row_id = e.row_id WHERE e.model_id = ? AND e.digest = m.content_digest"
)
_ORIGINALS: Final = (
    "SELECT m.memory_id FROM memories AS c JOIN consolidations AS k ON k.row_id = c.row_id "
    "JOIN consolidation_members AS cm ON cm.row_id = c.row_id JOIN memories AS m ON m.row_id = cm.member_row_id "
    "WHERE c.namespace = ? AND c.memory_id = ? AND m.state = 'archived' AND NOT EXISTS (SELECT 1 FROM "
    "consolidation_members AS o WHERE o.member_row_id = cm.member_row_id AND o.row_id <> cm.row_id) ORDER BY m.row_id"
)
_IS_MERGED: Final = (
    "SELECT k.row_id IS NOT NULL FROM memories AS m LEFT JOIN consolidations AS k ON k.row_id = m.row_id "
    "WHERE m.namespace = ? AND m.memory_id = ?"
)


async def possible(readers: Readers, row_ids: Collection[int]) -> list[Memory]:
    """Those of the rows that can be merged: active, without an end of their own, not brought back by an undo."""
    found = await readers.fetch(_BY_ROW_ID, (rows.to_json(sorted(row_ids)),))
    return [rows.memory_from_row(row) for row in found]


async def siblings(
    readers: Readers, namespace: str, parent_id: str, first: Made, created_s: tuple[float, float], limit: int
) -> list[tuple[Memory, bool]]:
    """The children of a parent that were created between two instants, in order, archived ones too: whether each can be
    merged. At most `limit` from `first` on, and an eighth of that before it: those nearest to it.

    Sessions and consolidated memories are left out.
    """
    place = (namespace, parent_id, *first)
    before = await readers.fetch(_BEFORE, (*place, created_s[0], limit // _BEFORE_SHARE))
    found = await readers.fetch(_FROM, (*place, created_s[1], limit))
    return [(rows.memory_from_row(row[1:]), bool(row[0])) for row in (*reversed(before), *found)]


async def related(readers: Readers, namespace: str, row_ids: Collection[int], limit: int) -> dict[int, list[Memory]]:
    """For each row, the memories that a relationship ties it to and that can be merged; at most `limit` in all."""
    found: dict[int, dict[int, Memory]] = {}
    for row in await readers.fetch(_RELATED, (rows.to_json(sorted(row_ids)), namespace, limit)):
        memory = rows.memory_from_row(row[1:])
        found.setdefault(row[0], {})[memory.row_id] = memory
    return {row_id: list(memories.values()) for row_id, memories in found.items()}


async def vectors(readers: Readers, model_id: str, row_ids: Sequence[int]) -> dict[int, Vectors]:
    """The vectors of the rows' present contents, of unit length; a row that has none is left out."""
    found = await readers.fetch(_VECTORS, (rows.to_json(list(row_ids)), model_id))
    return {row_id: np.frombuffer(vector, "<f4") for row_id, vector in found}


async def originals(readers: Readers, namespace: str, memory_id: str) -> list[str]:
    """The memory ids that an undo would bring back.

    Raises MemoryNotFound, InvalidField for a memory that was not made by consolidation.
    """
    found = await readers.fetch(_IS_MERGED, (namespace, memory_id))
    if not found:
        raise rows.not_found(memory_id)
    if not found[0][0]:
        raise not_consolidated(memory_id)
    return [row[0] for row in await readers.fetch(_ORIGINALS, (namespace, memory_id))]

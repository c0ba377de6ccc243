"""Rows of `memories` <-> Memory. The order of COLUMNS is the order of Memory's fields."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from memory_system import lifecycle
from memory_system.errors import MemoryNotFound
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.models import Memory

FIELDS: Final = Memory.__struct_fields__
COLUMNS: Final = ", ".join(FIELDS)
_METADATA: Final = FIELDS.index("metadata")
_TAGS: Final = FIELDS.index("tags")

_INSERT: Final = f"INSERT INTO memories ({', '.join(FIELDS[1:])}) VALUES ({', '.join('?' * (len(FIELDS) - 1))})"
# A memory that has expired is gone from every read, though its row may still stand.
ALIVE: Final = "(expires_at IS NULL OR expires_at > ?)"

_encode_json = msgspec.json.Encoder().encode


def columns(alias: str) -> str:
    """The column list of Memory with a table alias before each."""
    return ", ".join(f"{alias}.{name}" for name in FIELDS)


def memory_from_row(row: Sequence[Any]) -> Memory:
    values = list(row)
    metadata, tags = values[_METADATA], values[_TAGS]
    values[_METADATA] = {} if metadata == "{}" else msgspec.json.decode(metadata)
    values[_TAGS] = [] if tags == "[]" else msgspec.json.decode(tags)
    return Memory(**dict(zip(FIELDS, values, strict=True)))


def row_from_memory(memory: Memory) -> list[Any]:
    """The values of all columns but row_id."""
    values = list(msgspec.structs.astuple(memory))
    values[_METADATA] = to_json(memory.metadata) if memory.metadata else "{}"
    values[_TAGS] = to_json(memory.tags) if memory.tags else "[]"
    return values[1:]


def insert(db: sqlite3.Connection, memory: Memory) -> int:
    """Insert the memory as a new row; its row_id, which is not that of `memory`."""
    row_id = db.execute(_INSERT, row_from_memory(memory)).lastrowid
    assert row_id is not None
    return row_id


def to_json(value: Any) -> str:
    return _encode_json(value).decode()


def is_alive(memory: Memory, now_s: float) -> bool:
    return memory.expires_at is None or memory.expires_at > now_s


def fetch(db: sqlite3.Connection, namespace: str, memory_id: str, now_s: float) -> Memory:
    """The living memory of this id. Raises MemoryNotFound."""
    row = db.execute(
        f"SELECT {COLUMNS} FROM memories WHERE namespace = ? AND memory_id = ? AND {ALIVE}",
        (namespace, memory_id, now_s),
    ).fetchone()
    if row is None:
        raise not_found(memory_id)
    return memory_from_row(row)


def fetch_rows(db: sqlite3.Connection, row_ids: Iterable[int]) -> list[Memory]:
    rows = db.execute(
        f"SELECT {COLUMNS} FROM memories WHERE row_id IN (SELECT value FROM json_each(?))", (to_json(list(row_ids)),)
    )
    return [memory_from_row(row) for row in rows]


def not_found(memory_id: str) -> MemoryNotFound:
    return MemoryNotFound(f"no memory {memory_id} in this namespace", memory_id=memory_id)


class RecordView:
    """Turns a Memory into the record of a reply, with importance as of a given instant."""

    def __init__(self, settings: LifecycleSettings) -> None:
        self._settings = settings

    def importance(self, memory: Memory, now_s: float) -> float:
        return lifecycle.importance_now(self._settings, memory, now_s)

    def record(self, memory: Memory, now_s: float) -> dict[str, Any]:
        """The memory record of docs/protocol.md."""
        return {
            "memory_id": memory.memory_id,
            "content": memory.content,
            "memory_type": memory.memory_type,
            "memory_tier": memory.memory_tier,
            "importance": self.importance(memory, now_s),
            "access_count": memory.access_count,
            "last_accessed_at": memory.last_accessed_at,
            "created_at": memory.created_at,
            "updated_at": memory.updated_at,
            "occurred_at": memory.occurred_at,
            "expires_at": memory.expires_at,
            "metadata": memory.metadata,
            "tags": memory.tags,
            "parent_id": memory.parent_id,
            "session_id": memory.session_id,
            "user_id": memory.user_id,
            "created_by": memory.created_by,
            "version": memory.version,
            "state": memory.state,
        }

"""Rows of `memories` <-> Memory. The order of COLUMNS is the order of Memory's fields."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Final, TypeVar

import msgspec

from memory_system import lifecycle
from memory_system.errors import MemoryNotFound
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.models import Memory

T = TypeVar("T")

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


# Each step of a statement lets go of the interpreter and waits until it is given back, which beside busy readers costs
# many times what SQLite does in the step: so many rows are read, or written, in one.
AT_ONCE: Final = 16


def parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Parts of AT_ONCE items, then of powers of two: so few lengths that a statement for each stays prepared."""
    start, length = 0, AT_ONCE
    while start < len(items):
        while length > len(items) - start:
            length //= 2
        yield items[start : start + length]
        start += length


def values(count: int, width: int) -> str:
    """The SQL of `count` rows of `width` parameters each."""
    return ", ".join([f"({', '.join('?' * width)})"] * count)


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


def insert_all(db: sqlite3.Connection, memories: Sequence[Memory]) -> None:
    """Insert memories that have their row_ids, which have to be new ones."""
    for part in parts(memories):
        db.execute(_insert_some(len(part)), [v for memory in part for v in (memory.row_id, *row_from_memory(memory))])


@cache
def _insert_some(count: int) -> str:
    return f"INSERT INTO memories ({COLUMNS}) VALUES {values(count, len(FIELDS))}"


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
    """The memories of these row_ids, in their order, expired ones too; those that are not there are left out."""
    found, width = [], len(FIELDS)
    for part in parts(list(dict.fromkeys(row_ids))):
        row = db.execute(_fetch_some(len(part)), part).fetchone()
        each = [row[at : at + width] for at in range(0, len(row), width)]
        found += [memory_from_row(fields) for fields in each if fields[0] is not None]
    return found


@cache
def _fetch_some(count: int) -> str:
    aliases = [f"m{number}" for number in range(count)]
    joined = " ".join(f"LEFT JOIN memories AS {alias} ON {alias}.row_id = ?" for alias in aliases)
    return f"SELECT {', '.join(columns(alias) for alias in aliases)} FROM (SELECT 1) {joined}"


class RowUpdate:
    """Writes some fields of memories."""

    def __init__(self, *fields: str) -> None:
        self._fields = ("row_id", *fields)
        changes = ", ".join(f"{name} = new.{name}" for name in fields)
        self._statements = {
            count: f"WITH new ({', '.join(self._fields)}) AS (VALUES {values(count, len(self._fields))}) "
            f"UPDATE memories SET {changes} FROM new WHERE memories.row_id = new.row_id"
            for count in (1, 2, 4, 8, AT_ONCE)
        }

    def write(self, db: sqlite3.Connection, memories: Sequence[Memory]) -> None:
        for part in parts(memories):
            given = [getattr(memory, name) for memory in part for name in self._fields]
            db.execute(self._statements[len(part)], given)


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

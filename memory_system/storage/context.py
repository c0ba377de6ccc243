"""What an operation works with inside the writer, and what it leaves for the caches and indexes that follow."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.models import Memory
from memory_system.storage import rows
from memory_system.storage.new_rows import NewRows
from memory_system.storage.rows import RecordView
from memory_system.storage.usage import Quota

Reply = dict[str, Any]


class Removed(NamedTuple):
    """A content that is gone, by deletion or by an update."""

    row_id: int
    namespace: str
    memory_id: str
    content_digest: bytes


@dataclass(slots=True)
class Changes:
    """What a committed request changed, for the caches and indexes that follow."""

    written: list[Memory] = field(default_factory=list)
    removed: list[Removed] = field(default_factory=list)
    stale: list[tuple[str, str]] = field(default_factory=list)  # (namespace, memory_id) changed in place
    caller: tuple[str, str] = ("", "")  # (namespace, agent_id)
    new_texts: dict[int, bytes] = field(default_factory=dict)  # row_id -> digest of a content that needs a vector
    indexed: bool = False


@dataclass(slots=True)
class WriteContext:
    """What an operation has inside its transaction. `owner`: whose new memories are, "" for nobody's. `new_rows`: those
    of the whole group; None: the operation stands alone, and each is inserted at once."""

    connection: sqlite3.Connection
    now_s: float
    namespace: str
    lifecycle: LifecycleSettings
    view: RecordView
    changes: Changes = field(default_factory=Changes)
    log: list[tuple[int, str]] = field(default_factory=list)
    owner: str = ""
    quota: Quota | None = None
    new_rows: NewRows | None = None

    @property
    def db(self) -> sqlite3.Connection:
        """The connection, where everything that was added before can be seen."""
        if self.new_rows is not None:
            self.new_rows.write()
        return self.connection

    def db_with(self, memory_id: str) -> sqlite3.Connection:
        """The connection, where a memory of this id can be seen; what else was added may still be missing."""
        is_waiting = self.new_rows is not None and self.new_rows.has(self.namespace, memory_id)
        return self.db if is_waiting else self.connection

    def insert(self, memory: Memory) -> Memory:
        """Insert a new memory; it is returned with its row_id."""
        if self.new_rows is not None:
            return self.new_rows.add(memory)
        return msgspec.structs.replace(memory, row_id=rows.insert(self.connection, memory))

    def log_change(self, row_id: int, op: str) -> None:
        """Note for index_log; the writer appends it in the same transaction."""
        self.log.append((row_id, op))
        self.changes.indexed = True

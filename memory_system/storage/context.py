"""What an operation works with inside the writer, and what it leaves for the caches and indexes that follow."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.models import Memory
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
    """What an operation has inside its savepoint. `owner`: whose new memories are, "" for nobody's."""

    db: sqlite3.Connection
    now_s: float
    namespace: str
    lifecycle: LifecycleSettings
    view: RecordView
    changes: Changes = field(default_factory=Changes)
    log: list[tuple[int, str]] = field(default_factory=list)
    owner: str = ""
    quota: Quota | None = None

    def log_change(self, row_id: int, op: str) -> None:
        """Note for index_log; the writer appends it in the same transaction."""
        self.log.append((row_id, op))
        self.changes.indexed = True

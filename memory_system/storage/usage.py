"""Quotas: how many memories each owner has, and how many bytes these and their earlier versions say.

An owner's row in `usage` changes in the transaction of whatever changes a memory, by triggers of the writing
connection: no way to write, delete, merge or import can pass them by, and a rollback takes them back. The triggers are
temporary, made when a store is opened with quotas, so that a store without quotas pays nothing.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any, Final

from memory_system.errors import QuotaExceeded
from memory_system.limits_settings import LimitsSettings
from memory_system.storage import rows
from memory_system.storage.database import transaction

_MIB: Final = 1024 * 1024
# In `meta` while the figures are kept up: a store that was written without quotas has to be counted.
_KEPT: Final = "usage_kept"


def _bytes(row: str) -> str:
    """An expression: what a row of memories says. A length of text would be its characters."""
    return " + ".join(f"length(CAST({row}.{name} AS BLOB))" for name in ("content", "metadata", "tags"))


_RECORD_BYTES: Final = "length(CAST({0}.record AS BLOB))"
_HISTORY_BYTES: Final = (
    f"coalesce((SELECT sum({_RECORD_BYTES.format('h')}) FROM memory_history h WHERE h.row_id = {{0}}.row_id), 0)"
)
COUNTED: Final = (
    f"SELECT m.owner, count(*), sum({_bytes('m')} + {_HISTORY_BYTES.format('m')}) "
    "FROM memories m WHERE m.owner <> '' GROUP BY m.owner"
)
# Earlier versions go with their memory, which is gone by the time that their own trigger looks for its owner.
_TRIGGERS: Final = f"""
CREATE TEMP TRIGGER usage_of_new AFTER INSERT ON main.memories WHEN NEW.owner <> '' BEGIN
    INSERT INTO usage (owner, memories, bytes) VALUES (NEW.owner, 1, {_bytes("NEW")})
        ON CONFLICT (owner) DO UPDATE SET memories = memories + 1, bytes = bytes + excluded.bytes;
END;
CREATE TEMP TRIGGER usage_of_changed AFTER UPDATE OF content, metadata, tags ON main.memories WHEN NEW.owner <> '' BEGIN
    UPDATE usage SET bytes = bytes + ({_bytes("NEW")}) - ({_bytes("OLD")}) WHERE owner = NEW.owner;
END;
CREATE TEMP TRIGGER usage_of_deleted BEFORE DELETE ON main.memories WHEN OLD.owner <> '' BEGIN
    UPDATE usage SET memories = memories - 1, bytes = bytes - ({_bytes("OLD")}) - {_HISTORY_BYTES.format("OLD")}
        WHERE owner = OLD.owner;
END;
CREATE TEMP TRIGGER usage_of_new_version AFTER INSERT ON main.memory_history BEGIN
    UPDATE usage SET bytes = bytes + {_RECORD_BYTES.format("NEW")}
        WHERE owner = (SELECT owner FROM memories WHERE row_id = NEW.row_id);
END;
CREATE TEMP TRIGGER usage_of_dropped_version AFTER DELETE ON main.memory_history BEGIN
    UPDATE usage SET bytes = bytes - {_RECORD_BYTES.format("OLD")}
        WHERE owner = (SELECT owner FROM memories WHERE row_id = OLD.row_id);
END;
"""


@dataclass(frozen=True, slots=True)
class Quota:
    """What one owner may have; 0: as much as it likes."""

    memories: int
    bytes: int

    @classmethod
    def of(cls, limits: LimitsSettings) -> Quota | None:
        """None where there are no quotas."""
        quota = cls(limits.max_memories, int(limits.max_mb * _MIB))
        return quota if quota.memories or quota.bytes else None


def bring_up(db: sqlite3.Connection, quota: Quota | None) -> None:
    """Make the writing connection keep the figures up, after counting what was written without; or have it forget them.

    A count reads every memory once. Raises sqlite3.Error.
    """
    kept = db.execute("SELECT 1 FROM meta WHERE key = ?", (_KEPT,)).fetchone() is not None
    if kept != (quota is not None):
        with transaction(db):
            db.execute("DELETE FROM usage")
            if quota is None:
                db.execute("DELETE FROM meta WHERE key = ?", (_KEPT,))
            else:
                db.execute(f"INSERT INTO usage (owner, memories, bytes) {COUNTED}")
                db.execute("INSERT INTO meta (key, value) VALUES (?, '1')", (_KEPT,))
    if quota is not None:
        db.execute("DELETE FROM usage WHERE memories = 0")
        db.executescript(_TRIGGERS)


def size_of(content: str, metadata: dict[str, Any], tags: list[str]) -> int:
    """Bytes of a memory, as the triggers count them."""
    return len(content.encode()) + len(rows.to_json(metadata).encode()) + len(rows.to_json(tags).encode())


def check(db: sqlite3.Connection, quota: Quota | None, owner: str, *, memories: int, size: int) -> None:
    """Raise QuotaExceeded unless the owner may have so many memories and bytes more. To be asked before the write."""
    if quota is None or not owner or (memories <= 0 and size <= 0):
        return
    found = db.execute("SELECT memories, bytes FROM usage WHERE owner = ?", (owner,)).fetchone() or (0, 0)
    if quota.memories and memories > 0 and found[0] + memories > quota.memories:
        raise QuotaExceeded(
            f"{found[0]} memories are kept for this caller, and {quota.memories} is the most; delete some first",
            quota="memories",
            used=found[0],
            wanted=memories,
            limit=quota.memories,
        )
    if quota.bytes and size > 0 and found[1] + size > quota.bytes:
        raise QuotaExceeded(
            f"{found[1]} bytes are kept for this caller, and {quota.bytes} is the most; delete some memories first",
            quota="bytes",
            used=found[1],
            wanted=size,
            limit=quota.bytes,
        )

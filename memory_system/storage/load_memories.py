"""Putting in memories, their earlier versions and the ties to their parents."""

from __future__ import annotations

from typing import Final

import msgspec

from memory_system.errors import InvalidField
from memory_system.export_models import ParentLine, SessionPart
from memory_system.lifecycle import SESSION_TYPE
from memory_system.line_reader import HistoryItem, MemoryItem
from memory_system.models import Memory
from memory_system.storage import memories, rows, sessions
from memory_system.storage.context import Removed
from memory_system.storage.loading import Loading

# What a memory says, as opposed to how far it has aged. A difference here is a conflict.
SAID: Final = (
    *("content", "memory_type", "metadata", "tags", "parent_id", "session_id", "user_id", "created_by"),
    *("created_at", "occurred_at", "expires_at"),
)
AGED: Final = (
    *("memory_tier", "importance", "importance_at", "access_count", "last_accessed_at", "updated_at", "tier_since"),
    *("tier_accesses", "promote_at", "state", "archived_at"),
)


def put_memory(loading: Loading, item: MemoryItem) -> None:
    stored = loading.stored(item.memory.memory_id)
    if stored is None:
        _insert(loading, item)
        return
    fields = _differences(loading, stored, item)
    if fields:
        if loading.overwrites("memory", fields, memory_id=stored.memory_id):
            _replace(loading, stored, item)
    elif loading.order.overwrite and _has_aged(loading, stored, item):
        loading.tally.overwritten["memory"] += 1
        if not loading.order.dry_run:
            _mark_undone(loading, stored.row_id, item)
            _write(loading, stored, msgspec.structs.replace(item.memory, version=stored.version))
    else:
        loading.unchanged("memory")
    if item.vector is not None and not loading.order.dry_run:
        _vector(loading, stored.row_id, item)


def _insert(loading: Loading, item: MemoryItem) -> None:
    context, memory = loading.context, item.memory
    loading.tally.added["memory"] += 1
    if memory.parent_id is not None and not _is_there(loading, memory.parent_id, item.parent_follows):
        memory = msgspec.structs.replace(memory, parent_id=None)
    if loading.order.dry_run:
        return
    memory = context.insert(msgspec.structs.replace(memory, due_at=memories.due_at(context, memory)))
    row_id = memory.row_id
    if item.session is not None:
        loading.db.execute(
            f"INSERT INTO sessions ({', '.join(sessions.STORED)}, row_id) VALUES (?, ?, ?, ?, ?, ?)",
            (*_session_values(item.session), row_id),
        )
    else:
        context.log_change(row_id, "put")
    context.changes.written.append(memory)
    if item.undone_at is not None:
        _mark_undone(loading, row_id, item)
    if item.vector is not None:
        _vector(loading, row_id, item)


def _has_aged(loading: Loading, stored: Memory, item: MemoryItem) -> bool:
    """Whether use, age or an undone consolidation have made of the memory something else than the line says."""
    if any(getattr(stored, name) != getattr(item.memory, name) for name in AGED):
        return True
    row = loading.db.execute(
        "SELECT undone_at FROM consolidations_undone WHERE row_id = ?", (stored.row_id,)
    ).fetchone()
    return (None if row is None else row[0]) != item.undone_at


def _session_values(session: SessionPart) -> tuple[object, ...]:
    return tuple(getattr(session, name) for name in sessions.STORED)


def _mark_undone(loading: Loading, row_id: int, item: MemoryItem) -> None:
    """Whether a consolidation was undone, so that the memory is not consolidated again, is as the line says."""
    loading.db.execute("DELETE FROM consolidations_undone WHERE row_id = ?", (row_id,))
    if item.undone_at is not None:
        loading.db.execute("INSERT INTO consolidations_undone VALUES (?, ?)", (row_id, item.undone_at))


def _is_there(loading: Loading, parent_id: str, follows: bool) -> bool:
    """Raises InvalidField for a parent that is neither there nor said to follow."""
    if follows:
        return loading.stored(parent_id) is not None
    return loading.row_id(parent_id, "parent_id") is not None


def _differences(loading: Loading, stored: Memory, item: MemoryItem) -> list[str]:
    """The fields in which the line says something else than the store."""
    fields = [name for name in SAID if getattr(stored, name) != getattr(item.memory, name)]
    if "parent_id" in fields and _is_same_parent(loading, stored, item):
        fields.remove("parent_id")
    if item.session is not None and stored.memory_type == SESSION_TYPE:
        row = loading.db.execute(
            f"SELECT {', '.join(sessions.STORED)} FROM sessions WHERE row_id = ?", (stored.row_id,)
        ).fetchone()
        if row != _session_values(item.session):
            fields.append("session")
    return fields


def _is_same_parent(loading: Loading, stored: Memory, item: MemoryItem) -> bool:
    """Whether the tie to the parent is still to come, or is one to a memory that has expired: exports have none."""
    if stored.parent_id is None:
        return item.parent_follows
    parent = loading.stored(stored.parent_id)
    return item.memory.parent_id is None and parent is not None and not rows.is_alive(parent, loading.context.now_s)


def _replace(loading: Loading, stored: Memory, item: MemoryItem) -> None:
    """Give a stored memory what the line says; the version that it had is kept."""
    kinds = {stored.memory_type, item.memory.memory_type}
    if SESSION_TYPE in kinds and len(kinds) > 1:
        raise InvalidField("memory_type", f"memory_type: {stored.memory_id} is there, and of another type for good")
    memory = msgspec.structs.replace(item.memory, version=max(stored.version + 1, item.memory.version))
    if memory.parent_id is not None and memory.parent_id != stored.parent_id:
        if _is_there(loading, memory.parent_id, item.parent_follows):
            memories.check_cycle(loading.context, stored, memory.parent_id)
        else:
            memory = msgspec.structs.replace(memory, parent_id=None)
    memories.keep_history(loading.context, stored, loading.context.changes.caller[1])
    if item.session is not None:
        loading.db.execute(
            f"UPDATE sessions SET {', '.join(f'{name} = ?' for name in sessions.STORED)} WHERE row_id = ?",
            (*_session_values(item.session), stored.row_id),
        )
    _mark_undone(loading, stored.row_id, item)
    _write(loading, stored, memory)


_WRITTEN: Final = tuple(name for name in rows.FIELDS if name not in ("row_id", "namespace", "memory_id", "owner"))
_WRITE: Final = f"UPDATE memories SET {', '.join(f'{name} = ?' for name in _WRITTEN)} WHERE row_id = ?"


def _write(loading: Loading, stored: Memory, memory: Memory) -> None:
    context = loading.context
    memory = msgspec.structs.replace(memory, row_id=stored.row_id, owner=stored.owner)
    memory = msgspec.structs.replace(memory, due_at=memories.due_at(context, memory))
    values = dict(zip(rows.FIELDS[1:], rows.row_from_memory(memory), strict=True))
    loading.db.execute(_WRITE, [*(values[name] for name in _WRITTEN), memory.row_id])
    context.log_change(memory.row_id, "put")
    if memory.content_digest != stored.content_digest:
        gone = Removed(stored.row_id, stored.namespace, stored.memory_id, stored.content_digest)
        context.changes.removed.append(gone)
    context.changes.written.append(memory)


def _vector(loading: Loading, row_id: int, item: MemoryItem) -> None:
    """Keep a vector that the service can use and does not have; any other it makes by itself."""
    assert item.vector is not None
    model_id, data = item.vector
    if loading.order.model != (model_id, len(data) // 4) or item.session is not None:
        return
    cursor = loading.db.execute(
        "INSERT OR REPLACE INTO embeddings (row_id, model_id, digest, vector) "
        "SELECT row_id, ?1, content_digest, ?2 FROM memories WHERE row_id = ?3 AND content_digest = ?4 "
        "AND NOT EXISTS (SELECT 1 FROM embeddings WHERE row_id = ?3 AND model_id = ?1 AND digest = ?4)",
        (model_id, data, row_id, item.memory.content_digest),
    )
    if cursor.rowcount == 1:
        loading.context.log_change(row_id, "vector")


def put_parent(loading: Loading, line: ParentLine) -> None:
    child = loading.stored(line.memory_id)
    parent_row = loading.row_id(line.parent_id, "parent_id")
    if child is None:
        loading.row_id(line.memory_id, "memory_id")
        loading.tally.added["parent"] += 1
    elif child.parent_id == line.parent_id:
        loading.unchanged("parent")
    elif child.parent_id is None:
        loading.tally.added["parent"] += 1
        _tie(loading, child, line.parent_id, parent_row)
    elif loading.overwrites("parent", ["parent_id"], memory_id=line.memory_id):
        _tie(loading, child, line.parent_id, parent_row)


def _tie(loading: Loading, child: Memory, parent_id: str, parent_row: int | None) -> None:
    if loading.order.dry_run or parent_row is None:
        return
    memories.check_cycle(loading.context, child, parent_id)
    loading.db.execute("UPDATE memories SET parent_id = ? WHERE row_id = ?", (parent_id, child.row_id))
    loading.context.log_change(child.row_id, "put")
    loading.context.changes.stale.append((loading.context.namespace, child.memory_id))


def put_history(loading: Loading, item: HistoryItem) -> None:
    memory = loading.stored(item.memory_id)
    if memory is None:
        loading.row_id(item.memory_id, "memory_id")
        loading.tally.added["history"] += 1
        return
    row = loading.db.execute(
        "SELECT record FROM memory_history WHERE row_id = ? AND version = ?", (memory.row_id, item.version)
    ).fetchone()
    names = {"memory_id": item.memory_id, "version": item.version}
    if row is not None and msgspec.json.decode(row[0]) == item.record:
        loading.unchanged("history")
    elif row is not None or item.version >= memory.version:
        # What happened is not overwritten, and a version that is still to come cannot have been replaced.
        loading.conflict("history", ["record" if row is not None else "version"], **names)
    else:
        loading.add(
            "history",
            "INSERT INTO memory_history (row_id, version, record, replaced_at, replaced_by) VALUES (?, ?, ?, ?, ?)",
            (memory.row_id, item.version, rows.to_json(item.record), item.replaced_at, item.replaced_by),
        )

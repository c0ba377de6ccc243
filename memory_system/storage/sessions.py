"""Sessions: memories of type `session` with a few fields of their own."""

from __future__ import annotations

from typing import Any

import msgspec

from memory_system.digest import content_digest
from memory_system.errors import SessionNotFound
from memory_system.lifecycle import SESSION_TYPE
from memory_system.storage import memories, rows
from memory_system.storage.context import Reply, WriteContext

FIELDS = ("memory_id", "user_id", "session_type", "metadata", "created_at", "ended_at", "summary", "created_by")
SELECT = (
    "SELECT m.memory_id, m.user_id, s.session_type, m.metadata, m.created_at, s.ended_at, s.summary, m.created_by "
    "FROM memories m CROSS JOIN sessions s ON s.row_id = m.row_id"
)


def session_from_row(row: tuple[Any, ...]) -> dict[str, Any]:
    """The session object of a reply."""
    values = dict(zip(FIELDS, row, strict=True))
    return {
        "session_id": values["memory_id"],
        "user_id": values["user_id"],
        "session_type": values["session_type"],
        "session_state": "open" if values["ended_at"] is None else "ended",
        "metadata": msgspec.json.decode(values["metadata"]),
        "created_at": values["created_at"],
        "ended_at": values["ended_at"],
        "summary": values["summary"],
        "created_by": values["created_by"],
    }


def not_found(session_id: str) -> SessionNotFound:
    return SessionNotFound(f"no session {session_id} in this namespace", session_id=session_id)


def create(
    context: WriteContext, *, user_id: str, session_type: str, metadata: dict[str, Any], created_by: str
) -> Reply:
    session_id = memories.new_memory_id()
    content = f"{session_type} session of {user_id}"
    new = memories.NewMemory(
        content=content,
        content_digest=content_digest(content),
        memory_type=SESSION_TYPE,
        memory_tier="long",
        importance=1.0,
        metadata=metadata,
        tags=[],
        parent_id=None,
        session_id=None,
        user_id=user_id,
        occurred_at=None,
        expires_at=None,
        created_by=created_by,
    )
    memory = memories.insert(context, new, session_id)
    context.db.execute("INSERT INTO sessions (row_id, session_type) VALUES (?, ?)", (memory.row_id, session_type))
    context.db.execute("UPDATE memories SET session_id = memory_id WHERE row_id = ?", (memory.row_id,))
    context.changes.written[-1] = msgspec.structs.replace(memory, session_id=session_id)
    return {"session_id": session_id, "session": fetch(context, session_id)}


def fetch(context: WriteContext, session_id: str) -> dict[str, Any]:
    row = context.db.execute(
        f"{SELECT} WHERE m.namespace = ? AND m.memory_id = ? AND {rows.ALIVE.replace('expires_at', 'm.expires_at')}",
        (context.namespace, session_id, context.now_s),
    ).fetchone()
    if row is None:
        raise not_found(session_id)
    return session_from_row(row)


def end(context: WriteContext, session_id: str, summary: str | None) -> Reply:
    """Mark a session as ended; one that has ended already keeps its time, and takes a summary if one is given."""
    was_open = fetch(context, session_id)["session_state"] == "open"
    context.db.execute(
        "UPDATE sessions SET ended_at = coalesce(ended_at, ?), summary = coalesce(?, summary) WHERE row_id = "
        "(SELECT row_id FROM memories WHERE namespace = ? AND memory_id = ?)",
        (context.now_s, summary, context.namespace, session_id),
    )
    return {"session_id": session_id, "ended": was_open, "session": fetch(context, session_id)}

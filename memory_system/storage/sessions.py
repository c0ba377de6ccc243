"""Sessions: memories of type `session` with a few fields of their own.

A session ends when somebody ends it, or by itself: `idle_timeout_s` after its newest memory was made in it or it was
resumed. The latter is computed whenever it is asked for, so that it is right at any instant and nothing has to run.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from memory_system.digest import content_digest
from memory_system.errors import SessionNotFound
from memory_system.lifecycle import SESSION_TYPE
from memory_system.storage import memories, rows
from memory_system.storage.context import Reply, WriteContext

# When something last happened in a session `m`, `s`.
_LAST_ACTIVE: Final = (
    "max(m.created_at, coalesce(s.resumed_at, 0), coalesce((SELECT max(c.created_at) FROM memories c "
    "WHERE c.namespace = m.namespace AND c.session_id = m.memory_id), 0))"
)
# The columns of the table, but for its key: what a line of an export has of a session.
STORED: Final = ("session_type", "ended_at", "summary", "idle_timeout_s", "resumed_at")
FIELDS: Final = (
    *("memory_id", "user_id", "session_type", "metadata", "created_at", "ended_at", "summary", "created_by"),
    *("idle_timeout_s", "last_active_at"),
)
SELECT: Final = (
    "SELECT m.memory_id, m.user_id, s.session_type, m.metadata, m.created_at, s.ended_at, s.summary, m.created_by, "
    f"s.idle_timeout_s, {_LAST_ACTIVE} FROM memories m CROSS JOIN sessions s ON s.row_id = m.row_id"
)


def is_open_sql(now: str) -> str:
    """An expression over `m` and `s`: whether the session is open at the instant of the parameter `now`."""
    return f"(s.ended_at IS NULL AND (s.idle_timeout_s IS NULL OR {_LAST_ACTIVE} + s.idle_timeout_s > {now}))"


def ended_at(ended_s: float | None, last_active_s: float, idle_timeout_s: float | None, now_s: float) -> float | None:
    """When a session ended (epoch seconds), by a call (`ended_s`) or by itself; None while it is open at `now_s`."""
    if ended_s is not None or idle_timeout_s is None:
        return ended_s
    idle_end_s = last_active_s + idle_timeout_s
    return idle_end_s if idle_end_s <= now_s else None


def session_from_row(row: tuple[Any, ...], now_s: float) -> dict[str, Any]:
    """The session object of a reply, as of `now_s`."""
    values = dict(zip(FIELDS, row, strict=True))
    ended_s = ended_at(values["ended_at"], values["last_active_at"], values["idle_timeout_s"], now_s)
    return {
        "session_id": values["memory_id"],
        "user_id": values["user_id"],
        "session_type": values["session_type"],
        "session_state": "open" if ended_s is None else "ended",
        "metadata": msgspec.json.decode(values["metadata"]),
        "created_at": values["created_at"],
        "last_active_at": values["last_active_at"],
        "idle_timeout_s": values["idle_timeout_s"],
        "ended_at": ended_s,
        "summary": values["summary"],
        "created_by": values["created_by"],
    }


def not_found(session_id: str) -> SessionNotFound:
    return SessionNotFound(f"no session {session_id} in this namespace", session_id=session_id)


def create(
    context: WriteContext,
    *,
    user_id: str,
    session_type: str,
    metadata: dict[str, Any],
    created_by: str,
    idle_timeout_s: float | None = None,
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
    context.db.execute(
        "INSERT INTO sessions (row_id, session_type, idle_timeout_s) VALUES (?, ?, ?)",
        (memory.row_id, session_type, idle_timeout_s),
    )
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
    return session_from_row(row, context.now_s)


def end(context: WriteContext, session_id: str, summary: str | None) -> Reply:
    """Mark a session as ended; one that has ended already keeps its time, and takes a summary if one is given."""
    session = fetch(context, session_id)
    ended_s = context.now_s if session["ended_at"] is None else session["ended_at"]
    _set(context, session_id, "ended_at = ?, summary = coalesce(?, summary)", ended_s, summary)
    return _changed(context, session_id, ended=session["session_state"] == "open")


def resume(context: WriteContext, session_id: str) -> Reply:
    """Open a session again. Its idle time starts anew, also where it was open."""
    session = fetch(context, session_id)
    _set(context, session_id, "ended_at = NULL, resumed_at = ?", context.now_s)
    return _changed(context, session_id, resumed=session["session_state"] == "ended")


def _set(context: WriteContext, session_id: str, assignments: str, *values: Any) -> None:
    context.db.execute(
        f"UPDATE sessions SET {assignments} WHERE row_id = "
        "(SELECT row_id FROM memories WHERE namespace = ? AND memory_id = ?)",
        (*values, context.namespace, session_id),
    )


def _changed(context: WriteContext, session_id: str, **what: bool) -> Reply:
    return {"session_id": session_id, **what, "session": fetch(context, session_id)}

"""Deleting means gone: the record, its history, relations, group entries, vector and texts in the index, and what a
consolidated memory says of it.

Foreign keys with ON DELETE CASCADE take what hangs on one row; a subtree is found by a recursive query, because
SQLite's own cascade stops at 1,000 levels.
"""

from __future__ import annotations

from memory_system.lifecycle import SESSION_TYPE
from memory_system.storage import consolidations, rows
from memory_system.storage.context import Removed, Reply, WriteContext

Doomed = tuple[int, str, str, bytes, str]  # row_id, namespace, memory_id, content digest, memory_type

_SUBTREE = (
    "WITH RECURSIVE below (memory_id) AS (SELECT value FROM json_each(?) UNION "
    "SELECT m.memory_id FROM memories m JOIN below b ON m.namespace = ? AND m.parent_id = b.memory_id) "
    "SELECT m.row_id, m.namespace, m.memory_id, m.content_digest, m.memory_type "
    "FROM below b JOIN memories m ON m.namespace = ? AND m.memory_id = b.memory_id"
)


def delete(context: WriteContext, memory_id: str, *, cascade: bool) -> Reply:
    """Delete a memory with all below it, or hand its children to its parent. Raises MemoryNotFound."""
    row = context.db.execute(
        "SELECT row_id, namespace, memory_id, content_digest, memory_type, parent_id FROM memories "
        "WHERE namespace = ? AND memory_id = ?",
        (context.namespace, memory_id),
    ).fetchone()
    if row is None:
        raise rows.not_found(memory_id)
    if cascade:
        return {"deleted": remove(context, _subtree(context, [memory_id]))}
    _hand_over_children(context, memory_id, row[5])
    return {"deleted": remove(context, [row[:5]])}


def forget(context: WriteContext, *, user_id: str | None, session_id: str | None) -> Reply:
    """Delete everything of one user, or of one session, with all that hangs below it."""
    column, value = ("user_id", user_id) if user_id is not None else ("session_id", session_id)
    roots = context.db.execute(
        f"SELECT memory_id FROM memories WHERE namespace = ? AND {column} = ?", (context.namespace, value)
    )
    return {"deleted": remove(context, _subtree(context, [row[0] for row in roots]))}


def _subtree(context: WriteContext, roots: list[str]) -> list[Doomed]:
    return context.db.execute(_SUBTREE, (rows.to_json(roots), context.namespace, context.namespace)).fetchall()


def _hand_over_children(context: WriteContext, memory_id: str, grandparent_id: str | None) -> None:
    children = context.db.execute(
        "UPDATE memories SET parent_id = ?, updated_at = ? WHERE namespace = ? AND parent_id = ? "
        "RETURNING row_id, memory_id",
        (grandparent_id, context.now_s, context.namespace, memory_id),
    ).fetchall()
    for row_id, child_id in children:
        context.log_change(row_id, "put")
        context.changes.stale.append((context.namespace, child_id))


def remove(context: WriteContext, doomed: list[Doomed]) -> int:
    """Delete these rows; nothing may hang below them but what is deleted with them. Returns how many."""
    consolidations.before_removal(context, [row_id for row_id, *_ in doomed])
    # One statement, so that a parent and its children may go in any order.
    context.db.execute(
        "DELETE FROM memories WHERE row_id IN (SELECT value FROM json_each(?))",
        (rows.to_json([row_id for row_id, *_ in doomed]),),
    )
    for row_id, namespace, memory_id, digest, _ in doomed:
        context.log_change(row_id, "delete")
        context.changes.removed.append(Removed(row_id, namespace, memory_id, digest))
    _leave_sessions(context, [memory_id for _, _, memory_id, _, kind in doomed if kind == SESSION_TYPE])
    return len(doomed)


def _leave_sessions(context: WriteContext, session_ids: list[str]) -> None:
    """Memories that were made in a deleted session, but hang elsewhere, stay without it."""
    if not session_ids:
        return
    left = context.db.execute(
        "UPDATE memories SET session_id = NULL WHERE namespace = ? "
        "AND session_id IN (SELECT value FROM json_each(?)) RETURNING row_id, memory_id",
        (context.namespace, rows.to_json(session_ids)),
    ).fetchall()
    for row_id, memory_id in left:
        context.log_change(row_id, "put")
        context.changes.stale.append((context.namespace, memory_id))

"""Writing relationships and context groups."""

from __future__ import annotations

from memory_system.errors import GroupNotFound
from memory_system.storage import rows
from memory_system.storage.context import Reply, WriteContext


def _row_id(context: WriteContext, memory_id: str) -> int:
    return rows.fetch(context.db, context.namespace, memory_id, context.now_s).row_id


def relate(context: WriteContext, source_id: str, target_id: str, relationship_type: str, strength: float) -> Reply:
    """Add a relationship, or give the one that is there a new strength (`created` false). Raises MemoryNotFound."""
    source, target = _row_id(context, source_id), _row_id(context, target_id)
    cursor = context.db.execute(
        "INSERT OR IGNORE INTO relationships (source_row_id, target_row_id, relationship_type, strength, created_at) "
        "VALUES (?, ?, ?, ?, ?)",
        (source, target, relationship_type, strength, context.now_s),
    )
    if cursor.rowcount == 0:
        context.db.execute(
            "UPDATE relationships SET strength = ? "
            "WHERE source_row_id = ? AND target_row_id = ? AND relationship_type = ?",
            (strength, source, target, relationship_type),
        )
    return {"created": cursor.rowcount == 1}


def unrelate(context: WriteContext, source_id: str, target_id: str, relationship_type: str | None) -> Reply:
    """Remove the relationship of this type, or all from source to target. Raises MemoryNotFound."""
    cursor = context.db.execute(
        "DELETE FROM relationships WHERE source_row_id = ?1 AND target_row_id = ?2 "
        "AND (?3 IS NULL OR relationship_type = ?3)",
        (_row_id(context, source_id), _row_id(context, target_id), relationship_type),
    )
    return {"removed": cursor.rowcount}


def create_group(context: WriteContext, name: str, description: str | None) -> Reply:
    """Create a context group; one of this name that is there already is returned with `created` false."""
    row = context.db.execute(
        "INSERT OR IGNORE INTO context_groups (namespace, name, description, created_at) VALUES (?, ?, ?, ?) "
        "RETURNING group_id",
        (context.namespace, name, description, context.now_s),
    ).fetchone()
    if row is not None:
        return {"group_id": row[0], "created": True}
    row = context.db.execute(
        "SELECT group_id FROM context_groups WHERE namespace = ? AND name = ?", (context.namespace, name)
    ).fetchone()
    return {"group_id": row[0], "created": False}


def add_member(context: WriteContext, group_id: int, memory_id: str) -> Reply:
    """Raises GroupNotFound, MemoryNotFound; a member that is there already gives `added` false."""
    _check_group(context, group_id)
    cursor = context.db.execute(
        "INSERT OR IGNORE INTO group_members (group_id, row_id, added_at) VALUES (?, ?, ?)",
        (group_id, _row_id(context, memory_id), context.now_s),
    )
    return {"added": cursor.rowcount == 1}


def remove_member(context: WriteContext, group_id: int, memory_id: str) -> Reply:
    """Raises GroupNotFound, MemoryNotFound; a memory that is no member gives `removed` false."""
    _check_group(context, group_id)
    cursor = context.db.execute(
        "DELETE FROM group_members WHERE group_id = ? AND row_id = ?", (group_id, _row_id(context, memory_id))
    )
    return {"removed": cursor.rowcount == 1}


def _check_group(context: WriteContext, group_id: int) -> None:
    row = context.db.execute(
        "SELECT 1 FROM context_groups WHERE group_id = ? AND namespace = ?", (group_id, context.namespace)
    ).fetchone()
    if row is None:
        raise group_not_found(group_id)


def group_not_found(group_id: int) -> GroupNotFound:
    return GroupNotFound(f"no context group {group_id} in this namespace", group_id=group_id)

"""Merging memories into one, taking that back, and keeping what was deleted out of what was merged.

Each function runs inside one request's savepoint, so a merge is done wholly or not at all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import msgspec

from memory_system import lifecycle
from memory_system.consolidation import rules
from memory_system.consolidation.plan import Pieces, Plan, compose
from memory_system.digest import content_digest
from memory_system.errors import InvalidField
from memory_system.models import Memory
from memory_system.storage import ageing, rows
from memory_system.storage.context import Removed, Reply, WriteContext
from memory_system.storage.memories import new_memory_id

CREATED_BY: Final = "consolidation"

# What archiving an original changes, and undo gives back.
_BEFORE: Final = ("archived_at", "promote_at", "due_at")

_SPEAK_FOR_ANOTHER: Final = (
    "SELECT DISTINCT one.member_row_id FROM json_each(:doomed) AS gone "
    "CROSS JOIN consolidation_members AS one ON one.row_id = gone.value "
    "WHERE one.member_row_id NOT IN (SELECT value FROM json_each(:doomed)) AND EXISTS "
    "(SELECT 1 FROM consolidation_members AS other WHERE other.member_row_id = one.member_row_id "
    "AND other.row_id <> one.row_id)"
)


def apply(context: WriteContext, plan: Plan) -> Reply:
    """Make the merged memory and archive its originals; nothing at all if one of them is not as planned any more.

    `done`, `reason` (the plan's kind, or `changed`), `memory_id` of the merged memory, `members`.
    """
    originals = _as_planned(context, plan)
    if originals is None:
        return {"done": False, "reason": "changed", "memory_id": None, "members": []}
    memory = _insert(context, plan, rules.merged(context.lifecycle, originals, plan.kind, plan.as_of_s))
    pieces = None if plan.pieces is None else rows.to_json(plan.pieces)
    context.db.execute(
        "INSERT INTO consolidations (row_id, kind, summariser, pieces, created_at) VALUES (?, ?, ?, ?, ?)",
        (memory.row_id, plan.kind, plan.summariser, pieces, plan.as_of_s),
    )
    for original in originals:
        _take_in(context, memory, original, plan.as_of_s)
    _join_groups(context, memory.row_id, plan.row_ids)
    return {"done": True, "reason": plan.kind, "memory_id": memory.memory_id, "members": list(plan.members)}


def undo(context: WriteContext, memory_id: str) -> Reply:
    """Bring the originals back as they were, and remove the merged memory. They are not consolidated again.

    One whose importance has fallen to its tier's threshold since is brought back like any other from the archive. One
    that somebody brought back already stays as it is, and so does one that was merged again since. Raises
    MemoryNotFound, InvalidField for a memory that is not a consolidated one. `members`: those that were brought back.
    """
    memory = rows.fetch(context.db, context.namespace, memory_id, context.now_s)
    if not context.db.execute("SELECT 1 FROM consolidations WHERE row_id = ?", (memory.row_id,)).fetchone():
        raise not_consolidated(memory_id)
    kept = _members(context, memory.row_id)
    restored = [back for row_id, before in kept.items() if (back := _give_back(context, memory, row_id, before))]
    context.db.executemany(
        "INSERT OR REPLACE INTO consolidations_undone (row_id, undone_at) VALUES (?, ?)",
        [(row_id, context.now_s) for row_id in kept if not _is_taken_elsewhere(context, memory.row_id, row_id)],
    )
    _remove_merged(context, memory)
    return {"done": True, "reason": "undone", "memory_id": memory_id, "members": restored}


def not_consolidated(memory_id: str) -> InvalidField:
    return InvalidField("memory_id", f"{memory_id} was not made by consolidation")


def before_removal(context: WriteContext, doomed: Collection[int]) -> None:
    """Take what these rows said out of the memories that they were merged into; to be called before they are deleted.

    A merged memory is told anew by the pieces of the originals that stay. Where fewer than two stay, or the pieces are
    not known, it is removed, and those that stay come back as they were. What one of these rows was made of speaks for
    an older merged memory again, if it had become part of one before.
    """
    for (row_id,) in context.db.execute(_SPEAK_FOR_ANOTHER, {"doomed": rows.to_json(list(doomed))}).fetchall():
        context.log_change(row_id, "put")
    affected = context.db.execute(
        "SELECT DISTINCT row_id FROM consolidation_members WHERE member_row_id IN (SELECT value FROM json_each(?)) "
        "AND row_id NOT IN (SELECT value FROM json_each(?))",
        (rows.to_json(list(doomed)), rows.to_json(list(doomed))),
    ).fetchall()
    gone = frozenset(doomed)
    for memory in rows.fetch_rows(context.db, [row_id for (row_id,) in affected]):
        staying = {row_id: before for row_id, before in _members(context, memory.row_id).items() if row_id not in gone}
        if not _tell_anew(context, memory, list(staying)):
            for row_id, before in staying.items():
                _give_back(context, memory, row_id, before)
            _remove_merged(context, memory)


# -- merging ----------------------------------------------------------------------------------------------------------


def _as_planned(context: WriteContext, plan: Plan) -> list[Memory] | None:
    """The originals as they are now; None if one is gone, not active, was updated, moved, or does not fade any more."""
    found = {memory.row_id: memory for memory in rows.fetch_rows(context.db, plan.row_ids)}
    for planned in plan.originals:
        memory = found.get(planned.row_id)
        if memory is None or _place(memory) != _place(planned):
            return None
        if not rules.may_merge(context.lifecycle, memory, plan.as_of_s):
            return None
    return [found[row_id] for row_id in plan.row_ids]


def _place(memory: Memory) -> tuple[Any, ...]:
    return (
        memory.namespace,
        memory.version,
        memory.content_digest,
        memory.parent_id,
        memory.session_id,
        memory.user_id,
    )


def _insert(context: WriteContext, plan: Plan, fields: rules.Merged) -> Memory:
    memory = Memory(
        row_id=0,
        namespace=context.namespace,
        memory_id=new_memory_id(),
        content=plan.content,
        content_digest=content_digest(plan.content),
        memory_type=rules.CONSOLIDATED,
        importance_at=plan.as_of_s,
        created_at=context.now_s,
        updated_at=context.now_s,
        expires_at=None,
        tier_since=plan.as_of_s,
        due_at=None,
        created_by=CREATED_BY,
        version=1,
        state="active",
        **msgspec.structs.asdict(fields),
    )
    memory = context.insert(msgspec.structs.replace(memory, due_at=lifecycle.due_at(context.lifecycle, memory)))
    context.log_change(memory.row_id, "put")
    context.changes.new_texts[memory.row_id] = memory.content_digest
    context.changes.written.append(memory)
    return memory


def _take_in(context: WriteContext, memory: Memory, original: Memory, as_of_s: float) -> None:
    """Archive one original, with a note of what it was and a relationship to the merged memory."""
    before = {name: getattr(original, name) for name in _BEFORE}
    context.db.execute(
        "INSERT INTO consolidation_members (row_id, member_row_id, before) VALUES (?, ?, ?)",
        (memory.row_id, original.row_id, rows.to_json(before)),
    )
    context.db.execute(
        "INSERT OR REPLACE INTO relationships (source_row_id, target_row_id, relationship_type, strength, created_at) "
        "VALUES (?, ?, ?, 1.0, ?)",
        (original.row_id, memory.row_id, rules.INTO, context.now_s),
    )
    _put(context, ageing.archived(context.lifecycle, original, as_of_s))


def _join_groups(context: WriteContext, row_id: int, originals: Sequence[int]) -> None:
    """The merged memory belongs to every context group that an original belongs to."""
    context.db.execute(
        "INSERT OR IGNORE INTO group_members (group_id, row_id, added_at) SELECT group_id, ?, min(added_at) "
        "FROM group_members WHERE row_id IN (SELECT value FROM json_each(?)) GROUP BY group_id",
        (row_id, rows.to_json(list(originals))),
    )


def _put(context: WriteContext, memory: Memory) -> None:
    ageing.write_clocks(context, [memory])
    context.log_change(memory.row_id, "put")
    context.changes.written.append(memory)


# -- taking it back ---------------------------------------------------------------------------------------------------


def _members(context: WriteContext, row_id: int) -> dict[int, dict[str, Any]]:
    """row_id of each original -> what it was before."""
    found = context.db.execute(
        "SELECT member_row_id, before FROM consolidation_members WHERE row_id = ? ORDER BY member_row_id", (row_id,)
    )
    return {member: msgspec.json.decode(before) for member, before in found}


def _give_back(context: WriteContext, merged: Memory, row_id: int, before: dict[str, Any]) -> str | None:
    """Make an original active again, unless it is so already; its memory_id, None if it stayed as it was."""
    (original,) = rows.fetch_rows(context.db, [row_id])
    if original.state == "active" or _is_taken_elsewhere(context, merged.row_id, row_id):
        return None
    importance = lifecycle.importance_now(context.lifecycle, original, context.now_s)
    tier = lifecycle.tier_settings(context.lifecycle, original.memory_tier)
    if importance > tier.archive_threshold:
        back = msgspec.structs.replace(original, state="active", **before)
    else:
        back = ageing.restored(context.lifecycle, original, importance, context.now_s)
    _put(context, back)
    return original.memory_id


def _is_taken_elsewhere(context: WriteContext, merged_row_id: int, row_id: int) -> bool:
    """Whether an original that was brought back has become part of another merged memory since: of a newer one. That it
    was part of an older one before is no reason to leave it where this one put it."""
    sql = "SELECT 1 FROM consolidation_members WHERE member_row_id = ? AND row_id > ?"
    return context.db.execute(sql, (row_id, merged_row_id)).fetchone() is not None


def _remove_merged(context: WriteContext, memory: Memory) -> None:
    children = context.db.execute(
        "UPDATE memories SET parent_id = ?, updated_at = ? WHERE namespace = ? AND parent_id = ? "
        "RETURNING row_id, memory_id",
        (memory.parent_id, context.now_s, memory.namespace, memory.memory_id),
    ).fetchall()
    for row_id, child_id in children:
        context.log_change(row_id, "put")
        context.changes.stale.append((memory.namespace, child_id))
    context.db.execute("DELETE FROM memories WHERE row_id = ?", (memory.row_id,))
    context.log_change(memory.row_id, "delete")
    context.changes.removed.append(Removed(memory.row_id, memory.namespace, memory.memory_id, memory.content_digest))


# -- telling it anew --------------------------------------------------------------------------------------------------


def _tell_anew(context: WriteContext, memory: Memory, staying: list[int]) -> bool:
    """Make the merged memory one of these originals only; False if there is nothing to make it of."""
    if len(staying) < 2:
        return False
    kind, stored = context.db.execute(
        "SELECT kind, pieces FROM consolidations WHERE row_id = ?", (memory.row_id,)
    ).fetchone()
    originals = rules.in_order(rows.fetch_rows(context.db, staying))
    pieces = _left(kind, stored, originals)
    if not pieces:
        return False
    _rewrite(context, memory, pieces, originals, kind)
    return True


def _left(kind: rules.Kind, stored: str | None, originals: Sequence[Memory]) -> Pieces:
    """The pieces that come from these originals; none if that cannot be told."""
    if stored is None:
        return ()
    staying = {memory.row_id for memory in originals}
    pieces = tuple((row_id, text) for row_id, text in msgspec.json.decode(stored) if row_id in staying)
    if pieces or kind != "duplicates":
        return pieces
    chosen = rules.spokesman(originals)
    return ((chosen.row_id, chosen.content),)


def _rewrite(context: WriteContext, old: Memory, pieces: Pieces, originals: Sequence[Memory], kind: rules.Kind) -> None:
    """Content, tags, metadata and time follow the originals that are left; history and vector told of the others."""
    content = compose(pieces)
    memory = msgspec.structs.replace(
        old,
        content=content,
        content_digest=content_digest(content),
        tags=rules.tags_of(originals),
        metadata=rules.metadata_of(originals, kind),
        occurred_at=rules.time_of(originals[0]),
        updated_at=context.now_s,
    )
    context.db.execute(
        "UPDATE memories SET content = ?, content_digest = ?, tags = ?, metadata = ?, occurred_at = ?, updated_at = ? "
        "WHERE row_id = ?",
        (
            memory.content,
            memory.content_digest,
            rows.to_json(memory.tags),
            rows.to_json(memory.metadata),
            memory.occurred_at,
            memory.updated_at,
            memory.row_id,
        ),
    )
    context.db.execute("UPDATE consolidations SET pieces = ? WHERE row_id = ?", (rows.to_json(pieces), memory.row_id))
    for table in ("memory_history", "embeddings"):
        context.db.execute(f"DELETE FROM {table} WHERE row_id = ?", (memory.row_id,))
    context.log_change(memory.row_id, "put")
    context.changes.removed.append(Removed(old.row_id, old.namespace, old.memory_id, old.content_digest))
    context.changes.new_texts[memory.row_id] = memory.content_digest
    context.changes.written.append(memory)

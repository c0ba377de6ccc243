"""Use of memories as it is stored: reinforcing one, and the accesses that were counted since the last flush."""

from __future__ import annotations

from typing import Final

import msgspec

from memory_system import lifecycle
from memory_system.models import Memory
from memory_system.storage import ageing, rows
from memory_system.storage.context import Reply, WriteContext


def reinforce(context: WriteContext, memory_id: str, factor: float | None) -> Reply:
    """importance := min(1, importance now * factor), the clock of its decay starts anew, and it counts as an access.

    `factor` None: that of its type. An archived memory is brought back.
    """
    old = rows.fetch(context.db, context.namespace, memory_id, context.now_s)
    if factor is None:
        factor = lifecycle.reinforcement_factor(context.lifecycle, old.memory_type)
    importance = min(1.0, context.view.importance(old, context.now_s) * factor)
    if old.state == "archived":
        old = ageing.restored(context.lifecycle, old, importance, context.now_s)
        ageing.write_clocks(context, [old])
        context.log_change(old.row_id, "put")
        importance = old.importance
    memory = touched(context, old, importance, 1, context.now_s, reinforced=True)
    _TOUCH.write(context.db, [memory])
    context.changes.written.append(memory)
    return {"memory_id": memory_id, "new_importance": importance}


def touched(
    context: WriteContext,
    old: Memory,
    importance: float,
    accesses: int,
    accessed_at_s: float,
    *,
    reinforced: bool = False,
) -> Memory:
    """The memory with a new importance as of now, the accesses that led to it, and what they earned."""
    memory = msgspec.structs.replace(
        old,
        importance=importance,
        importance_at=context.now_s,
        access_count=old.access_count + accesses,
        last_accessed_at=accessed_at_s,
        tier_accesses=old.tier_accesses + accesses,
    )
    if old.promote_at is None and _is_promoted(context, old, memory, reinforced):
        memory = msgspec.structs.replace(memory, promote_at=context.now_s)
    return msgspec.structs.replace(memory, due_at=lifecycle.due_at(context.lifecycle, memory))


def _is_promoted(context: WriteContext, old: Memory, memory: Memory, reinforced: bool) -> bool:
    """Whether the access earned a promotion, or came when one was due, which the new clock would hide."""
    is_due = old.due_at is not None and old.due_at <= context.now_s
    if is_due and lifecycle.promotion_due(context.lifecycle, old, context.now_s):
        return True
    return lifecycle.earns_promotion(context.lifecycle, memory, reinforced=reinforced)


_TOUCH: Final = rows.RowUpdate(
    *("importance", "importance_at", "access_count", "last_accessed_at", "tier_accesses", "promote_at", "due_at")
)


def flush(context: WriteContext, accesses: dict[int, tuple[int, float, float]]) -> Reply:
    """Write buffered accesses: row_id -> (how many, their summed weight, the last one's time).

    importance := min(1, importance now + weight).
    """
    memories = []
    for old in rows.fetch_rows(context.db, accesses):
        count, weight, last_s = accesses[old.row_id]
        importance = min(1.0, context.view.importance(old, context.now_s) + weight)
        memories.append(touched(context, old, importance, count, last_s))
    _TOUCH.write(context.db, memories)
    context.changes.written += memories
    return {"flushed": len(memories)}

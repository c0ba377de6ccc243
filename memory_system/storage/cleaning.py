"""What cleanup removes: memories whose time is over, and the keys of requests that nobody repeats any more."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from memory_system import lifecycle
from memory_system.lifecycle import SESSION_TYPE
from memory_system.models import Memory
from memory_system.storage import removal, rows
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.readers import Readers


def remove_expired(context: WriteContext, row_ids: Sequence[int], as_of_s: float, budget: int) -> Reply:
    """Delete those of the memories, of the context's namespace, whose time was over at `as_of_s`.

    What hangs below them stays, and is handed to their parents; what was made in a session that goes stays without it.
    At most about `budget` rows are written: `left` has the row ids for the next call, `removed` those that are gone.
    """
    doomed: list[removal.Doomed] = []
    left: list[int] = []
    for memory in sorted(rows.fetch_rows(context.db, row_ids), key=lambda memory: row_ids.index(memory.row_id)):
        if memory.namespace != context.namespace or not _is_over(context, memory, as_of_s):
            continue
        budget -= 1 + (_detach(context, memory, budget) if budget > 0 else 0)
        if budget < 0:
            left.append(memory.row_id)
        else:
            digest = memory.content_digest
            doomed.append((memory.row_id, memory.namespace, memory.memory_id, digest, memory.memory_type))
    removal.remove(context, doomed)
    return {"removed": [row_id for row_id, *_ in doomed], "left": left}


def _is_over(context: WriteContext, memory: Memory, as_of_s: float) -> bool:
    if memory.due_at is None or memory.due_at > as_of_s:
        return False
    decision = lifecycle.decide(context.lifecycle, memory, as_of_s)
    return decision.kind == "expire" and (
        decision.reason == "expired" or not context.db.execute(_IS_MEMBER, (memory.row_id,)).fetchone()
    )


def _detach(context: WriteContext, memory: Memory, limit: int) -> int:
    """Cut off up to `limit` of what hangs at a memory; how many there were."""
    found = context.db.execute(
        "UPDATE memories SET parent_id = ?, updated_at = ? WHERE row_id IN "
        "(SELECT row_id FROM memories WHERE namespace = ? AND parent_id = ? LIMIT ?) RETURNING row_id, memory_id",
        (memory.parent_id, context.now_s, memory.namespace, memory.memory_id, limit),
    ).fetchall()
    if memory.memory_type == SESSION_TYPE and len(found) < limit:
        found += context.db.execute(
            "UPDATE memories SET session_id = NULL WHERE row_id IN "
            "(SELECT row_id FROM memories WHERE namespace = ? AND session_id = ? LIMIT ?) RETURNING row_id, memory_id",
            (memory.namespace, memory.memory_id, limit - len(found)),
        ).fetchall()
    for row_id, memory_id in found:
        context.log_change(row_id, "put")
        context.changes.stale.append((memory.namespace, memory_id))
    return len(found)


def remove_keys(context: WriteContext, below: int, limit: int = 200) -> Reply:
    """Drop at most `limit` of the idempotency keys below entry `below`."""
    cursor = context.db.execute(
        "DELETE FROM idempotency WHERE entry IN (SELECT entry FROM idempotency WHERE entry < ? ORDER BY entry LIMIT ?)",
        (below, limit),
    )
    return {"pruned": cursor.rowcount}


async def old_keys(readers: Readers, before_s: float) -> tuple[int, int]:
    """Up to which entry idempotency keys are from before `before_s`, and how many those are."""
    found = await readers.fetch(
        "SELECT entry FROM idempotency WHERE created_at >= ? ORDER BY entry LIMIT 1", (before_s,)
    )
    below = found[0][0] if found else 2**62
    counted = await readers.fetch("SELECT count(*) FROM idempotency WHERE entry < ?", (below,))
    return below, int(counted[0][0])


async def originals_among(readers: Readers, row_ids: Collection[int]) -> set[int]:
    """Those of the memories that a consolidated memory stands for."""
    found = await readers.fetch(
        "SELECT DISTINCT member_row_id FROM consolidation_members "
        "WHERE member_row_id IN (SELECT value FROM json_each(?))",
        (rows.to_json(sorted(row_ids)),),
    )
    return {row[0] for row in found}


async def count_due(readers: Readers, as_of_s: float, namespaces: Collection[str] | None) -> int:
    """How many memories are due at `as_of_s`; reads the index of what is due and nothing else."""
    if namespaces is None:
        found = await readers.fetch(
            "SELECT count(*) FROM memories INDEXED BY memories_by_due WHERE due_at <= ?", (as_of_s,)
        )
    else:
        found = await readers.fetch(_DUE_OF, (as_of_s, rows.to_json(sorted(namespaces))))
    return int(found[0][0])


_IS_MEMBER: Final = "SELECT 1 FROM consolidation_members WHERE member_row_id = ? LIMIT 1"
_DUE_OF: Final = (
    "SELECT count(*) FROM memories INDEXED BY memories_by_due WHERE due_at <= ? "
    "AND namespace IN (SELECT value FROM json_each(?))"
)

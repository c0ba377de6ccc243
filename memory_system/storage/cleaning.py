"""What cleanup removes: memories whose time is over, and the keys of requests that nobody repeats any more."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from memory_system import lifecycle
from memory_system.lifecycle import SESSION_TYPE
from memory_system.models import Memory
from memory_system.storage import removal, rows
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.readers import Readers

_Hanging = tuple[float, int, str]  # created_at, row_id, memory_id


class Moved(NamedTuple):
    """A memory that stays when its parent or session is deleted, and what it has in the place of that."""

    memory_id: str
    reason: str
    before: str
    after: str | None


def remove_expired(context: WriteContext, row_ids: Sequence[int], as_of_s: float, budget: int) -> Reply:
    """Delete those of the memories, of the context's namespace, whose time was over at `as_of_s`.

    What hangs below them stays, and is handed to their parents; what was made in a session that goes stays without it.
    At most about `budget` rows are written: `left` has the row ids for the next call, `removed` those that are gone,
    `moved` what was handed over (Moved).
    """
    doomed: list[removal.Doomed] = []
    left: list[int] = []
    moved: list[Moved] = []
    parents: dict[str, str | None] = {}  # of the doomed
    for memory in sorted(rows.fetch_rows(context.db, row_ids), key=lambda memory: row_ids.index(memory.row_id)):
        if memory.namespace != context.namespace or not _is_over(context, memory, as_of_s):
            continue
        parent_id = memory.parent_id
        while parent_id in parents:
            parent_id = parents[parent_id]
        cut = _detach(context, memory, parent_id, budget) if budget > 0 else []
        moved += [each for each in cut if each.memory_id not in parents]
        budget -= 1 + len(cut)
        if budget < 0:
            left.append(memory.row_id)
        else:
            parents[memory.memory_id] = parent_id
            digest = memory.content_digest
            doomed.append((memory.row_id, memory.namespace, memory.memory_id, digest, memory.memory_type))
    removal.remove(context, doomed)
    return {"removed": [row_id for row_id, *_ in doomed], "left": left, "moved": moved}


def _is_over(context: WriteContext, memory: Memory, as_of_s: float) -> bool:
    if memory.due_at is None or memory.due_at > as_of_s:
        return False
    decision = lifecycle.decide(context.lifecycle, memory, as_of_s)
    return decision.kind == "expire" and (
        decision.reason == "expired" or not context.db.execute(_IS_MEMBER, (memory.row_id,)).fetchone()
    )


def _detach(context: WriteContext, memory: Memory, parent_id: str | None, limit: int) -> list[Moved]:
    """Hand up to `limit` of what hangs at a memory to `parent_id`."""
    place = (memory.namespace, memory.memory_id)
    children = context.db.execute(f"{_CHILDREN} LIMIT ?", (*place, limit)).fetchall()
    members = []
    if memory.memory_type == SESSION_TYPE:
        members = context.db.execute(f"{_MEMBERS} LIMIT ?", (*place, limit - len(children))).fetchall()
    context.db.execute(
        f"UPDATE memories SET parent_id = ?, updated_at = ? WHERE {_AMONG}",
        (parent_id, context.now_s, rows.to_json([row_id for _, row_id, _ in children])),
    )
    context.db.execute(
        f"UPDATE memories SET session_id = NULL WHERE {_AMONG}", (rows.to_json([row_id for _, row_id, _ in members]),)
    )
    for _, row_id, memory_id in (*children, *members):
        context.log_change(row_id, "put")
        context.changes.stale.append((memory.namespace, memory_id))
    return [
        *(Moved(memory_id, "parent_deleted", memory.memory_id, parent_id) for _, _, memory_id in children),
        *(Moved(memory_id, "session_deleted", memory.memory_id, None) for _, _, memory_id in members),
    ]


class HandingOver:
    """What `remove_expired` would hand over, told by reading: to be asked about the doomed in its order, each once."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self._gone: set[tuple[str, str]] = set()
        self._parents: dict[tuple[str, str], str | None] = {}  # of what would be handed over by now
        self._heirs: dict[tuple[str, str], list[_Hanging]] = {}

    async def by(self, namespace: str, row_ids: Sequence[int]) -> list[Moved]:
        """What goes to others when these memories of a namespace are deleted."""
        moved: list[Moved] = []
        found = await self._readers.fetch(_DOOMED, (rows.to_json(list(row_ids)),))
        for memory_id, parent_id, memory_type in found:
            place = namespace, memory_id
            parent_id = self._parents.pop(place, parent_id)
            stored = await self._readers.fetch(_CHILDREN, place)
            children = [
                child
                for child in sorted([*stored, *self._heirs.pop(place, [])])
                if (namespace, child[2]) not in self._gone
            ]
            if parent_id is not None:
                self._heirs.setdefault((namespace, parent_id), []).extend(children)
            self._parents.update(((namespace, child_id), parent_id) for _, _, child_id in children)
            moved += [Moved(child_id, "parent_deleted", memory_id, parent_id) for _, _, child_id in children]
            if memory_type == SESSION_TYPE:
                members = await self._readers.fetch(_MEMBERS, place)
                moved += [
                    Moved(member_id, "session_deleted", memory_id, None)
                    for _, _, member_id in members
                    if (namespace, member_id) not in self._gone
                ]
            self._gone.add(place)
        return moved


async def count_old_keys(readers: Readers, before_s: float) -> int:
    """How many idempotency keys `idempotency.prune` would drop."""
    found = await readers.fetch(
        "SELECT count(*) FROM idempotency WHERE entry < "
        "coalesce((SELECT min(entry) FROM idempotency WHERE created_at >= ?), 9223372036854775807)",
        (before_s,),
    )
    return int(found[0][0])


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


# In the order of the index that each reads by.
_HANGING: Final = "SELECT created_at, row_id, memory_id FROM memories WHERE namespace = ? AND "
_CHILDREN: Final = f"{_HANGING} parent_id = ? ORDER BY created_at, row_id"
_MEMBERS: Final = f"{_HANGING} session_id = ? ORDER BY row_id"
_AMONG: Final = "row_id IN (SELECT value FROM json_each(?))"
_DOOMED: Final = (
    "SELECT m.memory_id, m.parent_id, m.memory_type FROM json_each(?) AS wanted "
    "CROSS JOIN memories AS m ON m.row_id = wanted.value ORDER BY wanted.key"
)
_IS_MEMBER: Final = "SELECT 1 FROM consolidation_members WHERE member_row_id = ? LIMIT 1"
_DUE_OF: Final = (
    "SELECT count(*) FROM memories INDEXED BY memories_by_due WHERE due_at <= ? "
    "AND namespace IN (SELECT value FROM json_each(?))"
)

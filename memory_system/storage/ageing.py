"""What is due: finding it by its index, and doing what the lifecycle decides about it.

`due_at` is the instant from which something is to be decided about a memory, and has an index of its own: a run
reads and writes what is due, however much else there is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from memory_system import lifecycle
from memory_system.lifecycle import Decision, Kind
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.models import Memory
from memory_system.storage import rows
from memory_system.storage.context import WriteContext
from memory_system.storage.readers import Readers

Position = tuple[float, int]  # (due_at, row_id) of the last row of a slice

# What the decay run does; `consolidate` waits for the consolidation, `expire` for the cleanup.
DECAY: Final[frozenset[Kind]] = frozenset({"keep", "promote", "archive"})


class DueRow(Struct, frozen=True, kw_only=True):
    """The part of a memory that ageing looks at (lifecycle.Aged), and its names."""

    row_id: int
    namespace: str
    memory_id: str
    memory_type: str
    memory_tier: str
    importance: float
    importance_at: float
    access_count: int
    tier_since: float
    expires_at: float | None
    state: str
    archived_at: float | None
    tier_accesses: int
    promote_at: float | None
    due_at: float

    @property
    def position(self) -> Position:
        return self.due_at, self.row_id


class Change(Struct, frozen=True, kw_only=True):
    """What a run does, or would do, to one memory. `before` and `after`: its tier if promoted, else its state."""

    row_id: int
    namespace: str
    memory_id: str
    kind: Kind
    before: str
    after: str
    reason: str
    importance: float


_SELECT: Final = (
    f"SELECT {', '.join(DueRow.__struct_fields__)} FROM memories INDEXED BY memories_by_due "
    "WHERE due_at <= ? AND (due_at, row_id) > (?, ?)"
)


async def due_rows(
    readers: Readers,
    as_of_s: float,
    *,
    after: Position | None = None,
    limit: int = 200,
    namespaces: Collection[str] | None = None,
) -> list[DueRow]:
    """Up to `limit` memories that are due at `as_of_s`, in the order of (due_at, row_id), from after `after`.

    `namespaces`: only those of these; None: all. The next slice begins after the `position` of the last row.
    """
    due_s, row_id = after or (float("-inf"), 0)
    sql = _SELECT
    parameters: list[float | str] = [as_of_s, due_s, row_id]
    if namespaces is not None:
        sql += " AND namespace IN (SELECT value FROM json_each(?))"
        parameters.append(rows.to_json(sorted(namespaces)))
    found = await readers.fetch(f"{sql} ORDER BY due_at, row_id LIMIT ?", [*parameters, limit])
    return [DueRow(**dict(zip(DueRow.__struct_fields__, row, strict=True))) for row in found]


def change_of(memory: DueRow | Memory, decision: Decision) -> Change | None:
    """What a caller would see of the decision; None when it leaves the memory as it is, or to another run."""
    if decision.kind not in ("promote", "archive"):
        return None
    promoted = decision.kind == "promote"
    return Change(
        row_id=memory.row_id,
        namespace=memory.namespace,
        memory_id=memory.memory_id,
        kind=decision.kind,
        before=memory.memory_tier if promoted else memory.state,
        after=str(decision.to_tier) if promoted else "archived",
        reason=decision.reason,
        importance=decision.importance,
    )


def apply(
    context: WriteContext, row_ids: Sequence[int], as_of_s: float, kinds: Collection[Kind] = DECAY
) -> list[Change]:
    """Decide anew about these memories of the context's namespace, as of `as_of_s`, and do what is of `kinds`.

    A row that is not due any more (done before, or used since) is left alone, so doing it twice changes nothing.
    What leaves a memory as it is moves its `due_at` forward; `consolidate` and `expire` among `kinds` do no more
    than that either. Returns what was changed.
    """
    changes, aged = [], []
    for old in rows.fetch_rows(context.db, row_ids):
        if old.namespace != context.namespace or old.due_at is None or old.due_at > as_of_s:
            continue
        decision = lifecycle.decide(context.lifecycle, old, as_of_s)
        if decision.kind in kinds:
            aged.append(msgspec.structs.replace(old, **lifecycle.changed_fields(old, decision, as_of_s)))
            if (aged[-1].memory_tier, aged[-1].state) != (old.memory_tier, old.state):
                context.log_change(old.row_id, "put")
            change = change_of(old, decision)
            if change is not None:
                changes.append(change)
    write_clocks(context, aged)
    context.changes.written += aged
    return changes


_CLOCKS: Final = rows.RowUpdate(
    *("memory_tier", "importance", "importance_at", "tier_since", "tier_accesses", "promote_at"),
    *("state", "archived_at", "due_at"),
)


def write_clocks(context: WriteContext, memories: Sequence[Memory]) -> None:
    """Write the fields of memories that ageing changes: tier, state, importance and their clocks, `due_at`."""
    _CLOCKS.write(context.db, memories)


def archived(settings: LifecycleSettings, memory: Memory, now_s: float) -> Memory:
    """The memory as archived at `now_s`; one that is archived stays as it is."""
    if memory.archived_at is not None:
        return memory
    memory = msgspec.structs.replace(memory, state="archived", archived_at=now_s, promote_at=None)
    return msgspec.structs.replace(memory, due_at=lifecycle.due_at(settings, memory))


def restored(settings: LifecycleSettings, memory: Memory, importance: float, now_s: float) -> Memory:
    """The archived memory brought back, important enough to stay for a while, its clocks started anew."""
    memory = msgspec.structs.replace(
        memory,
        state="active",
        archived_at=None,
        importance=max(importance, lifecycle.restore_importance(settings, memory.memory_tier)),
        importance_at=now_s,
        tier_since=now_s,
        tier_accesses=0,
        promote_at=None,
    )
    return msgspec.structs.replace(memory, due_at=lifecycle.due_at(settings, memory))


def decisions(settings: LifecycleSettings, due: Sequence[DueRow], as_of_s: float) -> list[tuple[DueRow, Decision]]:
    """What is to be done with each, as of `as_of_s`: what a dry run shows."""
    return [(row, lifecycle.decide(settings, row, as_of_s)) for row in due]

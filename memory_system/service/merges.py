"""The runs that merge: consolidation of what fades, and its undoing."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Final

from memory_system.consolidation.plan import Plan
from memory_system.lifecycle import Kind
from memory_system.service import Reply
from memory_system.service.consolidating import Consolidating, Cursor
from memory_system.service.run import Run
from memory_system.storage import ageing
from memory_system.storage.ageing import DueRow
from memory_system.storage.context import WriteContext

_FADING: Final[frozenset[Kind]] = frozenset({"consolidate"})
# Memories that one plan is made for.
_PLANNED: Final = 50


class Merges:
    """The work of the jobs consolidation and undo_consolidation. `slice_rows`: how many one write lets fade on."""

    def __init__(self, consolidating: Consolidating, slice_rows: int) -> None:
        self._consolidating = consolidating
        self._slice_rows = slice_rows

    async def consolidate(self, namespaces: Collection[str] | None, run: Run) -> Reply:
        """Merge what fades with its kin; what has none fades on. The reply has the first `plans`."""
        shown: list[Reply] = []
        after: Cursor | None = None
        seen = 0
        while True:
            run.check()
            began_s = time.monotonic()
            planned = await self._consolidating.plan(run.as_of_s, namespaces, _PLANNED, after)
            await run.rest(time.monotonic() - began_s)
            for plan in planned.plans:
                await self._merge(run, plan, shown)
            await self._fade(run, planned.alone)
            seen += planned.seen
            run.progress("due", seen)
            after = planned.after
            if after is None:
                return _plans(run, shown)

    async def _merge(self, run: Run, plan: Plan, shown: list[Reply]) -> None:
        memory_id = None
        if not run.dry_run:
            job = self._consolidating.job(plan)
            done = await run.write(job, plan.namespace, rows=plan.rows, counted=True)
            if not done["done"]:  # one of them was changed since, and is looked at by the next run
                run.counts["left"] += 1
                return
            memory_id = done["memory_id"]
        run.counts[plan.kind] += 1
        run.tally.mark(plan.digest)  # which of them became one memory, and what it says
        for member in plan.members:
            run.change(member, plan.namespace, "active", "archived", plan.kind)
        if len(shown) < run.limit:
            shown.append({**plan.as_dict(), **({} if memory_id is None else {"memory_id": memory_id})})

    async def _fade(self, run: Run, alone: Sequence[DueRow]) -> None:
        run.counts["faded"] += len(alone)
        if run.dry_run:
            return
        namespaces = dict.fromkeys(row.namespace for row in alone)
        for namespace in namespaces:
            row_ids = [row.row_id for row in alone if row.namespace == namespace]
            for start in range(0, len(row_ids), self._slice_rows):
                part = row_ids[start : start + self._slice_rows]
                # Only due_at changes, which no reader sees.
                await run.write(partial(_look_later, row_ids=part, as_of_s=run.as_of_s), namespace, rows=len(part))

    async def undo(self, namespace: str, memory_id: str, run: Run) -> None:
        """Bring back the originals of a consolidated memory, and remove it. Raises MemoryNotFound, InvalidField."""
        outcome = await self._consolidating.undo(namespace, memory_id, dry_run=run.dry_run)
        for member in outcome.members:
            run.change(member, namespace, "archived", "active", "undone")
        run.change(memory_id, namespace, "active", "deleted", "undone")


def _look_later(context: WriteContext, row_ids: Sequence[int], as_of_s: float) -> Reply:
    ageing.apply(context, row_ids, as_of_s, _FADING)
    return {}


def _plans(run: Run, shown: list[Reply]) -> Reply:
    """Shown with their content, stored without: what is deleted later must not live on in a stored reply."""
    run.live["plans"] = shown
    return {"plans": [_without_content(plan) for plan in shown]}


def _without_content(plan: dict[str, Any]) -> Reply:
    return {name: value for name, value in plan.items() if name not in ("content", "fields", "pieces")}

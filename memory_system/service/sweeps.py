"""Runs over what is due: decay (promotion and archive) and cleanup, slice by slice.

A dry run takes the same way through the same slices, and leaves out the writing: so it shows what a run changes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection, Sequence
from functools import partial

from memory_system.lifecycle import Decision
from memory_system.service import Reply
from memory_system.service.run import Run
from memory_system.settings import Settings
from memory_system.storage import ageing, cleaning, idempotency
from memory_system.storage import runs as stored_runs
from memory_system.storage.ageing import DueRow
from memory_system.storage.context import WriteContext
from memory_system.storage.readers import Readers

Namespaces = Collection[str] | None
Decided = tuple[DueRow, Decision]

_SECONDS_PER_DAY = 86_400.0
_SECONDS_PER_HOUR = 3_600.0


class Sweeps:
    """The work of the jobs decay and cleanup."""

    def __init__(self, readers: Readers, settings: Settings) -> None:
        self._readers = readers
        self._lifecycle = settings.lifecycle
        self._maintenance = settings.maintenance
        self._keys_s = settings.storage.idempotency_ttl_h * _SECONDS_PER_HOUR

    async def decay(self, namespaces: Namespaces, run: Run) -> None:
        """Promote and archive what is due; what stays as it is is looked at again later.

        What is to be consolidated or deleted waits for those runs.
        """
        async for decided in self._due(run, namespaces):
            theirs = [each for each in decided if each[1].kind in ageing.DECAY]
            for namespace, group in by_namespace(theirs):
                for change in await self._age(run, namespace, group):
                    run.change(change.memory_id, change.namespace, change.before, change.after, change.reason)

    async def _age(self, run: Run, namespace: str, group: Sequence[Decided]) -> list[ageing.Change]:
        if run.dry_run:
            found = (ageing.change_of(row, decision) for row, decision in group)
            return [change for change in found if change is not None]
        apply = partial(_apply, row_ids=[row.row_id for row, _ in group], as_of_s=run.as_of_s)
        changes: list[ageing.Change] = (await run.write(apply, namespace, rows=len(group), counted=True))["changes"]
        return changes

    async def cleanup(self, namespaces: Namespaces, run: Run) -> None:
        """Delete what has expired, old idempotency keys, and old runs; with `namespaces`, only what has expired."""
        handing_over = cleaning.HandingOver(self._readers)
        async for decided in self._due(run, namespaces):
            theirs = [each for each in decided if each[1].kind == "expire"]
            originals = await self._originals(theirs)
            theirs = [each for each in theirs if each[1].reason == "expired" or each[0].row_id not in originals]
            for namespace, group in by_namespace(theirs):
                row_ids = [row.row_id for row, _ in group]
                if run.dry_run:
                    removed = set(row_ids)
                    _tell_moved(run, namespace, await handing_over.by(namespace, row_ids))
                else:
                    removed = await self._remove(run, namespace, row_ids)
                for row, decision in group:
                    if row.row_id in removed:
                        run.change(row.memory_id, namespace, row.state, "deleted", decision.reason)
        if namespaces is None:
            await self._remove_keys(run)
            await self._remove_runs(run)

    async def _originals(self, decided: Sequence[Decided]) -> set[int]:
        """Those that stay archived because a consolidated memory stands for them."""
        asked = [row.row_id for row, decision in decided if decision.reason != "expired"]
        return await cleaning.originals_among(self._readers, asked) if asked else set()

    async def _remove(self, run: Run, namespace: str, row_ids: list[int]) -> set[int]:
        removed: set[int] = set()
        budget = self._maintenance.slice_rows
        while row_ids:
            remove = partial(cleaning.remove_expired, row_ids=row_ids, as_of_s=run.as_of_s, budget=budget)
            reply = await run.write(remove, namespace, rows=budget, counted=True)
            removed.update(reply["removed"])
            _tell_moved(run, namespace, reply["moved"])
            row_ids = reply["left"]
        return removed

    async def _remove_keys(self, run: Run) -> None:
        before_s = run.as_of_s - self._keys_s
        count = await cleaning.count_old_keys(self._readers, before_s)
        run.counts["idempotency_keys"] = count
        if run.dry_run:
            return
        run.counts["idempotency_keys"] = 0
        while pruned := (await run.write(partial(idempotency.prune, before_s=before_s, limit=200), rows=200))["pruned"]:
            run.counts["idempotency_keys"] += pruned
            run.progress("idempotency_keys", run.counts["idempotency_keys"], count)

    async def _remove_runs(self, run: Run) -> None:
        before_s = run.as_of_s - self._maintenance.runs_kept_days * _SECONDS_PER_DAY
        run.counts["runs"] = 0
        if run.dry_run:
            run.counts["runs"] = await stored_runs.count_old(self._readers, before_s)
            return
        while pruned := (await run.write(partial(stored_runs.prune, before_s=before_s), rows=200))["pruned"]:
            run.counts["runs"] += pruned

    async def _due(self, run: Run, namespaces: Namespaces) -> AsyncIterator[list[Decided]]:
        """What is due, in slices, with what is to be done about it."""
        total = await cleaning.count_due(self._readers, run.as_of_s, namespaces)
        after: ageing.Position | None = None
        done = 0
        run.progress("due", done, total)
        limit = self._maintenance.slice_rows
        began_s = time.monotonic()
        while due := await ageing.due_rows(self._readers, run.as_of_s, after=after, limit=limit, namespaces=namespaces):
            after = due[-1].position
            # What this very run has promoted may be due again at once: that is for the next run.
            yield ageing.decisions(self._lifecycle, [row for row in due if row.tier_since < run.as_of_s], run.as_of_s)
            done += len(due)
            run.progress("due", done, max(done, total))
            if run.dry_run:  # otherwise each write is followed by a rest
                await run.rest(time.monotonic() - began_s)
            began_s = time.monotonic()


def _tell_moved(run: Run, namespace: str, moved: Sequence[cleaning.Moved]) -> None:
    for memory_id, reason, before, after in moved:
        change = {"memory_id": memory_id, "namespace": namespace, "from": before, "to": after, "reason": reason}
        run.tally.add("handed_over", change)


def by_namespace(decided: Sequence[Decided]) -> list[tuple[str, list[Decided]]]:
    """The parts of a slice, each of one namespace, in the order in which these come first."""
    groups: dict[str, list[Decided]] = {}
    for each in decided:
        groups.setdefault(each[0].namespace, []).append(each)
    return list(groups.items())


def _apply(context: WriteContext, row_ids: Sequence[int], as_of_s: float) -> Reply:
    return {"changes": ageing.apply(context, row_ids, as_of_s)}

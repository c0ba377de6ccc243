"""The admin actions: runs of maintenance, begun by the scheduler or by hand, and what became of them."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Final

import msgspec

from memory_system import admin_models as a
from memory_system import cursors
from memory_system.calls import Call, ResultList
from memory_system.log import get_logger
from memory_system.search.index import SearchIndex
from memory_system.service import Reply
from memory_system.service.checking import Checking
from memory_system.service.merges import Merges
from memory_system.service.reindexing import Reindexing
from memory_system.service.run import Run, Work
from memory_system.service.runs import Runs, head
from memory_system.service.sweeps import Sweeps
from memory_system.storage import runs as stored_runs
from memory_system.storage.readers import Readers
from memory_system.storage.runs import StoredRun, Wanted
from memory_system.storage.writer import Writer

log = get_logger("service.maintaining")

_LIST_ITEM: Final = ("counts", "changes", "digest")


class MaintainingService:
    """One method for each admin action; the work itself is done by the parts that are passed in."""

    def __init__(
        self,
        runs: Runs,
        writer: Writer,
        readers: Readers,
        index: SearchIndex,
        sweeps: Sweeps,
        merges: Merges,
        checking: Checking,
        reindexing: Reindexing,
    ) -> None:
        self._runs = runs
        self._writer = writer
        self._readers = readers
        self._index = index
        self._sweeps = sweeps
        self._merges = merges
        self._checking = checking
        self._reindexing = reindexing

    def run_decay(self, call: Call, p: a.Sweep) -> Any:
        return self._sweep(call, "decay", p, partial(self._sweeps.decay, p.namespaces))

    def run_cleanup(self, call: Call, p: a.Sweep) -> Any:
        return self._sweep(call, "cleanup", p, partial(self._sweeps.cleanup, p.namespaces))

    def run_consolidation(self, call: Call, p: a.Sweep) -> Any:
        return self._sweep(call, "consolidation", p, partial(self._merges.consolidate, p.namespaces))

    def _sweep(self, call: Call, job: str, p: a.Sweep, work: Work) -> Any:
        """A run that changes memories: as of an instant, and not while the clock is unsettled."""
        return self._runs.perform(
            call,
            job,
            work,
            asked=_asked(p),
            as_of_s=p.as_of,
            dry_run=p.dry_run,
            limit=p.limit,
            irreversible=True,
        )

    def undo_consolidation(self, call: Call, p: a.UndoConsolidation) -> Any:
        work = partial(self._merges.undo, call.namespace, p.memory_id)
        asked = {"namespace": call.namespace, **_asked(p)}
        return self._runs.perform(call, "undo_consolidation", work, asked=asked, dry_run=p.dry_run, limit=1000)

    def run_snapshot(self, call: Call, p: a.RunSnapshot) -> Any:
        return self._runs.perform(call, "snapshot", self._snapshot, asked={})

    async def _snapshot(self, run: Run) -> Reply:
        saved = await asyncio.wrap_future(self._index.save_soon())
        return {"saved": saved, "seq": self._index.applied_seq}

    def run_checkpoint(self, call: Call, p: a.RunCheckpoint) -> Any:
        return self._runs.perform(call, "checkpoint", self._checkpoint, asked={})

    async def _checkpoint(self, run: Run) -> Reply:
        return await self._writer.checkpoint()

    def run_integrity_check(self, call: Call, p: a.RunIntegrityCheck) -> Any:
        work = partial(self._checking.check, p.full, p.limit)
        return self._runs.perform(call, "integrity_check", work, asked=_asked(p))

    def reindex(self, call: Call, p: a.Reindex) -> Any:
        work = partial(self._reindexing.reindex, p.keywords, p.vectors)
        return self._runs.perform(call, "reindex", work, asked=_asked(p))

    async def list_runs(self, call: Call, p: a.ListRuns) -> Reply:
        """Newest first; those under way tell how far they are."""
        scope = cursors.scope("list_runs", p.job, p.run_state, p.run_id)
        below = cursors.offset_of(p.cursor, scope) or 2**62
        wanted = Wanted(job=p.job, state=p.run_state, run_id=p.run_id, below=below)
        found = await stored_runs.page(self._readers, wanted, p.limit + 1)
        progress = self._runs.figures()
        results = ResultList(call.encoding, p.limit)
        taken = [run for run in found if results.add(_item(run, progress, whole=p.run_id is not None))]
        if len(taken) < len(found):
            return results.reply(next_cursor=cursors.at_offset(taken[-1].run_id, scope, call.now_s))
        return results.reply()


def _asked(p: msgspec.Struct) -> dict[str, Any]:
    """The fields of a request, as its row keeps them; `limit` changes what is shown and not what is done."""
    fields: dict[str, Any] = msgspec.to_builtins(p)
    fields.pop("limit", None)
    return fields


def _item(run: StoredRun, progress: dict[str, Reply], *, whole: bool) -> Reply:
    """A run as list_runs shows it; `whole`: with the changes that its reply showed."""
    item = head(run, run.started_at)
    item |= {"request_id": run.request_id, "asked": run.asked, "asked_by": run.asked_by}
    item |= {"finished_at": run.finished_at, "state": run.state, "error": run.error}
    result = run.result or {}
    item |= result if whole else {name: result[name] for name in _LIST_ITEM if name in result}
    if run.state == "running" and (figures := progress.get(run.job)) is not None:
        item["progress"] = {name: figures[name] for name in ("part", "done", "total")}
    return item

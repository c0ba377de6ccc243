"""Runs of maintenance: each is noted in the store, happens once for its request_id, and can be watched.

A run belongs to nobody's connection: it goes on when its caller has gone, and who asks again under the same
request_id joins it, or gets its stored result. One that did not get to its end is taken up again, as of the same
instant. Of each job one run is under way at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from memory_system.calls import Call
from memory_system.clock_guard import ClockGuard
from memory_system.errors import (
    Busy,
    ClockUnsettled,
    DeadlineExceeded,
    InternalError,
    InvalidField,
    MemorySystemError,
    ShuttingDown,
)
from memory_system.log import get_logger
from memory_system.service import Reply
from memory_system.service.run import LANE, Run, Work
from memory_system.settings import Settings
from memory_system.storage import runs as stored_runs
from memory_system.storage.context import WriteContext
from memory_system.storage.jobs import WriteJob
from memory_system.storage.readers import Readers
from memory_system.storage.runs import NewRun, StoredRun
from memory_system.storage.writer import Writer

log = get_logger("service.runs")

_BUSY_RETRY_MS: Final = 1000
# An `as_of` that a dry run gave a moment ago may lie ahead of a clock that was set back by a little since.
_FUTURE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks for a run and by when, as a Call tells it."""

    caller: str
    request_id: str | None
    now_s: float
    deadline_s: float | None


@dataclass(slots=True)
class _Active:
    """A run under way, from before it has its row. `run` is None until then."""

    new: NewRun
    task: asyncio.Task[Reply]
    run: Run | None = None


@dataclass(frozen=True, slots=True)
class _Order:
    """How a run is to be done. `irreversible`: it waits for a settled clock, unless it only shows what it would do."""

    new: NewRun
    work: Work
    limit: int
    irreversible: bool


def steady_s() -> float:
    """Seconds that nobody can set; where the system tells, those of a suspended machine count too."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Runs:
    """Begins, joins, watches and ends runs. Lives on one event loop."""

    def __init__(self, writer: Writer, readers: Readers, settings: Settings) -> None:
        self._writer = writer
        self._readers = readers
        self._maintenance = settings.maintenance
        self._clock = settings.clock
        self._active: dict[str, _Active] = {}
        self._stopping = False

    def __repr__(self) -> str:
        return f"<Runs {', '.join(self._active) or 'idle'}>"

    async def start(self) -> None:
        """Close the rows of a process that is gone. Comes before the first run."""
        try:
            left = (await self._submit(stored_runs.interrupt))["interrupted"]
        except MemorySystemError as error:  # a full disk keeps nobody from reading
            log.warning("runs_left_open", error_code=error.code, reason=error.message)
        else:
            if left:
                log.warning("runs_interrupted", runs=left, reason="the service ended while they ran")
        self.guard = ClockGuard(
            time.time(),
            steady_s(),
            jump_s=self._clock.jump_s,
            settle_s=self._clock.settle_s,
            not_before_s=await stored_runs.last_started_at(self._readers),
        )

    def stop(self) -> None:
        """End what is under way: its callers get `shutting_down`, its rows say interrupted."""
        self._stopping = True
        for active in self._active.values():
            active.task.cancel()

    async def close(self) -> None:
        """Stop, and return when all have ended."""
        self.stop()
        await asyncio.gather(*(active.task for active in self._active.values()), return_exceptions=True)

    async def perform(
        self,
        call: Call | Asker,
        job: str,
        work: Work,
        *,
        asked: Mapping[str, Any],
        as_of_s: float | None = None,
        dry_run: bool = False,
        limit: int = 50,
        irreversible: bool = False,
    ) -> Reply:
        """Do a job, or join the run that this request began, or give its stored result.

        `asked`: the fields of the request, as JSON can hold them. Raises Busy while another run of the job is under
        way, ClockUnsettled, IdempotencyMismatch, InvalidField for an `as_of` that is still to come, ShuttingDown.
        """
        as_of = call.now_s if as_of_s is None else as_of_s
        new = NewRun(
            job=job,
            request_id=call.request_id,
            asked=dict(asked),
            asked_by=call.caller,
            as_of=as_of,
            dry_run=dry_run,
        )
        if (joined := self._joinable(new)) is not None:
            return await self._join(joined)
        if new.request_id is not None and (found := await stored_runs.by_request_id(self._readers, new.request_id)):
            stored_runs.check_same(found, new)
            if found.state == "done":
                return _replay(found)
        # From here to the entry in _active nothing waits, so that no two runs of a job begin.
        if (joined := self._joinable(new)) is not None:
            return await self._join(joined)
        self._check(call, new, irreversible)
        task = asyncio.create_task(self._run(_Order(new, work, limit, irreversible)), name=f"run-{job}")
        self._active[job] = _Active(new, task)
        task.add_done_callback(partial(self._ended, job))
        return await asyncio.shield(task)

    def figures(self) -> dict[str, Reply]:
        """The runs under way: job -> run_id, part, done, total. May be called from any thread."""
        return {
            job: {"run_id": active.run.run_id, **active.run.figures()}
            for job, active in list(self._active.items())
            if active.run is not None
        }

    def _joinable(self, new: NewRun) -> _Active | None:
        """The run under way that this request began. Raises IdempotencyMismatch."""
        if new.request_id is None:
            return None
        for active in self._active.values():
            if active.new.request_id == new.request_id:
                stored_runs.check_same(active.new, new)
                return active
        return None

    async def _join(self, active: _Active) -> Reply:
        return {**await asyncio.shield(active.task), "joined": True}

    def _check(self, call: Call | Asker, new: NewRun, irreversible: bool) -> None:
        """Raise what stands in the way of a new run."""
        if self._stopping:
            raise ShuttingDown("the service is stopping; try again in a moment", retry_after_ms=500)
        if call.deadline_s is not None and time.monotonic() > call.deadline_s:
            raise DeadlineExceeded("the deadline passed before the run began; nothing was done")
        if new.as_of > call.now_s + _FUTURE_S and not new.dry_run:
            raise InvalidField("as_of", "as_of is still to come: only a dry run can look ahead", now=call.now_s)
        if (active := self._active.get(new.job)) is not None:
            raise Busy(
                f"a run of {new.job} is under way",
                retry_after_ms=_BUSY_RETRY_MS,
                **({} if active.run is None else {"run_id": active.run.run_id}),
            )
        if irreversible and not new.dry_run:
            self._check_clock()

    def _check_clock(self) -> None:
        """Raise ClockUnsettled when the clock was moved a moment ago."""
        wall_s, now_s = time.time(), steady_s()
        if self.guard.observe(wall_s, now_s):
            log.error(
                "clock_moved",
                reason="the wall clock was set: nothing irreversible is done until it has settled",
                settle_s=self._clock.settle_s,
            )
        self.guard.check(wall_s, now_s)

    def is_clock_settled(self) -> bool:
        """Whether what cannot be undone may be done now."""
        try:
            self._check_clock()
        except ClockUnsettled:
            return False
        return True

    def _ended(self, job: str, task: asyncio.Task[Reply]) -> None:
        del self._active[job]
        if not task.cancelled():
            task.exception()  # seen, also where no caller is left to hear of it

    async def _run(self, order: _Order) -> Reply:
        """The whole of a run, from its row to its reply."""
        new = order.new
        begun = await self._submit(partial(stored_runs.begin, new=new))
        if "done" in begun:
            return _replay(begun["done"])
        run = Run(
            self._writer,
            run_id=begun["run_id"],
            job=new.job,
            as_of_s=begun["as_of"],
            dry_run=new.dry_run,
            limit=order.limit,
            share=self._maintenance.share,
            check=self._check_clock if order.irreversible and not new.dry_run else lambda: None,
        )
        self._active[new.job].run = run
        log.info("run_started", run_id=run.run_id, job=run.job, as_of=run.as_of_s, dry_run=run.dry_run)
        try:
            result = run.reply(await order.work(run))
        except asyncio.CancelledError:
            await self._finish(run, "interrupted")
            raise ShuttingDown("the service is stopping; the run goes on when it is asked for again") from None
        except MemorySystemError as error:
            await self._failed(run, error)
            raise
        except Exception as error:  # a defect in one job is told like any other, and must not end the service
            log.exception("run_defect", run_id=run.run_id, job=run.job)
            named = InternalError("the run met a defect of the service; its log has the details")
            await self._failed(run, named)
            raise named from error
        ended = await self._finish(run, "done", result=result)
        return {**head(run, begun["started_at"]), **ended, **result, **run.live}

    async def _failed(self, run: Run, error: MemorySystemError) -> None:
        log.error("run_failed", run_id=run.run_id, job=run.job, error_code=error.code, reason=error.message)
        await self._finish(run, "failed", error={"error_code": error.code, "message": error.message})

    async def _finish(self, run: Run, state: stored_runs.State, **outcome: Any) -> Reply:
        ended = await self._submit(partial(stored_runs.finish, run_id=run.run_id, state=state, **outcome))
        log.info("run_ended", run_id=run.run_id, job=run.job, state=state, changes=run.tally.changes, **run.counts)
        return ended

    async def _submit(self, function: Callable[[WriteContext], Reply]) -> Reply:
        return await self._writer.submit(WriteJob(function, "", counted=False, client=LANE))


def head(run: Run | StoredRun, started_at: float) -> Reply:
    """What every reply of a run begins with."""
    as_of = run.as_of_s if isinstance(run, Run) else run.as_of
    return {
        "run_id": run.run_id,
        "job": run.job,
        "as_of": as_of,
        "dry_run": run.dry_run,
        "started_at": started_at,
    }


def _replay(stored: StoredRun) -> Reply:
    ended = {"finished_at": stored.finished_at, "replayed": True}
    return {**head(stored, stored.started_at), **(stored.result or {}), **ended}

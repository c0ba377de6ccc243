"""Keeps one job: runs it at each of its times, once, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from memory_system.log import get_logger
from memory_system.scheduling.jobs import Job
from memory_system.scheduling.link import Link, Reply, pause_s
from memory_system.scheduling.runs import Run

MAX_PAUSE_S: Final = 60.0
LONG_DELAY_S: Final = 300.0
_KNOWN_FIRES: Final = 100
_LOOK_S: Final = 0.5

log = get_logger("scheduler")


class Runner:
    """One job. `phase` is idle; waiting (for a place, or for the orchestrator at the start); running; or delayed, with
    its `reason` and the wall time `delayed_since`.

    A fire time is concluded when its run has succeeded, or was refused for good: then it is left, and the next one
    tries again. Anything else delays it, and its run is asked for again under the same request_id.
    """

    def __init__(self, job: Job, link: Link, slots: asyncio.Semaphore, *, now: Callable[[], float] = time.time) -> None:
        self.job = job
        self.phase = "idle"
        self.reason: str | None = None
        self.delayed_since: float | None = None
        self.last: Run | None = None  # of this job, whoever asked for it
        self.outcomes: Counter[str] = Counter()
        self._link = link
        self._slots = slots
        self._now = now
        self._woken = asyncio.Event()
        self._concluded: set[int] = set()
        self._tries = 0
        self._told = False

    def __repr__(self) -> str:
        return f"<Runner {self.job.name} {self.phase}>"

    def wake(self) -> None:
        """See whether there is something to do."""
        self._woken.set()

    def learn(self, runs: Iterable[Run]) -> None:
        """Runs on record, newest first."""
        found = list(runs)
        newest = next((run for run in found if not run.dry_run), None)
        # A failure that the orchestrator has no record of is known here alone.
        if newest is not None and (self.last is None or (newest.started_at or 0.0) >= (self.last.started_at or 0.0)):
            self.last = newest
        for run in found:
            fire_s = self.job.schedule.fire_time(run.request_id)
            if fire_s is not None and run.state == "done":
                self._note(fire_s)

    @property
    def failed(self) -> bool:
        """Whether its last run failed."""
        return self.last is not None and self.last.state == "failed"

    @property
    def is_late(self) -> bool:
        """Whether it has been delayed for long."""
        return self.delayed_since is not None and self._now() - self.delayed_since > LONG_DELAY_S

    def pending(self) -> int | None:
        """The fire time to be run now."""
        return self.job.schedule.pending(self._concluded, self._now())

    async def serve(self) -> None:
        """Do what is due whenever woken. Never ends."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            while self.pending() is not None:
                try:
                    await self._attempt()
                except Exception as error:  # a defect with one run must not end the job for good
                    self._delay(f"internal error: {type(error).__name__}")
                    log.exception("job_crashed", job=self.job.name)
                    await asyncio.sleep(MAX_PAUSE_S)
            self.phase = "idle"

    async def _attempt(self) -> None:
        """Try to have the pending run done; afterwards it may be pending still."""
        self.phase = "waiting"
        async with self._slots:
            refusal = await self._try()
        if refusal is None:
            return
        self._tries += 1
        if self._link.is_ready:
            await asyncio.sleep(pause_s(refusal, self._tries, MAX_PAUSE_S))
        while not await self._link.wait_ready(_LOOK_S):
            if self._link.state == "unavailable":
                self._delay("the orchestrator does not answer")

    async def _try(self) -> Reply | None:
        refusal = await self._link.look()
        fire_s = self.pending()  # what was learnt, or came due, while this waited counts
        return await self._run(fire_s) if refusal is None and fire_s is not None else refusal

    async def _run(self, fire_s: int) -> Reply | None:
        """Returns the refusal if the run is to be asked for again."""
        self.phase = "running"
        request_id, began_at = self.job.schedule.request_id(fire_s), self._now()
        reply = await self._link.run(self.job, {}, request_id)
        if reply["status"] == "success":
            self._succeed(fire_s, Run.done(request_id, reply), replayed=bool(reply.get("replayed")))
        elif reply.get("retryable"):
            self._delay(str(reply.get("message")), str(reply.get("error_code")))
            return reply
        else:
            self._fail(fire_s, reply, began_at)
        return None

    def _succeed(self, fire_s: int, run: Run, *, replayed: bool) -> None:
        if self.delayed_since is not None:
            log.info("job_resumed", job=self.job.name, delayed_s=round(self._now() - self.delayed_since, 1))
        self._end(fire_s, "replayed" if replayed else "success")
        self.last = run
        log.info("job_done", job=self.job.name, request_id=run.request_id, replayed=replayed, duration_s=run.duration_s)

    def _fail(self, fire_s: int, reply: Mapping[str, Any], began_at: float) -> None:
        code = str(reply.get("error_code"))
        self._end(fire_s, code)
        request_id = self.job.schedule.request_id(fire_s)
        self.last = Run(request_id, "failed", began_at, self._now(), error=f"{code}: {reply.get('message')}")
        reason = f"the job {self.job.name} failed with {code}; it is tried again at its next time"
        log.error("job_failed", job=self.job.name, error_code=code, reason=reason)

    def _end(self, fire_s: int, outcome: str) -> None:
        self._note(fire_s)
        self.outcomes[outcome] += 1
        self._tries = 0
        self.delayed_since = self.reason = None
        self._told = False

    def _note(self, fire_s: int) -> None:
        self._concluded.add(fire_s)
        if len(self._concluded) > _KNOWN_FIRES:
            self._concluded.remove(min(self._concluded))

    def _delay(self, reason: str, code: str = "") -> None:
        """Short delays are usual, as when programs start together: only a long one is reported."""
        self.phase, self.reason = "delayed", reason
        if self.delayed_since is None:
            self.delayed_since = self._now()
            log.info("job_delayed", job=self.job.name, error_code=code, reason=reason)
        elif self.is_late and not self._told:
            self._told = True
            minutes = LONG_DELAY_S / 60.0
            why = f"the job {self.job.name} has been delayed for more than {minutes:g} minutes: {code or reason}"
            log.warning("job_late", job=self.job.name, error_code=code, reason=why)

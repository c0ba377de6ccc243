"""What the scheduler does and says: it keeps every job, and answers list_jobs and run_job.

state     when
starting  the orchestrator has not answered since the scheduler's start, for at most 30 s
degraded  the orchestrator does not answer; or the last run of an enabled job failed; or a job is delayed for longer
          than five minutes
healthy   nothing of that
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from memory_system import __version__
from memory_system.envelope import Request
from memory_system.errors import AccessDenied, from_reply
from memory_system.keys import KeyFile
from memory_system.log import get_logger
from memory_system.metrics import Family
from memory_system.process_figures import process_figures
from memory_system.protocol import RESERVED_REPLY_FIELDS, new_request_id
from memory_system.scheduler_settings import SchedulerSettings
from memory_system.scheduling.families import scheduler_families
from memory_system.scheduling.jobs import Job, jobs_of, unknown_job
from memory_system.scheduling.link import Link, Reply
from memory_system.scheduling.runner import Runner
from memory_system.scheduling.timetable import Timetable
from memory_system.security import is_admin

log = get_logger("scheduler")


class Desk:
    """Everything but the socket, which is bound to `bind`. `endpoint` is the orchestrator's, `key` the scheduler's own.

    `on_link(state)` hears whether it answers, `on_crash()` that a defect has ended a part of the scheduler, so that it
    had better be started anew.
    """

    def __init__(
        self,
        rules: SchedulerSettings,
        endpoint: str,
        *,
        bind: str = "",
        on_link: Callable[[str], None] = lambda state: None,
        on_crash: Callable[[], None] = lambda: None,
        seed: str = "",
        now: Callable[[], float] = time.time,
        key: KeyFile | None = None,
    ) -> None:
        self._now = now
        self._bind = bind
        self._on_crash = on_crash
        self._started_s = time.monotonic()
        self._jobs = jobs_of(rules.jobs, seed)
        self.link = Link(endpoint, rules, on_change=on_link, on_ready=self._learn, key=key)
        slots = asyncio.Semaphore(rules.concurrent_jobs)
        self.runners = {name: Runner(job, self.link, slots, now=now) for name, job in self._jobs.items()}
        self._timetable = Timetable(
            {name: job.schedule for name, job in self._jobs.items() if job.settings.enabled},
            lambda name: self.runners[name].wake(),
            now=now,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._asked: dict[str, asyncio.Task[Reply]] = {}
        self._outcomes: Counter[tuple[str, ...]] = Counter()

    def __repr__(self) -> str:
        return f"<Desk {', '.join(map(repr, self.runners.values()))}>"

    def start(self) -> None:
        """Begin, on the running loop: what is overdue runs as soon as the orchestrator answers."""
        enabled = [runner for runner in self.runners.values() if runner.job.settings.enabled]
        for endless in (self.link.watch(), *(runner.serve() for runner in enabled)):
            task = asyncio.create_task(endless)
            task.add_done_callback(self._on_end)
            self._tasks.append(task)
        self._timetable.start()

    async def close(self) -> None:
        """Stop, waiting for nothing: what runs goes on in the orchestrator. May be called at any time."""
        self._timetable.close()
        tasks = [*self._tasks, *self._asked.values()]
        self._tasks = []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.link.close()

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("scheduler_crashed", reason="a part of the scheduler ended by a defect", exc_info=error)
            self._on_crash()

    # -- actions ------------------------------------------------------------------------------------------------

    async def list_jobs(self) -> dict[str, Any]:
        """Every job: when it runs next, how its last run went, and what it does now."""
        if await self.link.look() is None:
            await self._learn()
        results = self.jobs()
        return {"results": results, "count": len(results), "orchestrator": self.link.state}

    async def run_job(
        self, *, request: Request, name: str, dry_run: bool = False, as_of: float | None = None
    ) -> dict[str, Any]:
        """Run a job now; the reply is that of its run. Asking again with the same request_id joins it.

        Raises AccessDenied, InvalidField, and what the orchestrator refuses with.
        """
        if request.identity is None and not is_admin(request.address, self._bind):
            raise AccessDenied(f"run_job is for callers of the service's own machine; {request.address} is another")
        job = self._jobs.get(name)
        if job is None:
            raise unknown_job(name)
        data = job.fields(dry_run, as_of)
        request_id = new_request_id() if request.request_id is None or request.legacy else request.request_id
        reply = await asyncio.shield(self._joined(job, data, request_id))
        if reply["status"] != "success":
            raise from_reply(reply)
        return {field: value for field, value in reply.items() if field not in RESERVED_REPLY_FIELDS}

    def _joined(self, job: Job, data: Mapping[str, Any], request_id: str) -> asyncio.Task[Reply]:
        """The one task for this request_id: who lost the connection asks again while the first call still waits."""
        key = f"{job.name} {data} {request_id}"
        task = self._asked.get(key)
        if task is None:
            task = self._asked[key] = asyncio.create_task(self._run_now(job, data, request_id))
            task.add_done_callback(lambda _: self._asked.pop(key, None))
        return task

    async def _run_now(self, job: Job, data: Mapping[str, Any], request_id: str) -> Reply:
        refusal = await self.link.look()
        if refusal is None:
            reply = await self.link.run(job, data, request_id, by_hand=True)
            self.runners[job.name].learn(await self.link.runs(job))
        else:
            reply = refusal
        code = reply.get("error_code", "replayed" if reply.get("replayed") else "success")
        self._outcomes[job.name, str(code)] += 1
        log.info("job_asked_for", job=job.name, request_id=request_id, outcome=code, dry_run="dry_run" in data)
        return reply

    # -- what is known --------------------------------------------------------------------------------------------

    def jobs(self) -> list[dict[str, Any]]:
        """The results of list_jobs, as far as is known without asking."""
        return [self._shown(runner) for runner in self.runners.values()]

    def _shown(self, runner: Runner) -> dict[str, Any]:
        job, last = runner.job, runner.last
        return {
            "name": job.name,
            "action": job.action,
            "trigger": job.settings.trigger,
            "enabled": job.settings.enabled,
            "state": runner.phase if job.settings.enabled else "off",
            "running": runner.phase == "running" or (last is not None and last.state == "running"),
            "next_run_at": self._timetable.next_start_s(job.name),
            "delayed_since": runner.delayed_since,
            "reason": runner.reason,
            "last": None if last is None else last.shown(),
        }

    def figures(self) -> dict[str, Any]:
        """The scheduler's part of its health_check; also what its heartbeats say."""
        troubles = self._troubles()
        return {
            **process_figures(),
            "state": self._state(troubles),
            "uptime_s": time.monotonic() - self._started_s,
            "version": __version__,
            "readiness": {"orchestrator": self.link.state, **troubles},
            "breakers": {"orchestrator": self.link.breaker["state"]},
            "jobs": {name: runner.phase for name, runner in self.runners.items()},
        }

    def _state(self, troubles: Mapping[str, str]) -> str:
        if self.link.state == "loading":
            return "starting"
        return "degraded" if troubles or self.link.state != "ready" else "healthy"

    def _troubles(self) -> dict[str, str]:
        """What is wrong, by job."""
        found = {name: "delayed" for name, runner in self.runners.items() if runner.is_late}
        enabled = [(name, runner) for name, runner in self.runners.items() if runner.job.settings.enabled]
        return found | {name: "failed" for name, runner in enabled if runner.failed}

    def families(self) -> list[Family]:
        """The metrics as they are now; called in the thread of a scrape."""
        runs: Counter[tuple[str, ...]] = Counter(self._outcomes)
        for name, runner in self.runners.items():
            for outcome, count in dict(runner.outcomes).items():
                runs[name, outcome] += count
        return scheduler_families(self.figures(), self.jobs(), dict(runs))

    async def _learn(self) -> None:
        """Ask for the last runs of all jobs."""
        found = await asyncio.gather(*(self.link.runs(job) for job in self._jobs.values()))
        for runner, runs in zip(self.runners.values(), found, strict=True):
            runner.learn(runs)

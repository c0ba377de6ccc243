"""Wakes each job at its times: APScheduler with triggers that ask `schedule.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger

from memory_system.scheduling.schedule import Schedule

# How soon it is noticed that the clock was set, or stood still while the machine slept.
LOOK_EVERY_S: Final = 30.0
_TOLERANCE_S: Final = 1.0


class _Trigger(BaseTrigger):  # type: ignore[misc]  # APScheduler has no types
    """The starts of one job's runs, those that were missed left out: what is due is for `Schedule.pending` to say."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def get_next_fire_time(self, _previous: datetime | None, now: datetime) -> datetime:
        return datetime.fromtimestamp(self._schedule.next_start(now.timestamp()), UTC)


class Timetable:
    """Calls `wake(job)` on the running loop at each start of a run; a wake too many does no harm."""

    def __init__(
        self, schedules: Mapping[str, Schedule], wake: Callable[[str], None], *, now: Callable[[], float] = time.time
    ) -> None:
        self._schedules = schedules
        self._wake = wake
        self._now = now
        self._timer: asyncio.TimerHandle | None = None
        defaults = {"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        self._scheduler: Any = AsyncIOScheduler(timezone=UTC, job_defaults=defaults)

    def __repr__(self) -> str:
        return f"<Timetable {', '.join(self._schedules)}>"

    def start(self) -> None:
        """Begin, on the running loop; what is overdue is woken at once."""
        for name, schedule in self._schedules.items():
            self._scheduler.add_job(self._fire, _Trigger(schedule), args=[name], id=name)
        self._scheduler.start()
        self._look()

    def close(self) -> None:
        """Stop. May be called at any time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._scheduler.shutdown(wait=False)

    def next_start_s(self, name: str) -> float | None:
        """When the next run of a job begins, epoch seconds; None for a job that is not on the table."""
        schedule = self._schedules.get(name)
        return None if schedule is None else float(schedule.next_start(self._now()))

    async def _fire(self, name: str) -> None:
        self._wake(name)

    def _look(self) -> None:
        """Timers count monotonic time, fire times wall time: bring them together again."""
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)
        for name, schedule in self._schedules.items():
            job = self._scheduler.get_job(name)
            wanted_s = schedule.next_start(self._now())
            if abs(job.next_run_time.timestamp() - wanted_s) > _TOLERANCE_S:
                job.modify(next_run_time=datetime.fromtimestamp(wanted_s, UTC))
            self._wake(name)
        self._scheduler.wakeup()

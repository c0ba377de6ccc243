"""Which run of a job is due. Pure: a function of the configuration, of the time, and of what was done.

A job has *fire times*, the instants of its recurrence. Its run for a fire time begins a little later, by a delay that
the fire time itself determines (the jitter), and has a request_id made of the job's name and the fire time. So whoever
asks for the run of a fire time again, also another process after a crash, asks for the same run, which the
orchestrator does once. All times are epoch seconds, UTC.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from memory_system.cron import Interval, Recurrence

_PREFIX: Final = "scheduled"
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, slots=True)
class Schedule:
    """The fire times of one job. `seed` makes the delays of one deployment differ from those of another."""

    job: str
    recurrence: Recurrence
    jitter_s: float = 0.0
    seed: str = ""

    def delay_s(self, fire_s: int) -> int:
        """How much later than its fire time a run begins: whole seconds up to the jitter, spread evenly."""
        span_s = int(self.jitter_s)
        if isinstance(self.recurrence, Interval):
            span_s = min(span_s, self.recurrence.interval_s // 2)
        digest = hashlib.sha256(f"{self.seed}\0{self.job}\0{fire_s}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % (span_s + 1)

    def due(self, now_s: float) -> int:
        """The last fire time whose run should have begun."""
        fire_s = self.recurrence.latest(now_s)
        while fire_s + self.delay_s(fire_s) > now_s:
            fire_s = self.recurrence.latest(fire_s - 1)
        return fire_s

    def next_start(self, now_s: float) -> int:
        """When the next run begins that is not due yet."""
        fire_s = self.recurrence.following(self.due(now_s))
        found = math.inf
        while fire_s < found:
            start_s = fire_s + self.delay_s(fire_s)
            found = min(found, start_s) if start_s > now_s else found
            fire_s = self.recurrence.following(fire_s)
        return int(found)

    def pending(self, concluded: Collection[int], now_s: float) -> int | None:
        """The fire time to be run now; None when it is concluded, or a later one is.

        Fire times that were missed are run as one, the last. What was concluded for a time that lies ahead, by a clock
        that has been put back since, does not count.
        """
        fire_s = self.due(now_s)
        return None if any(fire_s <= each <= now_s for each in concluded) else fire_s

    def request_id(self, fire_s: int) -> str:
        """The name of the one run for this fire time: `scheduled-decay-2026-01-31T03:00:00Z`."""
        return f"{_PREFIX}-{self.job}-{datetime.fromtimestamp(fire_s, UTC).strftime(_TIME)}"

    def fire_time(self, request_id: str | None) -> int | None:
        """The fire time in such a name; None for another's."""
        start = f"{_PREFIX}-{self.job}-"
        if request_id is None or not request_id.startswith(start):
            return None
        try:
            return int(datetime.strptime(request_id.removeprefix(start), _TIME).replace(tzinfo=UTC).timestamp())
        except ValueError:
            return None

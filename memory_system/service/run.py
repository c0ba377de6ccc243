"""One run of maintenance, as the work inside it sees it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

from memory_system.service import Reply
from memory_system.service.tally import Tally
from memory_system.storage.context import WriteContext
from memory_system.storage.jobs import WriteJob
from memory_system.storage.writer import Writer

LANE: Final = b"maintenance"
# A store that is slow to answer is left alone for longer, but not for so long that a run never ends: beyond this it
# rests for as long as it has worked.
_LONGEST_REST_S: Final = 0.25


def rest_s(worked_s: float, share: float) -> float:
    """How long to rest after so much work, so that work takes at most this share of the time."""
    return min(worked_s * (1.0 / share - 1.0), max(worked_s, _LONGEST_REST_S))


class Run:
    """What a job works with: its instant, whether it only shows what it would do, and what it did so far.

    `share`: the part of the time that its work may take. `live`: reply fields that are shown and never stored.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        run_id: int,
        job: str,
        as_of_s: float,
        dry_run: bool,
        limit: int,
        share: float,
        check: Callable[[], None],
    ) -> None:
        self.run_id = run_id
        self.job = job
        self.as_of_s = as_of_s
        self.dry_run = dry_run
        self.limit = limit
        self.tally = Tally(limit)
        self.live: Reply = {}
        self.writes = 0  # WriteJobs so far
        self._writer = writer
        self._share = share
        self._check = check
        self._part, self._done = "", 0
        self._total: int | None = None

    def __repr__(self) -> str:
        return f"<Run {self.run_id} {self.job} as of {self.as_of_s:.0f}, {self._done} of {self._total} {self._part}>"

    @property
    def counts(self) -> Counter[str]:
        return self.tally.counts

    def progress(self, part: str, done: int, total: int | None = None) -> None:
        """How far the run has come, for list_runs and health_check; `total` None: not known."""
        self._part, self._done, self._total = part, done, total

    def figures(self) -> Reply:
        """part, done, total."""
        return {"part": self._part, "done": self._done, "total": self._total}

    def change(self, memory_id: str, namespace: str, before: str, after: str, reason: str) -> None:
        """Note that a memory was changed, or in a dry run would be: counted under `after`."""
        self.tally.add(
            after, {"memory_id": memory_id, "namespace": namespace, "from": before, "to": after, "reason": reason}
        )

    def check(self) -> None:
        """Raise ClockUnsettled when the clock was moved since the run began and the run cannot be undone."""
        self._check()

    async def write(
        self, function: Callable[[WriteContext], Reply], namespace: str = "", *, rows: int = 1, counted: bool = False
    ) -> Reply:
        """One slice of the run's writes, then a pause in which the store belongs to the requests.

        `counted`: whether it raises the namespace's commit_seq, which whatever a reader can see has to.
        Raises what the function raises, and ClockUnsettled as `check` does.
        """
        self._check()
        began_s = time.monotonic()
        self.writes += 1
        reply = await self._writer.submit(WriteJob(function, namespace, rows=rows, counted=counted, client=LANE))
        await self.rest(time.monotonic() - began_s)
        return reply

    async def rest(self, worked_s: float) -> None:
        """Leave the time to the requests that is theirs after so much work, whatever kind of work it was."""
        await asyncio.sleep(rest_s(worked_s, self._share))

    def reply(self, fields: dict[str, Any] | None) -> Reply:
        """The part of the reply that is stored: the tally, under what the job says of itself."""
        return {**self.tally.reply(), **(fields or {})}


Work = Callable[[Run], Awaitable[Reply | None]]

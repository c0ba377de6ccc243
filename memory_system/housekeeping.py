"""What the service does by the clock: flushing access counts, dropping old idempotency keys and applied log entries,
giving back memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from memory_system import allocator
from memory_system.access import AccessBuffer
from memory_system.errors import MemorySystemError
from memory_system.log import get_logger
from memory_system.settings import StorageSettings
from memory_system.storage import accesses, idempotency, vectors
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.jobs import WriteJob
from memory_system.storage.rows import AT_ONCE
from memory_system.storage.writer import Writer

log = get_logger("housekeeping")

_PRUNE_S: Final = 60.0
_GIVE_BACK_S: Final = 30.0
_LOG_KEPT: Final = 1_000
_ACCESS_ROWS: Final = 2 * AT_ONCE
_ACCESS_WRITES: Final = 64
_PRUNE_ROWS: Final = 1_000


class Housekeeping:
    """Periodic upkeep in small writes. `applied_seq()`: up to where every index has followed the log.
    `is_clock_settled()`: whether the wall clock can be trusted with what is past its time."""

    def __init__(
        self,
        writer: Writer,
        settings: StorageSettings,
        accesses: AccessBuffer,
        applied_seq: Callable[[], int],
        is_clock_settled: Callable[[], bool],
    ) -> None:
        self._writer = writer
        self._settings = settings
        self._accesses = accesses
        self._applied_seq = applied_seq
        self._is_clock_settled = is_clock_settled
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(_every(self._settings.access_flush_s, self.flush_accesses), name="access-flush"),
            asyncio.create_task(_every(_PRUNE_S, self.prune), name="prune"),
            asyncio.create_task(_every(_GIVE_BACK_S, give_back_memory), name="give-back-memory"),
        ]

    async def close(self) -> None:
        """Stop, and write the accesses that are still buffered."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        try:
            await self.flush_accesses()
        except MemorySystemError as error:
            log.warning("access_flush_failed", error_code=error.code, reason=error.message)

    async def flush_accesses(self) -> None:
        """Write what was counted since the last flush, in slices."""
        waiting = list(self._accesses.take().items())
        # Few together, so that an add beside them waits for milliseconds; many have to be written in time, too.
        length = max(_ACCESS_ROWS, len(waiting) // _ACCESS_WRITES)
        try:
            while waiting:
                part, waiting = dict(waiting[:length]), waiting[length:]
                try:
                    await self._run(partial(accesses.flush, accesses=part), rows=len(part))
                except MemorySystemError:
                    self._accesses.put_back(part)
                    raise
        finally:  # also of a flush that is cancelled: the part that is under way is written, the others are not
            self._accesses.put_back(dict(waiting))

    async def prune(self) -> None:
        """Drop idempotency keys past their time and log entries that are applied."""
        if self._is_clock_settled():
            before_s = time.time() - self._settings.idempotency_ttl_h * 3600.0
            await self._repeat(partial(idempotency.prune, before_s=before_s))
        up_to_seq = self._applied_seq() - _LOG_KEPT
        if up_to_seq > 0:
            await self._repeat(partial(vectors.prune_log, up_to_seq=up_to_seq))

    async def _repeat(self, run: Callable[[WriteContext], Reply]) -> None:
        """Prune slice by slice, so that requests get in between."""
        pruned = 1
        while pruned:
            pruned = (await self._run(run, rows=_PRUNE_ROWS))["pruned"]

    async def _run(self, run: Callable[[WriteContext], Reply], rows: int) -> Reply:
        return await self._writer.submit(WriteJob(run, "", rows=rows, counted=False))


async def give_back_memory() -> None:
    """What was freed among what is still used stays with the process for good, unless somebody asks for it."""
    await asyncio.to_thread(allocator.give_back)


async def _every(interval_s: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(interval_s)
        try:
            await work()
        except MemorySystemError as error:
            log.warning("housekeeping_failed", work=_name(work), error_code=error.code, reason=error.message)
        except Exception:  # a defect in one turn must not end the upkeep: it is tried again at the next
            log.exception("housekeeping_failed", work=_name(work))


def _name(work: Callable[[], Awaitable[None]]) -> str:
    return getattr(work, "__name__", "?")

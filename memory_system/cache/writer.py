"""What is on its way to Redis: one bounded queue and the one task that empties it.

Nobody waits for a write to a cache. Values are dropped when the queue is full or Redis is away. Deletions are kept
until Redis confirms them, up to a bound; what exceeds it, or is pending when the process ends, stays in Redis until
its time to live ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from memory_system.cache.redis import RedisConnection
from memory_system.log import get_logger

MAX_VALUES: Final = 4_096
MAX_VALUES_BYTES: Final = 16 * 1024 * 1024
MAX_DELETIONS: Final = 50_000
# A batch of values fits into an empty socket buffer, so that a frozen peer never holds up closing its connection.
BATCH_BYTES: Final = 48 * 1024
BATCH_VALUES: Final = 64
BATCH_DELETIONS: Final = 512
RETRY_PAUSE_S: Final = 0.25
CLOSE_BUDGET_S: Final = 0.5

_log = get_logger("cache.writer")


@dataclass(frozen=True, slots=True)
class WriterStats:
    """Values and deletions waiting now, and how many of each were given up since the start."""

    values: int
    deletions: int
    values_dropped: int
    deletions_dropped: int


class WriteBehind:
    """Owns the task that writes; `start` and `close` belong together. Event loop only."""

    def __init__(self, redis: RedisConnection, *, max_values: int = MAX_VALUES, max_deletions: int = MAX_DELETIONS):
        self._redis = redis
        self._max_values = max_values
        self._max_deletions = max_deletions
        self._values: dict[str, tuple[bytes, int]] = {}
        self._values_bytes = 0
        self._deletions: dict[str, None] = {}
        self._values_dropped = 0
        self._deletions_dropped = 0
        self._work = asyncio.Event()
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        redis.on_state(lambda _: self._work.set())

    def set(self, key: str, value: bytes, ttl_ms: int) -> None:
        """Queue a value; a later one for the same key replaces it."""
        if self._redis.state == "off":
            return
        self._take_value(key)
        full = len(self._values) >= self._max_values or self._values_bytes + len(value) > MAX_VALUES_BYTES
        if full or self._redis.state != "ready" or len(value) > BATCH_BYTES or ttl_ms < 1:
            self._values_dropped += 1
            return
        self._values[key] = (value, ttl_ms)
        self._values_bytes += len(value)
        self._work.set()

    def delete(self, keys: Iterable[str]) -> None:
        """Queue deletions; a value queued for such a key is forgotten."""
        if self._redis.state == "off":
            return
        for key in keys:
            self._take_value(key)
            if len(self._deletions) < self._max_deletions or key in self._deletions:
                self._deletions[key] = None
            else:
                self._deletions_dropped += 1
        self._work.set()

    def is_deleting(self, key: str) -> bool:
        """Whether a deletion of this key waits, so that what Redis has under it counts as gone."""
        return key in self._deletions

    def stats(self) -> WriterStats:
        return WriterStats(len(self._values), len(self._deletions), self._values_dropped, self._deletions_dropped)

    async def start(self) -> None:
        """Ask once whether Redis answers, within its timeout, and start the task."""
        if self._redis.state != "off" and self._task is None:
            await self._redis.ping()
            self._task = asyncio.create_task(self._run(), name="cache-writer")

    async def close(self) -> None:
        """Write what is queued as far as `CLOSE_BUDGET_S` allows, and end the task. May be called twice."""
        task, self._task = self._task, None
        if task is None:
            return
        self._stop.set()
        self._work.set()
        await task
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_BUDGET_S):
                while self._pending() and self._redis.state == "ready" and await self._write_batch():
                    pass
        if self._deletions:
            reason = "vectors of deleted texts stay in Redis until their time to live ends"
            _log.warning("redis_deletions_left", reason=reason, count=len(self._deletions))

    async def _run(self) -> None:
        while not self._stop.is_set():
            if self._redis.state != "ready":
                # Redis is found again without a request that pays for the probe; the breaker says when one is due.
                await self._pause(RETRY_PAUSE_S)
                await self._redis.ping()
            elif not self._pending():
                self._work.clear()
                await self._work.wait()
            elif not await self._write_batch():
                await self._pause(RETRY_PAUSE_S)

    async def _pause(self, seconds_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds_s):
                await self._stop.wait()

    def _pending(self) -> bool:
        return bool(self._deletions or self._values)

    async def _write_batch(self) -> bool:
        """Write one batch, deletions first; False if Redis did not take it."""
        if self._deletions:
            keys = list(islice(self._deletions, BATCH_DELETIONS))
            if not await self._redis.delete_many(keys):
                return False
            # A key queued again meanwhile needs no second deletion: values are sent by this task alone.
            for key in keys:
                self._deletions.pop(key, None)
            return True
        batch = self._take_batch()
        if await self._redis.set_many(batch):
            return True
        self._values_dropped += len(batch)
        return False

    def _take_batch(self) -> dict[str, tuple[bytes, int]]:
        batch: dict[str, tuple[bytes, int]] = {}
        room_bytes = BATCH_BYTES
        for key in list(islice(self._values, BATCH_VALUES)):
            room_bytes -= len(self._values[key][0])
            if room_bytes < 0:
                break
            value = self._take_value(key)
            if value is not None:
                batch[key] = value
        return batch

    def _take_value(self, key: str) -> tuple[bytes, int] | None:
        taken = self._values.pop(key, None)
        if taken is not None:
            self._values_bytes -= len(taken[0])
        return taken

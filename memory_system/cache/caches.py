"""All caches of one service as one object with one life."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from memory_system.cache.records import RecordCache
from memory_system.cache.redis import RedisConnection
from memory_system.cache.results import ResultCache
from memory_system.cache.vectors import LayeredVectorCache
from memory_system.cache.writer import WriteBehind
from memory_system.settings import CacheSettings, RedisSettings


@dataclass(frozen=True, slots=True)
class Caches:
    """`async with make_caches(...) as caches`, or `start` and `close`. Usable before `start`, without Redis."""

    records: RecordCache
    vectors: LayeredVectorCache
    results: ResultCache
    redis: RedisConnection
    writer: WriteBehind

    async def start(self) -> None:
        """Look for Redis, for at most its timeout; returns whether it is there or not."""
        await self.writer.start()

    async def close(self) -> None:
        """Write what is queued within half a second and close the connections. May be called twice."""
        await self.writer.close()
        await self.redis.close()

    def stats(self) -> dict[str, Any]:
        """Counters of every cache since the start, and the state of Redis (off | ready | unavailable)."""
        return {
            "records": asdict(self.records.stats()),
            "vectors": asdict(self.vectors.stats()),
            "results": asdict(self.results.stats()),
            "redis": {"state": self.redis.state, "failures": self.redis.failures, **asdict(self.writer.stats())},
        }

    async def __aenter__(self) -> Caches:
        await self.start()
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.close()


def make_caches(cache: CacheSettings, redis: RedisSettings, *, clock: Callable[[], float] = time.monotonic) -> Caches:
    """Build the caches; nothing is connected yet. `clock` gives monotonic seconds.

    Raises ConfigError when redis.url cannot be used. redis-py is imported only if there is a URL.
    """
    connection = RedisConnection(redis, clock=clock)
    writer = WriteBehind(connection)
    return Caches(
        records=RecordCache(cache.max_records, cache.max_mb),
        vectors=LayeredVectorCache(
            connection,
            writer,
            max_vectors=cache.max_vectors,
            ttl_s=redis.vector_ttl_s,
            prefix=redis.prefix,
            clock=clock,
        ),
        results=ResultCache(connection, writer, max_results=cache.max_results, prefix=redis.prefix, clock=clock),
        redis=connection,
        writer=writer,
    )

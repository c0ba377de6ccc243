"""Search results by the exact state of the store that they were computed from, so that none needs invalidating."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from memory_system.cache.lru import Lru
from memory_system.cache.redis import RedisConnection
from memory_system.cache.seal import seal, unseal
from memory_system.cache.writer import WriteBehind


class ResultKey(NamedTuple):
    """What a result depends on. `commit_seq` is the namespace's last change, `query_digest` covers all parameters."""

    store_epoch: str
    namespace: str
    commit_seq: int
    query_digest: bytes


@dataclass(frozen=True, slots=True)
class ResultStats:
    """`hits` were found in this process, `redis_hits` in Redis, `poisoned` there but not what was stored."""

    hits: int
    redis_hits: int
    misses: int
    poisoned: int
    size: int


class ResultCache:
    """Keeps `max_results` encoded results here and all of them in Redis, each for its own time to live.

    The caller must not keep a result that depends on more than its key: a degraded one, or one with vectors pending.
    No method raises or waits for a write.
    """

    def __init__(
        self,
        redis: RedisConnection,
        writer: WriteBehind,
        *,
        max_results: int,
        prefix: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._writer = writer
        self._prefix = f"{prefix}:res:"
        self._clock = clock
        self._results: Lru[ResultKey, tuple[float, bytes]] = Lru(max_results)
        self._hits = 0
        self._redis_hits = 0
        self._misses = 0
        self._poisoned = 0

    async def get(self, key: ResultKey) -> bytes | None:
        """Return the value put for this key, byte for byte, or None.

        What Redis has is not kept here: its remaining time to live is unknown, and keeping it would prolong it.
        """
        value = self._local(key)
        if value is not None:
            self._hits += 1
            return value
        value = await self._fetch(key)
        if value is None:
            self._misses += 1
        else:
            self._redis_hits += 1
        return value

    async def put(self, key: ResultKey, value: bytes, ttl_s: float) -> None:
        """Keep the value for `ttl_s` seconds; not at all if that is 0."""
        if ttl_s <= 0.0:
            return
        self._results.put(key, (self._clock() + ttl_s, value))
        identity = _identity(key)
        self._writer.set(self._key(identity), seal(identity, value), int(ttl_s * 1000))

    def stats(self) -> ResultStats:
        return ResultStats(self._hits, self._redis_hits, self._misses, self._poisoned, len(self._results))

    def _local(self, key: ResultKey) -> bytes | None:
        entry = self._results.get(key)
        if entry is None:
            return None
        expires_at_s, value = entry
        if self._clock() < expires_at_s:
            return value
        self._results.pop(key)
        return None

    async def _fetch(self, key: ResultKey) -> bytes | None:
        identity = _identity(key)
        redis_key = self._key(identity)
        values = await self._redis.get_many([redis_key])
        if not values or values[0] is None:
            return None
        payload = unseal(identity, values[0])
        if payload is None:
            self._poisoned += 1
            self._writer.delete([redis_key])
            return None
        return bytes(payload)

    def _key(self, identity: tuple[bytes, ...]) -> str:
        return self._prefix + blake2b(seal(identity, b""), digest_size=16).hexdigest()


def _identity(key: ResultKey) -> tuple[bytes, ...]:
    return (
        b"result",
        key.store_epoch.encode(),
        key.namespace.encode(),
        key.commit_seq.to_bytes(8, "little", signed=True),
        key.query_digest,
    )

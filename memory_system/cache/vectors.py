"""Vectors by (model, text digest): in this process, and in Redis behind it. They cannot go stale."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memory_system.cache.lru import Lru
from memory_system.cache.redis import RedisConnection
from memory_system.cache.seal import seal, unseal
from memory_system.cache.writer import WriteBehind

Vector = NDArray[np.float32]

# Keys of one MGET: small enough that its reply fits the timeout with much room.
GET_BATCH: Final = 128
# Longer than a vector can be on its way from a reader or an encoder to `put_many` (embedding.encode_timeout_s).
DELETED_HOLD_S: Final = 120.0
MAX_DELETED: Final = 65_536
MAX_DEVIATION: Final = 0.01


@dataclass(frozen=True, slots=True)
class VectorStats:
    """`hits` were found in this process, `redis_hits` in Redis, `poisoned` there but not what was stored."""

    hits: int
    redis_hits: int
    misses: int
    poisoned: int
    size: int


class LayeredVectorCache:
    """Keeps `max_vectors` here and all of them in Redis for `ttl_s`. No method raises or waits for a write.

    Vectors have unit length; one from Redis that has not is thrown away. In Redis the key is the text digest alone and
    the model is part of the sealed value, so that deleting a text removes its vector whatever model made it. A value
    that another model wrote does not open: it is a miss.
    """

    def __init__(
        self,
        redis: RedisConnection,
        writer: WriteBehind,
        *,
        max_vectors: int,
        ttl_s: float,
        prefix: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._writer = writer
        self._ttl_ms = int(ttl_s * 1000)
        self._prefix = f"{prefix}:vec:"
        # One model for each digest: after a change of models the old one's vectors are of no use.
        self._vectors: Lru[bytes, tuple[str, Vector]] = Lru(max_vectors)
        self._deleted = RecentlyDeleted(clock)
        self._hits = 0
        self._redis_hits = 0
        self._misses = 0
        self._poisoned = 0

    async def get_many(self, model_id: str, digests: Sequence[bytes]) -> dict[bytes, Vector]:
        """Return what is cached among `digests`: read-only float32 of shape (dimension,), shared by all callers."""
        found: dict[bytes, Vector] = {}
        missing: list[bytes] = []
        for digest in dict.fromkeys(digests):
            vector = self._local(model_id, digest)
            if vector is None:
                missing.append(digest)
            else:
                found[digest] = vector
        self._hits += len(found)
        if missing:
            remote = await self._fetch(model_id, missing)
            self._redis_hits += len(remote)
            self._misses += len(missing) - len(remote)
            found.update(remote)
        return found

    async def put_many(self, model_id: str, vectors: Mapping[bytes, Vector]) -> None:
        """Keep copies of vectors of shape (dimension,). A text deleted a moment ago is passed over.

        Its vector was asked for before the deletion, and keeping it would bring back what is gone.
        """
        for digest, vector in vectors.items():
            if self._deleted.holds(digest):
                continue
            payload = np.asarray(vector, dtype="<f4").tobytes()
            self._vectors.put(digest, (model_id, np.frombuffer(payload, dtype="<f4")))
            self._writer.set(self._key(digest), seal(_identity(model_id, digest), payload), self._ttl_ms)

    def delete_many(self, digests: Iterable[bytes]) -> None:
        """Remove the vectors of these texts, of every model: here at once, in Redis as soon as it takes it."""
        unique = list(dict.fromkeys(digests))
        for digest in unique:
            self._deleted.add(digest)
            self._vectors.pop(digest)
        self._writer.delete(self._key(digest) for digest in unique)

    def stats(self) -> VectorStats:
        return VectorStats(self._hits, self._redis_hits, self._misses, self._poisoned, len(self._vectors))

    def _key(self, digest: bytes) -> str:
        return self._prefix + digest.hex()

    def _local(self, model_id: str, digest: bytes) -> Vector | None:
        entry = self._vectors.get(digest)
        return entry[1] if entry is not None and entry[0] == model_id else None

    async def _fetch(self, model_id: str, digests: list[bytes]) -> dict[bytes, Vector]:
        found: dict[bytes, Vector] = {}
        for start in range(0, len(digests), GET_BATCH):
            batch = digests[start : start + GET_BATCH]
            values = await self._redis.get_many([self._key(digest) for digest in batch])
            if values is None:
                break  # each further batch would cost the timeout again
            for digest, value in zip(batch, values, strict=True):
                vector = None if value is None else self._open(model_id, digest, value)
                if vector is not None and not self._is_deleted(digest):
                    self._vectors.put(digest, (model_id, vector))
                    found[digest] = vector
        return found

    def _is_deleted(self, digest: bytes) -> bool:
        return self._deleted.holds(digest) or self._writer.is_deleting(self._key(digest))

    def _open(self, model_id: str, digest: bytes, value: bytes) -> Vector | None:
        payload = unseal(_identity(model_id, digest), value)
        if payload:
            vector = np.frombuffer(payload[: len(payload) // 4 * 4], dtype="<f4")
            if len(payload) % 4 == 0 and _is_unit(vector):
                return vector
        self._poisoned += 1
        self._writer.delete([self._key(digest)])
        return None


class RecentlyDeleted:
    """Digests deleted less than `DELETED_HOLD_S` ago; when they are too many to remember, everything counts as such."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._deleted_at_s: OrderedDict[bytes, float] = OrderedDict()
        self._hold_all_until_s = float("-inf")

    def add(self, digest: bytes) -> None:
        now_s = self._clock()
        self._deleted_at_s[digest] = now_s
        self._deleted_at_s.move_to_end(digest)
        self._expire(now_s)
        if len(self._deleted_at_s) > MAX_DELETED:
            _, oldest_s = self._deleted_at_s.popitem(last=False)
            self._hold_all_until_s = oldest_s + DELETED_HOLD_S

    def holds(self, digest: bytes) -> bool:
        if not self._deleted_at_s:
            return False
        now_s = self._clock()
        self._expire(now_s)
        return now_s < self._hold_all_until_s or digest in self._deleted_at_s

    def _expire(self, now_s: float) -> None:
        while self._deleted_at_s:
            digest, deleted_at_s = next(iter(self._deleted_at_s.items()))
            if now_s < deleted_at_s + DELETED_HOLD_S:
                return
            del self._deleted_at_s[digest]


def _is_unit(vector: Vector) -> bool:
    """Whether it has unit length up to rounding, as all that a model makes have; one that is not finite has not."""
    with np.errstate(all="ignore"):
        return abs(float(vector @ vector) - 1.0) <= MAX_DEVIATION


def _identity(model_id: str, digest: bytes) -> tuple[bytes, ...]:
    return (b"vector", model_id.encode(), digest)

"""What somebody who may write to Redis can put in the place of what the service keeps there."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Final

import numpy as np

from memory_system.cache.seal import seal
from tests.support.valkey import ValkeyServer

Poison = Callable[[ValkeyServer, str, random.Random], None]


def _set(change: Callable[[bytes, random.Random], bytes]) -> Poison:
    """Put what `change` makes of the value in its place."""

    def poison(redis: ValkeyServer, key: str, rng: random.Random) -> None:
        with contextlib.suppress(ValueError):  # of another type by now
            value = redis.command("GET", key)
            if value:
                redis.command("SET", key, change(value, rng))

    return poison


def _flipped(value: bytes, rng: random.Random) -> bytes:
    changed = bytearray(value)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def another_value(redis: ValkeyServer, key: str, rng: random.Random) -> None:
    """What is kept for another text or search, and is right there."""
    others = sorted({*redis.keys()} - {key})
    with contextlib.suppress(ValueError):
        redis.command("SET", key, redis.command("GET", rng.choice(others)) or b"" if others else b"")


def another_type(redis: ValkeyServer, key: str, rng: random.Random) -> None:
    redis.command("DEL", key)
    redis.command(
        *rng.choice([("HSET", key, "a", "b"), ("RPUSH", key, "a"), ("SADD", key, "a"), ("ZADD", key, "1", "a")])
    )


POISONS: Final[dict[str, Poison]] = {
    "empty": _set(lambda value, rng: b""),
    "short": _set(lambda value, rng: value[:15]),
    "cut": _set(lambda value, rng: value[: rng.randrange(len(value))]),
    "longer": _set(lambda value, rng: value + rng.randbytes(4)),
    "large": _set(lambda value, rng: value[:2000] * 2000),
    "flipped": _set(_flipped),
    "noise": _set(lambda value, rng: rng.randbytes(len(value))),
    "another value": another_value,
    "another type": another_type,
}


def forged_vectors(dimension: int) -> dict[str, bytes]:
    """Payloads that no model makes; `forge` seals them."""
    right = np.zeros(dimension, dtype="<f4")
    right[0] = 1.0
    nan, infinite, long = right.copy(), right.copy(), right * 2
    nan[1], infinite[1] = np.nan, np.inf
    return {
        "not a number": nan.tobytes(),
        "infinite": infinite.tobytes(),
        "zero": np.zeros(dimension, dtype="<f4").tobytes(),
        "too long": long.tobytes(),
        "another dimension": np.eye(1, dimension * 2, dtype="<f4").tobytes(),
        "one number": np.ones(1, dtype="<f4").tobytes(),
        "half a number": right.tobytes() + b"\0\0",
    }


def forge(redis: ValkeyServer, key: str, model_id: str, payload: bytes) -> None:
    """Put a vector with a right seal in the place of another: `key` ends in the digest of its text."""
    digest = bytes.fromhex(key.rpartition(":")[2])
    redis.command("SET", key, seal((b"vector", model_id.encode(), digest), payload))

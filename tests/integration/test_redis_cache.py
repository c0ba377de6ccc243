"""The caches over a real server that is killed, frozen, flushed, poisoned: nothing fails, nothing wrong comes out."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory_system.cache import Caches, ResultKey, make_caches
from memory_system.cache.redis import POOL_CONNECTIONS, RedisConnection
from memory_system.cache.writer import BATCH_BYTES, WriteBehind
from memory_system.settings import CacheSettings, RedisSettings
from tests.support.valkey import ValkeyServer, running_valkey

MODEL = "stub:1"
DIMENSION = 384
TIMEOUT_MS = 1000
KEY = ResultKey("epoch", "default", 7, b"q" * 16)
DIGESTS = [bytes([number]) * 16 for number in range(8)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    with running_valkey(tmp_path) as running:
        yield running


def settings(server: ValkeyServer, **changes: Any) -> RedisSettings:
    fields: dict[str, Any] = {"url": server.url, "timeout_ms": TIMEOUT_MS, "reset_timeout_s": 0.2}
    return RedisSettings(**(fields | changes))


def new_caches(server: ValkeyServer, **changes: Any) -> Caches:
    return make_caches(CacheSettings(), settings(server, **changes))


def vector(digest: bytes, dimension: int = DIMENSION) -> np.ndarray[Any, np.dtype[np.float32]]:
    return unit(np.random.default_rng(digest[0]).random(dimension, dtype=np.float32))


def unit(values: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return values / np.linalg.norm(values)


def vectors(digests: list[bytes]) -> dict[bytes, Any]:
    return {digest: vector(digest) for digest in digests}


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 45.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"in vain: {what}"
        await asyncio.sleep(0.01)


async def ready(caches: Caches) -> None:
    await until(lambda: caches.redis.state == "ready", "redis ready")


async def unavailable(caches: Caches) -> None:
    async def ask() -> None:
        while caches.redis.state == "ready":
            await caches.results.get(KEY)

    async with asyncio.timeout(15.0):
        await ask()


async def written(caches: Caches) -> None:
    def empty() -> bool:
        stats = caches.writer.stats()
        return not stats.values and not stats.deletions

    await until(empty, "queue empty")
    await caches.redis.ping()


def run(scenario: Any) -> None:
    """Run to the end, and fail if a task or a socket outlives it."""

    async def checked() -> None:
        await scenario()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(checked())
    gc.collect()


# What Redis is for


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_what_one_process_stored_the_next_one_finds(server: ValkeyServer, kind: str) -> None:
    if kind == "unix" and not server.socket_path.exists():
        pytest.skip("the temporary folder's path is too long for a unix socket")
    url = server.url if kind == "tcp" else server.unix_url

    async def scenario() -> None:
        async with new_caches(server, url=url) as first:
            await first.vectors.put_many(MODEL, vectors(DIGESTS))
            await first.results.put(KEY, b"answer", 30.0)
        async with new_caches(server, url=url) as second:
            found = await second.vectors.get_many(MODEL, DIGESTS)
            assert list(found) == DIGESTS
            for digest, value in found.items():
                np.testing.assert_array_equal(value, vector(digest))
                assert value.dtype == np.float32 and not value.flags.writeable
            assert await second.results.get(KEY) == b"answer"
            assert await second.results.get(KEY._replace(commit_seq=8)) is None
            assert second.vectors.stats().redis_hits == len(DIGESTS)
            await second.vectors.get_many(MODEL, DIGESTS)
            assert second.vectors.stats().hits == len(DIGESTS)

    run(scenario)


def test_more_vectors_than_one_batch_arrive_whole(server: ValkeyServer) -> None:
    digests = [number.to_bytes(16, "big") for number in range(600)]
    values = {digest: value_of(digest) for digest in digests}

    async def scenario() -> None:
        async with new_caches(server, timeout_ms=2000) as first:
            await first.vectors.put_many(MODEL, values)
            await written(first)
            assert first.writer.stats().values_dropped == 0
        async with new_caches(server, timeout_ms=2000) as second:
            found = await second.vectors.get_many(MODEL, digests)
            assert all(np.array_equal(found[digest], values[digest]) for digest in digests)

    run(scenario)


def test_every_key_has_the_prefix_and_a_time_to_live(server: ValkeyServer) -> None:
    async def scenario() -> None:
        async with new_caches(server, prefix="mesh", vector_ttl_s=100) as caches:
            await caches.vectors.put_many(MODEL, vectors(DIGESTS[:1]))
            await caches.results.put(KEY, b"answer", 30.0)
        keys = server.keys()
        assert [key[:9] for key in keys] == ["mesh:res:", "mesh:vec:"]
        limits_ms = (30_000, 100_000)
        assert all(0 < server.command("PTTL", key) <= limit for key, limit in zip(keys, limits_ms, strict=True))

    run(scenario)


def test_a_deleted_text_loses_its_vector_whatever_model_made_it(server: ValkeyServer) -> None:
    async def scenario() -> None:
        async with new_caches(server) as first:
            await first.vectors.put_many("the model before", vectors(DIGESTS[:2]))
        async with new_caches(server) as second:
            second.vectors.delete_many(DIGESTS[:1])
            await written(second)
        assert server.keys() == [f"memory:vec:{DIGESTS[1].hex()}"]

    run(scenario)


def test_vectors_of_two_models_never_mix(server: ValkeyServer) -> None:
    async def scenario() -> None:
        async with new_caches(server) as first:
            await first.vectors.put_many(MODEL, vectors(DIGESTS))
        async with new_caches(server) as second:
            assert await second.vectors.get_many("stub:2", DIGESTS) == {}

    run(scenario)


# Poison


def poisons(good: bytes, other: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "short": good[:15],
        "seal alone": good[:16],
        "truncated": good[:-4],
        "longer": good + b"\0\0\0\0",
        "flipped": good[:-1] + bytes([good[-1] ^ 1]),
        "of another key": other,
        "text": b"OK",
    }


def test_a_poisoned_vector_is_a_miss_and_is_deleted(server: ValkeyServer) -> None:
    keys = [f"memory:vec:{digest.hex()}" for digest in DIGESTS]

    async def scenario() -> None:
        async with new_caches(server) as first:
            await first.vectors.put_many(MODEL, vectors(DIGESTS))
        bad = poisons(server.command("GET", keys[0]), server.command("GET", keys[1]))
        for name, value in bad.items():
            server.command("SET", keys[0], value)
            async with new_caches(server) as caches:
                assert await caches.vectors.get_many(MODEL, DIGESTS[:1]) == {}, name
                assert caches.vectors.stats().poisoned == 1
                await written(caches)
            assert server.command("EXISTS", keys[0]) == 0, name

    run(scenario)


def test_a_poisoned_result_is_a_miss_and_is_deleted(server: ValkeyServer) -> None:
    async def scenario() -> None:
        async with new_caches(server) as first:
            await first.results.put(KEY, b"answer", 30.0)
            await written(first)
            (key,) = server.keys()
            await first.results.put(KEY._replace(commit_seq=8), b"another", 30.0)
        (other,) = set(server.keys()) - {key}
        for name, value in poisons(server.command("GET", key), server.command("GET", other)).items():
            server.command("SET", key, value)
            async with new_caches(server) as caches:
                assert await caches.results.get(KEY) is None, name
                await written(caches)
            assert server.command("EXISTS", key) == 0, name

    run(scenario)


def test_a_value_of_another_type_is_a_miss_and_is_overwritten(server: ValkeyServer) -> None:
    key = f"memory:vec:{DIGESTS[0].hex()}"
    server.command("RPUSH", key, "not", "a", "string")

    async def scenario() -> None:
        async with new_caches(server) as caches:
            assert await caches.vectors.get_many(MODEL, DIGESTS[:1]) == {}
            await caches.vectors.put_many(MODEL, vectors(DIGESTS[:1]))
        async with new_caches(server) as caches:
            assert list(await caches.vectors.get_many(MODEL, DIGESTS[:1])) == DIGESTS[:1]

    run(scenario)


# Faults


def test_a_killed_server_costs_misses_and_is_found_again_by_itself(
    server: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "memory_system")

    async def scenario() -> None:
        async with new_caches(server) as caches:
            await caches.vectors.put_many(MODEL, vectors(DIGESTS))
            await caches.results.put(KEY, b"answer", 30.0)
            await written(caches)
            server.kill()
            await until_unavailable_by_misses(caches)
            assert len(await caches.vectors.get_many(MODEL, DIGESTS)) == len(DIGESTS)
            assert await caches.results.get(KEY) == b"answer"
            await caches.vectors.put_many(MODEL, vectors(DIGESTS))
            assert caches.writer.stats().values_dropped >= len(DIGESTS)
            server.start()
            await ready(caches)
            await caches.vectors.put_many(MODEL, vectors(DIGESTS))
            await written(caches)
            assert len(server.keys()) == len(DIGESTS)

    run(scenario)
    events = [str(record.msg) for record in caplog.records]
    assert sum("redis_unavailable" in event for event in events) == 1
    assert sum("redis_ready" in event for event in events) == 2


async def until_unavailable_by_misses(caches: Caches) -> None:
    async with asyncio.timeout(15.0):
        while caches.redis.state == "ready":
            assert await caches.vectors.get_many(MODEL, [b"x" * 16]) == {}
            assert await caches.results.get(KEY._replace(commit_seq=99)) is None


def test_a_frozen_server_costs_a_few_timeouts_and_then_nothing(server: ValkeyServer) -> None:
    async def scenario() -> None:
        async with new_caches(server, reset_timeout_s=60.0, failure_threshold=3) as caches:
            server.freeze()
            begun_s = time.monotonic()
            while caches.redis.state == "ready":
                assert await caches.results.get(KEY) is None
            assert caches.redis.failures == 3
            # Three timeouts of a second, and much room for a busy machine.
            assert time.monotonic() - begun_s < 15.0
            before = caches.redis.failures
            for _ in range(200):
                assert await caches.results.get(KEY) is None
            assert caches.redis.failures == before

    run(scenario)


def test_a_thawed_server_is_found_again_by_itself(server: ValkeyServer) -> None:
    async def scenario() -> None:
        async with new_caches(server) as caches:
            for _ in range(3):
                server.freeze()
                await unavailable(caches)
                server.thaw()
                await ready(caches)
            await caches.results.put(KEY, b"answer", 30.0)
            await written(caches)
        async with new_caches(server) as caches:
            assert await caches.results.get(KEY) == b"answer"

    run(scenario)


def test_a_put_never_waits_and_its_queue_is_bounded(server: ValkeyServer) -> None:
    async def scenario() -> None:
        redis = RedisConnection(settings(server, timeout_ms=2000))
        writer = WriteBehind(redis, max_values=10)
        await writer.start()
        server.freeze()
        for number in range(100):
            writer.set(f"key-{number}", b"x" * 1000, 1000)
        stats = writer.stats()
        assert (stats.values, stats.values_dropped) == (10, 90)
        writer.set("key-0", b"replaced", 1000)
        writer.set("large", b"x" * (BATCH_BYTES + 1), 1000)
        stats = writer.stats()
        assert (stats.values, stats.values_dropped) == (10, 91)
        server.thaw()
        await until(lambda: not writer.stats().values, "queue empty")
        await writer.close()
        await redis.close()
        assert server.command("GET", "key-0") in (b"replaced", None)

    run(scenario)


def test_flushing_the_server_costs_misses(server: ValkeyServer) -> None:
    async def scenario() -> None:
        async with new_caches(server) as first, new_caches(server) as second:
            await first.results.put(KEY, b"answer", 30.0)
            await written(first)
            assert await second.results.get(KEY) == b"answer"
            server.command("FLUSHALL")
            assert await second.results.get(KEY) is None
            assert second.redis.state == "ready"

    run(scenario)


def test_a_deletion_waits_for_the_server_to_come_back(server: ValkeyServer) -> None:
    async def scenario() -> None:
        async with new_caches(server) as caches:
            await caches.vectors.put_many(MODEL, vectors(DIGESTS))
            await written(caches)
            server.freeze()
            caches.vectors.delete_many(DIGESTS[:3])
            await unavailable(caches)
            assert list(await caches.vectors.get_many(MODEL, DIGESTS)) == DIGESTS[3:]
            assert caches.writer.stats().deletions == 3
            server.thaw()
            await ready(caches)
            assert list(await caches.vectors.get_many(MODEL, DIGESTS)) == DIGESTS[3:]
            await written(caches)
            assert server.keys() == sorted(f"memory:vec:{digest.hex()}" for digest in DIGESTS[3:])

    run(scenario)


def test_waiting_deletions_are_bounded_and_close_says_what_is_left(
    server: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        redis = RedisConnection(settings(server))
        writer = WriteBehind(redis, max_deletions=2)
        server.kill()
        await writer.start()
        writer.delete(["a", "b", "c", "a"])
        stats = writer.stats()
        assert (stats.deletions, stats.deletions_dropped) == (2, 1)
        assert writer.is_deleting("a") and not writer.is_deleting("c")
        await writer.close()
        await redis.close()

    run(scenario)
    assert "redis_deletions_left" in caplog.text


def test_a_late_reply_never_answers_the_next_call(server: ValkeyServer) -> None:
    """Freezing makes calls time out whose replies come after thawing; each key's value names the key."""
    keys = [f"key-{number}" for number in range(64)]
    for key in keys:
        server.command("SET", key, f"value of {key}")

    async def ask(redis: RedisConnection, key: str) -> bool:
        values = await redis.get_many([key])
        assert values in (None, [f"value of {key}".encode()])
        return values is not None

    async def scenario() -> None:
        redis = RedisConnection(settings(server, timeout_ms=100, failure_threshold=10_000))
        rng = random.Random(5)
        answered = 0
        for _ in range(8):
            await asyncio.gather(*(ask(redis, key) for key in rng.sample(keys, POOL_CONNECTIONS)))
            server.freeze()
            assert not any(await asyncio.gather(*(ask(redis, key) for key in rng.sample(keys, 20))))
            server.thaw()
            for _ in range(10):
                answered += sum(await asyncio.gather(*(ask(redis, key) for key in rng.sample(keys, 4))))
        assert answered > 100  # of 320
        clients = server.command("CLIENT", "LIST").decode().splitlines()
        assert len(clients) <= POOL_CONNECTIONS + 1  # and the one that asks
        await redis.close()

    run(scenario)


def test_a_cancelled_call_leaves_neither_its_connection_nor_its_probe_behind(server: ValkeyServer) -> None:
    server.command("SET", "key", "value")

    async def scenario() -> None:
        redis = RedisConnection(settings(server, timeout_ms=5000, failure_threshold=1))
        assert await redis.get_many(["key"]) == [b"value"]
        for _ in range(POOL_CONNECTIONS + 2):
            server.freeze()
            call = asyncio.create_task(redis.get_many(["key"]))
            await asyncio.sleep(0.02)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            server.thaw()
            assert await redis.get_many(["key"]) == [b"value"]
        assert redis.failures == 0
        await redis.close()

    run(scenario)


def test_closing_over_a_frozen_server_takes_no_time_and_leaks_nothing(server: ValkeyServer) -> None:
    async def scenario() -> None:
        caches = new_caches(server)
        await caches.start()
        server.freeze()
        await caches.vectors.put_many(MODEL, vectors([number.to_bytes(2, "big") * 8 for number in range(500)]))
        caches.vectors.delete_many(DIGESTS)
        await asyncio.sleep(0.02)
        begun_s = time.monotonic()
        await caches.close()
        await caches.close()
        assert time.monotonic() - begun_s < 15.0
        assert await caches.results.get(KEY) is None

    run(scenario)


def test_a_server_that_comes_after_the_start_is_found(server: ValkeyServer) -> None:
    server.kill()

    async def scenario() -> None:
        async with new_caches(server) as caches:
            assert caches.redis.state == "unavailable"
            await caches.vectors.put_many(MODEL, vectors(DIGESTS))
            server.start()
            await ready(caches)

    run(scenario)


def test_a_password_opens_the_server_and_enters_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def scenario(server: ValkeyServer) -> None:
        async with new_caches(server) as caches:
            assert caches.redis.state == "ready"
            await caches.results.put(KEY, b"answer", 30.0)
        wrong = server.url.replace("hush-hush", "wrong-hush")
        async with new_caches(server, url=wrong) as caches:
            assert caches.redis.state == "unavailable"
            assert await caches.results.get(KEY) is None
            assert "hush" not in repr(caches)

    with running_valkey(tmp_path, password="hush-hush") as server:
        run(lambda: scenario(server))
    assert "redis_unavailable" in caplog.text
    assert "hush" not in caplog.text


FAULT_DIGESTS = [number.to_bytes(16, "big") for number in range(1, 200)]


def value_of(digest: bytes) -> Any:
    return unit(np.random.default_rng(int.from_bytes(digest, "big")).random(DIMENSION, dtype=np.float32))


async def checking_caller(caches: Caches, rng: random.Random, stop: asyncio.Event) -> int:
    calls = 0
    while not stop.is_set():
        chosen = rng.sample(FAULT_DIGESTS, 5)
        for digest, value in (await caches.vectors.get_many(MODEL, chosen)).items():
            np.testing.assert_array_equal(value, value_of(digest))
        await caches.vectors.put_many(MODEL, {digest: value_of(digest) for digest in chosen})
        key = KEY._replace(commit_seq=rng.randrange(50))
        assert await caches.results.get(key) in (None, b"%d" % key.commit_seq)
        await caches.results.put(key, b"%d" % key.commit_seq, 30.0)
        calls += 1
        await asyncio.sleep(0.001)
    return calls


async def inflict(server: ValkeyServer, kind: str, rng: random.Random) -> None:
    if kind == "kill":
        await asyncio.to_thread(server.kill)
        await asyncio.sleep(0.1)
        await asyncio.to_thread(server.start)
    elif kind == "freeze":
        server.freeze()
        await asyncio.sleep(0.2)
        server.thaw()
    elif kind == "flush":
        await asyncio.to_thread(server.command, "FLUSHALL")
    else:
        for key in await asyncio.to_thread(server.keys):
            await asyncio.to_thread(server.command, "SETRANGE", key, str(rng.randrange(40)), b"\xff\xff")


def test_under_random_faults_every_answer_is_right_or_a_miss(server: ValkeyServer) -> None:
    """Four callers read and write while the server is killed, frozen, flushed and poisoned in a seeded order."""
    seed = 20

    async def scenario() -> None:
        rng = random.Random(seed)
        kinds = 4 * ["kill", "freeze", "flush", "poison"]
        rng.shuffle(kinds)
        changes = settings(server, timeout_ms=50, reset_timeout_s=0.05)
        stop = asyncio.Event()
        async with make_caches(CacheSettings(max_vectors=20, max_results=5), changes) as caches:
            callers = [asyncio.create_task(checking_caller(caches, random.Random(seed + n), stop)) for n in range(4)]
            for kind in kinds:
                await inflict(server, kind, rng)
                await asyncio.sleep(0.1)
            stop.set()
            assert all(await asyncio.gather(*callers))
            await ready(caches)
            assert caches.vectors.stats().redis_hits > 0
            assert caches.redis.failures > 0

    run(scenario)

"""The caches without Redis: bounds, stale fills, integrity, times to live."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_system.cache import Caches, RecordCache, ResultKey, make_caches
from memory_system.cache.lru import Lru
from memory_system.cache.records import MAX_RECENT_CHANGES, MAX_SECOND_CHANCES, RECORD_BYTES
from memory_system.cache.seal import seal, unseal
from memory_system.cache.vectors import DELETED_HOLD_S
from memory_system.embedding.interface import VectorCache
from memory_system.errors import ConfigError
from memory_system.models import Memory
from memory_system.settings import CacheSettings, RedisSettings

MODEL = "stub:1"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def memory(memory_id: str, *, namespace: str = "default", **changes: Any) -> Memory:
    fields: dict[str, Any] = {
        "row_id": 1,
        "namespace": namespace,
        "memory_id": memory_id,
        "content": "some text",
        "content_digest": b"d" * 16,
        "memory_type": "general",
        "memory_tier": "short",
        "importance": 0.5,
        "importance_at": 0.0,
        "access_count": 0,
        "last_accessed_at": None,
        "created_at": 0.0,
        "updated_at": 0.0,
        "occurred_at": None,
        "expires_at": None,
        "tier_since": 0.0,
        "due_at": None,
        "metadata": {},
        "tags": [],
        "parent_id": None,
        "session_id": None,
        "user_id": None,
        "created_by": "agent",
        "version": 1,
        "state": "active",
    }
    return Memory(**(fields | changes))


def vector(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).random(8, dtype=np.float32)


def local_caches(clock: Clock | None = None, **cache: Any) -> Caches:
    return make_caches(CacheSettings(**cache), RedisSettings(), clock=clock or Clock())


# Records


def test_a_record_is_found_under_its_namespace_only() -> None:
    records = RecordCache(10, 1.0)
    records.put(memory("a"))
    assert records.get("default", "a") == memory("a")
    assert records.get("other", "a") is None
    stats = records.stats()
    assert (stats.hits, stats.misses, stats.size) == (1, 1, 1)


def test_invalidate_and_clear_leave_nothing_behind() -> None:
    records = RecordCache(10, 1.0)
    for name in "abc":
        records.put(memory(name))
    records.invalidate("default", "a")
    records.invalidate("default", "never there")
    assert records.get("default", "a") is None
    records.clear()
    assert (records.stats().size, records.stats().bytes) == (0, 0)


def test_the_newest_put_replaces_the_older_and_its_bytes() -> None:
    records = RecordCache(10, 1.0)
    records.put(memory("a", content="x" * 5000))
    large = records.stats().bytes
    records.put(memory("a", content="y"))
    assert len(records) == 1
    assert records.stats().bytes < large


def test_an_eviction_spares_what_was_used() -> None:
    records = RecordCache(3, 1.0)
    for name in "abc":
        records.put(memory(name))
    records.get("default", "a")
    records.put(memory("d"))
    assert [name for name in "abcd" if records.get("default", name)] == ["a", "c", "d"]


def test_a_newcomer_survives_its_own_eviction() -> None:
    records = RecordCache(3, 1.0)
    for name in "abc":
        records.put(memory(name))
        records.get("default", name)
    records.put(memory("d"))
    assert records.get("default", "d") is not None
    assert len(records) == 3


def test_an_eviction_ends_though_everything_is_in_use() -> None:
    count = 4 * MAX_SECOND_CHANCES
    records = RecordCache(count, 64.0)
    for number in range(count):
        records.put(memory(str(number)))
        records.get("default", str(number))
    records.put(memory("new"))
    assert len(records) == count
    # What came after the last chance was evicted though it was in use: a bounded step beats a perfect choice.
    assert records.get("default", str(MAX_SECOND_CHANCES)) is None


def test_the_bytes_are_bounded_as_well() -> None:
    records = RecordCache(1000, 1.0)
    for number in range(100):
        records.put(memory(str(number), content="x" * 50_000))
    assert 0 < records.stats().size <= 21
    assert records.stats().bytes <= 1024 * 1024


def test_a_record_larger_than_the_cache_is_not_kept_and_evicts_nothing() -> None:
    records = RecordCache(10, 0.01)
    records.put(memory("small"))
    records.put(memory("large", content="x" * 20_000))
    assert records.get("default", "large") is None
    assert records.get("default", "small") is not None


def test_a_cache_of_no_records_keeps_none() -> None:
    records = RecordCache(0, 1.0)
    records.put(memory("a"))
    assert records.get("default", "a") is None


def test_metadata_and_tags_count_as_bytes() -> None:
    records = RecordCache(10, 1.0)
    records.put(memory("a", metadata={"list": ["x" * 1000, {"deep": "y" * 1000}]}, tags=["z" * 100]))
    assert records.stats().bytes > RECORD_BYTES + 2100


def test_a_load_enters_the_cache() -> None:
    records = RecordCache(10, 1.0)
    records.finish_load(records.begin_load(), memory("a"))
    assert records.get("default", "a") is not None


@pytest.mark.parametrize("change", ["invalidate", "put", "clear"])
def test_a_row_read_before_a_change_does_not_enter_after_it(change: str) -> None:
    records = RecordCache(10, 1.0)
    token = records.begin_load()
    if change == "invalidate":
        records.invalidate("default", "a")
    elif change == "put":
        records.put(memory("a", version=2))
    else:
        records.clear()
    records.finish_load(token, memory("a", version=1))
    cached = records.get("default", "a")
    assert (cached.version if cached else None) == (2 if change == "put" else None)


def test_a_change_of_another_key_does_not_spoil_a_load() -> None:
    records = RecordCache(10, 1.0)
    token = records.begin_load()
    records.put(memory("b"))
    records.invalidate("other", "a")
    records.finish_load(token, memory("a"))
    assert records.get("default", "a") is not None


def test_a_load_begun_after_the_change_enters_and_an_older_one_does_not_replace_it() -> None:
    records = RecordCache(10, 1.0)
    old = records.begin_load()
    records.invalidate("default", "a")
    new = records.begin_load()
    records.finish_load(new, memory("a", version=2))
    records.finish_load(old, memory("a", version=1))
    cached = records.get("default", "a")
    assert cached is not None and cached.version == 2


def test_a_load_that_outlived_the_memory_of_changes_is_refused() -> None:
    records = RecordCache(10, 1.0)
    token = records.begin_load()
    records.invalidate("default", "a")
    for number in range(MAX_RECENT_CHANGES + 1):
        records.invalidate("default", f"other-{number}")
    records.finish_load(token, memory("a"))
    assert records.get("default", "a") is None
    records.finish_load(records.begin_load(), memory("a"))
    assert records.get("default", "a") is not None


_step = st.tuples(st.sampled_from(["commit_put", "commit_invalidate", "begin", "finish"]), st.integers(0, 3))


@given(st.lists(_step, max_size=60))
def test_no_order_of_loads_and_commits_leaves_a_stale_record(steps: list[tuple[str, int]]) -> None:
    records = RecordCache(2, 1.0)
    stored = dict.fromkeys(range(4), 1)
    loads: dict[int, tuple[int, Memory]] = {}
    for step, key in steps:
        if step == "begin":
            loads[key] = (records.begin_load(), memory(str(key), version=stored[key]))
        elif step == "finish" and key in loads:
            records.finish_load(*loads.pop(key))
        elif step.startswith("commit"):
            stored[key] += 1
            if step == "commit_put":
                records.put(memory(str(key), version=stored[key]))
            else:
                records.invalidate("default", str(key))
        for number, version in stored.items():
            cached = records.get("default", str(number))
            assert cached is None or cached.version == version
        assert len(records) <= 2


# Lru and seal


def test_lru_drops_what_was_not_used_for_longest() -> None:
    lru: Lru[str, int] = Lru(2)
    lru.put("a", 1)
    lru.put("b", 2)
    lru.get("a")
    lru.put("c", 3)
    assert (lru.get("a"), lru.get("b"), lru.get("c"), len(lru)) == (1, None, 3, 2)


def test_lru_of_nothing_keeps_nothing() -> None:
    lru: Lru[str, int] = Lru(0)
    lru.put("a", 1)
    assert lru.get("a") is None


@given(st.lists(st.binary(max_size=8), max_size=3), st.binary(max_size=64), st.data())
def test_a_sealed_value_opens_only_unchanged(identity: list[bytes], payload: bytes, data: st.DataObject) -> None:
    value = seal(tuple(identity), payload)
    opened = unseal(tuple(identity), value)
    assert opened is not None and bytes(opened) == payload
    position = data.draw(st.integers(0, len(value) - 1))
    flipped = bytearray(value)
    flipped[position] ^= data.draw(st.integers(1, 255))
    assert unseal(tuple(identity), bytes(flipped)) is None
    assert unseal(tuple(identity), value[:position]) is None
    assert unseal((*identity, b"more"), value) is None


# Vectors


def test_vectors_are_kept_by_model_and_digest_as_read_only_copies() -> None:
    async def scenario() -> None:
        vectors: VectorCache = local_caches().vectors
        matrix = np.stack([vector(1), vector(2)])
        expected = matrix.copy()
        await vectors.put_many(MODEL, {b"one": matrix[0], b"two": matrix[1]})
        matrix[:] = 0.0
        found = await vectors.get_many(MODEL, [b"one", b"two", b"three", b"one"])
        assert list(found) == [b"one", b"two"]
        np.testing.assert_array_equal(np.stack(list(found.values())), expected)
        assert not found[b"one"].flags.writeable
        assert await vectors.get_many("another model", [b"one"]) == {}

    asyncio.run(scenario())


def test_vectors_are_bounded_and_counted() -> None:
    async def scenario() -> None:
        vectors = local_caches(max_vectors=3).vectors
        await vectors.put_many(MODEL, {bytes([number]): vector(number) for number in range(10)})
        await vectors.get_many(MODEL, [bytes([number]) for number in range(10)])
        stats = vectors.stats()
        assert (stats.size, stats.hits, stats.misses) == (3, 3, 7)

    asyncio.run(scenario())


def test_a_deleted_vector_is_gone_and_a_late_put_does_not_bring_it_back() -> None:
    async def scenario() -> None:
        clock = Clock()
        vectors = local_caches(clock).vectors
        await vectors.put_many(MODEL, {b"one": vector(1), b"two": vector(2)})
        vectors.delete_many([b"one"])
        await vectors.put_many(MODEL, {b"one": vector(1)})
        assert list(await vectors.get_many(MODEL, [b"one", b"two"])) == [b"two"]
        clock.now_s += DELETED_HOLD_S
        await vectors.put_many(MODEL, {b"one": vector(1)})
        assert list(await vectors.get_many(MODEL, [b"one"])) == [b"one"]

    asyncio.run(scenario())


def test_too_many_deletions_to_remember_hold_back_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory_system.cache.vectors.MAX_DELETED", 3)

    async def scenario() -> None:
        clock = Clock()
        vectors = local_caches(clock).vectors
        vectors.delete_many([b"one", b"two", b"three", b"four"])
        await vectors.put_many(MODEL, {b"one": vector(1)})
        assert await vectors.get_many(MODEL, [b"one"]) == {}
        clock.now_s += DELETED_HOLD_S
        await vectors.put_many(MODEL, {b"one": vector(1)})
        assert list(await vectors.get_many(MODEL, [b"one"])) == [b"one"]

    asyncio.run(scenario())


# Results


def test_results_belong_to_one_state_of_the_store() -> None:
    async def scenario() -> None:
        results = local_caches().results
        key = ResultKey("epoch", "default", 7, b"q" * 16)
        await results.put(key, b"answer", 60.0)
        assert await results.get(key) == b"answer"
        for changed in (
            key._replace(store_epoch="restored"),
            key._replace(namespace="other"),
            key._replace(commit_seq=8),
            key._replace(query_digest=b"r" * 16),
        ):
            assert await results.get(changed) is None
        assert (results.stats().hits, results.stats().misses) == (1, 4)

    asyncio.run(scenario())


def test_results_end_with_their_time_to_live_and_are_bounded() -> None:
    async def scenario() -> None:
        clock = Clock()
        results = local_caches(clock, max_results=2).results
        keys = [ResultKey("epoch", "default", seq, b"q") for seq in range(3)]
        await results.put(keys[0], b"never", 0.0)
        assert await results.get(keys[0]) is None
        for key in keys:
            await results.put(key, b"answer", 5.0)
        assert [await results.get(key) for key in keys] == [None, b"answer", b"answer"]
        clock.now_s += 5.0
        assert await results.get(keys[2]) is None
        assert results.stats().size == 1

    asyncio.run(scenario())


# The whole


def test_without_a_url_there_is_no_redis_and_its_package_stays_unloaded() -> None:
    program = (
        "import asyncio, sys\n"
        "from memory_system.cache import make_caches\n"
        "from memory_system.settings import CacheSettings, RedisSettings\n"
        "async def main():\n"
        "    async with make_caches(CacheSettings(), RedisSettings()) as caches:\n"
        "        assert caches.stats()['redis']['state'] == 'off'\n"
        "        caches.vectors.delete_many([b'digest'])\n"
        "        assert caches.stats()['redis']['deletions'] == 0\n"
        "asyncio.run(main())\n"
        "sys.exit('redis' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=90, check=False).returncode == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "localhost:6379",
        "redis://:secret/word@localhost:6379",
        "redis://:secret@localhost:port",
        "redis://localhost?secret_option=1",
        "redis://localhost?socket_timeout=secret",
        "redis://[secret",
    ],
)
def test_an_unusable_url_is_a_config_error_that_does_not_quote_it(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_caches(CacheSettings(), RedisSettings(url=url))
    assert "redis.url" in caught.value.message
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_tls_url_is_usable_and_the_password_stays_out_of_its_description() -> None:
    caches = make_caches(
        CacheSettings(), RedisSettings(url="rediss://user:secret@cache.example:6380/2?password=secret")
    )
    assert repr(caches.redis) == "<RedisConnection rediss://cache.example:6380/2 unavailable>"

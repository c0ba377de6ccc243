"""Nobody's crowd harms another: clients before the writer, tenants before a search, and what a search may keep."""

from __future__ import annotations

import asyncio
import threading

import pytest

from memory_system.storage.context import WriteContext
from memory_system.storage.jobs import WriteJob
from tests.support.service import Service, eventually, service_test
from tests.support.wire import encode, envelope


@service_test()
async def test_one_clients_crowd_does_not_hold_up_another(service: Service) -> None:
    replies: list[bytes] = []
    entered, release = threading.Event(), threading.Event()

    def hold(_: WriteContext) -> dict[str, bool]:
        entered.set()
        return {"ok": release.wait(20)}

    held = service.runtime._writer.submit(WriteJob(hold, "default", counted=False))
    assert await asyncio.to_thread(entered.wait, 20)  # alone: what is there before it begins is taken with it
    for number, peer in enumerate([b"a"] * 20 + [b"b"]):
        body = encode(envelope("add_memory", {"content": f"{number}"}), service.encoding)
        service.runtime.dispatcher.handle(body, replies.append, peer)

    async def waiting() -> bool:
        return service.runtime._writer.depth == 21

    await eventually(waiting)  # else those that came first are a group before the last one is there
    release.set()
    await held

    async def answered() -> bool:
        return len(replies) == 21

    await eventually(answered)
    order = [content for (content,) in service.rows("SELECT content FROM memories ORDER BY row_id")]
    assert order.index("20") < 3


@service_test()
async def test_a_crowded_neighbour_takes_no_candidates(service: Service) -> None:
    other = {"namespace": "other"}
    await service.ok("batch_add_memories", other, memories=[{"content": "cello"}] * 300)
    mine = await service.add("cello and many other words that make it a lesser match")

    async def embedded() -> bool:
        pending = [(await service.ok("stats", around))["pending"] for around in ({}, other)]
        return pending == [0, 0]

    await eventually(embedded)
    for mode in ("dense", "keyword", "hybrid"):
        found = await service.ok("semantic_search", query="cello", k=3, mode=mode)
        assert [memory["memory_id"] for memory in found["results"]] == [mine], mode


@service_test()
async def test_a_search_by_importance_follows_the_clock(service: Service) -> None:
    await service.add("a cello", importance=0.5)
    await service.settled()
    query = {"query": "cello", "filters": {"importance": {"gte": 0.4}}, "touch": False}
    assert (await service.ok("semantic_search", **query))["count"] == 1
    service.clock.ahead_s = 30 * 86_400.0
    assert (await service.ok("semantic_search", **query))["count"] == 0


@pytest.mark.parametrize("mode", ["keyword", "dense", "hybrid"])
@service_test()
async def test_a_repeated_search_sees_what_was_written_between(service: Service, mode: str) -> None:
    async def found() -> set[str]:
        reply = await service.ok("semantic_search", query="harp", mode=mode)
        return {memory["memory_id"] for memory in reply["results"]}

    first = await service.add("a harp")
    await service.settled()
    assert await found() == {first}
    assert await found() == {first}
    second = await service.add("another harp")
    await service.settled()
    assert await found() == {first, second}
    await service.ok("delete_memory", memory_id=first)
    assert await found() == {second}


@service_test()
async def test_a_kept_hit_that_changed_since_it_was_judged_is_not_returned(service: Service) -> None:
    memory_id = await service.add("a lute")
    await service.settled()
    found = await service.ok("semantic_search", query="lute", mode="keyword")
    assert [memory["memory_id"] for memory in found["results"]] == [memory_id]
    queries = service.runtime._queries
    by_row_ids = queries.by_row_ids
    changed = []

    async def late(namespace, row_ids):  # type: ignore[no-untyped-def]
        if not changed:
            changed.append(memory_id)
            await service.ok("update_memory", memory_id=memory_id, update_payload={"content": "a drum"})
        return await by_row_ids(namespace, row_ids)

    queries.by_row_ids = late  # type: ignore[method-assign]
    found = await service.ok("semantic_search", query="lute", mode="keyword")
    assert changed and found["results"] == []

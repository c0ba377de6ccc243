"""An expired memory is gone from every read at that instant, though its row may still stand."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from tests.support.service import Service, eventually, service_test


async def family(service: Service) -> dict[str, Any]:
    """A memory that expires in 100 s, in every place where it could be seen, and one that stays beside it."""
    session = await service.session()
    carried = {"session_id": session}
    parent = await service.add("parent of both", carried)
    expiring = await service.add("a violin", parent_id=parent, expires_at=service.clock.time() + 100, tags=["t"])
    await service.ok("update_memory", memory_id=expiring, update_payload={"content": "a violin plays"})
    staying = await service.add("the violin stays", parent_id=parent)
    below = await service.add("below the violin", parent_id=expiring)
    group = (await service.ok("create_context_group", name="g"))["group_id"]
    for memory_id in (expiring, staying):
        await service.ok("add_to_group", memory_id=memory_id, group_id=group)
    await service.ok("add_relationship", source_id=staying, target_id=expiring, relationship_type="r")
    await service.ok("add_relationship", source_id=expiring, target_id=staying, relationship_type="back")
    await service.settled()
    return {"parent": parent, "expiring": expiring, "staying": staying, "below": below, "group": group}


def lists(f: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        ("get_children", {"parent_id": f["parent"], "include_archived": True}),
        ("list_memories", {"include_archived": True}),
        ("list_memories", {"filters": {"tags": {"contains": "t"}}}),
        ("batch_get_memories", {"memory_ids": [f["expiring"], f["staying"]]}),
        ("get_memories_by_group", {"group_id": f["group"]}),
        ("get_related_memories", {"memory_id": f["staying"]}),
        ("search_memory", {"query": "violin"}),
        ("search_memory", {"query": "violin", "parent_id": f["parent"]}),
        ("semantic_search", {"query": "violin", "mode": "dense"}),
        ("semantic_search", {"query": "violin", "mode": "hybrid"}),
        ("semantic_search", {"query": "violin", "mode": "keyword"}),
        ("search_similar", {"memory_id": f["staying"]}),
    ]


async def shown(service: Service, action: str, data: dict[str, Any]) -> list[str]:
    reply = await service.ok(action, **data)
    return [item.get("memory", item)["memory_id"] for item in reply["results"]]


@service_test()
async def test_expired_memories_vanish_from_every_read(service: Service) -> None:
    f = await family(service)
    expiring = f["expiring"]
    batch = {"queries": [{"query": "violin"}, {"query": "violin plays", "mode": "keyword"}]}
    await service.ok("get_memory", memory_id=expiring)
    for action, data in lists(f):
        assert expiring in await shown(service, action, data), action
    for answer in (await service.ok("batch_search", **batch))["results"]:
        assert expiring in [memory["memory_id"] for memory in answer["results"]]
    before = await service.ok("stats")

    service.clock.ahead_s = 101.0
    for action, data in lists(f):
        assert expiring not in await shown(service, action, data), action
    for answer in (await service.ok("batch_search", **batch))["results"]:
        assert expiring not in [memory["memory_id"] for memory in answer["results"]]
    for action, data in (
        ("get_memory", {"memory_id": expiring}),
        ("get_memory_history", {"memory_id": expiring}),
        ("get_related_memories", {"memory_id": expiring}),
        ("search_similar", {"memory_id": expiring}),
        ("get_children", {"parent_id": expiring}),
    ):
        await service.fails("memory_not_found", action, **data)
    assert (await service.ok("batch_get_memories", memory_ids=[expiring]))["missing"] == [expiring]
    after = await service.ok("stats")
    assert after["memories"] == before["memories"] - 1
    assert after["relationships"] == 0
    assert (await service.ok("list_context_groups"))["results"][0]["members"] == 1


@service_test()
async def test_expired_memories_take_no_writes(service: Service) -> None:
    f = await family(service)
    expiring, staying = f["expiring"], f["staying"]
    service.clock.ahead_s = 101.0
    for action, data in (
        ("update_memory", {"memory_id": expiring, "update_payload": {"expires_at": None}}),
        ("update_memory", {"memory_id": staying, "update_payload": {"parent_id": expiring}}),
        ("reinforce_memory", {"memory_id": expiring}),
        ("add_memory", {"content": "x", "parent_id": expiring}),
        ("batch_add_memories", {"memories": [{"content": "x", "parent_id": expiring}]}),
        ("add_relationship", {"source_id": expiring, "target_id": staying, "relationship_type": "r"}),
        ("add_to_group", {"memory_id": expiring, "group_id": f["group"]}),
    ):
        await service.fails("memory_not_found", action, **data)


@service_test()
async def test_expired_sessions_vanish(service: Service) -> None:
    session = await service.session()
    await service.ok("update_memory", memory_id=session, update_payload={"expires_at": service.clock.time() + 100})
    await service.ok("get_session", session_id=session)
    service.clock.ahead_s = 101.0
    for action in ("get_session", "end_session"):
        await service.fails("session_not_found", action, session_id=session)
    await service.fails("session_not_found", "add_memory", {"session_id": session}, content="x")
    assert (await service.ok("list_sessions"))["results"] == []
    assert (await service.ok("stats"))["sessions"] == 0


@service_test()
async def test_expiry_by_the_real_clock(service: Service) -> None:
    memory_id = await service.add("soon gone", expires_at=time.time() + 2.5)
    await service.record(memory_id)
    assert (await service.ok("search_memory", query="gone"))["count"] == 1

    async def gone() -> bool:
        return (await service.ask("get_memory", memory_id=memory_id))["status"] == "error"

    await eventually(gone)
    assert (await service.ok("search_memory", query="gone"))["count"] == 0


@service_test()
async def test_expiry_can_be_moved_and_cleared(service: Service) -> None:
    memory_id = await service.add("moved", expires_at=service.clock.time() + 100)
    await service.settled()
    await service.ok("update_memory", memory_id=memory_id, update_payload={"expires_at": None})
    service.clock.ahead_s = 200.0
    await service.record(memory_id)
    await asyncio.sleep(0)
    assert (await service.ok("search_memory", query="moved"))["count"] == 1
    past = service.clock.time() - 1
    await service.ok("update_memory", memory_id=memory_id, update_payload={"expires_at": past})
    await service.fails("memory_not_found", "get_memory", memory_id=memory_id)
    assert (await service.ok("search_memory", query="moved"))["count"] == 0


@service_test()
async def test_expired_results_do_not_starve_a_search(service: Service) -> None:
    soon = service.clock.time() + 100
    batch = [{"content": f"cello {number}", "expires_at": soon} for number in range(300)]
    await service.ok("batch_add_memories", memories=batch)
    staying = await service.add("cello cello cello and many more words than the others have")
    await service.settled()
    service.clock.ahead_s = 101.0
    for mode in ("dense", "keyword", "hybrid"):
        assert await shown(service, "semantic_search", {"query": "cello", "k": 3, "mode": mode}) == [staying]

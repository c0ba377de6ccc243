"""Memories as they age: promotion, the archive and the way back, defaults of types, importance as of now everywhere."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from memory_system.storage.ageing import DECAY
from tests.support.ageing import DAY_S, age, due, stored
from tests.support.service import Service, service_test

TYPES = "{knowledge_fact: {memory_tier: long, importance: 0.7, reinforcement_factor: 1.1}, note: {importance: 0.2}}"


async def ids(service: Service, action: str, **data: Any) -> list[str]:
    return [record["memory_id"] for record in (await service.ok(action, **data))["results"]]


async def everywhere(
    service: Service, memory_id: str, group_id: int, parent_id: str, **options: Any
) -> dict[str, bool]:
    """By list or search, whether it shows the memory."""
    asked: dict[str, dict[str, Any]] = {
        "list_memories": {},
        "search_memory": {"query": "harbour"},
        "semantic_search": {"query": "harbour"},
        "get_memories_by_group": {"group_id": group_id},
        "get_children": {"parent_id": parent_id},
    }
    return {action: memory_id in await ids(service, action, **data, **options) for action, data in asked.items()}


async def archived_memory(service: Service) -> tuple[str, int, str]:
    """A memory that decay has archived, the group and the parent that it is in."""
    parent_id = await service.add("Places")
    memory_id = await service.add("The harbour is closed", importance=0.3, parent_id=parent_id)
    group_id = (await service.ok("create_context_group", name="places"))["group_id"]
    await service.ok("add_to_group", memory_id=memory_id, group_id=group_id)
    await service.settled()
    assert all((await everywhere(service, memory_id, group_id, parent_id)).values())
    service.clock.ahead_s = 12 * DAY_S
    changes = await age(service, service.clock.time())
    assert [(change.memory_id, change.kind, change.before, change.after) for change in changes] == [
        (memory_id, "archive", "active", "archived")
    ]
    return memory_id, group_id, parent_id


@service_test()
async def test_the_archived_are_out_of_searches_lists_and_groups(service: Service) -> None:
    memory_id, group_id, parent_id = await archived_memory(service)
    hidden = await everywhere(service, memory_id, group_id, parent_id)
    assert not any(hidden.values()), hidden
    shown = await everywhere(service, memory_id, group_id, parent_id, include_archived=True)
    assert all(shown.values()), shown
    record = await service.record(memory_id)
    assert (record["state"], record["version"]) == ("archived", 1)
    similar = await ids(service, "search_similar", memory_id=parent_id, k=10)
    assert memory_id not in similar
    groups = (await service.ok("list_context_groups"))["results"]
    assert groups[0]["members"] == 0


@service_test()
async def test_an_update_brings_the_archived_back(service: Service) -> None:
    memory_id, group_id, parent_id = await archived_memory(service)
    await service.ok("update_memory", memory_id=memory_id, update_payload={"state": "active"})
    assert all((await everywhere(service, memory_id, group_id, parent_id)).values())
    now_s = service.clock.time()
    record = await service.record(memory_id)
    assert record["importance"] == pytest.approx(0.3, rel=1e-4)
    assert stored(service, memory_id, "tier_since", "importance_at") == pytest.approx((now_s, now_s), abs=30)
    assert stored(service, memory_id, "archived_at", "promote_at", "tier_accesses") == (None, None, 0)
    assert await age(service, now_s) == []


@service_test()
async def test_reinforcing_brings_the_archived_back(service: Service) -> None:
    memory_id, group_id, parent_id = await archived_memory(service)
    reply = await service.ok("reinforce_memory", memory_id=memory_id, reinforcement_factor=1.1)
    assert reply["new_importance"] == pytest.approx(0.3, rel=1e-4)
    assert all((await everywhere(service, memory_id, group_id, parent_id)).values())
    record = await service.record(memory_id)
    assert (record["state"], record["access_count"]) == ("active", 1)
    assert record["importance"] == pytest.approx(0.3, rel=1e-4)
    await service.ok("update_memory", memory_id=memory_id, update_payload={"state": "archived"})
    reply = await service.ok("reinforce_memory", memory_id=memory_id, reinforcement_factor=3.0)
    assert reply["new_importance"] == pytest.approx(0.9, rel=1e-3)


@service_test()
async def test_an_update_may_archive_and_may_name_the_importance_on_the_way_back(service: Service) -> None:
    memory_id = await service.add(importance=0.9)
    await service.ok("update_memory", memory_id=memory_id, update_payload={"state": "archived"})
    assert stored(service, memory_id, "archived_at", "due_at") == (pytest.approx(service.clock.time(), abs=30), None)
    await service.ok("update_memory", memory_id=memory_id, update_payload={"state": "archived", "tags": ["x"]})
    reply = await service.ok(
        "update_memory", memory_id=memory_id, update_payload={"state": "active", "importance": 0.2}
    )
    assert reply["memory"]["importance"] == pytest.approx(0.2, rel=1e-4)
    assert stored(service, memory_id, "archived_at") == (None,)


@service_test()
async def test_reading_an_archived_memory_does_not_bring_it_back(service: Service) -> None:
    memory_id, *_ = await archived_memory(service)
    for _ in range(20):
        await service.ok("get_memory", memory_id=memory_id)
    await service.runtime._housekeeping.flush_accesses()
    assert (await service.record(memory_id))["state"] == "archived"
    assert stored(service, memory_id, "access_count", "promote_at", "due_at") == (20, None, None)


@service_test()
async def test_the_end_of_a_stay_promotes_what_is_still_important(service: Service) -> None:
    memory_id = await service.add(importance=1.0)
    await service.ok("reinforce_memory", memory_id=memory_id, reinforcement_factor=0.72)
    await service.ok("get_memory", memory_id=memory_id)
    await service.runtime._housekeeping.flush_accesses()
    service.clock.ahead_s = 8 * DAY_S
    now_s = service.clock.time()
    before = (await service.record(memory_id))["importance"]
    assert before < 0.5  # the end of the stay was a day ago
    changes = await age(service, now_s)
    assert [(change.before, change.after, change.reason) for change in changes] == [
        ("short", "medium", "important_at_max_age")
    ]
    record = await service.record(memory_id)
    assert (record["memory_tier"], record["version"], record["state"]) == ("medium", 1, "active")
    assert record["importance"] == pytest.approx(before, rel=1e-4)
    assert await ids(service, "list_memories", filters={"memory_tier": "medium"}) == [memory_id]
    assert await age(service, now_s) == []
    # From here it fades as its new tier does.
    service.clock.ahead_s += 10 * DAY_S
    expected = before * math.exp(-0.05 * 10 / (1 + math.log(3)))
    assert (await service.record(memory_id))["importance"] == pytest.approx(expected, rel=1e-3)


@service_test(lifecycle__early_promote_accesses=3)
async def test_what_is_read_often_is_promoted_before_its_time(service: Service) -> None:
    memory_id, seldom = await service.add("often"), await service.add("seldom")
    for turn in range(3):
        await service.ok("get_memory", memory_id=memory_id)
        if turn < 2:
            await service.ok("get_memory", memory_id=seldom)
        await service.runtime._housekeeping.flush_accesses()
        changes = await age(service, service.clock.time())
        assert [change.memory_id for change in changes] == ([memory_id] if turn == 2 else [])
    assert (changes[0].after, changes[0].reason) == ("medium", "used_often")
    # The next tier counts anew.
    assert stored(service, memory_id, "tier_accesses", "access_count", "promote_at") == (0, 3, None)
    assert await age(service, service.clock.time()) == []


@service_test()
async def test_what_is_reinforced_to_importance_is_promoted_before_its_time(service: Service) -> None:
    memory_id = await service.add(importance=0.95)
    assert await due(service, service.clock.time()) == []  # important from the start, but nobody has used it
    await service.ok("reinforce_memory", memory_id=memory_id, reinforcement_factor=1.0)
    service.clock.ahead_s = DAY_S
    assert [change.after for change in await age(service, service.clock.time())] == ["medium"]


@service_test()
async def test_a_promotion_that_is_due_is_not_lost_by_a_read(service: Service) -> None:
    """A read starts the clock anew, and by then less than the threshold may be left."""
    memory_id = await service.add(importance=1.0)
    await service.ok("reinforce_memory", memory_id=memory_id, reinforcement_factor=0.72)
    await service.ok("reinforce_memory", memory_id=memory_id, reinforcement_factor=1.0)
    service.clock.ahead_s = 9 * DAY_S
    await service.ok("get_memory", memory_id=memory_id)
    await service.runtime._housekeeping.flush_accesses()
    assert (await service.record(memory_id))["importance"] < 0.5
    assert [change.after for change in await age(service, service.clock.time())] == ["medium"]


@service_test()
async def test_what_waits_for_another_run_stays_due(service: Service) -> None:
    fading = await service.add("fading", importance=0.5)
    expiring = await service.add("expiring", expires_at=service.clock.time() + DAY_S)
    service.clock.ahead_s = 8 * DAY_S
    now_s = service.clock.time()
    assert await age(service, now_s) == []
    assert {row.memory_id for row in await due(service, now_s)} == {fading, expiring}
    assert await age(service, now_s, kinds=DECAY | {"consolidate"}) == []
    assert [row.memory_id for row in await due(service, now_s)] == [expiring]
    # It is looked at again when it falls to its threshold, or after recheck_days.
    assert stored(service, fading, "due_at") == (pytest.approx(now_s + 7 * DAY_S),)


@service_test()
async def test_due_rows_come_in_order_and_in_slices(service: Service) -> None:
    start_s = service.clock.time()
    for number in range(20):
        namespace = {"namespace": f"n{number % 3}"}
        await service.add(f"m{number}", namespace, expires_at=start_s + 1000.0 - number % 7)
    await service.add("later", expires_at=start_s + 2000.0)
    as_of_s = start_s + 1000.0
    everything = await due(service, as_of_s)
    assert len(everything) == 20
    assert [row.position for row in everything] == sorted(row.position for row in everything)
    slices, after = [], None
    while found := await due(service, as_of_s, after=after, limit=3):
        slices += found
        after = found[-1].position
    assert slices == everything
    some = await due(service, as_of_s, namespaces=["n0", "n2", "none"])
    assert some == [row for row in everything if row.namespace in ("n0", "n2")]


@service_test()
async def test_sessions_do_not_age(service: Service) -> None:
    session_id = await service.session()
    service.clock.ahead_s = 10_000 * DAY_S
    assert await due(service, service.clock.time()) == []
    assert (await service.record(session_id))["importance"] == 1.0


@service_test(lifecycle__memory_types=TYPES)
async def test_types_have_defaults_of_their_own(service: Service) -> None:
    fact = await service.add("f", memory_type="knowledge_fact")
    named = await service.add("n", memory_type="knowledge_fact", memory_tier="short", importance=0.4)
    items = [{"content": "b", "memory_type": kind} for kind in ("knowledge_fact", "note", "other")]
    batch = (await service.ok("batch_add_memories", memories=items))["memory_ids"]
    found = [await service.record(memory_id) for memory_id in (fact, named, *batch)]
    assert [record["memory_tier"] for record in found] == ["long", "short", "long", "short", "short"]
    assert [round(record["importance"], 3) for record in found] == [0.7, 0.4, 0.7, 0.2, 0.5]
    assert (await service.ok("reinforce_memory", memory_id=fact))["new_importance"] == pytest.approx(0.77, rel=1e-4)
    assert (await service.ok("reinforce_memory", memory_id=batch[1]))["new_importance"] == pytest.approx(0.24, rel=1e-4)
    reply = await service.ok("reinforce_memory", memory_id=fact, reinforcement_factor=1.2)
    assert reply["new_importance"] == pytest.approx(0.924, rel=1e-4)


@service_test()
async def test_every_read_sees_importance_as_of_now(service: Service) -> None:
    """Stored in the order a, b; after a month the one that fades slowly is the more important one."""
    fast = await service.add("the harbour in spring", importance=0.9)
    slow = await service.add("the harbour in autumn", importance=0.6, memory_tier="long")
    await service.settled()
    service.clock.ahead_s = 20 * DAY_S
    expected = {fast: 0.9 * math.exp(-2.0), slow: 0.6 * math.exp(-0.2)}
    floor = {"importance": {"gte": 0.4}}
    for filters, wanted in (({}, {fast, slow}), (floor, {slow}), ({"importance": {"lt": 0.4}}, {fast})):
        for action, data in (
            ("list_memories", {}),
            ("search_memory", {"query": "harbour"}),
            ("semantic_search", {"query": "harbour", "mode": "hybrid"}),
            ("semantic_search", {"query": "harbour", "mode": "dense"}),
            ("semantic_search", {"query": "harbour", "mode": "keyword"}),
        ):
            results = (await service.ok(action, **data, filters=filters, touch=False) if action != "list_memories"
                       else await service.ok(action, filters=filters))["results"]  # fmt: skip
            assert {record["memory_id"] for record in results} == wanted, (action, filters)
            for record in results:
                assert record["importance"] == pytest.approx(expected[record["memory_id"]], rel=1e-4), action
    assert await ids(service, "search_similar", memory_id=fast, filters=floor) == [slow]
    batch = (await service.ok("batch_search", queries=[{"query": "harbour", "filters": floor}]))["results"]
    assert [record["memory_id"] for record in batch[0]["results"]] == [slow]
    assert await ids(service, "list_memories", sort_field="importance", sort_order="desc") == [slow, fast]
    many = (await service.ok("batch_get_memories", memory_ids=[fast, slow], touch=False))["results"]
    assert [record["importance"] for record in many] == pytest.approx([expected[fast], expected[slow]], rel=1e-4)
    # A result that is kept for the next search keeps the hits, not the importance of that moment.
    service.clock.ahead_s = 90 * DAY_S
    assert await ids(service, "semantic_search", query="harbour", filters=floor, touch=False) == []
    for record in (await service.ok("semantic_search", query="harbour", touch=False))["results"]:
        assert record["importance"] < 0.3


@service_test(lifecycle__access_weight_search=0.0)
async def test_search_hits_weigh_nothing_unless_configured(service: Service) -> None:
    memory_id = await service.add("the harbour")
    await service.ok("search_memory", query="harbour")
    await service.runtime._housekeeping.flush_accesses()
    assert (await service.record(memory_id))["access_count"] == 0


@service_test(lifecycle__access_weight_search=0.1)
async def test_search_hits_count_when_they_have_a_weight(service: Service) -> None:
    memory_id = await service.add("the harbour")
    await service.ok("search_memory", query="harbour")
    await service.ok("search_memory", query="harbour", touch=False)
    await service.runtime._housekeeping.flush_accesses()
    record = await service.record(memory_id)
    assert record["access_count"] == 1
    assert record["importance"] == pytest.approx(0.6, rel=1e-4)


@service_test(storage__access_flush_s=3600.0)
async def test_a_flush_that_is_broken_off_loses_no_access_and_counts_none_twice(service: Service) -> None:
    reply = await service.ok("batch_add_memories", memories=[{"content": f"memory {number}"} for number in range(200)])
    for memory_id in reply["memory_ids"]:
        await service.ok("get_memory", memory_id=memory_id)
    housekeeping = service.runtime._housekeeping
    flush = asyncio.create_task(housekeeping.flush_accesses())
    await asyncio.sleep(0)  # the first part is under way
    flush.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flush
    assert 0 < len(housekeeping._accesses) < 200
    await housekeeping.flush_accesses()
    assert service.rows("SELECT access_count, count(*) FROM memories GROUP BY access_count") == [(1, 200)]

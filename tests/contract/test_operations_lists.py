"""Lists: children and memories in every order, cursors over data that changes, and the size limit of a page."""

from __future__ import annotations

import base64
import itertools
import json
from typing import Any

import pytest

from memory_system import protocol
from tests.support.service import Service, service_test

SORT_FIELDS = (
    "created_at", "updated_at", "occurred_at", "last_accessed_at", "importance", "access_count", "version",
    "memory_id",
)  # fmt: skip


async def varied(service: Service, count: int = 12, **data: Any) -> list[str]:
    """Memories that differ in every field a list is sorted by, with ties in some."""
    ids = []
    for number in range(count):
        mixed = number * 7 % count
        fields = {"importance": mixed // 3 / 10, **({} if number % 3 else {"occurred_at": float(mixed - 5)})}
        ids.append(await service.add(f"memory {number}", tags=[f"t{number % 3}"], **fields, **data))
        for _ in range(mixed % 3):
            await service.ok("get_memory", memory_id=ids[-1])
            await service.ok("update_memory", memory_id=ids[-1], update_payload={"metadata": {"n": mixed}})
    await service.runtime._housekeeping.flush_accesses()
    return ids


def ids_of(results: list[dict[str, Any]]) -> list[str]:
    return [memory["memory_id"] for memory in results]


def value(memory: dict[str, Any], field: str) -> Any:
    missing = {"occurred_at": memory["created_at"], "last_accessed_at": 0.0}
    return missing[field] if memory.get(field) is None else memory[field]


@pytest.mark.parametrize("action", ["get_children", "list_memories"])
@service_test()
async def test_every_order(service: Service, action: str) -> None:
    parent = await service.add("parent", importance=0.9)
    ids = await varied(service, parent_id=parent)
    data: dict[str, Any] = {"parent_id": parent} if action == "get_children" else {"filters": {"parent_id": parent}}
    for field, order in itertools.product(SORT_FIELDS, ("asc", "desc")):
        whole = await service.ok(action, **data, sort_field=field, sort_order=order)
        values = [value(memory, field) for memory in whole["results"]]
        assert values == sorted(values, reverse=order == "desc"), (field, order)
        assert sorted(ids_of(whole["results"])) == sorted(ids)
        assert "next_cursor" not in whole
        paged = await service.walk(action, **data, sort_field=field, sort_order=order, limit=5)
        assert ids_of(paged) == ids_of(whole["results"]), (field, order)


@service_test()
async def test_children_default_to_newest_first(service: Service) -> None:
    parent = await service.add("parent")
    children = [await service.add(f"{number}", parent_id=parent) for number in range(4)]
    grandchild = await service.add("below", parent_id=children[0])
    assert ids_of((await service.ok("get_children", parent_id=parent))["results"]) == children[::-1]
    assert ids_of((await service.ok("get_children", parent_id=children[0]))["results"]) == [grandchild]
    first = await service.ok("get_children", parent_id=parent, limit=2)
    assert ids_of(first["results"]) == children[:1:-1]
    assert "next_cursor" in first


@service_test()
async def test_a_full_last_page_has_no_cursor(service: Service) -> None:
    await varied(service, 6)
    reply = await service.ok("list_memories", limit=3)
    reply = await service.ok("list_memories", limit=3, cursor=reply["next_cursor"])
    assert reply["count"] == 3
    assert "next_cursor" not in reply


@service_test()
async def test_filters(service: Service) -> None:
    ids = await varied(service)
    some = await service.ok("list_memories", filters={"tags": {"any": ["t1"]}, "metadata.n": {"exists": True}})
    assert some["count"] > 0
    assert all(memory["tags"] == ["t1"] and "n" in memory["metadata"] for memory in some["results"])
    nothing = await service.ok("list_memories", filters={"not": {"memory_id": {"in": ids}}})
    assert nothing["results"] == []
    important = await service.ok("list_memories", filters={"importance": {"gte": 0.15}})
    assert {memory["importance"] >= 0.15 for memory in important["results"]} == {True}
    for filters, named in (
        ({"contents": "x"}, "contents"),
        ({"content": {"like": "x"}}, "like"),
        ({"importance": {"gte": "x"}}, "importance"),
        ({"or": []}, "or"),
        ([1], ""),
        ("x", ""),
    ):
        reply = await service.fails("invalid_filter", "list_memories", filters=filters)
        assert named in json.dumps([reply["message"], reply["details"]])


@service_test()
async def test_archived_memories_are_listed_only_when_asked_for(service: Service) -> None:
    kept, archived = await service.add("kept"), await service.add("archived")
    await service.ok("update_memory", memory_id=archived, update_payload={"state": "archived"})
    assert ids_of((await service.ok("list_memories"))["results"]) == [kept]
    assert set(ids_of((await service.ok("list_memories", include_archived=True))["results"])) == {kept, archived}
    assert (await service.record(archived))["state"] == "archived"
    await service.settled()
    assert ids_of((await service.ok("search_memory", query="archived"))["results"]) == []
    found = await service.ok("search_memory", query="archived", include_archived=True)
    assert ids_of(found["results"]) == [archived]


@pytest.mark.parametrize("field", ["created_at", "importance", "memory_id", "access_count"])
@pytest.mark.parametrize("order", ["asc", "desc"])
@service_test()
async def test_a_walk_ends_and_shows_each_untouched_memory_once(service: Service, field: str, order: str) -> None:
    ids = await varied(service, 20)
    seen: list[str] = []
    data: dict[str, Any] = {"sort_field": field, "sort_order": order, "limit": 3}
    reply = await service.ok("list_memories", **data)
    for page in range(1, 100):
        seen += ids_of(reply["results"])
        if "next_cursor" not in reply:
            break
        await service.add(f"new {page}", importance=0.05 * (page % 20))
        await service.ok("reinforce_memory", memory_id=ids[0], reinforcement_factor=0.9)
        service.clock.ahead_s += 3600.0
        reply = await service.ok("list_memories", **data, cursor=reply["next_cursor"])
    untouched = ids[1:]
    assert [seen.count(memory_id) for memory_id in untouched] == [1] * len(untouched)


@service_test()
async def test_importance_is_computed_as_of_the_first_page(service: Service) -> None:
    await varied(service, 9)
    first = await service.ok("list_memories", sort_field="importance", limit=4)
    service.clock.ahead_s = 30 * 86_400.0
    second = await service.ok("list_memories", sort_field="importance", limit=4, cursor=first["next_cursor"])
    third = await service.ok("list_memories", sort_field="importance", limit=4, cursor=second["next_cursor"])
    assert first["as_of"] == second["as_of"] == third["as_of"]
    values = [memory["importance"] for page in (first, second, third) for memory in page["results"]]
    assert len(values) == 9
    assert values == sorted(values, reverse=True)
    now = await service.ok("list_memories", sort_field="importance")
    assert max(memory["importance"] for memory in now["results"]) < values[0] / 2


@service_test()
async def test_a_cursor_serves_only_the_call_that_made_it(service: Service) -> None:
    parent = await service.add("parent")
    for number in range(3):
        await service.add(f"child {number}", parent_id=parent)
    data: dict[str, Any] = {"parent_id": parent, "limit": 1}
    cursor = (await service.ok("get_children", **data))["next_cursor"]
    for change in ({"parent_id": parent, "sort_field": "memory_id"}, {"sort_order": "asc"}, {"include_archived": True}):
        await service.fails("invalid_cursor", "get_children", **(data | change), cursor=cursor)
    await service.fails("invalid_cursor", "list_memories", cursor=cursor)
    await service.ok("get_children", parent_id=parent, limit=2, cursor=cursor)


def forged(cursor: str, **changes: Any) -> str:
    scope, as_of, key = json.loads(base64.urlsafe_b64decode(cursor + "=="))
    position = {"scope": scope, "as_of": as_of, "key": key} | changes
    return base64.urlsafe_b64encode(json.dumps([*position.values()]).encode()).decode().rstrip("=")


@service_test()
async def test_forged_cursors(service: Service) -> None:
    await varied(service, 3)
    cursor = (await service.ok("list_memories", limit=1))["next_cursor"]
    for bad in ("a", "====", "é", "A" * 1024, cursor[:-3], cursor + "AAAA", forged(cursor, scope="x")):
        await service.fails("invalid_cursor", "list_memories", limit=1, cursor=bad)
    for key in ([2**70, 1], [1.0, 2**70], [1.0, -(2**64)], ["a", 1], [1.0, "a"], [], [1.0], [1.0, 1, 2], [None, 1]):
        await service.fails("invalid_cursor", "list_memories", limit=1, cursor=forged(cursor, key=key))
    for as_of in (1e308, -1e308, 0.0):
        data = {"limit": 1, "sort_field": "importance"}
        cursor = (await service.ok("list_memories", **data))["next_cursor"]
        reply = await service.ask("list_memories", **data, cursor=forged(cursor, as_of=as_of))
        assert reply.get("error_code", "invalid_cursor") == "invalid_cursor"
    for bad in ("", "x" * 1025):
        await service.fails("invalid_field", "list_memories", limit=1, cursor=bad)
    for action in ("list_sessions", "list_context_groups"):
        for key in ([-1], [2**40], [1.5], ["a"], []):
            await service.fails("invalid_cursor", action, cursor=forged(cursor, key=key))


@service_test()
async def test_limits_of_a_page(service: Service) -> None:
    for limit in (0, -1, 1001, 1.5, "1", True, None):
        reply = await service.fails("invalid_field", "list_memories", limit=limit)
        assert reply["details"]["field"] == "limit"


@pytest.mark.timeout(120)
@service_test()
async def test_a_page_stops_at_its_size_limit_and_the_rest_follows(service: Service) -> None:
    content = "long words " * 5900
    parent = await service.add("parent")
    group = (await service.ok("create_context_group", name="g"))["group_id"]
    ids = []
    for _ in range(10):
        batch = [{"content": content, "parent_id": parent} for _ in range(13)]
        ids += (await service.ok("batch_add_memories", memories=batch))["memory_ids"]
    for memory_id in ids:
        await service.ok("add_to_group", memory_id=memory_id, group_id=group)
        await service.ok("add_relationship", source_id=parent, target_id=memory_id, relationship_type="r")
    for action, data in (
        ("batch_get_memories", {"memory_ids": ids}),
        ("get_children", {"parent_id": parent, "limit": 1000}),
        ("list_memories", {"limit": 1000, "filters": {"parent_id": parent}}),
        ("get_memories_by_group", {"group_id": group, "limit": 1000}),
        ("get_related_memories", {"memory_id": parent, "limit": 1000}),
        ("search_memory", {"query": "long words", "limit": 1000, "parent_id": parent}),
    ):
        first = await service.ok(action, **data)
        assert protocol.MAX_LIST_REPLY_BYTES - 70_000 < len(json.dumps(first["results"])) < 1.01 * 2**22, action
        found = await service.walk(action, **data)
        assert sorted(ids_of([item.get("memory", item) for item in found])) == sorted(ids), action


@service_test()
async def test_a_filter_on_importance_holds_as_of_the_first_page(service: Service) -> None:
    for number in range(6):
        await service.add(f"memory {number}", importance=0.5)
    data = {"limit": 2, "filters": {"importance": {"gte": 0.4}}}
    first = await service.ok("list_memories", **data)
    service.clock.ahead_s = 30 * 86_400.0
    assert (await service.ok("list_memories", **data, cursor=first["next_cursor"]))["count"] == 2
    assert (await service.ok("list_memories", **data))["count"] == 0


@service_test()
async def test_a_cursor_belongs_to_its_arguments(service: Service) -> None:
    ids = [await service.add(f"the same words {number}") for number in range(4)]
    for target in ids[1:]:
        await service.ok("add_relationship", source_id=ids[0], target_id=target, relationship_type="r")
        await service.ok("add_relationship", source_id=target, target_id=ids[0], relationship_type="r")
    for action, data, changes in (
        ("list_memories", {"limit": 1, "filters": {"version": 1}}, {"filters": {"version": 2}}),
        ("get_related_memories", {"limit": 1, "memory_id": ids[0]}, {"memory_id": ids[1]}),
        ("get_related_memories", {"limit": 1, "memory_id": ids[0]}, {"direction": "incoming"}),
        ("search_memory", {"limit": 1, "query": "words"}, {"query": "same"}),
        ("semantic_search", {"k": 1, "query": "words", "mode": "keyword"}, {"mode": "dense"}),
    ):
        cursor = (await service.ok(action, **data))["next_cursor"]
        await service.ok(action, **data, cursor=cursor)
        await service.fails("invalid_cursor", action, **(data | changes), cursor=cursor)

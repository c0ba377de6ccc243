"""Typed relationships and context groups."""

from __future__ import annotations

import pytest

from tests.support.service import Service, service_test


async def related(service: Service, memory_id: str, **data: object) -> list[tuple[str, str, float, str]]:
    reply = await service.ok("get_related_memories", memory_id=memory_id, **data)
    return [
        (item["memory"]["memory_id"], item["relationship_type"], item["strength"], item["direction"])
        for item in reply["results"]
    ]


async def relate(service: Service, source: str, target: str, kind: str, strength: float = 1.0) -> bool:
    reply = await service.ok(
        "add_relationship", source_id=source, target_id=target, relationship_type=kind, strength=strength
    )
    created: bool = reply["created"]
    return created


@service_test()
async def test_relationships_have_type_strength_and_direction(service: Service) -> None:
    a, b, c = [await service.add(name) for name in "abc"]
    assert await relate(service, a, b, "causes", 0.5)
    assert await relate(service, c, a, "causes", 0.9)
    assert await relate(service, a, b, "mentions", 0.7)
    assert await relate(service, b, a, "causes", 0.1)
    out = [(b, "mentions", 0.7, "outgoing"), (b, "causes", 0.5, "outgoing")]
    come = [(c, "causes", 0.9, "incoming"), (b, "causes", 0.1, "incoming")]
    assert await related(service, a, direction="outgoing") == out
    assert await related(service, a, direction="incoming") == come
    assert await related(service, a) == [come[0], *out, come[1]]
    assert await related(service, a, relationship_type="mentions") == out[:1]
    assert await related(service, a, relationship_type="none") == []
    first = (await service.ok("get_related_memories", memory_id=a))["results"][0]
    assert set(first) == {"memory", "relationship_type", "strength", "direction"}
    record = await service.record(c)
    assert first["memory"] == {**record, "importance": first["memory"]["importance"]}


@service_test()
async def test_adding_again_sets_the_strength(service: Service) -> None:
    a, b = await service.add("a"), await service.add("b")
    assert await relate(service, a, b, "r", 0.2)
    assert not await relate(service, a, b, "r", 0.8)
    assert await related(service, a) == [(b, "r", 0.8, "outgoing")]
    assert await related(service, b) == [(a, "r", 0.8, "incoming")]


@service_test()
async def test_relationships_that_cannot_be(service: Service) -> None:
    a, b = await service.add("a"), await service.add("b")
    good = {"source_id": a, "target_id": b, "relationship_type": "r"}
    for change, field in (
        ({"target_id": a}, "target_id"),
        ({"strength": 1.1}, "strength"),
        ({"strength": -0.1}, "strength"),
        ({"relationship_type": ""}, "relationship_type"),
        ({"relationship_type": "x" * 129}, "relationship_type"),
    ):
        reply = await service.fails("invalid_field", "add_relationship", **(good | change))
        assert reply["details"]["field"] == field
    for change in ({"source_id": "none"}, {"target_id": "none"}):
        await service.fails("memory_not_found", "add_relationship", **(good | change))
    assert service.count("relationships") == 0


@service_test()
async def test_removing_relationships(service: Service) -> None:
    a, b = await service.add("a"), await service.add("b")
    for kind in ("x", "y", "z"):
        await relate(service, a, b, kind)
    await relate(service, b, a, "x")
    pair = {"source_id": a, "target_id": b}
    assert (await service.ok("remove_relationship", **pair, relationship_type="x"))["removed"] == 1
    assert (await service.ok("remove_relationship", **pair, relationship_type="x"))["removed"] == 0
    assert (await service.ok("remove_relationship", **pair))["removed"] == 2
    assert await related(service, a) == [(b, "x", 1.0, "incoming")]
    await service.fails("memory_not_found", "remove_relationship", source_id=a, target_id="none")


@service_test()
async def test_related_memories_page_by_page(service: Service) -> None:
    center = await service.add("center")
    others = [await service.add(f"m{number}") for number in range(25)]
    for number, other in enumerate(others):
        await relate(service, center, other, "r", number / 100)
    found = await service.walk("get_related_memories", memory_id=center, limit=7)
    assert [item["memory"]["memory_id"] for item in found] == others[::-1]


@service_test()
async def test_groups(service: Service) -> None:
    members = [await service.add(f"m{number}") for number in range(5)]
    created = await service.ok("create_context_group", name="trip", description="to Rome")
    group = created["group_id"]
    assert isinstance(group, int)
    for memory_id in members:
        assert (await service.ok("add_to_group", memory_id=memory_id, group_id=group))["added"] is True
    assert (await service.ok("add_to_group", memory_id=members[0], group_id=group))["added"] is False
    found = await service.ok("get_memories_by_group", group_id=group)
    assert [memory["memory_id"] for memory in found["results"]] == members
    paged = await service.walk("get_memories_by_group", group_id=group, limit=2)
    assert [memory["memory_id"] for memory in paged] == members
    (listed,) = (await service.ok("list_context_groups"))["results"]
    assert listed | {"created_at": 0} == {
        "group_id": group, "name": "trip", "description": "to Rome", "created_at": 0, "members": 5,
    }  # fmt: skip
    assert (await service.ok("remove_from_group", memory_id=members[2], group_id=group))["removed"] is True
    assert (await service.ok("remove_from_group", memory_id=members[2], group_id=group))["removed"] is False
    found = await service.ok("get_memories_by_group", group_id=group)
    assert [memory["memory_id"] for memory in found["results"]] == [*members[:2], *members[3:]]


@service_test()
async def test_a_group_has_its_name_alone(service: Service) -> None:
    first = await service.ok("create_context_group", name="trip")
    assert first["created"] is True
    again = await service.ok("create_context_group", name="trip", description="other")
    assert (again["group_id"], again["created"]) == (first["group_id"], False)
    other = await service.ok("create_context_group", name="Trip")
    assert other["group_id"] != first["group_id"]
    listed = await service.walk("list_context_groups", limit=1)
    assert [group["name"] for group in listed] == ["trip", "Trip"]


@service_test()
async def test_archived_members_are_left_out_unless_asked_for(service: Service) -> None:
    memory_id = await service.add()
    group = (await service.ok("create_context_group", name="g"))["group_id"]
    await service.ok("add_to_group", memory_id=memory_id, group_id=group)
    await service.ok("update_memory", memory_id=memory_id, update_payload={"state": "archived"})
    assert (await service.ok("get_memories_by_group", group_id=group))["count"] == 0
    assert (await service.ok("get_memories_by_group", group_id=group, include_archived=True))["count"] == 1


@pytest.mark.parametrize("group_id", [0, -1, 99, 2**63 - 1])
@service_test()
async def test_groups_that_are_none(service: Service, group_id: int) -> None:
    memory_id = await service.add()
    for action in ("add_to_group", "remove_from_group"):
        reply = await service.fails("group_not_found", action, memory_id=memory_id, group_id=group_id)
        assert reply["details"]["group_id"] == group_id
    await service.fails("group_not_found", "get_memories_by_group", group_id=group_id)


@service_test()
async def test_members_that_are_none(service: Service) -> None:
    group = (await service.ok("create_context_group", name="g"))["group_id"]
    for action in ("add_to_group", "remove_from_group"):
        await service.fails("memory_not_found", action, memory_id="mem-none", group_id=group)

"""Namespaces keep tenants apart: the ids, groups and request_ids of one are nothing to another."""

from __future__ import annotations

from typing import Any

import pytest

from memory_system.protocol import ACTIONS, ADMIN_ACTIONS
from tests.support.service import Service, service_test
from tests.support.wire import request_id

OTHER = {"namespace": "other"}


async def tenant(service: Service) -> dict[str, Any]:
    """One of everything in the default namespace."""
    session = await service.session()
    parent = await service.add("trumpet parent", {"session_id": session})
    child = await service.add("trumpet child", parent_id=parent, user_id="ada")
    group = (await service.ok("create_context_group", name="g"))["group_id"]
    await service.ok("add_to_group", memory_id=child, group_id=group)
    await service.ok("add_relationship", source_id=parent, target_id=child, relationship_type="r")
    key = request_id()
    await service.add("with a key", {"request_id": key})
    await service.settled()
    return {"session": session, "parent": parent, "child": child, "group": group, "key": key}


def refused(t: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(code, action, data) of what another namespace cannot do with these ids."""
    child, parent, session, group = t["child"], t["parent"], t["session"], t["group"]
    nothing, no_session, no_group = "memory_not_found", "session_not_found", "group_not_found"
    return [
        (nothing, "get_memory", {"memory_id": child}),
        (nothing, "update_memory", {"memory_id": child, "update_payload": {"content": "x"}}),
        (nothing, "delete_memory", {"memory_id": child}),
        (nothing, "delete_memory", {"memory_id": session, "cascade": False}),
        (nothing, "reinforce_memory", {"memory_id": child}),
        (nothing, "get_children", {"parent_id": parent}),
        (nothing, "get_memory_history", {"memory_id": child}),
        (nothing, "get_related_memories", {"memory_id": child}),
        (nothing, "add_relationship", {"source_id": parent, "target_id": child, "relationship_type": "r"}),
        (nothing, "remove_relationship", {"source_id": parent, "target_id": child}),
        (nothing, "search_similar", {"memory_id": child}),
        (nothing, "undo_consolidation", {"memory_id": parent}),
        (nothing, "add_memory", {"content": "x", "parent_id": parent}),
        (nothing, "batch_add_memories", {"memories": [{"content": "x", "parent_id": parent}]}),
        (no_session, "get_session", {"session_id": session}),
        (no_session, "end_session", {"session_id": session}),
        (no_session, "resume_session", {"session_id": session}),
        (no_group, "get_memories_by_group", {"group_id": group}),
        (no_group, "add_to_group", {"memory_id": child, "group_id": group}),
        (no_group, "remove_from_group", {"memory_id": child, "group_id": group}),
    ]


def empty(t: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        ("list_memories", {"include_sessions": True}),
        ("list_memories", {"filters": {"memory_id": t["child"]}}),
        ("batch_get_memories", {"memory_ids": [t["child"], t["parent"]]}),
        ("list_sessions", {}),
        ("list_context_groups", {}),
        ("search_memory", {"query": "trumpet"}),
        ("search_memory", {"query": "trumpet", "parent_id": t["parent"]}),
        ("semantic_search", {"query": "trumpet", "mode": "dense"}),
        ("semantic_search", {"query": "trumpet"}),
        ("export_memories", {}),
    ]


UNBOUND = {"create_session", "create_context_group", "health_check", "get_commit_seq"}
# Maintenance is of the whole store, whoever asks for it; an import names the namespace of each line or takes its own.
UNBOUND |= ADMIN_ACTIONS - {"export_memories", "undo_consolidation"}


@service_test()
async def test_another_namespace_sees_and_does_nothing(service: Service) -> None:
    t = await tenant(service)
    database = service.rows("SELECT * FROM memories ORDER BY row_id")
    for code, action, data in refused(t):
        await service.fails(code, action, OTHER, **data)
    for action, data in empty(t):
        assert (await service.ok(action, OTHER, **data))["results"] == [], action
    assert (await service.ok("forget", OTHER, user_id="ada"))["deleted"] == 0
    assert (await service.ok("forget", OTHER, session_id=t["session"]))["deleted"] == 0
    assert (await service.ok("get_request_status", OTHER, request_id=t["key"]))["state"] == "unknown"
    (answer,) = (await service.ok("batch_search", OTHER, queries=[{"query": "trumpet"}]))["results"]
    assert answer["results"] == []
    stats = await service.ok("stats", OTHER)
    assert [stats[name] for name in ("memories", "sessions", "relationships", "context_groups")] == [0] * 4
    assert service.rows("SELECT * FROM memories ORDER BY row_id") == database
    covered = {action for _, action, _ in refused(t)} | {action for action, _ in empty(t)}
    assert covered | UNBOUND | {"forget", "get_request_status", "batch_search", "stats"} == ACTIONS


@service_test()
async def test_groups_of_one_name_are_two_groups(service: Service) -> None:
    first = await service.ok("create_context_group", name="g")
    second = await service.ok("create_context_group", OTHER, name="g")
    assert second["created"] is True
    assert first["group_id"] != second["group_id"]
    mine = await service.add("mine")
    await service.fails("group_not_found", "add_to_group", memory_id=mine, group_id=second["group_id"])
    await service.fails("memory_not_found", "add_to_group", OTHER, memory_id=mine, group_id=second["group_id"])


@service_test()
async def test_relationships_do_not_cross(service: Service) -> None:
    mine, theirs = await service.add("mine"), await service.add("theirs", OTHER)
    for around in ({}, OTHER):
        for source, target in ((mine, theirs), (theirs, mine)):
            await service.fails(
                "memory_not_found",
                "add_relationship",
                around,
                source_id=source,
                target_id=target,
                relationship_type="r",
            )


@service_test()
async def test_commit_seq_counts_each_namespace_alone(service: Service) -> None:
    assert (await service.ok("get_commit_seq"))["commit_seq"] == 0
    await service.add("one")
    await service.add("two")
    theirs = await service.ok("add_memory", OTHER, content="theirs")
    assert theirs["commit_seq"] == 1
    assert (await service.ok("get_commit_seq"))["commit_seq"] == 2
    assert (await service.ok("get_commit_seq", OTHER))["commit_seq"] == 1
    assert (await service.ok("get_commit_seq", {"namespace": "third"}))["commit_seq"] == 0


@service_test()
async def test_one_request_id_in_two_namespaces_is_two_requests(service: Service) -> None:
    key = request_id()
    mine = await service.ok("add_memory", {"request_id": key}, content="x")
    theirs = await service.ok("add_memory", {"request_id": key, **OTHER}, content="y")
    assert "replayed" not in theirs
    assert mine["memory_id"] != theirs["memory_id"]


@pytest.mark.parametrize("namespace", ["", "a\0b", "a\nb", "x" * 129, 1, ["a"], {}])
@service_test()
async def test_names_that_are_none(service: Service, namespace: Any) -> None:
    reply = await service.fails("invalid_field", "add_memory", {"namespace": namespace}, content="x")
    assert reply["details"]["field"] == "namespace"
    assert service.count("memories") == 0


@service_test()
async def test_absent_and_null_are_the_default_namespace(service: Service) -> None:
    memory_id = await service.add("x", {"namespace": "default"})
    request = {"v": 1, "action": "get_memory", "data": {"memory_id": memory_id}}
    assert (await service.send(request))["status"] == "success"
    assert (await service.send({**request, "namespace": None}))["status"] == "success"

"""Callers that do not speak `v: 1` are served leniently and under the names that they use; `v: 1` is strict."""

from __future__ import annotations

from typing import Any

import pytest

from memory_system.protocol import ACTIONS
from tests.support.service import Service, service_test
from tests.support.wire import Reply, request_id


async def legacy(service: Service, action: str, **data: Any) -> Reply:
    return await service.send({"action": action, "data": data})


@service_test()
async def test_unknown_fields_of_legacy_callers_are_ignored_and_counted(service: Service) -> None:
    for request in (
        {"action": "add_memory", "data": {"content": "x", "colour": "red"}},
        {"action": "add_memory", "data": {"content": "x"}, "priority": 1},
        {"action": "add_memory", "data": {"content": "x", "a\nb": 1, "`": 2, "": 3}, "a`\n": None},
        {"action": "stats", "data": {"x": {"y": []}}},
        {"action": "batch_add_memories", "data": {"memories": [{"content": "x", "colour": "red"}]}},
    ):
        before = service.runtime.dispatcher.ignored_fields
        reply = await service.send(request)
        assert reply["status"] == "success", reply
        assert "request_id" not in reply
        if request["action"] != "batch_add_memories":
            assert service.runtime.dispatcher.ignored_fields > before
    assert service.count("memories") == 4


@service_test()
async def test_known_fields_of_legacy_callers_are_checked_all_the_same(service: Service) -> None:
    reply = await legacy(service, "add_memory", content="x", importance="high", colour="red")
    assert (reply["error_code"], reply["details"]["field"]) == ("invalid_field", "importance")
    reply = await legacy(service, "add_memory", colour="red")
    assert (reply["error_code"], reply["details"]["field"]) == ("invalid_field", "content")
    assert service.count("memories") == 0


@service_test()
async def test_version_one_refuses_unknown_fields_with_a_suggestion(service: Service) -> None:
    for action, data, field, suggestion in (
        ("add_memory", {"content": "x", "importanse": 1}, "importanse", "importance"),
        ("get_children", {"parent_id": "x", "sort_oder": "asc"}, "sort_oder", "sort_order"),
        ("stats", {"anything": 1}, "anything", None),
        ("add_memory", {"content": "x", "a\nb": 1}, "a\nb", None),
    ):
        reply = await service.fails("invalid_field", action, **data)
        assert reply["details"] == {"field": field, **({"suggestion": suggestion} if suggestion else {})}
    reply = await service.fails("invalid_field", "stats", {"namespase": "x"})
    assert reply["details"] == {"field": "namespase", "suggestion": "namespace"}
    reply = await service.fails("invalid_field", "update_memory", memory_id="x", update_payload={"contents": "x"})
    assert reply["details"] == {"field": "update_payload.contents", "suggestion": "content"}


@service_test()
async def test_names_of_older_agents(service: Service) -> None:
    session = (await legacy(service, "create_session", user_id="ada", metadata={"a": 1}, created_by="old"))["session"]
    assert (session["metadata"], session["created_by"]) == ({"a": 1}, "old")
    memory_id = (await legacy(service, "add_memory", content="x", created_by="old"))["memory_id"]
    assert (await service.record(memory_id))["created_by"] == "old"
    updated = await legacy(service, "update_memory", memory_id=memory_id, update_data={"content": "y"})
    assert updated["memory"]["content"] == "y"
    other = await service.add("other")
    await legacy(service, "add_relationship", source_id=memory_id, target_id=other, relationship_type="r")
    found = await legacy(service, "get_related", memory_id=other)
    assert [item["memory"]["memory_id"] for item in found["results"]] == [memory_id]


@service_test()
async def test_the_older_names_work_for_version_one_too(service: Service) -> None:
    memory_id = await service.add("x")
    await service.ok("update_memory", memory_id=memory_id, update_data={"content": "y"})
    reply = await service.fails("invalid_field", "update_memory", memory_id=memory_id, update_data={"contents": "y"})
    assert reply["details"]["field"] == "update_data.contents"
    await service.ok("get_related", memory_id=memory_id)
    created = await service.ok("create_session", user_id="ada", metadata={"b": 2})
    assert created["session"]["metadata"] == {"b": 2}


@service_test()
async def test_created_by_is_the_agent_unless_the_data_names_another(service: Service) -> None:
    agent = {"agent_id": "agent"}
    assert (await service.record(await service.add("x", agent)))["created_by"] == "agent"
    assert (await service.record(await service.add("x", agent, created_by="other")))["created_by"] == "other"
    assert (await service.record(await service.add("x")))["created_by"] == ""
    ids = (await service.ok("batch_add_memories", agent, memories=[{"content": "x"}]))["memory_ids"]
    assert (await service.record(ids[0]))["created_by"] == "agent"


@service_test()
async def test_request_ids_are_echoed(service: Service) -> None:
    for request in (
        {"action": "stats", "request_id": "1"},
        {"action": "stats", "request_id": "x" * 128},
        {"action": "none", "request_id": "1"},
        {"action": "add_memory", "data": {"content": ""}, "request_id": "1"},
        {"v": 1, "action": "stats", "request_id": "x" * 16},
        {"v": 1, "action": "stats", "request_id": "x" * 16, "unknown": 1},
        {"v": 2, "action": "stats", "request_id": "x" * 16},
        {"action": 1, "request_id": "1"},
        {"request_id": "1"},
    ):
        assert (await service.send(request)).get("request_id") == request["request_id"], request
    assert "request_id" not in await service.send({"action": "stats"})
    assert "request_id" not in await service.send({"action": "stats", "request_id": None})


@pytest.mark.parametrize("action", ["", "semantic_serch", "Get_Memory", "__init__", "run", "x" * 128, "_write"])
@service_test()
async def test_unknown_actions(service: Service, action: str) -> None:
    for request in ({"action": action}, {"v": 1, "action": action, "data": {}, "request_id": request_id()}):
        reply = await service.send(request)
        assert reply["error_code"] == "unknown_action"
        if action == "semantic_serch":
            assert reply["details"]["suggestion"] == "semantic_search"


@pytest.mark.parametrize("version", [0, 2, -1, 2**63 - 1, 2**64 - 1])
@service_test()
async def test_versions_that_are_not_spoken(service: Service, version: int) -> None:
    assert (await service.send({"v": version, "action": "stats"}))["error_code"] == "unsupported_version"


@pytest.mark.parametrize("version", ["1", 1.0, True, [1], {}])
@service_test()
async def test_versions_that_are_no_integers(service: Service, version: Any) -> None:
    reply = await service.send({"v": version, "action": "stats"})
    assert (reply["error_code"], reply["details"].get("field")) == ("invalid_field", "v")


WITHOUT_REQUIRED_DATA = {
    "list_sessions", "list_context_groups", "list_memories", "stats", "get_commit_seq", "health_check",
    "run_decay", "run_consolidation", "run_cleanup", "run_snapshot", "run_checkpoint", "run_integrity_check",
    "list_runs", "backup", "reindex", "export_memories",
}  # fmt: skip


@service_test()
async def test_data_may_be_absent_null_or_empty(service: Service) -> None:
    for action in sorted(ACTIONS):
        replies = [
            await service.send({"action": action}),
            await service.send({"action": action, "data": None}),
            await service.send({"action": action, "data": {}}),
        ]
        expected = None if action in WITHOUT_REQUIRED_DATA else "invalid_field"
        assert [reply.get("error_code") for reply in replies] == [expected] * 3, action
    for data in ([], "x", 1, True):
        reply = await service.send({"action": "stats", "data": data})
        assert reply["error_code"] == "invalid_field", reply

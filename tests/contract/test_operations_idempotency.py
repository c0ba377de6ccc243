"""A write retried under its request_id happens once, and its caller cannot tell but by `replayed`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from memory_system.protocol import WRITE_ACTIONS
from memory_system.storage import cleaning
from tests.support.service import Service, service_test
from tests.support.wire import encode, envelope, request_id


async def every_write(service: Service) -> list[tuple[str, dict[str, Any]]]:
    """A call of each action that writes, with an effect of its own."""
    session, a, b, c = await service.session(), *[await service.add(name) for name in "abc"]
    group = (await service.ok("create_context_group", name="there"))["group_id"]
    await service.ok("add_to_group", memory_id=b, group_id=group)
    await service.ok("add_relationship", source_id=b, target_id=c, relationship_type="r")
    await service.add("eve", user_id="eve")
    return [
        ("create_session", {"user_id": "ada", "session_metadata": {"a": 1}}),
        ("end_session", {"session_id": session, "summary": "s"}),
        ("resume_session", {"session_id": session}),
        ("add_memory", {"content": "x"}),
        ("batch_add_memories", {"memories": [{"content": "x"}, {"content": "y"}]}),
        ("update_memory", {"memory_id": a, "update_payload": {"content": "changed"}, "expected_version": 1}),
        ("reinforce_memory", {"memory_id": a, "reinforcement_factor": 0.5}),
        ("add_relationship", {"source_id": a, "target_id": b, "relationship_type": "r"}),
        ("remove_relationship", {"source_id": b, "target_id": c}),
        ("create_context_group", {"name": "g"}),
        ("add_to_group", {"memory_id": a, "group_id": group}),
        ("remove_from_group", {"memory_id": b, "group_id": group}),
        ("delete_memory", {"memory_id": c}),
        ("forget", {"user_id": "eve"}),
    ]


TABLES = ("memories", "sessions", "memory_history", "relationships", "context_groups", "group_members", "idempotency")


def contents(service: Service) -> list[list[tuple[Any, ...]]]:
    return [service.rows(f"SELECT * FROM {table}") for table in (*TABLES, "namespaces")]


@service_test()
async def test_every_write_is_done_once_and_answered_alike(service: Service) -> None:
    calls = await every_write(service)
    assert {action for action, _ in calls} == WRITE_ACTIONS
    for action, data in calls:
        around = {"request_id": request_id(), "agent_id": "a"}
        first = await service.ok(action, around, **data)
        assert "replayed" not in first
        state = contents(service)
        again = await service.ok(action, around, **data)
        assert again.pop("replayed") is True, action
        if action == "update_memory":  # what is not stored is read anew: importance decays meanwhile
            again["memory"]["importance"] = first["memory"]["importance"]
        assert again == first, action
        assert contents(service) == state, action


@service_test()
async def test_retries_at_once_are_one_write(service: Service) -> None:
    around = {"request_id": request_id()}
    replies = await asyncio.gather(*(service.ok("add_memory", around, content="x") for _ in range(20)))
    assert len({reply["memory_id"] for reply in replies}) == 1
    assert sum("replayed" in reply for reply in replies) == 19
    assert service.count("memories") == 1


@service_test()
async def test_one_key_for_two_calls_is_refused(service: Service) -> None:
    around = {"request_id": request_id()}
    memory_id = await service.add("x", around)
    session = await service.session()
    state = contents(service)
    for action, more, data in (
        ("add_memory", {}, {"content": "y"}),
        ("add_memory", {}, {"content": "x", "importance": 0.6}),
        ("add_memory", {"session_id": session}, {"content": "x"}),
        ("delete_memory", {}, {"memory_id": memory_id}),
        ("create_context_group", {}, {"name": "x"}),
    ):
        reply = await service.fails("idempotency_mismatch", action, {**around, **more}, **data)
        assert reply["details"]["request_id"] == around["request_id"]
        assert reply["retryable"] is False
    assert contents(service) == state


@service_test()
async def test_a_failure_is_not_stored(service: Service) -> None:
    around = {"request_id": request_id()}
    group = {"group_id": 1}
    await service.fails("memory_not_found", "reinforce_memory", around, memory_id="mem-none")
    await service.fails("group_not_found", "add_to_group", around, memory_id="mem-none", **group)
    await service.fails("invalid_field", "add_memory", around, content="")
    assert service.count("idempotency") == 0
    assert (await service.ok("get_request_status", request_id=around["request_id"]))["state"] == "unknown"
    memory_id = await service.add("now it works", around)
    assert (await service.ok("get_request_status", request_id=around["request_id"]))["state"] == "committed"
    assert (await service.ok("add_memory", around, content="now it works"))["memory_id"] == memory_id


@service_test()
async def test_a_version_conflict_may_be_tried_again(service: Service) -> None:
    memory_id = await service.add("x")
    around = {"request_id": request_id()}
    change = {"memory_id": memory_id, "update_payload": {"content": "y"}, "expected_version": 2}
    await service.fails("version_conflict", "update_memory", around, **change)
    await service.ok("update_memory", memory_id=memory_id, update_payload={"content": "z"})
    assert (await service.ok("update_memory", around, **change))["version"] == 3


@service_test()
async def test_keys_belong_to_their_agent(service: Service) -> None:
    key = request_id()
    replies = [
        await service.ok("add_memory", {"request_id": key, "agent_id": agent}, content="x")
        for agent in ("one", "two", None)
    ]
    assert len({reply["memory_id"] for reply in replies}) == 3
    assert not any("replayed" in reply for reply in replies)


@service_test()
async def test_legacy_callers_and_calls_without_a_key_are_not_deduplicated(service: Service) -> None:
    key = request_id()
    for _ in range(2):
        reply = await service.send({"action": "add_memory", "data": {"content": "x"}, "request_id": key})
        assert (reply["status"], reply["request_id"]) == ("success", key)
        await service.ok("add_memory", {"request_id": None}, content="x")
    assert service.count("memories") == 4
    assert service.count("idempotency") == 0


@service_test()
async def test_a_replay_of_what_is_gone_since(service: Service) -> None:
    session = await service.session()
    update, end = {"request_id": request_id()}, {"request_id": request_id()}
    memory_id = await service.add("x")
    change = {"memory_id": memory_id, "update_payload": {"content": "y"}}
    await service.ok("update_memory", update, **change)
    await service.ok("end_session", end, session_id=session)
    await service.ok("delete_memory", memory_id=memory_id)
    await service.ok("delete_memory", memory_id=session)
    again = await service.ok("update_memory", update, **change)
    assert (again["replayed"], again["version"], again["memory"]) == (True, 2, None)
    again = await service.ok("end_session", end, session_id=session)
    assert (again["replayed"], again["session"]) == (True, None)


@service_test()
async def test_status_of_a_request(service: Service) -> None:
    around = {"request_id": request_id(), "agent_id": "a"}
    first = await service.ok("add_memory", around, content="x")
    status = await service.ok("get_request_status", {"agent_id": "a"}, request_id=around["request_id"])
    assert status["state"] == "committed"
    assert status["reply"]["memory_id"] == first["memory_id"]
    assert status["reply"]["commit_seq"] == first["commit_seq"]
    assert status["committed_at"] == pytest.approx(first["created_at"], abs=1.0)
    other = await service.ok("get_request_status", {"agent_id": "b"}, request_id=around["request_id"])
    assert other["state"] == "unknown"
    assert "reply" not in other


@service_test()
async def test_the_same_call_in_the_other_encoding_is_not_the_same_bytes(service: Service) -> None:
    """A retry repeats its bytes; what other bytes get must be safe: a refusal or the stored reply, no second write."""
    request = envelope("add_memory", {"content": "x"})
    for encoding in ("msgpack", "json"):
        body = await service(encode(request, encoding))
        assert body
    assert service.count("memories") == 1


@pytest.mark.parametrize("key", ["short", "x" * 15, "", "x" * 129, "x" * 15 + "\0", 1234567890123456, ["x" * 16]])
@service_test()
async def test_keys_that_are_none(service: Service, key: Any) -> None:
    request = {"v": 1, "action": "add_memory", "data": {"content": "x"}, "request_id": key}
    reply = await service.send(request)
    assert (reply["error_code"], reply["details"]["field"]) == ("invalid_field", "request_id")
    assert service.count("memories") == 0


@service_test(storage__idempotency_ttl_h=0.0, clock__jump_s=1e9)
async def test_old_keys_are_pruned(service: Service) -> None:
    service.clock.ahead_s = -3600.0
    await service.add("x")
    assert service.count("idempotency") == 1
    await service.runtime._housekeeping.prune()
    assert (service.count("idempotency"), service.count("memories")) == (0, 1)


@service_test()
async def test_a_cleanup_of_old_keys_leaves_those_that_come_meanwhile(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key was fresh when it began; one that comes before its first write is kept, and the retry is one memory."""
    key, counted = request_id(), cleaning.count_old_keys

    async def slow(*arguments: Any) -> int:
        count = await counted(*arguments)
        await service.ok("add_memory", {"request_id": key}, content="once")
        return count

    monkeypatch.setattr(cleaning, "count_old_keys", slow)
    assert (await service.ok("run_cleanup"))["counts"]["idempotency_keys"] == 0
    again = await service.ok("add_memory", {"request_id": key}, content="once")
    assert again["replayed"] is True
    assert service.count("memories") == 1

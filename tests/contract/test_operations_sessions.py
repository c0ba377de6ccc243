"""Sessions: memories of a type of their own, and what a call that carries one does with it."""

from __future__ import annotations

import time

import pytest

from tests.support.service import Service, request_id, service_test

SESSION_FIELDS = {
    "session_id", "user_id", "session_type", "session_state", "metadata", "created_at", "last_active_at",
    "idle_timeout_s", "ended_at", "summary", "created_by",
}  # fmt: skip


@service_test()
async def test_life_of_a_session(service: Service) -> None:
    created = await service.ok(
        "create_session", {"agent_id": "host"}, user_id="ada", session_type="call", session_metadata={"topic": "x"}
    )
    session_id = created["session_id"]
    session = created["session"]
    assert set(session) == SESSION_FIELDS
    assert session["last_active_at"] == session["created_at"]
    assert session | {"created_at": 0.0, "last_active_at": 0.0} == {
        "session_id": session_id, "user_id": "ada", "session_type": "call", "session_state": "open",
        "metadata": {"topic": "x"}, "created_at": 0.0, "last_active_at": 0.0, "idle_timeout_s": None, "ended_at": None,
        "summary": None, "created_by": "host",
    }  # fmt: skip
    got = await service.ok("get_session", session_id=session_id)
    assert (got["session_id"], got["session"]) == (session_id, session)

    ended = await service.ok("end_session", session_id=session_id, summary="we talked")
    assert (ended["session_id"], ended["ended"], ended["session"]["session_state"]) == (session_id, True, "ended")
    assert ended["session"]["ended_at"] == pytest.approx(time.time(), abs=30)
    again = await service.ok("end_session", session_id=session_id)
    assert (again["ended"], again["session"]) == (False, ended["session"])
    later = await service.ok("end_session", session_id=session_id, summary="more")
    assert later["session"] == {**ended["session"], "summary": "more"}


@service_test()
async def test_a_session_is_a_memory(service: Service) -> None:
    session = await service.session(session_metadata={"a": 1})
    record = await service.record(session)
    assert (record["memory_type"], record["session_id"], record["user_id"]) == ("session", session, "ada")
    assert record["metadata"] == {"a": 1}
    child = await service.add("turn", parent_id=session)
    children = await service.ok("get_children", parent_id=session)
    assert [memory["memory_id"] for memory in children["results"]] == [child]
    record = await service.record(child)
    assert (record["session_id"], record["user_id"]) == (session, "ada")


@service_test()
async def test_the_session_of_the_call_is_the_parent_unless_one_is_named(service: Service) -> None:
    session = await service.session()
    carried = {"session_id": session}
    parent = await service.add("parent")
    for data, parent_id in (({}, session), ({"parent_id": None}, None), ({"parent_id": parent}, parent)):
        record = await service.record(await service.add("x", carried, **data))
        assert (record["parent_id"], record["session_id"], record["user_id"]) == (parent_id, session, "ada")
    batch = [{"content": "a"}, {"content": "b", "parent_id": None}, {"content": "c", "user_id": "bob"}]
    ids = (await service.ok("batch_add_memories", carried, memories=batch))["memory_ids"]
    records = (await service.ok("batch_get_memories", memory_ids=ids))["results"]
    assert [record["parent_id"] for record in records] == [session, None, session]
    assert [record["user_id"] for record in records] == ["ada", "ada", "bob"]


@service_test()
async def test_session_and_user_are_inherited_from_the_parent(service: Service) -> None:
    session = await service.session()
    child = await service.add("child", parent_id=session)
    record = await service.record(await service.add("grandchild", parent_id=child))
    assert (record["parent_id"], record["session_id"], record["user_id"]) == (child, session, "ada")


@service_test()
async def test_the_session_of_the_call_serves_session_operations(service: Service) -> None:
    session = await service.session()
    assert (await service.ok("get_session", {"session_id": session}))["session_id"] == session
    assert (await service.ok("end_session", {"session_id": session}))["session_id"] == session
    for action in ("get_session", "end_session"):
        reply = await service.fails("invalid_field", action)
        assert reply["details"]["field"] == "session_id"


@service_test()
async def test_sessions_that_are_none(service: Service) -> None:
    memory = await service.add("no session")
    for session_id in ("mem-none", memory):
        for action in ("get_session", "end_session"):
            reply = await service.fails("session_not_found", action, session_id=session_id)
            assert reply["details"]["session_id"] == session_id
        await service.fails("session_not_found", "add_memory", {"session_id": session_id}, content="x")
    assert service.count("memories") == 1


@service_test()
async def test_sessions_are_listed_newest_first_by_user_and_state(service: Service) -> None:
    mine = [await service.session(user_id="ada") for _ in range(5)]
    other = await service.session(user_id="bob")
    await service.ok("end_session", session_id=mine[1])
    for data, expected in (
        ({}, [other, *reversed(mine)]),
        ({"user_id": "ada"}, mine[::-1]),
        ({"user_id": "ada", "session_state": "ended"}, [mine[1]]),
        ({"user_id": "ada", "session_state": "open"}, [mine[4], mine[3], mine[2], mine[0]]),
        ({"user_id": "nobody"}, []),
    ):
        assert [s["session_id"] for s in (await service.ok("list_sessions", **data))["results"]] == expected
        assert [s["session_id"] for s in await service.walk("list_sessions", **data, limit=2)] == expected
    await service.fails("invalid_field", "list_sessions", session_state="closed")


@service_test()
async def test_sessions_are_neither_searched_nor_listed_as_memories(service: Service) -> None:
    session = await service.session(user_id="marimba", session_type="marimba")
    await service.ok("update_memory", memory_id=session, update_payload={"content": "marimba marimba"})
    memory = await service.add("the marimba plays", {"session_id": session})
    await service.settled()
    for action in ("search_memory", "semantic_search"):
        found = await service.ok(action, query="marimba")
        assert [record["memory_id"] for record in found["results"]] == [memory]
    assert [m["memory_id"] for m in (await service.ok("list_memories"))["results"]] == [memory]
    both = await service.ok("list_memories", include_sessions=True)
    assert {m["memory_id"] for m in both["results"]} == {memory, session}
    stats = await service.ok("stats")
    assert (stats["memories"], stats["sessions"], stats["by_type"]) == (1, 1, {"general": 1})
    assert service.count("embeddings") == 1


@service_test()
async def test_sessions_do_not_decay(service: Service) -> None:
    session = await service.session()
    service.clock.ahead_s = 1000 * 86_400.0
    assert (await service.record(session))["importance"] == 1.0


@service_test()
async def test_metadata_of_a_session_is_checked(service: Service) -> None:
    for data, field in (
        ({"session_metadata": [1]}, "session_metadata"),
        ({"session_metadata": {"a": "\0"}}, "session_metadata"),
        ({"metadata": "text"}, "metadata"),
    ):
        reply = await service.fails("invalid_field", "create_session", user_id="ada", **data)
        assert reply["details"]["field"] == field
    reply = await service.fails("invalid_field", "create_session")
    assert reply["details"]["field"] == "user_id"
    assert service.count("sessions") == 0


@service_test()
async def test_a_session_ends_by_itself_when_nothing_is_added_for_so_long(service: Service) -> None:
    idle = await service.session(idle_timeout_s=60)
    other = await service.session()
    made = (await service.ok("get_session", session_id=idle))["session"]
    assert (made["session_state"], made["idle_timeout_s"], made["ended_at"]) == ("open", 60.0, None)
    service.clock.ahead_s = 50.0
    await service.add("still there", {"session_id": idle})
    active_s = (await service.ok("get_session", session_id=idle))["session"]["last_active_at"]
    assert active_s == pytest.approx(made["created_at"] + 50.0, abs=10)
    service.clock.ahead_s = 100.0
    assert await state(service, idle) == "open"
    service.clock.ahead_s = 120.0
    ended = (await service.ok("get_session", session_id=idle))["session"]
    assert (ended["session_state"], ended["ended_at"]) == ("ended", active_s + 60.0)
    for session_state, expected in (("ended", [idle]), ("open", [other])):
        found = await service.ok("list_sessions", session_state=session_state)
        assert [each["session_id"] for each in found["results"]] == expected
    assert service.rows("SELECT ended_at FROM sessions") == [(None,), (None,)], "nothing had to run for that"


async def state(service: Service, session_id: str) -> str:
    found: str = (await service.ok("get_session", session_id=session_id))["session"]["session_state"]
    return found


@service_test()
async def test_memories_anywhere_below_a_session_keep_it_open(service: Service) -> None:
    session = await service.session(idle_timeout_s=60)
    child = await service.add("child", parent_id=session)
    service.clock.ahead_s = 50.0
    await service.add("grandchild", parent_id=child)
    service.clock.ahead_s = 100.0
    assert await state(service, session) == "open"
    await service.add("of the session, but hanging nowhere", {"session_id": session}, parent_id=None)
    service.clock.ahead_s = 150.0
    assert await state(service, session) == "open"
    service.clock.ahead_s = 170.0
    assert await state(service, session) == "ended"


@service_test()
async def test_a_resumed_session_is_open_and_its_idle_time_begins_anew(service: Service) -> None:
    session = await service.session(idle_timeout_s=60)
    service.clock.ahead_s = 100.0
    resumed = await service.ok("resume_session", session_id=session)
    assert (resumed["resumed"], resumed["session"]["session_state"]) == (True, "open")
    assert resumed["session"]["last_active_at"] == pytest.approx(time.time() + 100.0, abs=10)
    service.clock.ahead_s = 150.0
    assert not (await service.ok("resume_session", {"session_id": session}))["resumed"]
    service.clock.ahead_s = 200.0
    assert await state(service, session) == "open"
    service.clock.ahead_s = 220.0
    assert await state(service, session) == "ended"

    await service.ok("end_session", session_id=session, summary="done")
    again = await service.ok("resume_session", session_id=session)
    assert (again["resumed"], again["session"]["ended_at"], again["session"]["summary"]) == (True, None, "done")
    await service.fails("session_not_found", "resume_session", session_id="mem-none")


@service_test()
async def test_ending_a_session_that_ended_by_itself_keeps_its_time(service: Service) -> None:
    ended, left = await service.session(idle_timeout_s=60), await service.session(idle_timeout_s=60)
    service.clock.ahead_s = 100.0
    end_s = (await service.ok("get_session", session_id=ended))["session"]["ended_at"]
    reply = await service.ok("end_session", session_id=ended, summary="over")
    assert (reply["ended"], reply["session"]["ended_at"], reply["session"]["summary"]) == (False, end_s, "over")
    for session, expected in ((ended, "ended"), (left, "open")):
        await service.add("one thing more", {"session_id": session})
        assert await state(service, session) == expected


@service_test()
async def test_a_resumption_is_done_once(service: Service) -> None:
    session = await service.session()
    await service.ok("end_session", session_id=session)
    key = {"request_id": request_id()}
    first = await service.ok("resume_session", key, session_id=session)
    await service.ok("end_session", session_id=session)
    second = await service.ok("resume_session", key, session_id=session)
    assert (first["resumed"], second["resumed"], second["replayed"]) == (True, True, True)
    assert (await state(service, session), second["session"]["session_state"]) == ("ended", "ended")


@service_test()
async def test_idle_times_that_are_none(service: Service) -> None:
    for value in (0, -1, "60", 1e11, True):
        reply = await service.fails("invalid_field", "create_session", user_id="ada", idle_timeout_s=value)
        assert reply["details"]["field"] == "idle_timeout_s"
    assert service.count("sessions") == 0

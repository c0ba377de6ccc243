"""What the service says of itself, commit_seq, deadlines, and the searches as operations of the wire."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import time

import pytest

from tests.support.process import PROJECT
from tests.support.service import Service, eventually, service_test
from tests.support.wire import envelope, request_id

PROTOCOL = (PROJECT / "docs" / "protocol.md").read_text(encoding="utf-8")


@service_test()
async def test_health(service: Service) -> None:
    await service.ok("stats")
    await service.settled()
    health = await service.ok("health_check")
    assert health["state"] == "healthy"
    assert health["pid"] == os.getpid()
    assert health["readiness"] == {
        "store": "ready", "search_index": "ready", "embedding": "ready", "redis": health["readiness"]["redis"],
    }  # fmt: skip
    assert health["requests"]["stats"] >= 1
    assert "details" not in health


@service_test()
async def test_health_says_what_the_system_says_elsewhere(service: Service) -> None:
    before_s = time.time()
    await service.add("x" * 50_000)
    await service.settled()
    health = await service.ok("health_check")
    assert abs(health["disk_free_bytes"] - shutil.disk_usage(service.path).free) < 1024**3
    assert health["database"] == {
        "size_bytes": service.path.stat().st_size,
        "wal_bytes": service.path.with_name(f"{service.path.name}-wal").stat().st_size,
        "schema_version": service.rows("PRAGMA user_version")[0][0],
    }
    assert health["database"]["wal_bytes"] > 50_000
    assert before_s <= health["last_commit_at"] <= time.time()
    assert health["open_files_limit"] in (resource.getrlimit(resource.RLIMIT_NOFILE)[0], -1)
    assert 0 < health["open_files"] < 10_000
    assert health["memory_bytes"] > 10 * 1024 * 1024
    assert health["threads"] >= 3
    assert health["breakers"] == {}
    assert health["index_lag"] == 0


@service_test()
async def test_the_index_lag_is_what_the_index_has_not_followed(service: Service) -> None:
    await service.settled()
    index = service.runtime._index
    with index.reading():  # held still: the index cannot follow
        for number in range(7):
            await service.add(f"memory {number}")
        logged = service.rows("SELECT max(seq) FROM index_log")[0][0]
        assert (await service.ok("health_check"))["index_lag"] == logged - index.applied_seq >= 7
    await service.settled()
    await eventually(lambda: _lag_is_zero(service))


@service_test()
async def test_the_lag_counts_what_was_committed_alone(service: Service) -> None:
    memory_id = await service.add("kept")
    await asyncio.gather(
        service.fails("memory_not_found", "delete_memory", memory_id="mem-none"),
        service.ok("update_memory", memory_id=memory_id, update_payload={"content": "changed"}),
        service.fails(
            "version_conflict",
            "update_memory",
            memory_id=memory_id,
            update_payload={"content": "never"},
            expected_version=99,
        ),
        service.ok("batch_add_memories", memories=[{"content": str(number)} for number in range(20)]),
    )
    await service.settled()
    assert service.runtime._writer.log_seq == service.rows("SELECT max(seq) FROM index_log")[0][0]
    assert await _lag_is_zero(service)


async def _lag_is_zero(service: Service) -> bool:
    return (await service.ok("health_check"))["index_lag"] == 0


@service_test()
async def test_every_figure_of_health_is_documented(service: Service) -> None:
    section = PROTOCOL.split("### health_check")[1].split("\n### ")[0]
    health = await service.ok("health_check")
    assert not [
        name for name in health if f'"{name}"' not in section and f"`{name}`" not in section and name != "request_id"
    ]


@service_test(embedding__provider="off")
async def test_without_embeddings_keywords_answer(service: Service) -> None:
    memory_id = await service.add("the oboe plays")
    found = await service.ok("semantic_search", query="oboe")
    assert [memory["memory_id"] for memory in found["results"]] == [memory_id]
    assert found["degraded"] is True
    assert found["degraded_reason"]
    await service.fails("vectors_unavailable", "search_similar", memory_id=memory_id)
    assert (await service.ok("health_check"))["readiness"]["embedding"] == "off"


@service_test()
async def test_stats(service: Service) -> None:
    session = await service.session()
    a = await service.add("a", {"session_id": session}, memory_tier="long", memory_type="fact")
    b = await service.add("b")
    await service.ok("update_memory", memory_id=b, update_payload={"state": "archived"})
    await service.ok("add_relationship", source_id=a, target_id=b, relationship_type="r")
    await service.ok("create_context_group", name="g")
    await service.settled()
    stats = await service.ok("stats")
    assert {name: stats[name] for name in stats.keys() - {"status", "request_id", "commit_seq"}} == {
        "namespace": "default", "memories": 2, "sessions": 1, "relationships": 1, "context_groups": 1,
        "by_type": {"fact": 1, "general": 1}, "by_tier": {"long": 1, "short": 1},
        "by_state": {"active": 1, "archived": 1}, "pending": 0,
    }  # fmt: skip


@service_test()
async def test_commit_seq_rises_by_one_with_each_committed_change(service: Service) -> None:
    memory_id = await service.add("1")
    other = await service.add("2")
    sequences = [2]
    for action, data in (
        ("update_memory", {"memory_id": memory_id, "update_payload": {"content": "x"}}),
        ("reinforce_memory", {"memory_id": memory_id}),
        ("add_relationship", {"source_id": memory_id, "target_id": other, "relationship_type": "r"}),
        ("create_session", {"user_id": "ada"}),
        ("batch_add_memories", {"memories": [{"content": "x"}] * 3}),
        ("create_context_group", {"name": "g"}),
        ("delete_memory", {"memory_id": memory_id}),
    ):
        sequences.append((await service.ok(action, **data))["commit_seq"])
        await service.ok("get_memory", memory_id=other)
        await service.ask(action, update_payload=1)  # refused
        await service.ask("delete_memory", memory_id="mem-none")  # fails
        await service.runtime._housekeeping.flush_accesses()
        assert (await service.ok("get_commit_seq"))["commit_seq"] == sequences[-1]
    assert sequences == list(range(2, 10))
    await asyncio.gather(*(service.add(f"{number}") for number in range(50)))
    assert (await service.ok("get_commit_seq"))["commit_seq"] == 59
    assert (await service.ok("get_memory", memory_id=other))["commit_seq"] == 59


@service_test()
async def test_a_replay_does_not_raise_commit_seq(service: Service) -> None:
    around = {"request_id": request_id()}
    first = await service.ok("add_memory", around, content="x")
    again = await service.ok("add_memory", around, content="x")
    assert first["commit_seq"] == again["commit_seq"] == (await service.ok("get_commit_seq"))["commit_seq"]


@service_test()
async def test_deadlines(service: Service) -> None:
    for deadline_ms in (0, 0.0):
        reply = await service.fails("deadline_exceeded", "add_memory", {"deadline_ms": deadline_ms}, content="x")
        assert reply["retryable"] is True
    assert service.count("memories") == 0
    await service.add("in time", {"deadline_ms": 60_000})
    for bad in (-1, "5", True, 86_400_001.0):
        reply = await service.fails("invalid_field", "add_memory", {"deadline_ms": bad}, content="x")
        assert reply["details"]["field"] == "deadline_ms"
    assert service.count("memories") == 1


@service_test()
async def test_a_write_whose_deadline_passed_in_the_queue_is_not_done(service: Service) -> None:
    around = {"deadline_ms": 0.0001, "request_id": request_id()}
    await service.fails("deadline_exceeded", "add_memory", around, content="x")
    assert service.count("memories") == 0
    assert (await service.ok("get_request_status", request_id=around["request_id"]))["state"] == "unknown"


@service_test()
async def test_a_write_is_read_back_at_once(service: Service) -> None:
    for number in range(20):
        memory_id = await service.add(f"bassoon{number}")
        assert (await service.record(memory_id))["content"] == f"bassoon{number}"
        assert (await service.ok("search_memory", query=f"bassoon{number}"))["count"] == 1
        assert (await service.ok("list_memories", limit=1))["results"][0]["memory_id"] == memory_id
        found = await service.ok("semantic_search", query=f"bassoon{number}", k=1)
        assert found["results"][0]["memory_id"] == memory_id


@pytest.mark.parametrize("mode", ["hybrid", "dense", "keyword"])
@service_test()
async def test_search_results_are_records_with_scores(service: Service, mode: str) -> None:
    memory_id = await service.add("the harp rings", tags=["music"])
    await service.add("the stock market falls")
    await service.settled()
    found = await service.ok("semantic_search", query="harp", k=1, mode=mode, explain=True)
    (first,) = found["results"]
    assert first["memory_id"] == memory_id
    record = await service.record(memory_id)
    assert record.keys() | {"score", "similarity", "keyword", "explain"} == first.keys()
    assert (found["pending"], found["degraded"]) == (0, False)
    plain = (await service.ok("semantic_search", query="harp", k=1, mode=mode))["results"][0]
    assert "explain" not in plain
    for min_score in (-1.0, 1.0):
        await service.ok("semantic_search", query="harp", min_score=min_score)
    walked = await service.walk("semantic_search", query="the", k=1, mode=mode)
    assert len({memory["memory_id"] for memory in walked}) == len(walked) == 2


@service_test()
async def test_search_memory_by_type_and_parent(service: Service) -> None:
    parent = await service.add("parent lute")
    child = await service.add("child lute", parent_id=parent, memory_type="song")
    other = await service.add("other lute", memory_type="song")
    for data, expected in (
        ({}, {parent, child, other}),
        ({"memory_type": "song"}, {child, other}),
        ({"parent_id": parent}, {child}),
        ({"memory_type": "song", "filters": {"memory_id": {"ne": child}}}, {other}),
        ({"memory_type": "none"}, set()),
    ):
        found = await service.ok("search_memory", query="lute", **data)
        assert {memory["memory_id"] for memory in found["results"]} == expected


@pytest.mark.parametrize("query", ['"', "AND", "* -x", "NEAR(a b)", "content:x", "(((", "^", "\u0301", "  ", "🗝" * 100])
@service_test()
async def test_queries_are_words_and_no_syntax(service: Service, query: str) -> None:
    await service.add("some words AND more")
    for action in ("search_memory", "semantic_search"):
        await service.ok(action, query=query)


@service_test()
async def test_many_calls_at_once_are_each_answered(service: Service) -> None:
    requests = [envelope("add_memory", {"content": f"m{number}"}) for number in range(300)]
    replies = await asyncio.gather(*(service.send(request) for request in requests))
    assert [reply["request_id"] for reply in replies] == [request["request_id"] for request in requests]
    assert sorted(reply["commit_seq"] for reply in replies) == list(range(1, 301))

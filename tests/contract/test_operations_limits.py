"""Limits of one caller: a rate, with batches counted by their items, and quotas that are exact to the last memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from unittest import mock

import pytest

from memory_system.errors import BY_CODE, InternalError
from memory_system.security import guard
from tests.support.service import Reply, Service, running_service, service_test


def around(agent_id: str, **more: str) -> dict[str, str]:
    return {"agent_id": agent_id, **more}


def of(codes: list[Reply]) -> list[str]:
    return [reply.get("error_code", reply["status"]) for reply in codes]


@service_test(limits__rate_per_s=0.001, limits__burst=3)
async def test_a_caller_above_its_rate_is_told_when_to_come_back(service: Service) -> None:
    replies = [await service.ask("stats", around("ada")) for _ in range(4)]
    assert of(replies) == ["success"] * 3 + ["rate_limited"]
    assert replies[3]["retryable"] is True
    assert 900_000 < replies[3]["details"]["retry_after_ms"] <= 1_000_000
    await service.ok("stats", around("ben"))
    assert (await service.ok("health_check", around("ada")))["rate_limited"] == 1
    assert (await service.ok("run_checkpoint", around("ada")))["job"] == "checkpoint"


@service_test(limits__rate_per_s=0.001, limits__burst=10)
async def test_a_batch_costs_its_items(service: Service) -> None:
    memories = [{"content": str(number)} for number in range(6)]
    await service.ok("batch_add_memories", around("ada"), memories=memories)
    await service.fails("rate_limited", "batch_add_memories", around("ada"), memories=memories)
    assert (await service.ok("stats", around("ben")))["memories"] == 6
    queries = [{"query": "x", "mode": "keyword"}] * 4
    await service.fails("rate_limited", "batch_search", around("ada"), queries=queries)
    await service.ok("batch_search", around("ben"), queries=queries)
    # Larger than a bucket: it goes through when the bucket is full, and is owed.
    await service.ok("batch_get_memories", around("cy"), memory_ids=[f"mem-{number}" for number in range(100)])
    refused = await service.fails("rate_limited", "stats", around("cy"))
    assert refused["details"]["retry_after_ms"] > 80_000_000


@service_test(limits__rate_per_s=0.001, limits__burst=2)
async def test_what_is_malformed_counts_too(service: Service) -> None:
    for _ in range(2):
        await service.fails("invalid_field", "add_memory", around("ada"))
    await service.fails("rate_limited", "add_memory", around("ada"))


@service_test()
async def test_without_limits_there_is_no_refusal(service: Service) -> None:
    for _ in range(300):
        await service.ok("get_commit_seq", around("ada"))
    await service.ok("batch_add_memories", around("ada"), memories=[{"content": "x"}] * 1000)
    assert service.rows("SELECT count(*) FROM usage") == [(0,)]


@service_test(limits__max_memories=3)
async def test_a_quota_of_memories_holds_for_each_caller(service: Service) -> None:
    added = [(await service.ok("add_memory", around("ada"), content=str(number)))["memory_id"] for number in range(3)]
    refused = await service.fails("quota_exceeded", "add_memory", around("ada"), content="four")
    assert refused["retryable"] is False
    assert refused["details"] == {"quota": "memories", "used": 3, "wanted": 1, "limit": 3}
    await service.fails("quota_exceeded", "create_session", around("ada"), user_id="u")
    await service.fails("quota_exceeded", "add_memory", around("ada", namespace="elsewhere"), content="four")
    await service.ok("batch_add_memories", around("ben"), memories=[{"content": "x"}] * 3)
    await service.fails("quota_exceeded", "batch_add_memories", around("cy"), memories=[{"content": "x"}] * 4)
    await service.ok("update_memory", around("ada"), memory_id=added[0], update_payload={"content": "longer"})
    # Whoever deletes it: the memory was ada's.
    await service.ok("delete_memory", around("ben"), memory_id=added[0])
    await service.ok("add_memory", around("ada"), content="four")
    await service.fails("quota_exceeded", "add_memory", around("ada"), content="five")


@service_test(limits__max_mb=0.001)
async def test_a_quota_of_bytes(service: Service) -> None:
    assert 0.001 * 2**20 > 1048
    memory_id = (await service.ok("add_memory", around("ada"), content="x" * 1000))["memory_id"]
    refused = await service.fails("quota_exceeded", "add_memory", around("ada"), content="y" * 100)
    assert refused["details"] == {"quota": "bytes", "used": 1004, "wanted": 104, "limit": 1048}
    await service.ok("forget", around("ada"), user_id="nobody")
    await service.ok("delete_memory", around("ada"), memory_id=memory_id)
    await service.ok("add_memory", around("ada"), content="y" * 1000)


@service_test(limits__max_memories=2)
async def test_a_repeated_call_is_answered_at_the_end_of_a_quota(service: Service) -> None:
    call = around("ada", request_id="a-request-that-is-sent-twice")
    first = await service.ok("add_memory", call, content="one")
    await service.ok("add_memory", around("ada"), content="two")
    again = await service.ok("add_memory", call, content="one")
    assert (again["memory_id"], again["replayed"]) == (first["memory_id"], True)


@pytest.mark.parametrize("encoding", ["msgpack"])
def test_figures_outlive_a_restart_and_a_time_without_quotas(tmp_path: Path, encoding: str) -> None:
    async def add(count: int, **overrides: object) -> list[str]:
        async with running_service(tmp_path, encoding, **overrides) as service:
            return of([await service.ask("add_memory", around("ada"), content=str(each)) for each in range(count)])

    assert asyncio.run(add(2, limits__max_memories=5)) == ["success"] * 2
    assert asyncio.run(add(2)) == ["success"] * 2
    assert asyncio.run(add(2, limits__max_memories=5)) == ["success", "quota_exceeded"]
    assert asyncio.run(add(1, limits__max_memories=5)) == ["quota_exceeded"]


@service_test(limits__max_memories=2)
async def test_what_maintenance_makes_and_what_is_imported_is_nobodys(service: Service) -> None:
    line = {"kind": "memory", "content": "imported", "created_at": 1.0}
    lines = [{**line, "memory_id": f"mem-{number}"} for number in range(4)]
    await service.ok("import_memories", around("ada"), records=lines)
    await service.ok("add_memory", around("ada"), content="one")
    exported = (await service.ok("export_memories", around("ada")))["results"]
    owners = [line["owner"] for line in exported if line["kind"] == "memory"]
    assert sorted(owners) == ["", "", "", "", "@/ada"]
    # A line says whose it was, and so a store that is moved keeps its figures.
    more = {**line, "memory_id": "mem-9", "owner": "@/ada"}
    await service.ok("import_memories", around("root", namespace="other"), records=[more])
    await service.fails("quota_exceeded", "add_memory", around("ada"), content="two")


def test_a_plaintext_caller_is_known_by_its_address_and_name() -> None:
    def name(address: str, agent_id: str = "ada") -> str:
        return guard.principal_of(None, guard.Asked("stats", "home", agent_id, address=address))

    assert name("") == name("127.0.0.1") == name("::1") == "@/ada"
    assert name("10.0.0.7") == "@10.0.0.7/ada" != name("10.0.0.8")
    assert name("10.0.0.7", "") == "@10.0.0.7/"


def test_both_refusals_are_errors_of_the_wire() -> None:
    assert BY_CODE["rate_limited"].retryable
    assert not BY_CODE["quota_exceeded"].retryable


@service_test(limits__rate_per_s=0.001, limits__burst=1)
async def test_a_defect_is_counted_like_any_request(service: Service) -> None:
    broken = mock.Mock(side_effect=InternalError("broken"))
    with mock.patch.dict(service.runtime.dispatcher._handlers, {"stats": broken}):  # type: ignore[arg-type]
        await service.fails("internal_error", "stats", around("ada"))
    await service.fails("rate_limited", "stats", around("ada"))

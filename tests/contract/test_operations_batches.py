"""Batches: all or nothing for writes, everything named for reads, and the order of the request kept."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.service import Service, service_test


@service_test()
async def test_a_batch_is_added_in_order(service: Service) -> None:
    memories = [{"content": f"m{number}", "importance": number / 10, "tags": [f"t{number}"]} for number in range(10)]
    reply = await service.ok("batch_add_memories", memories=memories)
    assert reply["count"] == len(set(reply["memory_ids"])) == 10
    assert reply["memory_ids"] == sorted(reply["memory_ids"])
    records = (await service.ok("batch_get_memories", memory_ids=reply["memory_ids"]))["results"]
    assert [record["content"] for record in records] == [memory["content"] for memory in memories]
    assert [record["tags"] for record in records] == [memory["tags"] for memory in memories]


@pytest.mark.parametrize("index", [0, 2, 4])
@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({}, "content"),
        ({"content": ""}, "content"),
        ({"content": 1}, "content"),
        ({"content": "x", "importance": 2}, "importance"),
        ({"content": "x", "metadata": []}, "metadata"),
        ({"content": "x", "metadata": {"a": "\0"}}, "metadata"),
        ({"content": "x", "contents": "y"}, "contents"),
        ({"content": "x", "memory_type": "session"}, "memory_type"),
        ("text", ""),
        (None, ""),
        ([], ""),
    ],
)
@service_test()
async def test_one_bad_item_refuses_the_batch_and_is_named(service: Service, index: int, bad: Any, field: str) -> None:
    memories: list[Any] = [{"content": f"good {number}"} for number in range(5)]
    memories[index] = bad
    reply = await service.fails("invalid_field", "batch_add_memories", memories=memories)
    assert reply["details"]["index"] == index
    assert reply["details"]["field"] == f"memories[{index}]" + (f".{field}" if field else "")
    assert service.count("memories") == 0


@service_test()
async def test_an_item_that_fails_in_the_store_takes_the_batch_with_it(service: Service) -> None:
    memories = [{"content": "a"}, {"content": "b", "parent_id": "mem-none"}, {"content": "c"}]
    reply = await service.fails("memory_not_found", "batch_add_memories", memories=memories)
    assert reply["details"]["index"] == 1
    assert "item 1" in reply["message"]
    assert service.count("memories") == 0
    assert service.count("index_log") == 0
    assert (await service.ok("get_commit_seq"))["commit_seq"] == 0


@service_test()
async def test_batch_sizes(service: Service) -> None:
    largest = [{"content": "x"}] * 1000
    reply = await service.ok("batch_add_memories", memories=largest)
    assert reply["count"] == 1000
    ids = reply["memory_ids"]
    assert (await service.ok("batch_get_memories", memory_ids=ids))["count"] == 1000
    assert (await service.ok("batch_get_memories", memory_ids=[]))["results"] == []
    for action, data, field in (
        ("batch_add_memories", {"memories": [*largest, {"content": "x"}]}, "memories"),
        ("batch_add_memories", {"memories": []}, "memories"),
        ("batch_get_memories", {"memory_ids": [*ids, "x"]}, "memory_ids"),
        ("batch_search", {"queries": []}, "queries"),
        ("batch_search", {"queries": [{"query": "x"}] * 101}, "queries"),
    ):
        refusal = await service.fails("invalid_field", action, **data)
        assert refusal["details"]["field"] == field
    assert service.count("memories") == 1000


@service_test()
async def test_batch_get_names_the_missing_and_takes_each_once(service: Service) -> None:
    a, b = await service.add("a"), await service.add("b")
    reply = await service.ok("batch_get_memories", memory_ids=[b, "mem-none", a, b, "other", "mem-none"])
    assert [record["memory_id"] for record in reply["results"]] == [b, a]
    assert reply["missing"] == ["mem-none", "other"]


@service_test()
async def test_one_commit_for_a_batch(service: Service) -> None:
    reply = await service.ok("batch_add_memories", memories=[{"content": "x"}] * 50)
    assert reply["commit_seq"] == 1
    assert (await service.ok("get_commit_seq"))["commit_seq"] == 1


@service_test()
async def test_batch_search_answers_each_query_as_a_search_of_its_own(service: Service) -> None:
    for content in ("the flute sings", "the drum beats", "a flute and a drum"):
        await service.add(content)
    await service.settled()
    queries: list[dict[str, Any]] = [
        {"query": "flute", "k": 1},
        {"query": "drum", "mode": "keyword"},
        {"query": "nothing at all", "mode": "keyword"},
        {"query": "flute", "filters": {"content": {"contains": "drum"}}},
    ]
    reply = await service.ok("batch_search", queries=queries)
    assert reply["count"] == len(queries)
    for query, answer in zip(queries, reply["results"], strict=True):
        single = await service.ok("semantic_search", **query)
        assert answer["count"] == len(answer["results"])
        assert [m["memory_id"] for m in answer["results"]] == [m["memory_id"] for m in single["results"]]
    assert reply["results"][2]["results"] == []


@pytest.mark.parametrize(
    ("bad", "field"),
    [({}, "query"), ({"query": 1}, "query"), ({"query": "x", "k": 0}, "k"), ({"query": "x", "cursor": "y"}, "cursor")],
)
@service_test()
async def test_a_bad_query_is_named(service: Service, bad: dict[str, Any], field: str) -> None:
    reply = await service.fails("invalid_field", "batch_search", queries=[{"query": "fine"}, bad])
    assert reply["details"]["field"] == f"queries[1].{field}"

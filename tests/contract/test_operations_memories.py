"""Adding, reading, updating and reinforcing one memory, and what each limit of the wire does at its edge."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from tests.support.service import Service, service_test

RECORD_FIELDS = {
    "memory_id", "content", "memory_type", "memory_tier", "importance", "access_count", "last_accessed_at",
    "created_at", "updated_at", "occurred_at", "expires_at", "metadata", "tags", "parent_id", "session_id",
    "user_id", "created_by", "version", "state",
}  # fmt: skip
KIB = 1024


@service_test()
async def test_defaults_of_a_memory(service: Service) -> None:
    before_s = time.time()
    added = await service.ok("add_memory", {"agent_id": "planner"}, content="Ada prefers trains.")
    assert set(added) == {"status", "request_id", "commit_seq", "memory_id", "version", "created_at"}
    assert added["memory_id"].startswith("mem-")
    assert added["version"] == 1
    assert before_s <= added["created_at"] <= time.time()
    record = await service.record(added["memory_id"])
    assert set(record) == RECORD_FIELDS
    assert record["importance"] == pytest.approx(0.5, abs=1e-6)
    assert record | {"importance": 0.5} == {
        "memory_id": added["memory_id"], "content": "Ada prefers trains.", "memory_type": "general",
        "memory_tier": "short", "importance": 0.5, "access_count": 0, "last_accessed_at": None,
        "created_at": added["created_at"], "updated_at": added["created_at"], "occurred_at": None,
        "expires_at": None, "metadata": {}, "tags": [], "parent_id": None, "session_id": None, "user_id": None,
        "created_by": "planner", "version": 1, "state": "active",
    }  # fmt: skip


@service_test()
async def test_every_field_comes_back_as_it_was_given(service: Service) -> None:
    parent = await service.add("parent")
    given: dict[str, Any] = {
        "content": "ключ 🗝 \t\r\n \u2028 'quoted' \"double\" \\ end",
        "memory_type": "episode",
        "memory_tier": "long",
        "importance": 1.0,
        "metadata": {"a": [1, 2.5, None, True, {"b": "ü"}], "": {}, "n": -(2**63), "m": 2**63 - 1, "1.0": 1e-300},
        "tags": ["x", "y z", "ä"],
        "parent_id": parent,
        "user_id": "ada",
        "occurred_at": -1.5,
        "expires_at": time.time() + 1e6,
    }
    record = await service.record(await service.add(given.pop("content"), **given, created_by="other"))
    assert record["content"] == "ключ 🗝 \t\r\n \u2028 'quoted' \"double\" \\ end"
    assert record["created_by"] == "other"
    assert {name: record[name] for name in given} == {**given, "importance": record["importance"]}
    assert isinstance(record["metadata"]["1.0"], float)
    assert record["metadata"]["a"][3] is True


@service_test()
async def test_tags_are_kept_once_each_in_their_order(service: Service) -> None:
    memory_id = await service.add(tags=["b", "a", "b"])
    assert (await service.record(memory_id))["tags"] == ["b", "a"]
    await service.ok("update_memory", memory_id=memory_id, update_payload={"tags": ["c", "c", "a"]})
    assert (await service.record(memory_id))["tags"] == ["c", "a"]


@service_test()
async def test_missing_memory(service: Service) -> None:
    for action, data in {
        "get_memory": {},
        "update_memory": {"update_payload": {"importance": 1.0}},
        "delete_memory": {},
        "reinforce_memory": {},
        "get_memory_history": {},
        "get_related_memories": {},
        "search_similar": {},
    }.items():
        reply = await service.fails("memory_not_found", action, memory_id="mem-none", **data)
        assert reply["details"]["memory_id"] == "mem-none"
        assert not reply["retryable"]
    await service.fails("memory_not_found", "get_children", parent_id="mem-none")
    reply = await service.fails("memory_not_found", "add_memory", content="x", parent_id="mem-none")
    assert reply["details"]["field"] == "parent_id"
    assert service.count("memories") == 0


@service_test()
async def test_update_changes_only_what_it_names_and_null_clears(service: Service) -> None:
    memory_id = await service.add("first", tags=["t"], user_id="ada", occurred_at=5.0, metadata={"a": 1, "b": {"c": 2}})
    reply = await service.ok("update_memory", memory_id=memory_id, update_payload={"content": "second"})
    assert reply["memory_id"] == memory_id
    assert reply["version"] == reply["memory"]["version"] == 2
    record = await service.record(memory_id)
    assert record == {**reply["memory"], "importance": record["importance"]}
    assert (record["content"], record["tags"], record["user_id"]) == ("second", ["t"], "ada")
    assert record["updated_at"] >= record["created_at"]
    cleared: dict[str, Any] = {"tags": None, "user_id": None, "occurred_at": None, "metadata": None}
    record = (await service.ok("update_memory", memory_id=memory_id, update_payload=cleared))["memory"]
    assert (record["tags"], record["user_id"], record["occurred_at"], record["metadata"]) == ([], None, None, {})
    assert record["version"] == 3


@pytest.mark.parametrize("field", ["content", "memory_type", "memory_tier", "importance", "state"])
@service_test()
async def test_null_does_not_clear_what_every_memory_has(service: Service, field: str) -> None:
    memory_id = await service.add()
    reply = await service.fails("invalid_field", "update_memory", memory_id=memory_id, update_payload={field: None})
    assert reply["details"]["field"] == f"update_payload.{field}"
    assert (await service.record(memory_id))["version"] == 1


@service_test()
async def test_metadata_is_merged_one_level_deep_or_replaced(service: Service) -> None:
    memory_id = await service.add(metadata={"a": {"x": 1, "y": 2}, "b": 1, "c": 1})
    update = {"metadata": {"a": {"z": 3}, "b": None, "d": 4}}
    merged = (await service.ok("update_memory", memory_id=memory_id, update_payload=update))["memory"]
    assert merged["metadata"] == {"a": {"z": 3}, "c": 1, "d": 4}
    replaced = await service.ok(
        "update_memory", memory_id=memory_id, update_payload={"metadata": {"e": None}}, metadata_mode="replace"
    )
    assert replaced["memory"]["metadata"] == {"e": None}


@service_test()
async def test_metadata_that_grows_too_large_by_merging_is_refused(service: Service) -> None:
    memory_id = await service.add(metadata={"a": "x" * 20 * KIB})
    update = {"metadata": {"b": "x" * 20 * KIB}}
    reply = await service.fails("invalid_field", "update_memory", memory_id=memory_id, update_payload=update)
    assert "metadata" in reply["details"]["field"]
    assert list((await service.record(memory_id))["metadata"]) == ["a"]


@service_test()
async def test_an_update_needs_something_to_change(service: Service) -> None:
    memory_id = await service.add()
    for payload in ({}, None):
        reply = await service.fails("invalid_field", "update_memory", memory_id=memory_id, update_payload=payload)
        assert reply["details"]["field"].startswith("update_payload")
    await service.fails("invalid_field", "update_memory", memory_id=memory_id)


@service_test()
async def test_expected_version(service: Service) -> None:
    memory_id = await service.add("one")
    change = {"memory_id": memory_id, "update_payload": {"content": "two"}, "expected_version": 1}
    assert (await service.ok("update_memory", **change))["version"] == 2
    sequence = (await service.ok("get_commit_seq"))["commit_seq"]
    reply = await service.fails("version_conflict", "update_memory", **change)
    assert reply["details"]["current"]["content"] == "two"
    assert reply["details"]["current"]["version"] == 2
    assert (await service.ok("get_commit_seq"))["commit_seq"] == sequence
    assert service.count("memory_history") == 1


@service_test()
async def test_history_keeps_each_replaced_version_newest_first(service: Service) -> None:
    memory_id = await service.add("v1", {"agent_id": "first"}, metadata={"n": 1})
    for version in (2, 3, 4):
        payload = {"content": f"v{version}", "metadata": {"n": version}}
        await service.ok("update_memory", {"agent_id": f"agent{version}"}, memory_id=memory_id, update_payload=payload)
    history = await service.ok("get_memory_history", memory_id=memory_id)
    assert (history["memory_id"], history["version"], history["count"]) == (memory_id, 4, 3)
    assert [(old["version"], old["content"], old["metadata"]) for old in history["results"]] == [
        (version, f"v{version}", {"n": version}) for version in (3, 2, 1)
    ]
    assert [old["replaced_by"] for old in history["results"]] == ["agent4", "agent3", "agent2"]
    assert set(history["results"][0]) == RECORD_FIELDS | {"replaced_at", "replaced_by"}
    paged = await service.walk("get_memory_history", memory_id=memory_id, limit=1)
    assert [old["version"] for old in paged] == [3, 2, 1]


@service_test()
async def test_only_updates_raise_the_version(service: Service) -> None:
    memory_id, other = await service.add(), await service.add()
    group = (await service.ok("create_context_group", name="g"))["group_id"]
    await service.ok("reinforce_memory", memory_id=memory_id)
    await service.ok("add_to_group", memory_id=memory_id, group_id=group)
    await service.ok("add_relationship", source_id=memory_id, target_id=other, relationship_type="r")
    await service.ok("get_memory", memory_id=memory_id)
    await service.runtime._housekeeping.flush_accesses()
    record = await service.record(memory_id)
    assert (record["version"], record["access_count"]) == (1, 2)
    assert service.count("memory_history") == 0


@service_test()
async def test_session_type_can_be_neither_given_nor_taken(service: Service) -> None:
    session, memory = await service.session(), await service.add()
    reply = await service.fails("invalid_field", "add_memory", content="x", memory_type="session")
    assert reply["details"]["field"] == "memory_type"
    for memory_id, memory_type in ((session, "general"), (memory, "session")):
        reply = await service.fails(
            "invalid_field", "update_memory", memory_id=memory_id, update_payload={"memory_type": memory_type}
        )
        assert "memory_type" in reply["details"]["field"]


@service_test()
async def test_reinforcement_multiplies_caps_and_restarts_the_decay(service: Service) -> None:
    memory_id = await service.add(importance=0.4)
    service.clock.ahead_s = 10 * 86_400.0
    decayed = 0.4 * math.exp(-0.1 * 10)
    assert (await service.record(memory_id))["importance"] == pytest.approx(decayed, rel=1e-4)
    reply = await service.ok("reinforce_memory", memory_id=memory_id, reinforcement_factor=1.5)
    assert reply["memory_id"] == memory_id
    assert reply["new_importance"] == pytest.approx(decayed * 1.5, rel=1e-4)
    assert (await service.record(memory_id))["importance"] == pytest.approx(reply["new_importance"], rel=1e-6)
    assert service.rows("SELECT importance_at FROM memories")[0][0] == pytest.approx(service.clock.time(), abs=30)
    assert (await service.ok("reinforce_memory", memory_id=memory_id, reinforcement_factor=100.0))[
        "new_importance"
    ] == 1.0
    assert (await service.record(memory_id))["access_count"] == 2
    service.clock.ahead_s += 86_400.0
    slower = math.exp(-0.1 / (1 + math.log(3)))
    assert (await service.record(memory_id))["importance"] == pytest.approx(slower, rel=1e-4)
    for factor in (0, -1.0, 101.0):
        await service.fails("invalid_field", "reinforce_memory", memory_id=memory_id, reinforcement_factor=factor)


@service_test()
async def test_reading_counts_as_access_unless_touch_is_false(service: Service) -> None:
    memory_id = await service.add(importance=0.5)
    await service.ok("get_memory", memory_id=memory_id)
    await service.ok("batch_get_memories", memory_ids=[memory_id])
    await service.ok("get_memory", memory_id=memory_id, touch=False)
    await service.ok("batch_get_memories", memory_ids=[memory_id], touch=False)
    await service.runtime._housekeeping.flush_accesses()
    record = await service.record(memory_id)
    assert record["access_count"] == 2
    assert record["last_accessed_at"] == pytest.approx(time.time(), abs=30)
    assert record["importance"] == pytest.approx(0.52, abs=1e-4)


@pytest.mark.parametrize("character", ["x", "ü", "🗝"])
@service_test()
async def test_content_limit_is_in_bytes(service: Service, character: str) -> None:
    largest = character * (64 * KIB // len(character.encode()))
    assert len(largest.encode()) == 64 * KIB
    memory_id = await service.add(largest)
    assert (await service.record(memory_id))["content"] == largest
    for action, data in (
        ("add_memory", {"content": largest + "x"}),
        ("update_memory", {"memory_id": memory_id, "update_payload": {"content": largest + "x"}}),
        ("batch_add_memories", {"memories": [{"content": "ok"}, {"content": largest + "x"}]}),
    ):
        reply = await service.fails("invalid_field", action, **data)
        assert reply["details"]["field"].split(".")[-1] == "content", reply
    await service.fails("invalid_field", "add_memory", content="")
    assert service.count("memories") == 1


@service_test()
async def test_metadata_limit_in_bytes_of_the_request(service: Service) -> None:
    # The limit is on the request and on the JSON that is stored. The json module writes a space after the colon.
    overhead = len('{"a":""}') + (service.encoding == "json")
    largest = {"a": "x" * (32 * KIB - overhead)}
    memory_id = await service.add(metadata=largest)
    assert (await service.record(memory_id))["metadata"] == largest
    reply = await service.fails("invalid_field", "add_memory", content="x", metadata={"a": largest["a"] + "x"})
    assert reply["details"]["field"] == "metadata"
    assert reply["details"]["limit"] == 32 * KIB


@service_test()
async def test_metadata_depth(service: Service) -> None:
    def nested(levels: int, leaf: Any) -> Any:
        value = leaf
        for level in range(levels):
            value = {"k": value} if level % 2 or level == levels - 1 else [value]
        return value

    memory_id = await service.add(metadata=nested(16, 1))
    assert (await service.record(memory_id))["metadata"] == nested(16, 1)
    for metadata in (nested(17, 1), nested(300, 1)):
        reply = await service.fails("invalid_field", "add_memory", content="x", metadata=metadata)
        assert reply["details"]["field"] == "metadata"
    assert service.count("memories") == 1


@service_test()
async def test_tag_limits(service: Service) -> None:
    await service.add(tags=[f"t{n}" for n in range(64)])
    await service.add(tags=["x" * 128])
    for tags in ([f"t{n}" for n in range(65)], ["x" * 129], [""], ["a\nb"], ["a", 1], "a"):
        reply = await service.fails("invalid_field", "add_memory", content="x", tags=tags)
        assert reply["details"]["field"].startswith("tags")
    assert service.count("memories") == 2

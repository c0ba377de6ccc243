"""Deleting means gone: nothing of a deleted memory is left in any table, however deep the tree was."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from memory_system.digest import content_digest
from memory_system.storage import memories
from memory_system.storage.context import WriteContext
from memory_system.storage.writer import WriteJob
from tests.support.service import Service, service_test
from tests.support.wire import request_id

SECRET = "xylophone"


async def full_memory(service: Service, **data: str) -> str:
    """A memory with everything that can hang on one: history, relations, a group, a vector, accesses."""
    memory_id = await service.add(f"first {SECRET}", metadata={"note": SECRET}, tags=[SECRET], **data)
    await service.ok("update_memory", memory_id=memory_id, update_payload={"content": f"second {SECRET}"})
    other = await service.add("other")
    group = (await service.ok("create_context_group", name="group"))["group_id"]
    await service.ok("add_to_group", memory_id=memory_id, group_id=group)
    await service.ok("add_relationship", source_id=memory_id, target_id=other, relationship_type="r")
    await service.ok("add_relationship", source_id=other, target_id=memory_id, relationship_type="r")
    await service.ok("get_memory", memory_id=memory_id)
    await service.settled()
    return memory_id


def assert_no_trace(service: Service, row_id: int) -> None:
    assert service.rows("SELECT 1 FROM memories WHERE row_id = ?", row_id) == []
    for table, column in {
        "memory_history": "row_id",
        "group_members": "row_id",
        "embeddings": "row_id",
        "sessions": "row_id",
        "relationships": "source_row_id",
        "relationships ": "target_row_id",
    }.items():
        assert service.rows(f"SELECT 1 FROM {table} WHERE {column} = ?", row_id) == [], table
    last = service.rows("SELECT op FROM index_log WHERE row_id = ? ORDER BY seq DESC LIMIT 1", row_id)
    assert last in ([("delete",)], [])
    assert service.rows("PRAGMA foreign_key_check") == []


def assert_word_is_nowhere(service: Service, word: str) -> None:
    """In no column of any table, and found by no search."""
    for (table,) in service.rows("SELECT name FROM sqlite_master WHERE type = 'table'"):
        for row in service.rows(f"SELECT * FROM {table}"):
            for value in row:
                assert word not in (value.decode("utf-8", "ignore") if isinstance(value, bytes) else str(value)), table
    assert service.texts_with(word) == 0


@pytest.mark.parametrize("cascade", [True, False])
@service_test(storage__synchronous="full")
async def test_nothing_is_left_of_a_deleted_memory(service: Service, cascade: bool) -> None:
    memory_id = await full_memory(service)
    row_id = service.rows("SELECT row_id FROM memories WHERE memory_id = ?", memory_id)[0][0]
    assert service.rows("SELECT 1 FROM embeddings WHERE row_id = ?", row_id) != []
    reply = await service.ok("delete_memory", memory_id=memory_id, cascade=cascade)
    assert reply["deleted"] == 1
    await service.fails("memory_not_found", "get_memory", memory_id=memory_id)
    await service.fails("memory_not_found", "delete_memory", memory_id=memory_id)
    await service.settled()
    await service.runtime._housekeeping.flush_accesses()
    assert_no_trace(service, row_id)
    found = await service.ok("semantic_search", query=SECRET, k=10)
    assert memory_id not in [memory["memory_id"] for memory in found["results"]]
    assert (await service.ok("search_memory", query=SECRET))["results"] == []


@service_test()
async def test_the_words_of_a_deleted_memory_are_in_no_table(service: Service) -> None:
    memory_id = await full_memory(service)
    session = await service.session(user_id="user", session_metadata={"note": SECRET})
    await service.ok("end_session", session_id=session, summary=SECRET)
    await service.ok("delete_memory", memory_id=memory_id)
    await service.ok("delete_memory", memory_id=session)
    await service.settled()
    assert_word_is_nowhere(service, SECRET)


@service_test()
async def test_cascade_takes_the_whole_subtree_and_nothing_else(service: Service) -> None:
    root = await service.add("root")
    child, other = await service.add("child", parent_id=root), await service.add("other")
    leaves = [await service.add("leaf", parent_id=child) for _ in range(3)]
    assert (await service.ok("delete_memory", memory_id=child))["deleted"] == 4
    await service.record(root)
    await service.record(other)
    assert (await service.ok("get_children", parent_id=root))["results"] == []
    found = await service.ok("batch_get_memories", memory_ids=leaves)
    assert (found["results"], found["missing"]) == ([], leaves)


@service_test()
async def test_without_cascade_children_go_to_the_grandparent(service: Service) -> None:
    root = await service.add("root")
    middle = await service.add("middle", parent_id=root)
    child = await service.add("child", parent_id=middle)
    grandchild = await service.add("grandchild", parent_id=child)
    await service.record(child)  # now it is in the record cache
    assert (await service.ok("delete_memory", memory_id=middle, cascade=False))["deleted"] == 1
    assert (await service.record(child))["parent_id"] == root
    assert (await service.record(grandchild))["parent_id"] == child
    assert [memory["memory_id"] for memory in (await service.ok("get_children", parent_id=root))["results"]] == [child]
    await service.ok("delete_memory", memory_id=root, cascade=False)
    assert (await service.record(child))["parent_id"] is None
    await service.settled()
    found = await service.ok("semantic_search", query="child", filters={"parent_id": child}, mode="dense")
    assert [memory["memory_id"] for memory in found["results"]] == [grandchild]


async def add_chain(service: Service, levels: int) -> list[str]:
    """Memories each below the one before, in one transaction: a commit for each would take most of the test's time."""
    first = new_memory("root")

    def insert(context: WriteContext) -> dict[str, Any]:
        chain = [memories.insert(context, first).memory_id]
        while len(chain) < levels:
            chain.append(memories.insert(context, msgspec.structs.replace(first, parent_id=chain[-1])).memory_id)
        return {"chain": chain}

    chain: list[str] = (await service.runtime._writer.submit(WriteJob(insert, "default", rows=levels)))["chain"]
    return chain


def new_memory(content: str) -> memories.NewMemory:
    return memories.NewMemory(
        content=content, content_digest=content_digest(content), memory_type="general", memory_tier="short",
        importance=0.5, metadata={}, tags=[], parent_id=None, session_id=None, user_id=None, occurred_at=None,
        expires_at=None, created_by="",
    )  # fmt: skip


@service_test()
async def test_three_thousand_levels(service: Service) -> None:
    levels = 3000
    chain = await add_chain(service, levels)
    reply = await service.fails("cycle", "update_memory", memory_id=chain[0], update_payload={"parent_id": chain[-1]})
    assert reply["details"]["parent_id"] == chain[-1]
    await service.ok("delete_memory", memory_id=chain[1], cascade=False)
    assert (await service.record(chain[2]))["parent_id"] == chain[0]
    assert (await service.ok("delete_memory", memory_id=chain[0]))["deleted"] == levels - 1
    for table in ("memories", "embeddings", "memory_history"):
        assert service.count(table) == 0
    assert service.texts_with("level") == 0
    assert (await service.ok("stats"))["memories"] == 0


@service_test()
async def test_cycles_are_refused(service: Service) -> None:
    root = await service.add("root")
    child = await service.add("child", parent_id=root)
    grandchild = await service.add("grandchild", parent_id=child)
    for parent in (root, child, grandchild):
        await service.fails("cycle", "update_memory", memory_id=root, update_payload={"parent_id": parent})
    moved = await service.ok("update_memory", memory_id=grandchild, update_payload={"parent_id": root})
    assert moved["memory"]["parent_id"] == root
    top = await service.ok("update_memory", memory_id=grandchild, update_payload={"parent_id": None})
    assert top["memory"]["parent_id"] is None


@service_test()
async def test_a_deleted_session_takes_its_children(service: Service) -> None:
    session = await service.session()
    inside = [await service.add("inside", {"session_id": session}) for _ in range(3)]
    below = await service.add("below", parent_id=inside[0])
    outside = await service.add("outside", {"session_id": session}, parent_id=None)
    assert (await service.ok("delete_memory", memory_id=session))["deleted"] == 5
    await service.fails("session_not_found", "get_session", session_id=session)
    assert (await service.ok("batch_get_memories", memory_ids=[*inside, below]))["results"] == []
    assert (await service.record(outside))["session_id"] is None
    assert service.count("sessions") == 0


@service_test()
async def test_a_session_deleted_without_cascade_leaves_its_memories(service: Service) -> None:
    session = await service.session()
    inside = await service.add("inside", {"session_id": session})
    below = await service.add("below", {"session_id": session}, parent_id=inside)
    assert (await service.ok("delete_memory", memory_id=session, cascade=False))["deleted"] == 1
    for memory_id, parent in ((inside, None), (below, inside)):
        record = await service.record(memory_id)
        assert (record["parent_id"], record["session_id"]) == (parent, None)


@service_test()
async def test_forget_a_user(service: Service) -> None:
    session = await service.session(user_id="ada")
    await service.add(f"in the session {SECRET}", {"session_id": session})
    tree = await service.add(f"own {SECRET}", user_id="ada")
    await service.add(f"below it, of nobody {SECRET}", parent_id=tree)
    kept = [await service.add("of bob", user_id="bob"), await service.add("of nobody")]
    elsewhere = await service.add("other namespace", {"namespace": "n2"}, user_id="ada")
    reply = await service.ok("forget", user_id="ada")
    assert reply["deleted"] == 4
    assert (await service.ok("forget", user_id="ada"))["deleted"] == 0
    assert (await service.ok("batch_get_memories", memory_ids=kept))["missing"] == []
    await service.ok("get_memory", {"namespace": "n2"}, memory_id=elsewhere)
    assert (await service.ok("list_sessions", user_id="ada"))["results"] == []
    assert_word_is_nowhere(service, SECRET)


@service_test()
async def test_forget_a_session(service: Service) -> None:
    session, other = await service.session(), await service.session()
    await service.add("child", {"session_id": session})
    await service.add("elsewhere in the tree", {"session_id": session}, parent_id=None)
    kept = await service.add("kept", {"session_id": other})
    assert (await service.ok("forget", session_id=session))["deleted"] == 3
    assert (await service.record(kept))["session_id"] == other


@service_test()
async def test_forget_needs_exactly_one_name(service: Service) -> None:
    await service.add(user_id="ada")
    for data in ({}, {"user_id": "ada", "session_id": "s"}, {"user_id": None, "session_id": None}):
        reply = await service.fails("invalid_field", "forget", **data)
        assert reply["details"]["field"] in ("user_id", "session_id")
    assert service.count("memories") == 1


@service_test()
async def test_stored_replies_hold_no_content(service: Service) -> None:
    session = await service.session(user_id=f"user-{SECRET}", session_metadata={"note": SECRET})
    memory_id = await service.add(SECRET, {"session_id": session}, metadata={"note": SECRET}, tags=[SECRET])
    await service.ok("update_memory", memory_id=memory_id, update_payload={"content": f"{SECRET} again"})
    await service.ok("end_session", session_id=session, summary=SECRET)
    await service.ok("create_context_group", name=SECRET, description=SECRET)
    await service.ok("batch_add_memories", memories=[{"content": SECRET}])
    assert service.count("idempotency") == 6
    for (reply,) in service.rows("SELECT reply FROM idempotency"):
        assert SECRET not in reply


@service_test()
async def test_row_ids_do_not_come_back(service: Service) -> None:
    first = await service.add()
    row_id = service.rows("SELECT row_id FROM memories")[0][0]
    await service.ok("delete_memory", memory_id=first)
    await service.add()
    assert service.rows("SELECT row_id FROM memories")[0][0] > row_id


@service_test()
async def test_deleting_twice_at_once_deletes_once(service: Service) -> None:
    memory_id = await service.add()
    replies = await asyncio.gather(
        *(service.ask("delete_memory", {"request_id": request_id()}, memory_id=memory_id) for _ in range(8))
    )
    assert sorted(reply["status"] for reply in replies) == ["error"] * 7 + ["success"]
    assert {reply["error_code"] for reply in replies if reply["status"] == "error"} == {"memory_not_found"}


@service_test()
async def test_searching_does_not_wait_for_vectors_that_never_come(service: Service) -> None:
    session = await service.session()
    await service.ok("update_memory", memory_id=session, update_payload={"content": "a session is not embedded"})
    ids = await asyncio.gather(*(service.add(f"gone {number}") for number in range(20)))
    await asyncio.gather(*(service.ok("delete_memory", memory_id=memory_id) for memory_id in ids))
    await service.settled()
    callers = service.runtime._own_writes
    await callers.wait(("default", ""), 0.5)
    assert not callers._waiting(("default", ""))

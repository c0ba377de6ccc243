"""Consolidation through the service: what becomes one, what it is then, what undoes it, and what never does."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest

from memory_system.consolidation.summarisers import Embed, Original
from memory_system.errors import ConfigError
from memory_system.search.speakers import NONE
from memory_system.service import kindred, merges
from tests.support.archive import lines_of
from tests.support.runs import DAY_S, DECAY, STEADY, reported
from tests.support.service import Service, running_service, service_test

# Three neighbours that speak of one thing, and one that does not.
GARDEN = (
    "Ada: The tomatoes in the garden are ripe. Shall I pick them?",
    "Bob: Pick the ripe tomatoes in the garden, and water the beans.",
    "Ada: The ripe tomatoes of the garden are picked. The beans had water.",
)
TRAIN = "Bob: My train to Lisbon leaves on Friday morning at seven."
OLD_S = 8 * DAY_S
TABLES = ("memories", "relationships", "consolidations", "consolidation_members", "group_members", "index_log")


@pytest.fixture
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kindred, "_POOL", 4)


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merges, "_PLANNED", 2)


async def turns(service: Service, contents: Sequence[str], **fields: Any) -> tuple[str, list[str]]:
    """A session with these memories, old enough to fade, each with its vector: its id and theirs."""
    session_id = await service.session()
    memories = [
        {"content": content, "parent_id": session_id, "occurred_at": 1000.0 + 20.0 * at, **fields}
        for at, content in enumerate(contents)
    ]
    ids = (await service.ok("batch_add_memories", memories=memories))["memory_ids"]
    await fade(service)
    return session_id, ids


async def fade(service: Service) -> None:
    await service.settled()
    service.clock.ahead_s += OLD_S


async def alone(service: Service, *contents: str, **fields: Any) -> list[str]:
    """Memories without a parent, old enough to fade."""
    ids = [await service.add(content, **fields) for content in contents]
    await fade(service)
    return ids


async def merged(service: Service, **data: Any) -> list[dict[str, Any]]:
    """The records that a run of consolidation makes."""
    reply = await service.ok("run_consolidation", **data)
    return [await service.record(plan["memory_id"]) for plan in reply["plans"]]


async def found(service: Service, query: str, **data: Any) -> list[str]:
    reply = await service.ok("search_memory", query=query, touch=False, **data)
    return [result["memory_id"] for result in reply["results"]]


def everything(service: Service) -> dict[str, list[tuple[Any, ...]]]:
    return {table: service.rows(f"SELECT * FROM {table} ORDER BY 1, 2") for table in TABLES}


def ageing(service: Service, *memory_ids: str) -> list[tuple[Any, ...]]:
    columns = "memory_id, state, memory_tier, importance, importance_at, tier_since, tier_accesses, due_at"
    marks = ", ".join("?" * len(memory_ids))
    sql = f"SELECT {columns}, archived_at, promote_at, version, updated_at FROM memories WHERE memory_id IN ({marks})"
    return service.rows(f"{sql} ORDER BY row_id", *memory_ids)


def holds(service: Service, word: str) -> list[str]:
    """The tables in which a word stands."""
    names = [row[0] for row in service.rows("SELECT name FROM sqlite_master WHERE type = 'table'")]
    plain = [name for name in names if not name.startswith("sqlite_")]
    holding = [
        name for name in plain for row in service.rows(f"SELECT * FROM {name}") if word.lower() in str(row).lower()
    ]
    return [*holding, *(["the index of words"] if service.texts_with(word) else [])]


# -- what becomes one -------------------------------------------------------------------------------------------------


@service_test(**STEADY)
async def test_neighbours_that_speak_of_the_same_become_one(service: Service) -> None:
    session_id, ids = await turns(service, [*GARDEN, TRAIN], tags=["talk"], memory_type="turn")
    reply = await service.ok("run_consolidation")
    assert reply["counts"] == {"archived": 3, "summary": 1, "faded": 1}
    assert [(r["memory_id"], r["from"], r["to"], r["reason"]) for r in reply["results"]] == [
        (memory_id, "active", "archived", "summary") for memory_id in ids[:3]
    ]
    (plan,) = reply["plans"]
    record = await service.record(plan["memory_id"])
    assert plan["members"] == ids[:3]
    assert record["content"] == plan["content"]
    assert (record["memory_type"], record["memory_tier"], record["state"]) == ("consolidated", "medium", "active")
    assert (record["parent_id"], record["session_id"], record["user_id"]) == (session_id, session_id, "ada")
    assert record["occurred_at"] == 1000.0
    assert record["tags"] == ["talk"]
    assert record["metadata"]["consolidation"] == {
        "kind": "summary",
        "count": 3,
        "first_at": 1000.0,
        "last_at": 1040.0,
    }
    assert record["version"] == 1
    assert record["created_by"] == "consolidation"
    # Each original has a voice, in the order of time, and no sentence stands twice.
    content = record["content"]
    assert content.count("Ada:") == 2
    assert content.index("Ada:") < content.index("Bob:") < content.rindex("Ada:")
    assert len(content) <= 0.9 * sum(len(each) + 1 for each in GARDEN)
    for memory_id in ids[:3]:
        related = await service.ok("get_related_memories", memory_id=memory_id)
        assert [(r["memory"]["memory_id"], r["relationship_type"], r["direction"]) for r in related["results"]] == [
            (record["memory_id"], "consolidated_into", "outgoing")
        ]
    assert [(await service.record(memory_id))["state"] for memory_id in ids] == ["archived"] * 3 + ["active"]


@service_test(**STEADY)
async def test_searches_find_the_summary_in_place_of_its_originals(service: Service) -> None:
    _, ids = await turns(service, [*GARDEN, TRAIN])
    assert set(await found(service, "ripe tomatoes")) == set(ids[:3])
    (record,) = await merged(service)
    await service.settled()
    assert await found(service, "ripe tomatoes") == [record["memory_id"]]
    assert set(await found(service, "ripe tomatoes", include_archived=True)) == {record["memory_id"], *ids[:3]}
    reply = await service.ok("semantic_search", query="ripe tomatoes in the garden", k=10, mode="dense", touch=False)
    assert {result["memory_id"] for result in reply["results"]} == {record["memory_id"], ids[3]}
    listed = await service.walk("list_memories")
    assert {memory["memory_id"] for memory in listed} == {record["memory_id"], ids[3]}


@service_test(**STEADY)
async def test_importance_and_use_are_those_of_all(service: Service) -> None:
    session_id = await service.session()
    ids = [await service.add(content, parent_id=session_id, importance=0.4) for content in GARDEN]
    for _ in range(2):
        await service.ok("get_memory", memory_id=ids[1])
    await service.runtime._housekeeping.flush_accesses()
    await fade(service)
    reply = await service.ok("run_consolidation", dry_run=True)
    parts = [
        (await service.record(memory_id))["importance"] for memory_id in ids
    ]  # a moment later than the run: equal but for seconds
    left = 1.0
    for part in parts:
        left *= 1.0 - part
    fields = reply["plans"][0]["fields"]
    assert fields["importance"] == pytest.approx(1.0 - left, abs=1e-4)
    assert fields["access_count"] == 2
    assert fields["last_accessed_at"] is not None


@service_test(**STEADY)
async def test_a_merged_memory_joins_the_groups_of_its_originals(service: Service) -> None:
    _, ids = await turns(service, GARDEN)
    group_id = (await service.ok("create_context_group", name="garden"))["group_id"]
    await service.ok("add_to_group", memory_id=ids[1], group_id=group_id)
    (record,) = await merged(service)
    members = await service.ok("get_memories_by_group", group_id=group_id)
    assert [memory["memory_id"] for memory in members["results"]] == [record["memory_id"]]


@service_test(**STEADY)
async def test_metadata_is_merged(service: Service) -> None:
    session_id = await service.session()
    metadata: list[dict[str, Any]] = [
        {"topic": "garden", "turn": 1, "seen": ["a"]},
        {"topic": "garden", "turn": 2, "seen": ["a", "b"]},
        {"topic": "garden", "turn": 1, "only": True},
    ]
    for at, (content, each) in enumerate(zip(GARDEN, metadata, strict=True)):
        await service.add(content, parent_id=session_id, metadata=each, tags=["t", f"tag-{at}"], occurred_at=float(at))
    await fade(service)
    (record,) = await merged(service)
    about = record["metadata"].pop("consolidation")
    assert about["count"] == 3
    assert record["metadata"] == {"topic": "garden", "turn": [1, 2], "seen": ["a", "a", "b"], "only": True}
    assert record["tags"] == ["t", "tag-0", "tag-1", "tag-2"]
    by_turn = await service.ok("list_memories", filters={"metadata.turn": {"contains": 2}})
    assert [memory["memory_id"] for memory in by_turn["results"]] == [record["memory_id"]]


@service_test(**STEADY)
async def test_related_memories_become_one_where_no_parent_is_shared(service: Service) -> None:
    one, other, stranger = [await service.add(content) for content in GARDEN]
    await service.ok("add_relationship", source_id=other, target_id=one, relationship_type="about")
    await fade(service)
    reply = await service.ok("run_consolidation")
    assert [plan["members"] for plan in reply["plans"]] == [[one, other]]
    assert (await service.record(stranger))["state"] == "active"


@service_test(**STEADY)
async def test_duplicates_are_folded_and_counted(service: Service) -> None:
    ids = await alone(service, "The door code is 4711.", "the door code is 4711", "The  door code is: 4711", TRAIN)
    reply = await service.ok("run_consolidation")
    (plan,) = reply["plans"]
    assert (plan["kind"], plan["members"]) == ("duplicates", ids[:3])
    record = await service.record(plan["memory_id"])
    assert record["content"] == "The  door code is: 4711"
    assert record["metadata"]["consolidation"]["count"] == 3
    assert reply["counts"] == {"archived": 3, "duplicates": 1, "faded": 1}


@service_test(**STEADY, consolidation__min_related_memories=3)
async def test_duplicates_are_found_wherever_they_stand(service: Service, small_slices: None) -> None:
    """Without a parent by the index, in slices of two; below a parent also when they are too few for a summary."""
    session_id = await service.session()
    below = [await service.add("The key is under the mat.", parent_id=session_id) for _ in range(2)]
    top = []
    for number in range(3):
        top.append(await service.add("Sergei repairs old watches for a living."))
        await service.add(f"Something else entirely, number{number} word{number} thing{number}.")
    await fade(service)
    seen = await service.ok("run_consolidation", dry_run=True)
    assert sorted(plan["members"] for plan in seen["plans"]) == sorted([below, top])
    assert reported(await service.ok("run_consolidation", as_of=seen["as_of"]))["digest"] == seen["digest"]


@service_test(**STEADY, embedding__provider="off")
async def test_without_a_model_equal_texts_are_folded(service: Service) -> None:
    session_id = await service.session()
    same = [await service.add("The key is under the mat.", parent_id=session_id) for _ in range(2)]
    top = [await service.add(text) for text in ("A blue door.", "a blue door")]
    for content in GARDEN:
        await service.add(content, parent_id=session_id)
    service.clock.ahead_s += OLD_S
    reply = await service.ok("run_consolidation")
    assert sorted(plan["members"] for plan in reply["plans"]) == sorted([same, top])
    assert reply["counts"]["faded"] == 3


# -- what does not ----------------------------------------------------------------------------------------------------


@service_test(**STEADY)
async def test_what_differs_in_kind_or_owner_is_kept_apart(service: Service) -> None:
    text = "The ripe tomatoes in the garden are picked."
    session_id = await service.session()
    other_session = await service.session()
    await service.add(text, parent_id=session_id)
    await service.add(text, parent_id=session_id, memory_type="fact")
    await service.add(text, parent_id=session_id, user_id="eve")
    await service.add(text, parent_id=session_id, expires_at=service.clock.time() + 1000 * DAY_S)
    await service.add(text, parent_id=other_session)
    await service.add(text)
    await service.add(text, {"namespace": "elsewhere"})
    await fade(service)
    # Important ones are promoted, and young ones have not faded.
    await service.add(text, parent_id=session_id, importance=1.0)
    await service.add(text, parent_id=session_id)
    await service.settled()
    reply = await service.ok("run_consolidation")
    assert (reply["plans"], reply["changes"]) == ([], 0)
    assert reply["counts"] == {"faded": 7}
    assert service.rows("SELECT count(*) FROM memories WHERE state = 'archived'") == [(0,)]


@service_test(**DECAY)
async def test_neighbours_are_those_with_nothing_between_them(service: Service) -> None:
    """An important memory between two others keeps them apart; one of another type does not."""
    important, unimportant = [
        await turns_with_notes(service, importances) for importances in ((0.5, 1.0, 0.5), (0.5, 0.5, 0.5))
    ]
    await fade(service)
    reply = await service.ok("run_consolidation")
    assert [plan["members"] for plan in reply["plans"] if plan["kind"] == "summary"] == [unimportant]
    assert [(await service.record(memory_id))["state"] for memory_id in important] == ["active"] * 3
    # What was archived stands between its neighbours as before: the next run finds nothing new.
    service.clock.ahead_s += 7.5 * DAY_S
    assert (await service.ok("run_consolidation"))["changes"] == 0


async def turns_with_notes(service: Service, importances: Sequence[float]) -> list[str]:
    session_id = await service.session()
    ids = []
    for content, importance in zip(GARDEN, importances, strict=True):
        ids.append(await service.add(content, parent_id=session_id, importance=importance))
        await service.add(TRAIN, parent_id=session_id, memory_type="note")
    return ids


@service_test(**STEADY, consolidation__window_h=0.01)
async def test_what_lies_too_far_apart_in_time_is_kept_apart(service: Service) -> None:
    session_id = await service.session()
    ids = [
        await service.add(content, parent_id=session_id, occurred_at=at)
        for content, at in zip(GARDEN, (0.0, 20.0, 100.0), strict=True)
    ]
    await fade(service)
    reply = await service.ok("run_consolidation")
    assert [plan["members"] for plan in reply["plans"]] == [ids[:2]]


@service_test(**STEADY)
async def test_a_consolidated_memory_is_not_consolidated_again(service: Service) -> None:
    session_id, _ = await turns(service, GARDEN)
    (record,) = await merged(service)
    for _ in range(2):
        await service.add(record["content"], parent_id=session_id, memory_type="consolidated")
    await service.settled()
    service.clock.ahead_s += 31 * DAY_S
    assert await merged(service) == []
    assert (await service.record(record["memory_id"]))["state"] == "active"


@service_test(**STEADY)
async def test_a_consolidated_memory_of_another_type_is_not_consolidated_again(service: Service) -> None:
    session_id, _ = await turns(service, GARDEN)
    (record,) = await merged(service)
    await service.ok("update_memory", memory_id=record["memory_id"], update_payload={"memory_type": "note"})
    copy = await service.add(record["content"], parent_id=session_id, memory_type="note", memory_tier="medium")
    other = await service.add(record["content"], parent_id=session_id, memory_type="note", memory_tier="medium")
    await service.settled()
    service.clock.ahead_s += 31 * DAY_S
    reply = await service.ok("run_consolidation")
    assert [plan["members"] for plan in reply["plans"]] == [[copy, other]]


@service_test(**STEADY)
async def test_only_the_namespaces_that_are_named(service: Service) -> None:
    for namespace in ("one", "two"):
        for _ in range(2):
            await service.add("The door code is 4711.", {"namespace": namespace})
    for namespace in ("one", "two"):
        reply = await service.ok("stats", {"namespace": namespace})
        assert reply["memories"] == 2
    service.clock.ahead_s += OLD_S
    reply = await service.ok("run_consolidation", namespaces=["two"])
    assert [plan["namespace"] for plan in reply["plans"]] == ["two"]
    assert service.rows("SELECT DISTINCT namespace FROM memories WHERE state = 'archived'") == [("two",)]


# -- dry runs ---------------------------------------------------------------------------------------------------------


@service_test(**STEADY, maintenance__slice_rows=2)
async def test_a_run_does_what_its_dry_run_shows(service: Service, small_slices: None) -> None:
    """Also in slices that cut through families, some memories in none of them, and a day later."""
    for _ in range(3):
        session_id = await service.session()
        for content in (*GARDEN, TRAIN, "Bob: The Lisbon train left at seven on Friday morning.", "Ada: Hm."):
            await service.add(content, parent_id=session_id)
    for _ in range(3):
        await service.add("The door code is 4711.")
    await fade(service)
    before = everything(service)
    seen = await service.ok("run_consolidation", dry_run=True)
    again = await service.ok("run_consolidation", dry_run=True, as_of=seen["as_of"])
    assert everything(service) == before
    assert reported(seen) == reported(again)
    assert seen["counts"]["summary"] >= 3
    assert seen["counts"]["duplicates"] == 1
    service.clock.ahead_s += DAY_S
    done = await service.ok("run_consolidation", as_of=seen["as_of"])
    made = {plan.pop("memory_id") for plan in done["plans"]}
    assert made == {row[0] for row in service.rows("SELECT memory_id FROM memories WHERE memory_type = 'consolidated'")}
    assert reported(done) == reported(seen)
    empty = await service.ok("run_consolidation", as_of=seen["as_of"])
    assert empty["changes"] == 0


@service_test(**STEADY)
async def test_what_changed_after_the_plan_is_left_alone(service: Service) -> None:
    session_id, ids = await turns(service, GARDEN)
    consolidating = service.runtime._maintaining._merges._consolidating
    as_of_s = service.clock.time()
    (plan,) = (await consolidating.plan(as_of_s)).plans
    changes: list[tuple[str, dict[str, Any]]] = [
        ("update_memory", {"memory_id": ids[1], "update_payload": {"content": "Bob: Never mind the garden."}}),
        ("update_memory", {"memory_id": ids[0], "update_payload": {"parent_id": None}}),
        ("reinforce_memory", {"memory_id": ids[2], "reinforcement_factor": 4.0}),
        ("delete_memory", {"memory_id": ids[2]}),
    ]
    for action, data in changes:
        await service.ok(action, **data)
        await service.settled()  # new words get a vector, which is a change as well
        before = everything(service)
        outcome = await consolidating.apply(plan)
        assert (outcome.done, outcome.reason, outcome.members) == (False, "changed", [])
        assert everything(service) == before
        plans = (await consolidating.plan(as_of_s)).plans
        if not plans:
            break
        (plan,) = plans
    assert session_id


@service_test(**STEADY)
async def test_a_plan_is_carried_out_once(service: Service) -> None:
    _, ids = await turns(service, GARDEN)
    consolidating = service.runtime._maintaining._merges._consolidating
    (plan,) = (await consolidating.plan(service.clock.time())).plans
    assert (await consolidating.plan(plan.as_of_s)).plans[0].digest == plan.digest
    first, second = await consolidating.apply(plan), await consolidating.apply(plan)
    assert (first.done, first.members) == (True, ids)
    assert not second.done
    assert service.count("consolidations") == 1


# -- undo -------------------------------------------------------------------------------------------------------------


@service_test(**STEADY)
async def test_undo_restores_the_originals_exactly(service: Service) -> None:
    _, ids = await turns(service, GARDEN, tags=["talk"])
    before, texts = ageing(service, *ids), [await service.record(memory_id) for memory_id in ids]
    (record,) = await merged(service)
    seen = await service.ok("undo_consolidation", memory_id=record["memory_id"], dry_run=True)
    assert (await service.record(record["memory_id"])) | {"importance": 0} == record | {"importance": 0}
    done = await service.ok("undo_consolidation", memory_id=record["memory_id"])
    assert reported(done) == reported(seen) | {"as_of": done["as_of"]}
    assert ageing(service, *ids) == before
    for memory_id, old in zip(ids, texts, strict=True):
        new = await service.record(memory_id)
        assert new | {"importance": 0} == old | {"importance": 0}
    await service.fails("memory_not_found", "get_memory", memory_id=record["memory_id"])
    assert set(await found(service, "ripe tomatoes")) == set(ids)
    for table in ("consolidations", "consolidation_members", "relationships"):
        assert service.count(table) == 0
    await service.settled()


@service_test(**STEADY)
async def test_what_was_undone_is_not_done_again(service: Service) -> None:
    _, ids = await turns(service, GARDEN)
    (record,) = await merged(service)
    await service.ok("undo_consolidation", memory_id=record["memory_id"])
    assert await merged(service) == []
    service.clock.ahead_s += 7.5 * DAY_S
    assert await merged(service) == []
    assert [(await service.record(memory_id))["state"] for memory_id in ids] == ["active"] * 3


@service_test(**STEADY)
async def test_undo_leaves_what_was_brought_back_and_revives_what_would_be_archived_at_once(service: Service) -> None:
    _, ids = await turns(service, GARDEN)
    (record,) = await merged(service)
    service.clock.ahead_s += 30 * DAY_S
    await service.ok("reinforce_memory", memory_id=ids[0], reinforcement_factor=9.0)
    back = ageing(service, ids[0])
    reply = await service.ok("undo_consolidation", memory_id=record["memory_id"])
    assert {r["memory_id"] for r in reply["results"]} == {*ids[1:], record["memory_id"]}
    assert ageing(service, ids[0]) == back
    for memory_id in ids[1:]:
        assert (await service.record(memory_id))["importance"] == pytest.approx(0.3, abs=1e-3)
    await service.ok("run_decay")
    assert [(await service.record(memory_id))["state"] for memory_id in ids] == ["active"] * 3


async def merged_twice(service: Service) -> tuple[str, list[str], list[dict[str, Any]]]:
    """One that was merged, brought back, and merged again with another: its id, those of the others, and the merged
    memories, the older one first."""
    (once, twice) = await alone(service, "The door code is 4711.", "The door code is 4711.")
    older = await merged(service)
    await service.ok("update_memory", memory_id=twice, update_payload={"state": "active"})
    (new,) = await alone(service, "The door code is 4711.")
    newer = await merged(service)
    assert [(await service.record(each))["state"] for each in (once, twice, new)] == ["archived"] * 3
    return twice, [once, new], older + newer


@service_test(**STEADY)
async def test_undo_brings_back_what_was_part_of_an_older_one_too(service: Service) -> None:
    twice, (once, new), (older, newer) = await merged_twice(service)
    reply = await service.ok("undo_consolidation", memory_id=newer["memory_id"])
    assert {r["memory_id"] for r in reply["results"]} == {twice, new, newer["memory_id"]}
    assert [(await service.record(each))["state"] for each in (once, twice, new)] == ["archived", "active", "active"]
    reply = await service.ok("undo_consolidation", memory_id=older["memory_id"])
    assert {r["memory_id"] for r in reply["results"]} == {once, older["memory_id"]}


@service_test(**STEADY)
async def test_undo_leaves_what_was_merged_again_since(service: Service) -> None:
    twice, (once, new), (older, _) = await merged_twice(service)
    await service.ok("undo_consolidation", memory_id=older["memory_id"])
    assert [(await service.record(each))["state"] for each in (once, twice, new)] == ["active", "archived", "archived"]


async def spoken_for(service: Service, memory_id: str) -> str | None:
    """The memory for which this one's words count in searches."""
    await service.ok("semantic_search", query="door", touch=False)
    view = service.runtime._index.view
    assert view is not None
    slot = view.columns.slot(service.rows("SELECT row_id FROM memories WHERE memory_id = ?", memory_id)[0][0])
    into = int(view.columns.speakers.into[slot])
    found = service.rows("SELECT memory_id FROM memories WHERE row_id = ?", int(view.columns.row_ids[into]))
    return None if into == NONE else str(found[0][0])


@service_test(**STEADY)
async def test_without_the_newer_one_an_original_speaks_for_the_older_one_again(service: Service) -> None:
    twice, _, (older, newer) = await merged_twice(service)
    assert await spoken_for(service, twice) == newer["memory_id"]
    await service.ok("delete_memory", memory_id=newer["memory_id"])
    assert await spoken_for(service, twice) == older["memory_id"]


@service_test(**STEADY)
async def test_undo_keeps_what_hangs_below_and_knows_its_own(service: Service) -> None:
    session_id, _ = await turns(service, GARDEN)
    (record,) = await merged(service)
    child = await service.add("a note on it", parent_id=record["memory_id"])
    await service.ok("undo_consolidation", memory_id=record["memory_id"])
    assert (await service.record(child))["parent_id"] == session_id
    await service.fails("invalid_field", "undo_consolidation", memory_id=child)
    await service.fails("invalid_field", "undo_consolidation", memory_id=child, dry_run=True)
    for unknown in ("mem-nowhere", record["memory_id"]):
        await service.fails("memory_not_found", "undo_consolidation", memory_id=unknown)
    await service.fails("memory_not_found", "undo_consolidation", {"namespace": "elsewhere"}, memory_id=child)


# -- deleting means gone ----------------------------------------------------------------------------------------------


@service_test(**STEADY, consolidation__summary_share=1.0)
async def test_a_deleted_original_is_gone_from_the_summary(service: Service) -> None:
    contents = [
        "Ada: The tomatoes in the garden are ripe.",
        "Bob: Pick all the ripe tomatoes in the garden before the zebra comes.",
        "Ada: The ripe tomatoes in the garden are picked.",
    ]
    session_id = await service.session()
    ids = [
        await service.add(text, parent_id=session_id, metadata={"by": f"who-{at}"}, tags=[f"tag-{at}"])
        for at, text in enumerate(contents)
    ]
    await fade(service)
    (record,) = await merged(service)
    assert "zebra" in record["content"]
    await service.ok("update_memory", memory_id=record["memory_id"], update_payload={"tags": ["zebra"]})
    await service.settled()
    await service.ok("delete_memory", memory_id=ids[1])
    after = await service.record(record["memory_id"])
    assert after["content"] == "Ada: The tomatoes in the garden are ripe. The ripe tomatoes in the garden are picked."
    assert after["metadata"]["by"] == ["who-0", "who-2"]
    assert after["metadata"]["consolidation"]["count"] == 2
    assert after["tags"] == ["tag-0", "tag-2"]
    assert holds(service, "zebra") == []
    assert await found(service, "zebra", include_archived=True) == []
    await service.settled()
    dense = await service.ok("semantic_search", query="ripe tomatoes garden", mode="dense", touch=False)
    assert [result["memory_id"] for result in dense["results"]] == [record["memory_id"]]
    assert service.rows(
        "SELECT e.digest = m.content_digest FROM embeddings e JOIN memories m USING (row_id) WHERE m.memory_id = ?",
        record["memory_id"],
    ) == [(1,)]
    reply = await service.ok("undo_consolidation", memory_id=record["memory_id"])
    assert {r["memory_id"] for r in reply["results"]} == {ids[0], ids[2], record["memory_id"]}


@service_test(**STEADY)
async def test_of_two_originals_the_other_comes_back(service: Service) -> None:
    _, ids = await turns(service, GARDEN[:2])
    before = ageing(service, ids[0])
    (record,) = await merged(service)
    reply = await service.ok("delete_memory", memory_id=ids[1])
    assert reply["deleted"] == 1
    assert ageing(service, ids[0]) == before
    await service.fails("memory_not_found", "get_memory", memory_id=record["memory_id"])
    assert await found(service, "tomatoes", include_archived=True) == [ids[0]]
    assert holds(service, "beans") == []


@service_test(**STEADY)
async def test_forgetting_a_session_or_a_user_takes_the_summary_along(service: Service) -> None:
    for around in ({"session_id": None}, {"user_id": "ada"}):
        session_id, _ = await turns(service, GARDEN)
        assert len(await merged(service)) == 1
        await service.ok("forget", **{name: value or session_id for name, value in around.items()})
        assert holds(service, "tomato") == []
        assert service.count("consolidations") == 0
        assert service.rows("SELECT count(*) FROM memories WHERE memory_type <> 'session'") == [(0,)]


@service_test(**STEADY)
async def test_another_duplicate_speaks_for_one_that_is_deleted(service: Service) -> None:
    ids = await alone(service, "The door code is 4711!!", "the door code is 4711", "the door code is 4711")
    (record,) = await merged(service)
    assert record["content"] == "The door code is 4711!!"
    await service.ok("delete_memory", memory_id=ids[0])
    after = await service.record(record["memory_id"])
    assert after["content"] == "the door code is 4711"
    assert after["metadata"]["consolidation"]["count"] == 2
    assert holds(service, "!!") == []


@service_test(**STEADY)
async def test_deleting_the_summary_leaves_its_originals_in_the_archive(service: Service) -> None:
    _, ids = await turns(service, GARDEN)
    (record,) = await merged(service)
    await service.ok("delete_memory", memory_id=record["memory_id"])
    assert [(await service.record(memory_id))["state"] for memory_id in ids] == ["archived"] * 3
    await service.ok("update_memory", memory_id=ids[0], update_payload={"state": "active"})
    assert await found(service, "tomatoes") == [ids[0]]
    assert service.count("consolidation_members") == 0


# -- summarisers of one's own -----------------------------------------------------------------------------------------


def shout(originals: Sequence[Original], budget_chars: int, embed: Embed) -> str:
    return f"{len(originals)} MEMORIES IN {budget_chars}: " + " ".join(each.content.upper() for each in originals)


async def first_words(originals: Sequence[Original], budget_chars: int, embed: Embed) -> list[tuple[int, str]]:
    assert (await embed(["a", "b"])).shape == (2, 64)
    return [(at, " ".join(original.content.split()[:4])) for at, original in enumerate(originals)]


def broken(originals: Sequence[Original], budget_chars: int, embed: Embed) -> str:
    raise RuntimeError("no summary today")


def mute(originals: Sequence[Original], budget_chars: int, embed: Embed) -> str:
    return " "


def wild(originals: Sequence[Original], budget_chars: int, embed: Embed) -> list[tuple[int, str]]:
    return [(7, "of nobody")]


@service_test(**STEADY, consolidation__summariser=f"{__name__}:shout")
async def test_a_summariser_of_ones_own(service: Service) -> None:
    _, ids = await turns(service, GARDEN)
    (record,) = await merged(service)
    assert record["content"].startswith("3 MEMORIES IN ")
    assert "ADA: THE TOMATOES" in record["content"]
    # What cannot be taken out is taken apart.
    await service.ok("delete_memory", memory_id=ids[0])
    await service.fails("memory_not_found", "get_memory", memory_id=record["memory_id"])
    assert set(await found(service, "tomatoes")) == set(ids[1:])
    assert holds(service, "shall") == []


@service_test(**STEADY, consolidation__summariser=f"{__name__}:first_words")
async def test_a_search_finds_a_summary_by_what_its_text_leaves_out(service: Service) -> None:
    """As long as the original that said it is there, in the store that made it and in one that it was brought to."""

    async def heard(around: dict[str, Any]) -> list[str]:
        asked = {"query": "lighthouse", "explain": True, "touch": False}
        reply = await service.ok("semantic_search", around, **asked)
        return [each["memory_id"] for each in reply["results"] if each["explain"]["keyword"] > 0.0]

    _, ids = await turns(service, [f"{GARDEN[0]} From the lighthouse.", *GARDEN[1:], TRAIN])
    (record,) = await merged(service)
    assert "lighthouse" not in record["content"]
    await service.settled()
    copy = {"namespace": "copy"}
    lines = [{name: line[name] for name in line if name != "namespace"} for line in await lines_of(service)]
    for is_tie in (False, True):  # the index has the originals before it can know what they speak for
        records = [line for line in lines if (line["kind"] == "consolidation") == is_tie]
        await service.ok("import_memories", copy, records=records)
        await service.settled()
    assert (await heard({}))[0] == (await heard(copy))[0] == record["memory_id"]
    assert not set(await heard({})) & set(ids[:3])
    await service.ok("delete_memory", memory_id=ids[0])
    assert await heard({}) == [] and (await heard(copy))[0] == record["memory_id"]


@service_test(**STEADY, consolidation__summariser=f"{__name__}:first_words")
async def test_a_summariser_that_tells_where_its_pieces_are_from(service: Service) -> None:
    _, ids = await turns(service, GARDEN)
    (record,) = await merged(service)
    assert record["content"] == "Ada: The tomatoes in Bob: Pick the ripe Ada: The ripe tomatoes"
    await service.ok("delete_memory", memory_id=ids[1])
    assert (await service.record(record["memory_id"]))["content"] == "Ada: The tomatoes in The ripe tomatoes"


@pytest.mark.parametrize("name", ["broken", "mute", "wild"])
def test_a_summariser_that_fails_harms_nothing(tmp_path: Any, name: str) -> None:
    async def scenario() -> None:
        settings = {**STEADY, "consolidation__summariser": f"{__name__}:{name}"}
        async with running_service(tmp_path, **settings) as service:
            _, ids = await turns(service, GARDEN)
            same = [await service.add("The door code is 4711.") for _ in range(2)]
            await fade(service)
            reply = await service.ok("run_consolidation")
            assert [plan["members"] for plan in reply["plans"]] == [same]
            assert [(await service.record(memory_id))["state"] for memory_id in ids] == ["active"] * 3
            again = await service.ok("run_consolidation")
            assert again["counts"].get("faded", 0) == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["nowhere_at_all:x", f"{__name__}:nothing", f"{__name__}:GARDEN"])
def test_a_summariser_that_is_not_there_is_refused_at_the_start(tmp_path: Any, name: str) -> None:
    async def scenario() -> None:
        async with running_service(tmp_path, consolidation__summariser=name):
            pass

    with pytest.raises(ConfigError, match=r"consolidation\.summariser"):
        asyncio.run(scenario())


# -- when something is missing ----------------------------------------------------------------------------------------


@service_test(**STEADY)
async def test_while_there_is_no_model_nothing_is_decided(service: Service) -> None:
    _, ids = await turns(service, GARDEN)
    before = everything(service)
    embedder = service.runtime._embedder
    kindred = service.runtime._maintaining._merges._consolidating._kindred
    absent = types.SimpleNamespace(state="down", reason="it died", model_id=None, dimension=None)
    with mock.patch.object(kindred, "_embedder", absent):
        reply = await service.fails("vectors_unavailable", "run_consolidation")
        assert reply["retryable"] is True
    assert everything(service) == before
    assert embedder.state == "ready"
    assert len(await merged(service)) == 1
    assert ids


@pytest.mark.usefixtures("small_pools")
@pytest.mark.parametrize("between", [True, False])
def test_what_was_said_between_is_seen_however_many_children_there_are(tmp_path: Any, between: bool) -> None:
    """Of a parent with more children than are looked at together, those around the fading ones count."""

    async def scenario() -> None:
        async with running_service(tmp_path, "msgpack", **DECAY) as service:
            spoken = [*(f"{TRAIN} Number {number}." for number in range(12)), GARDEN[0]]
            spoken += [TRAIN, GARDEN[1]] if between else [GARDEN[1], TRAIN]
            session_id = await service.session()
            memories = [
                {"content": each, "parent_id": session_id, "importance": 0.5 if each in GARDEN else 1.0}
                for each in spoken
            ]
            await service.ok("batch_add_memories", memories=memories)
            await fade(service)
            seen = await service.ok("run_consolidation", dry_run=True)
            assert [len(plan["members"]) for plan in seen["plans"]] == ([] if between else [2])
            done = await service.ok("run_consolidation", as_of=seen["as_of"])
            assert reported(seen)["digest"] == reported(done)["digest"]

    asyncio.run(scenario())

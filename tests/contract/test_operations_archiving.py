"""export_memories and import_memories: everything comes out, the same goes in, once, and nothing by halves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from memory_system.export_models import LINES, HistoryRecord, MemoryLine
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.models import Memory
from memory_system.service import exports
from memory_system.storage.rows import RecordView
from tests.support.archive import SETTINGS, Line, fill, lines_of, put_in, totals
from tests.support.runs import DAY_S
from tests.support.service import Service, eventually, running_service, service_test
from tests.support.stores import everything

DELETE = object()


def test_lines_carry_every_field_of_a_memory_but_what_is_derived() -> None:
    own = set(MemoryLine.__struct_fields__) - {"kind", "parent_follows", "undone_at", "session", "vector"}
    assert own == set(Memory.__struct_fields__) - {"row_id", "content_digest", "due_at"}
    clocks = {"importance": 1.0, "importance_at": 0.0, "access_count": 0}
    values = {**dict.fromkeys(Memory.__struct_fields__), "memory_type": "session", "memory_tier": "long", **clocks}
    shown = RecordView(LifecycleSettings()).record(Memory(**values), 0.0)
    assert set(HistoryRecord.__struct_fields__) == set(shown)


@pytest.mark.parametrize("encoding", ["msgpack", "json"])
@pytest.mark.parametrize("vectors", [True, False])
def test_an_export_put_into_an_empty_store_gives_the_same_memories(
    tmp_path: Path, encoding: str, vectors: bool
) -> None:
    async def scenario() -> None:
        async with running_service(tmp_path / "one", encoding, **SETTINGS) as service:
            ids = await fill(service)
            lines = await lines_of(service, all_namespaces=True, vectors=vectors, limit=3)
            first = await service.ok("export_memories", all_namespaces=True, vectors=vectors)
            assert {kind: count for kind, count in first["totals"].items() if count} == totals(lines)
            gone = {ids["expiring"]}
        assert set(totals(lines)) == set(LINES)
        before = everything(tmp_path / "one" / "memory.db")

        async with running_service(tmp_path / "two", encoding, **SETTINGS) as service:
            service.clock.ahead_s = 8 * DAY_S
            outcome = await put_in(service, lines)
            assert outcome == {"added": totals(lines), "unchanged": {}, "overwritten": {}, "conflicts": {}}
            assert await lines_of(service, all_namespaces=True, vectors=False) == _without_vectors(lines)
            found = await service.ok("search_memory", query="version 2 of it")
            assert found["results"][0]["content"] == "version 2 of it"
            await service.settled()
            assert await lines_of(service, all_namespaces=True, vectors=vectors) == lines
        after = everything(tmp_path / "two" / "memory.db")
        assert after == _without(before, gone)
        assert len(after["undone"]) == 2

    asyncio.run(scenario())


def _without_vectors(lines: list[Line]) -> list[Line]:
    return [{name: value for name, value in line.items() if name != "vector"} for line in lines]


def _without(found: dict[str, list[tuple[Any, ...]]], gone: set[str]) -> dict[str, list[tuple[Any, ...]]]:
    """What is left of everything when some memories are not there: their children stand without a parent."""
    kept = {name: [row for row in rows if row[1] not in gone] for name, rows in found.items()}
    kept["memories"] = [tuple(None if value in gone else value for value in row) for row in kept["memories"]]
    return {name: sorted(rows, key=repr) for name, rows in kept.items()}


@service_test(**SETTINGS)
async def test_put_in_twice_it_changes_nothing(service: Service) -> None:
    await fill(service)
    lines = await lines_of(service, all_namespaces=True, vectors=True)
    before = everything(service.path)
    seq, log = await numbers(service)
    for choice in ("report", "overwrite"):
        outcome = await put_in(service, lines, on_conflict=choice)
        assert outcome == {"added": {}, "unchanged": totals(lines), "overwritten": {}, "conflicts": {}}
    assert everything(service.path) == before
    assert await numbers(service) == (seq, log)


async def numbers(service: Service) -> tuple[int, int]:
    """The end of the log, and the number of the last change."""
    (log,) = service.rows("SELECT max(seq) FROM index_log")[0]
    return (await service.ok("get_commit_seq"))["commit_seq"], log


@service_test(**SETTINGS)
async def test_what_use_and_age_have_done_since_is_no_conflict(service: Service) -> None:
    ids = await fill(service)
    lines = await lines_of(service)
    await service.ok("reinforce_memory", memory_id=ids["first"])
    await service.ok("get_memory", memory_id=ids["later"])
    await service.ok("update_memory", memory_id=ids["archived"], update_payload={"state": "active"})
    before = everything(service.path)
    outcome = await put_in(service, lines)
    assert (outcome["conflicts"], outcome["overwritten"], outcome["added"]) == ({}, {}, {})
    assert everything(service.path)["memories"] == before["memories"]


@service_test(**SETTINGS)
async def test_conflicts_are_reported_and_nothing_is_overwritten_unless_asked(service: Service) -> None:
    ids = await fill(service)
    lines = await lines_of(service)
    await service.ok(
        "update_memory", memory_id=ids["later"], update_payload={"content": "changed since", "tags": ["x"]}
    )
    related = {"source_id": ids["first"], "target_id": ids["later"], "relationship_type": "supports"}
    await service.ok("add_relationship", **related, strength=0.75)
    before = everything(service.path)

    reply = await service.ok("import_memories", records=lines)
    assert reply["conflicts"] == {"memory": 1, "relationship": 1}
    position = {(line["kind"], line.get("memory_id"), line.get("relationship_type")): n for n, line in enumerate(lines)}
    assert reply["results"] == [
        {"index": position["memory", ids["later"], None], "kind": "memory", "memory_id": ids["later"],
         "fields": ["content", "tags"]},
        {"index": position["relationship", None, "supports"], "kind": "relationship", **related,
         "fields": ["strength"]},
    ]  # fmt: skip
    assert everything(service.path) == before

    seen = await service.ok("import_memories", records=lines, on_conflict="overwrite", dry_run=True)
    assert everything(service.path) == before
    done = await service.ok("import_memories", records=lines, on_conflict="overwrite")
    assert done["overwritten"] == seen["overwritten"] == {"memory": 1, "relationship": 1}
    record = await service.record(ids["later"])
    assert (record["content"], record["tags"]) == ("made later, and a parent all the same", [])
    assert record["version"] == 3
    (history,) = (await service.ok("get_memory_history", memory_id=ids["later"]))["results"][:1]
    assert (history["version"], history["content"]) == (2, "changed since")
    found = await service.ok("search_memory", query="changed since")
    assert ids["later"] not in [result["memory_id"] for result in found["results"]]
    again = await service.ok("import_memories", records=lines, on_conflict="overwrite")
    assert (again["overwritten"], again["conflicts"], again["added"]) == ({}, {}, {})


@service_test(**SETTINGS)
async def test_what_was_undone_is_not_consolidated_again_after_an_import(service: Service) -> None:
    await fill(service)
    undone = service.rows("SELECT memory_id FROM consolidations_undone JOIN memories USING (row_id) ORDER BY memory_id")
    lines = await lines_of(service)
    around = {"namespace": "copy"}
    own = [{name: value for name, value in line.items() if name != "namespace"} for line in lines]
    await service.ok("import_memories", around, records=own)
    again = await service.ok("run_consolidation", namespaces=["copy"])
    assert again["counts"]["faded"] >= 2
    assert not {each["memory_id"] for each in again["results"]} & {memory_id for (memory_id,) in undone}

    # The mark goes with the line where the line takes the memory's place, and only there.
    unmarked = [{name: value for name, value in line.items() if name != "undone_at"} for line in own]
    assert (await service.ok("import_memories", around, records=unmarked))["overwritten"] == {}
    counted = "SELECT count(*) FROM consolidations_undone u JOIN memories m USING (row_id) WHERE m.namespace = 'copy'"
    assert service.rows(counted) == [(2,)]
    await service.ok("import_memories", around, records=unmarked, on_conflict="overwrite")
    assert service.rows(counted) == [(0,)]
    await service.ok("import_memories", around, records=own, on_conflict="overwrite")
    assert service.rows(counted) == [(2,)]


@service_test(**SETTINGS)
async def test_a_dry_run_says_what_would_be_done_and_does_nothing(service: Service) -> None:
    await fill(service)
    lines = [line for line in await lines_of(service)]
    around = {"namespace": "copy"}
    for line in lines:
        del line["namespace"]
    before = everything(service.path)
    seen = await service.ok("import_memories", around, records=lines, dry_run=True)
    assert everything(service.path) == before
    assert seen["commit_seq"] == 0
    done = await service.ok("import_memories", around, records=lines)
    assert {**seen, "request_id": "", "commit_seq": 1} == {**done, "request_id": ""}


@service_test()
async def test_all_pages_are_of_one_state_however_much_is_written_meanwhile(service: Service) -> None:
    ids = [await service.add(f"memory {number}") for number in range(12)]
    await service.ok("add_relationship", source_id=ids[11], target_id=ids[0], relationship_type="follows")
    page = await service.ok("export_memories", limit=5)
    found = page["results"]
    await service.add("too late")
    await service.ok("delete_memory", memory_id=ids[11])
    await service.ok("update_memory", memory_id=ids[8], update_payload={"content": "changed", "parent_id": ids[9]})
    second = page["next_cursor"]
    while "next_cursor" in page:
        page = await service.ok("export_memories", limit=5, cursor=page["next_cursor"])
        found += page["results"]
    assert [line["content"] for line in found if line["kind"] == "memory"] == [f"memory {n}" for n in range(12)]
    assert totals(found) == {"memory": 12, "relationship": 1}
    again = await service.ok("export_memories", limit=5, cursor=second)
    assert again["results"] == found[5:10]
    assert len(await lines_of(service)) == 12 + 1 + 1  # 12 memories, a history, a parent that follows


@service_test()
async def test_a_state_that_is_not_held_any_more_is_said_to_be_gone(service: Service) -> None:
    for number in range(3):
        await service.add(f"memory {number}")
    cursors = [(await service.ok("export_memories", limit=1))["next_cursor"] for _ in range(exports.MAX_OPEN + 2)]
    for cursor in cursors[:2]:
        gone = await service.fails("invalid_cursor", "export_memories", limit=1, cursor=cursor)
        assert "start again" in gone["message"]
    for cursor in cursors[2:]:
        await service.ok("export_memories", limit=1, cursor=cursor)
    await service.fails("invalid_cursor", "export_memories", limit=1, cursor=cursors[3], vectors=True)
    await service.fails("invalid_cursor", "export_memories", {"namespace": "other"}, limit=1, cursor=cursors[3])


@service_test()
async def test_exports_that_begin_together_hold_no_more_states_than_there_may_be(service: Service) -> None:
    await service.add("one")
    await service.add("two")
    replies = await asyncio.gather(*(service.ask("export_memories", limit=1) for _ in range(3 * exports.MAX_OPEN)))
    held: exports.Exports = service.runtime.dispatcher._handlers["export_memories"].__self__._exports  # type: ignore
    assert len(held._held) == exports.MAX_OPEN
    codes = [reply.get("error_code") for reply in replies if reply["status"] == "error"]
    assert set(codes) <= {"busy"}


def test_a_state_without_a_reader_is_let_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        with mock.patch.object(exports.Exports.__init__, "__defaults__", (0.05,)):
            async with running_service(tmp_path) as service:
                await service.add("one")
                await service.add("two")
                cursor = (await service.ok("export_memories", limit=1))["next_cursor"]

                async def is_gone() -> bool:
                    await asyncio.sleep(0.2)
                    reply = await service.ask("export_memories", limit=1, cursor=cursor)
                    return reply.get("error_code") == "invalid_cursor"

                await eventually(is_gone)

    asyncio.run(scenario())


# -- what is wrong ----------------------------------------------------------------------------------------------------


def memory(**changes: Any) -> Line:
    line = {"kind": "memory", "memory_id": "mem-a", "content": "text", "created_at": 1000.0, **changes}
    return {name: value for name, value in line.items() if value is not DELETE}


def history(memory_id: str, of: str) -> Line:
    record = {"memory_id": of, "content": "as it was"}
    return {"kind": "history", "memory_id": memory_id, "version": 1, "record": record, "replaced_at": 1.0}


def relationship(target_id: str) -> Line:
    ends = {"source_id": "mem-first", "target_id": target_id}
    return {"kind": "relationship", **ends, "relationship_type": "follows", "created_at": 1.0}


def consolidation(**changes: Any) -> Line:
    made = {"memory_id": "mem-first", "consolidation_kind": "summary", "summariser": "extractive", "created_at": 1.0}
    return {"kind": "consolidation", **made, "members": [{"memory_id": "mem-first"}], **changes}


WRONG: list[tuple[str, Line]] = [
    ("kind", {"kind": "memories"}),
    ("kind", {"memory_id": "mem-a"}),
    ("content", memory(content="")),
    ("content", memory(content=DELETE)),
    ("content", memory(content="ж" * 40_000)),
    ("importance", memory(importance=1.5)),
    ("importance", memory(importance="high")),
    ("importanse", memory(importanse=0.5)),
    ("memory_tier", memory(memory_tier="middling")),
    ("created_at", memory(created_at=1e300)),
    ("metadata", memory(metadata=[1])),
    ("metadata", memory(metadata={"a": "x" * 40_000})),
    ("parent_id", memory(parent_id="mem-nowhere")),
    ("parent_id", memory(parent_id="mem-a")),
    ("session", memory(memory_type="session")),
    ("session", memory(session={"session_type": "call"})),
    ("session.ended_at", memory(memory_type="session", session={"ended_at": "yesterday"})),
    ("vector.data", memory(vector={"model_id": "stub-64", "data": "????"})),
    ("vector.data", memory(vector={"model_id": "stub-64", "data": "AAAAAAAA"})),
    ("namespace", memory(namespace="other")),
    ("version", memory(version=0)),
    ("memory_id", history("mem-b", "mem-b")),
    ("record.memory_id", history("mem-first", "mem-b")),
    ("target_id", relationship("mem-b")),
    ("target_id", relationship("mem-first")),
    ("group", {"kind": "member", "group": "nobody's", "memory_id": "mem-first", "added_at": 1.0}),
    ("members[0].memory_id", consolidation(members=[{"memory_id": "mem-b"}])),
    ("members", consolidation(members=[])),
    ("pieces[0]", consolidation(pieces=[["mem-b", "text"]])),
]


@pytest.mark.parametrize(("field", "line"), WRONG, ids=[f"{field}-{n}" for n, (field, _) in enumerate(WRONG)])
@service_test()
async def test_what_is_wrong_is_named_and_nothing_of_the_request_is_kept(
    service: Service, field: str, line: Line
) -> None:
    good = [memory(memory_id="mem-first"), {"kind": "group", "name": "people", "created_at": 1.0}]
    reply = await service.fails("invalid_field", "import_memories", records=[*good, line])
    path = f"records[2].{field}"
    assert (reply["details"]["field"], reply["details"]["index"]) == (path, 2)
    assert field.rpartition(".")[2] in reply["message"]
    assert service.count("memories") == service.count("context_groups") == service.count("index_log") == 0
    await service.ok("import_memories", records=good)


@service_test()
async def test_a_line_that_is_no_map_is_named_too(service: Service) -> None:
    for value in (7, "text", [1], None):
        reply = await service.fails("invalid_field", "import_memories", records=[memory(), value])
        assert reply["details"]["index"] == 1


@service_test()
async def test_ties_to_parents_make_no_circle(service: Service) -> None:
    lines = [memory(memory_id=name, parent_id=parent, parent_follows=True) for name, parent in (("a", "b"), ("b", "a"))]
    reply = await service.fails(
        "cycle",
        "import_memories",
        records=[
            *lines,
            {"kind": "parent", "memory_id": "a", "parent_id": "b"},
            {"kind": "parent", "memory_id": "b", "parent_id": "a"},
        ],
    )
    assert reply["details"]["index"] == 3 or reply["details"]["index"] == 2
    assert service.count("memories") == 0


@service_test()
async def test_a_memory_needs_little_and_groups_keep_their_number_where_it_is_free(service: Service) -> None:
    taken = (await service.ok("create_context_group", name="here first"))["group_id"]
    group = {"kind": "group", "name": "people", "created_at": 5.0}
    await service.ok(
        "import_memories",
        records=[memory(), {**group, "group_id": taken}, {**group, "name": "places", "group_id": 4711}],
    )
    record = await service.record("mem-a")
    expected = {"memory_tier": "short", "created_at": 1000.0, "updated_at": 1000.0, "version": 1}
    assert {name: record[name] for name in expected} == expected
    assert record["importance"] == pytest.approx(0.0)  # 0.5, decades ago
    groups = {each["name"]: each["group_id"] for each in await service.walk("list_context_groups")}
    assert groups["here first"] == taken
    assert groups["places"] == 4711
    assert groups["people"] not in (taken, 4711)


@service_test()
async def test_a_retried_import_happens_once(service: Service) -> None:
    around = {"request_id": "import-of-this-test-0001"}
    first = await service.ok("import_memories", around, records=[memory()])
    await service.ok("delete_memory", memory_id="mem-a")
    again = await service.ok("import_memories", around, records=[memory()])
    assert again == {**first, "replayed": True}
    assert service.count("memories") == 0


@service_test(embedding__provider="off")
async def test_vectors_of_another_model_are_left_out(service: Service) -> None:
    unit = "AACAPwAAAAA="  # 1.0, 0.0
    await service.ok("import_memories", records=[memory(vector={"model_id": "stub-64", "data": unit})])
    assert service.count("memories") == 1
    assert service.count("embeddings") == 0

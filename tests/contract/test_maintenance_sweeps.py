"""Decay and cleanup: what a dry run shows is what a run does, once, in slices, and to nobody else."""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from memory_system.service.run import LANE
from memory_system.storage import cleaning
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.group import Group, GroupRunner, Outcome
from memory_system.storage.jobs import WriteJob
from tests.support.runs import ARCHIVED, DAY_S, DECAY, FADING, PROMOTED, STEADY, old_memories, reported
from tests.support.service import Service, eventually, request_id, running_service, service_test

MIXED = [PROMOTED, ARCHIVED, FADING, ARCHIVED, PROMOTED]
KEEP_ALL = {**STEADY, "lifecycle__short__max_age_days": 3000, "lifecycle__short__decay_rate": 0}
DELETING = {**DECAY, "lifecycle__delete_enabled": True, "lifecycle__delete_after_days": 10}


def stored(service: Service) -> list[tuple[Any, ...]]:
    """All that a reader could see of the memories."""
    return service.rows(
        "SELECT namespace, memory_id, state, memory_tier, importance, importance_at, tier_since, archived_at, due_at, "
        "version, updated_at FROM memories ORDER BY row_id"
    )


@service_test(**DECAY, maintenance__slice_rows=2)
async def test_decay_does_what_its_dry_run_shows(service: Service) -> None:
    ids = await old_memories(service, MIXED)
    before = stored(service)
    seen = await service.ok("run_decay", dry_run=True)
    assert stored(service) == before
    service.clock.ahead_s += 500.0
    done = await service.ok("run_decay", as_of=seen["as_of"])
    assert reported(done) == reported(seen)
    assert seen["counts"] == {"archived": 2, "medium": 2}
    assert seen["changes"] == seen["count"] == 4
    wanted = {
        **{ids[i]: ("active", "archived", "below_threshold") for i in (1, 3)},
        **{ids[i]: ("short", "medium", "important_at_max_age") for i in (0, 4)},
    }
    assert {r["memory_id"]: (r["from"], r["to"], r["reason"]) for r in seen["results"]} == wanted
    now = dict(service.rows("SELECT memory_id, memory_tier || ' ' || state FROM memories"))
    assert now == {
        **{ids[i]: "short archived" for i in (1, 3)},
        **{ids[i]: "medium active" for i in (0, 4)},
        ids[2]: "short active",
    }
    assert {row[0] for row in service.rows("SELECT version FROM memories")} == {1}


@service_test(**DECAY)
async def test_a_second_run_changes_nothing(service: Service) -> None:
    await old_memories(service, MIXED)
    first = await service.ok("run_decay")
    before = stored(service)
    for as_of in (first["as_of"], None):
        again = await service.ok("run_decay", as_of=as_of)
        assert (again["changes"], again["results"], again["digest"]) == (0, [], "0" * 32)
        assert stored(service) == before
        assert again["commit_seq"] == first["commit_seq"]


@service_test(**DECAY, lifecycle__medium__archive_threshold=0.45)
async def test_what_a_run_promotes_it_looks_at_once(service: Service) -> None:
    """Promoted at 0.449, which is below what the next tier keeps: that is for the next run, as the dry run says."""
    (memory_id,) = await old_memories(service, [PROMOTED])
    seen = await service.ok("run_decay", dry_run=True)
    done = await service.ok("run_decay", as_of=seen["as_of"])
    assert reported(seen) == reported(done)
    assert done["counts"] == {"medium": 1}
    assert (await service.ok("run_decay", as_of=seen["as_of"]))["changes"] == 0
    service.clock.ahead_s += 1.0
    after = await service.ok("run_decay")
    assert [(each["memory_id"], each["to"]) for each in after["results"]] == [(memory_id, "archived")]


@service_test(**DECAY)
async def test_decay_leaves_to_others_what_is_theirs(service: Service) -> None:
    """What fades waits for consolidation, what has expired for cleanup: both stay due."""
    await service.add("expires", expires_at=service.clock.time() + 100.0)
    await old_memories(service, [FADING])
    before = stored(service)
    assert (await service.ok("run_decay"))["changes"] == 0
    assert stored(service) == before


@service_test(**DECAY)
async def test_archived_memories_are_out_of_searches_at_once(service: Service) -> None:
    await old_memories(service, [PROMOTED, ARCHIVED])
    await service.settled()
    for _ in range(2):  # the second is out of the cache
        assert (await service.ok("semantic_search", query="memory"))["count"] == 2
        assert (await service.ok("search_memory", query="memory"))["count"] == 2
    await service.ok("run_decay")
    for action in ("semantic_search", "search_memory"):
        (found,) = (await service.ok(action, query="memory"))["results"]
        assert found["memory_tier"] == "medium"
        assert (await service.ok(action, query="memory", include_archived=True))["count"] == 2
    assert (await service.ok("list_memories"))["count"] == 1


@service_test(**DECAY)
async def test_namespaces_can_be_named(service: Service) -> None:
    for namespace in ("a", "b", "c"):
        await old_memories(service, [ARCHIVED], namespace)
    sequences = {name: (await service.ok("get_commit_seq", {"namespace": name}))["commit_seq"] for name in "abc"}
    reply = await service.ok("run_decay", {"namespace": "c"}, namespaces=["a", "nobody"])
    assert [each["namespace"] for each in reply["results"]] == ["a"]
    after = {name: (await service.ok("get_commit_seq", {"namespace": name}))["commit_seq"] for name in "abc"}
    assert {name: after[name] - sequences[name] for name in "abc"} == {"a": 1, "b": 0, "c": 0}
    rest = await service.ok("run_decay", {"namespace": "c"})
    assert [each["namespace"] for each in rest["results"]] == ["b", "c"]
    await service.fails("invalid_field", "run_decay", namespaces=[])


@service_test(**DECAY)
async def test_the_digest_is_over_all_and_the_limit_over_what_is_shown(service: Service) -> None:
    await old_memories(service, [ARCHIVED] * 9)
    few = await service.ok("run_decay", dry_run=True, limit=2)
    many = await service.ok("run_decay", dry_run=True, limit=100)
    assert (few["count"], few["changes"]) == (2, 9)
    assert few["results"] == many["results"][:2]
    assert few["digest"] == many["digest"]
    other = await service.ok("run_decay", dry_run=True, as_of=few["as_of"] - 7.5 * DAY_S)
    assert other["digest"] != few["digest"]


@service_test(**DECAY)
async def test_what_was_used_since_the_dry_run_is_spared(service: Service) -> None:
    ids = await old_memories(service, [ARCHIVED, ARCHIVED])
    seen = await service.ok("run_decay", dry_run=True)
    await service.ok("reinforce_memory", memory_id=ids[0], reinforcement_factor=5.0)
    done = await service.ok("run_decay", as_of=seen["as_of"])
    assert [each["memory_id"] for each in done["results"]] == [ids[1]]
    assert done["digest"] != seen["digest"]


# -- cleanup -----------------------------------------------------------------------------------------------------------


async def family(service: Service) -> dict[str, str]:
    """A session and a memory in it that expire in 100 s, and what hangs at them and stays."""
    session = await service.session()
    within = {"session_id": session}
    top = await service.add("the top", within)
    middle = await service.add("the middle", within, parent_id=top, expires_at=service.clock.time() + 100.0)
    leaves = [await service.add(f"leaf {number}", within, parent_id=middle) for number in range(5)]
    ends = {"expires_at": service.clock.time() + 100.0}
    await service.ok("update_memory", memory_id=session, update_payload=ends)
    return {"session": session, "top": top, "middle": middle, "leaf": leaves[0]}


@service_test(**KEEP_ALL, maintenance__slice_rows=2)
async def test_cleanup_does_what_its_dry_run_shows(service: Service) -> None:
    f = await family(service)
    staying = await service.add("stays")
    service.clock.ahead_s = 101.0
    before = stored(service)
    seen = await service.ok("run_cleanup", dry_run=True)
    assert stored(service) == before
    done = await service.ok("run_cleanup", as_of=seen["as_of"])
    assert reported(done) == reported(seen)
    # The top and, but for its session, the middle; the top, the middle and five leaves were made in the session.
    assert seen["counts"] == {"deleted": 2, "handed_over": 1 + 5 + 7, "idempotency_keys": 0, "runs": 0}
    deleted = [each for each in seen["results"] if each["to"] == "deleted"]
    shown = {each["memory_id"]: (each["from"], each["to"], each["reason"]) for each in deleted}
    assert shown == dict.fromkeys((f["session"], f["middle"]), ("active", "deleted", "expired"))
    left = dict(service.rows("SELECT memory_id, coalesce(parent_id, '-') || coalesce(session_id, '-') FROM memories"))
    assert len(left) == 7
    assert left[f["leaf"]] == f["top"] + "-"
    assert left[f["top"]] == "--"
    assert left[staying] == "--"
    assert service.rows("PRAGMA foreign_key_check") == []
    assert (await service.ok("search_memory", query="middle"))["count"] == 0
    assert (await service.ok("get_memory", memory_id=f["leaf"]))["memory"]["parent_id"] == f["top"]
    again = await service.ok("run_cleanup")
    assert again["changes"] == 0


@pytest.mark.parametrize("slice_rows", [1, 2, 25])
@pytest.mark.parametrize("order", ["parents first", "children first"])
def test_what_hangs_below_several_that_expire_is_handed_to_who_stays(
    tmp_path: Path, slice_rows: int, order: str
) -> None:
    async def scenario() -> None:
        async with running_service(tmp_path, **KEEP_ALL, maintenance__slice_rows=slice_rows) as service:
            parents: list[str] = []
            for depth in range(5):  # all but the highest expire
                after_s = 10.0 * (depth if order == "parents first" else 5 - depth)
                ends = {"expires_at": service.clock.time() + after_s} if depth else {}
                tie = {"parent_id": parents[-1]} if parents else {}
                parents.append(await service.add(f"depth {depth}", **tie, **ends))
            staying = [await service.add(f"leaf below {parent}", parent_id=parent) for parent in parents]
            service.clock.ahead_s = 100.0
            before = dict(service.rows("SELECT memory_id, parent_id FROM memories"))
            seen = await service.ok("run_cleanup", dry_run=True)
            done = await service.ok("run_cleanup", as_of=seen["as_of"])
            assert reported(done) == reported(seen)
            assert {each["memory_id"] for each in done["results"] if each["to"] == "deleted"} == set(parents[1:])
            after = dict(service.rows("SELECT memory_id, parent_id FROM memories"))
            assert after == {parents[0]: None, **dict.fromkeys(staying, parents[0])}
            told = {each["memory_id"]: each["to"] for each in done["results"] if each["reason"] == "parent_deleted"}
            told = {memory_id: parent for memory_id, parent in told.items() if memory_id in after}
            assert told == {name: after[name] for name in after if after[name] != before[name]}

    asyncio.run(scenario())


@service_test(**KEEP_ALL, maintenance__slice_rows=3)
async def test_many_children_are_handed_over_in_slices(service: Service) -> None:
    parent = await service.add("expires", expires_at=service.clock.time() + 100.0)
    await service.ok("batch_add_memories", memories=[{"content": "child", "parent_id": parent}] * 50)
    service.clock.ahead_s = 101.0
    with counted(service) as rows:
        assert (await service.ok("run_cleanup"))["counts"]["deleted"] == 1
    assert max(rows) <= 2 * 3 + 4
    assert len(rows) >= 50 // 3
    assert service.rows("SELECT count(*), count(parent_id) FROM memories") == [(50, 0)]


@service_test(**DECAY)
async def test_archived_memories_stay_unless_deletion_is_switched_on(service: Service) -> None:
    await old_memories(service, [ARCHIVED])
    await service.ok("run_decay")
    service.clock.ahead_s += 2000 * DAY_S
    assert (await service.ok("run_cleanup"))["counts"].get("deleted", 0) == 0
    assert service.count("memories") == 1


@service_test(**DELETING)
async def test_archived_memories_are_deleted_when_that_is_switched_on(service: Service) -> None:
    (memory_id,) = await old_memories(service, [ARCHIVED])
    await service.ok("run_decay")
    service.clock.ahead_s += 9 * DAY_S
    assert (await service.ok("run_cleanup"))["changes"] == 0
    service.clock.ahead_s += 2 * DAY_S
    seen = await service.ok("run_cleanup", dry_run=True)
    done = await service.ok("run_cleanup", as_of=seen["as_of"])
    assert reported(seen) == reported(done)
    assert [(each["memory_id"], each["from"], each["reason"]) for each in done["results"]] == [
        (memory_id, "archived", "archived_long_enough")
    ]
    assert service.count("memories") == 0


@service_test(**DELETING)
async def test_originals_of_a_consolidated_memory_are_not_deleted(service: Service) -> None:
    """The memory that stands for them was made of them."""
    ids = await old_memories(service, [ARCHIVED, ARCHIVED, ARCHIVED])
    await service.ok("run_decay")

    def join(context: WriteContext) -> Reply:
        member, merged = (
            context.db.execute("SELECT row_id FROM memories WHERE memory_id = ?", (memory_id,)).fetchone()[0]
            for memory_id in ids[:2]
        )
        context.db.execute(
            "INSERT INTO consolidations (row_id, kind, summariser, created_at) VALUES (?, 'summary', 'x', 0)", (merged,)
        )
        context.db.execute("INSERT INTO consolidation_members VALUES (?, ?, '{}')", (merged, member))
        context.db.execute("UPDATE memories SET state = 'active', archived_at = NULL WHERE row_id = ?", (merged,))
        return {}

    await write(service, join)
    service.clock.ahead_s += 11 * DAY_S
    seen = await service.ok("run_cleanup", dry_run=True)
    done = await service.ok("run_cleanup", as_of=seen["as_of"])
    assert reported(seen) == reported(done)
    assert [each["memory_id"] for each in done["results"]] == [ids[2]]
    # Nor one that has become an original since the run looked.
    ((row_id,),) = service.rows("SELECT row_id FROM memories WHERE memory_id = ?", ids[0])
    now_s = service.clock.time()
    await write(service, partial(cleaning.remove_expired, row_ids=[row_id], as_of_s=now_s, budget=10), "default")
    assert service.rows("SELECT count(*) FROM memories WHERE memory_id = ?", ids[0]) == [(1,)]


@service_test(**KEEP_ALL, maintenance__runs_kept_days=10)
async def test_cleanup_of_keys_and_runs(service: Service) -> None:
    for _ in range(3):
        await service.ok("run_decay")
        await service.ok("run_checkpoint")
    await service.add("old")
    service.clock.ahead_s = 2 * DAY_S
    await service.add("new")
    seen = await service.ok("run_cleanup", dry_run=True)
    assert seen["counts"] == {"idempotency_keys": 1, "runs": 0}
    done = await service.ok("run_cleanup", as_of=seen["as_of"])
    assert reported(seen) == reported(done)
    assert service.count("idempotency") == 1
    service.clock.ahead_s = 11 * DAY_S
    await service.ok("run_checkpoint")
    seen = await service.ok("run_cleanup", dry_run=True)
    done = await service.ok("run_cleanup", as_of=seen["as_of"])
    assert reported(seen) == reported(done)
    assert seen["counts"] == {"idempotency_keys": 1, "runs": 5}
    left = [run["job"] for run in (await service.ok("list_runs"))["results"]]
    assert left == ["cleanup", "cleanup", "checkpoint", "cleanup", "cleanup", "decay"], "the last of each job stays"


@service_test(**KEEP_ALL, maintenance__runs_kept_days=1)
async def test_the_last_run_of_each_caller_is_kept(service: Service) -> None:
    """What the scheduler had done for a fire time is on record, whatever a person asked for since."""
    scheduled = {"request_id": "scheduled-decay-2026-01-01T00:00:00Z", "agent_id": "memory_scheduler"}
    await service.ok("run_decay", {**scheduled, "request_id": "scheduled-decay-2025-12-01T00:00:00Z"})
    first = await service.ok("run_decay", scheduled)
    for dry_run in (False, False, True, True):
        await service.ok("run_decay", {"agent_id": "operator"}, dry_run=dry_run)
    service.clock.ahead_s = 2 * DAY_S
    seen = await service.ok("run_cleanup", dry_run=True)
    done = await service.ok("run_cleanup", as_of=seen["as_of"])
    assert seen["counts"]["runs"] == done["counts"]["runs"] == 3
    left = (await service.ok("list_runs", job="decay"))["results"]
    assert [(run["asked_by"], run["dry_run"]) for run in left] == [
        ("operator", True),
        ("operator", False),
        ("memory_scheduler", False),
    ]
    again = await service.ok("run_decay", scheduled)
    assert again["replayed"] is True
    assert again["run_id"] == first["run_id"]


@service_test(**KEEP_ALL)
async def test_cleanup_of_named_namespaces_leaves_the_rest(service: Service) -> None:
    for namespace in ("a", "b"):
        await service.add("x", {"namespace": namespace}, expires_at=service.clock.time() + 100.0)
    service.clock.ahead_s = 2 * DAY_S
    reply = await service.ok("run_cleanup", namespaces=["b"])
    assert reply["counts"] == {"deleted": 1}
    assert service.rows("SELECT namespace FROM memories") == [("a",)]
    assert service.count("idempotency") == 2


# -- slices ------------------------------------------------------------------------------------------------------------


class counted:
    """Collects how many rows of the database each slice of maintenance changed."""

    def __init__(self, service: Service) -> None:
        self._runner: GroupRunner = service.runtime._writer._runner
        self.rows: list[int] = []

    def __enter__(self) -> list[int]:
        run_job = self._runner._run_job

        def counting(outcome: Outcome, group: Group) -> None:
            before = self._runner._db.total_changes
            run_job(outcome, group)
            if outcome.job.client == LANE:
                self.rows.append(self._runner._db.total_changes - before)

        self._runner._run_job = counting  # type: ignore[method-assign]
        return self.rows

    def __exit__(self, *_: object) -> None:
        del self._runner._run_job


async def write(service: Service, function: Any, namespace: str = "") -> None:
    await service.runtime._writer.submit(WriteJob(function, namespace, counted=False))


def many_due(count: int) -> Any:
    """A job that makes many memories at once that fell below their threshold long ago."""
    texts = [(f"mem-{number:028x}", f"text {number}") for number in range(count)]

    def run(context: WriteContext) -> Reply:
        old_s = time.time() - 100 * DAY_S
        context.db.execute(
            "INSERT INTO memories (namespace, memory_id, content, content_digest, memory_type, memory_tier, "
            "importance, importance_at, created_at, updated_at, tier_since, due_at, created_by) "
            "SELECT 'n' || (key % 7), json_extract(value, '$[0]'), json_extract(value, '$[1]'), x'00', 'general', "
            "'short', 0.2, ?1, ?1, ?1, ?1, ?1 + 600000 + key, 'x' FROM json_each(?2)",
            (old_s, json.dumps(texts)),
        )
        return {}

    return run


@pytest.mark.timeout(120)
@service_test(embedding__provider="off", maintenance__share=1.0)
async def test_a_run_over_many_holds_the_writer_for_one_slice_at_a_time(service: Service) -> None:
    count, slice_rows = 20_000, service.runtime._settings.maintenance.slice_rows
    await write(service, many_due(count))
    reads = 0
    with counted(service) as rows:
        run = asyncio.create_task(service.ok("run_decay"))
        while not run.done():
            await service.ok("stats")
            await service.add("written meanwhile", {"namespace": "other"})
            reads += 1
    reply = await run
    assert reply["counts"] == {"archived": count}
    assert max(rows) <= slice_rows
    assert len(rows) >= count / slice_rows
    assert reads > 20, "requests were answered all the while"


@pytest.mark.timeout(120)
@service_test(embedding__provider="off", maintenance__slice_rows=100)
async def test_the_progress_of_a_run_over_many_shows(service: Service) -> None:
    await write(service, many_due(3_000))
    run = asyncio.create_task(service.ok("run_decay"))
    seen: list[tuple[int, int]] = []

    async def looked() -> bool:
        for each in (await service.ok("list_runs", run_state="running"))["results"]:
            assert each["progress"]["part"] in ("due", "")
            seen.append((each["progress"]["done"], each["progress"]["total"]))
        return run.done()

    await eventually(looked, timeout_s=60.0)
    assert (await run)["changes"] == 3_000
    middle = [done for done, total in seen if total == 3_000 and 0 < done < 3_000]
    assert len(set(middle)) > 3
    assert middle == sorted(middle)


@service_test(**DECAY)
async def test_a_dry_run_writes_nothing_but_its_row(service: Service) -> None:
    await old_memories(service, MIXED)
    await service.add("expired", expires_at=service.clock.time() + 1.0)
    service.clock.ahead_s += 2.0
    sequence = (await service.ok("get_commit_seq"))["commit_seq"]
    with counted(service) as rows:
        for action in ("run_decay", "run_cleanup"):
            await service.ok(action, {"request_id": request_id()}, dry_run=True)
    assert len(rows) == 4  # the beginning and the end of each
    assert (await service.ok("get_commit_seq"))["commit_seq"] == sequence

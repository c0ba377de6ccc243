"""Runs of maintenance that are cut off: nothing is left half done, and the next one finishes."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import crash
from tests.support.lifecycle import DAY_S, Ageing, ageing_orchestrator, asking
from tests.support.process import wait_until
from tests.support.wire import decode, request_id

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

SLOW = {"maintenance__slice_rows": 3, "maintenance__share": 0.02}
QUICK = {"maintenance__slice_rows": 100, "maintenance__share": 0.9}
NAMESPACES = ("one", "two", "three")
ARCHIVED = "SELECT count(*) FROM memories WHERE state = 'archived'"
Run = dict[str, Any]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Ageing]:
    with ageing_orchestrator(tmp_path, **SLOW) as running:
        yield running


def kill_once(service: Ageing, sql: str, more_than: int) -> None:
    """Kill the process when the number that the query gives has gone beyond this."""
    wait_until(lambda: service.query(sql)[0][0] > more_than, f"{sql} > {more_than}", 60.0)
    service.orchestrator.kill()


def damage(service: Ageing) -> list[str]:
    with contextlib.closing(sqlite3.connect(service.orchestrator.database)) as db:
        return crash.damage(db)


def run_of(service: Ageing, request: str) -> Run:
    [run] = [run for run in service.ok("list_runs")["results"] if run["request_id"] == request]
    return run


def said(service: Ageing, action: str) -> tuple[set[str], float]:
    """The memories that a run would change, and as of when."""
    reply = service.ok(action, dry_run=True, limit=1000)
    assert reply["changes"] == reply["count"]
    return {change["memory_id"] for change in reply["results"]}, reply["as_of"]


# -- decay ------------------------------------------------------------------------------------------------------


def fill_with_due(service: Ageing, each: int) -> None:
    for namespace in NAMESPACES:
        memories = [{"content": f"number {number}", "importance": 0.15} for number in range(each)]
        lasting = [{"content": f"lasting {number}", "importance": 0.9} for number in range(each // 10)]
        service.ok("batch_add_memories", {"namespace": namespace}, memories=memories + lasting)
    service.clock.advance(6 * DAY_S)


def test_a_decay_that_is_killed_again_and_again_is_finished_by_the_last(service: Ageing) -> None:
    fill_with_due(service, 100)
    expected, as_of = said(service, "run_decay")
    assert len(expected) == 300
    key = request_id()
    service.clock.advance(60.0)
    for killed in range(4):
        with asking(service, "run_decay", {"request_id": key}, as_of=as_of):
            kill_once(service, ARCHIVED, 30 * (killed + 1))
        assert damage(service) == []
        half = service.query("SELECT archived_at, due_at, promote_at FROM memories WHERE state = 'archived'")
        assert 30 * (killed + 1) < len(half) < 300
        assert set(half) == {(as_of, None, None)}
        untouched = service.query("SELECT DISTINCT archived_at FROM memories WHERE state = 'active'")
        assert untouched == [(None,)]
        service.clock.advance(60.0)
        service.orchestrator.start()
        run = run_of(service, key)
        assert (run["state"], run["as_of"]) == ("interrupted", as_of)
        assert run["finished_at"] is not None
    service.restart_with(**QUICK)
    done = service.ok("run_decay", {"request_id": key}, as_of=as_of)
    assert (done["run_id"], done["as_of"]) == (run["run_id"], as_of)
    assert run_of(service, key)["state"] == "done"
    archived = service.query("SELECT memory_id, archived_at FROM memories WHERE state = 'archived'")
    assert dict(archived) == dict.fromkeys(expected, as_of)
    assert service.ok("run_decay")["changes"] == 0
    service.ok("health_check")


def test_what_a_killed_run_left_is_done_by_any_other_run(service: Ageing) -> None:
    fill_with_due(service, 60)
    with asking(service, "run_decay", {"request_id": request_id()}):
        kill_once(service, ARCHIVED, 20)
    done_before = service.query(ARCHIVED)[0][0]
    service.configure(**QUICK)
    service.orchestrator.start()
    rest = service.ok("run_decay")
    assert rest["changes"] == 180 - done_before
    assert service.query(ARCHIVED)[0][0] == 180
    assert service.ok("list_runs", run_state="interrupted")["count"] == 1
    for namespace in NAMESPACES:
        assert len(service.listed({"namespace": namespace})) == 6
        found = service.ok("search_memory", {"namespace": namespace}, query="number", limit=1000)
        assert found["count"] == 0


def test_sigterm_ends_a_run_in_time_and_its_caller_is_told(service: Ageing) -> None:
    fill_with_due(service, 100)
    key = request_id()
    with asking(service, "run_decay", {"request_id": key}) as caller:
        wait_until(lambda: service.query(ARCHIVED)[0][0] > 10, "the run is under way")
        assert service.orchestrator.terminate(15.0) == 0
        with contextlib.suppress(TimeoutError):  # the connection may be gone before the reply
            assert decode(caller.receive(5.0), "msgpack")["error_code"] == "shutting_down"
    assert damage(service) == []
    service.configure(**QUICK)
    service.orchestrator._forget()
    service.orchestrator.start()
    assert run_of(service, key)["state"] == "interrupted"
    service.ok("run_decay", {"request_id": key})
    assert service.query(ARCHIVED)[0][0] == 300


# -- cleanup ----------------------------------------------------------------------------------------------------


def test_a_cleanup_that_is_killed_leaves_nothing_of_what_it_deleted(service: Ageing) -> None:
    soon_s = service.clock.time() + DAY_S
    memories = [{"content": f"expired {number}", "expires_at": soon_s, "tags": ["x"]} for number in range(150)]
    ids = service.ok("batch_add_memories", memories=memories)["memory_ids"]
    stays = service.add("not expired", importance=1.0)
    for source, target in zip(ids, [*ids[1:], stays], strict=True):
        service.ok("add_relationship", source_id=source, target_id=target, relationship_type="before")
    service.vectors_ready()
    service.clock.advance(2 * DAY_S)
    expected, as_of = said(service, "run_cleanup")
    assert expected == set(ids)
    with asking(service, "run_cleanup", {"request_id": request_id()}, as_of=as_of):
        wait_until(lambda: service.query("SELECT count(*) FROM memories")[0][0] < 120, "some are deleted", 60.0)
        service.orchestrator.kill()
    assert damage(service) == []
    left = service.query("SELECT count(*) FROM memories")[0][0]
    assert 1 < left < 120
    assert service.query("SELECT count(*) FROM relationships")[0][0] == left - 1
    service.configure(**QUICK)
    service.orchestrator.start()
    assert service.ok("run_cleanup", as_of=as_of)["changes"] == left - 1
    assert service.listed() == [stays]
    assert service.query("SELECT count(*) FROM embeddings")[0][0] <= 1


# -- consolidation ----------------------------------------------------------------------------------------------

_MADE = "SELECT count(*) FROM consolidations"
_MEMBERS = """
SELECT member.memory_id, member.state, merged.state, merged.memory_type, relationship_type
FROM consolidation_members AS link
JOIN memories AS member ON member.row_id = link.member_row_id
JOIN memories AS merged ON merged.row_id = link.row_id
LEFT JOIN relationships ON source_row_id = link.member_row_id AND target_row_id = link.row_id
"""


def fill_with_kin(service: Ageing, pairs: int) -> None:
    """Pairs of memories of one parent that speak of the same, each pair of something else."""
    for namespace in NAMESPACES:
        around = {"namespace": namespace}
        parent_id = service.add("a conversation", around, importance=1.0, memory_tier="long")
        memories = [
            {
                "content": f"aa{pair}aa bb{pair}bb cc{pair}cc dd{pair}dd {word}",
                "importance": 0.5,
                "parent_id": parent_id,
            }
            for pair in range(pairs)
            for word in (f"early{pair}", f"late{pair}")
        ]
        service.ok("batch_add_memories", around, memories=memories)
        service.vectors_ready(around)
    service.clock.advance(8 * DAY_S)


def whole_merges(service: Ageing) -> set[str]:
    """The members of all merges, each of which is complete; and outside of them nothing is archived."""
    found = service.query(_MEMBERS)
    members = [memory_id for memory_id, *_ in found]
    assert len(members) == len(set(members))
    assert {tuple(rest) for _, *rest in found} <= {("archived", "active", "consolidated", "consolidated_into")}
    assert len(members) == service.query(ARCHIVED)[0][0]
    assert service.query("SELECT count(*) FROM relationships")[0][0] == len(members)
    lonely = "SELECT count(*) FROM consolidations WHERE row_id NOT IN (SELECT row_id FROM consolidation_members)"
    assert service.query(lonely) == [(0,)]
    made = "SELECT count(*) FROM memories WHERE memory_type = 'consolidated'"
    assert service.query(made) == service.query(_MADE)
    return set(members)


def test_a_consolidation_that_is_killed_leaves_no_half_merged_memory(service: Ageing) -> None:
    fill_with_kin(service, 20)
    expected, as_of = said(service, "run_consolidation")
    assert len(expected) == 120
    key = request_id()
    merged: set[str] = set()
    for killed in range(3):
        with asking(service, "run_consolidation", {"request_id": key}, as_of=as_of):
            kill_once(service, _MADE, 12 * (killed + 1))
        assert damage(service) == []
        now_merged = whole_merges(service)
        assert merged < now_merged < expected
        merged = now_merged
        service.orchestrator.start()
        assert run_of(service, key)["state"] == "interrupted"
        for namespace in NAMESPACES:
            service.vectors_ready({"namespace": namespace})
    service.restart_with(**QUICK)
    service.ok("run_consolidation", {"request_id": key}, as_of=as_of)
    assert whole_merges(service) == expected
    assert service.query(_MADE) == [(60,)]
    assert service.ok("run_consolidation")["changes"] == 0
    for namespace in NAMESPACES:
        found = service.ok("search_memory", {"namespace": namespace}, query="aa7aa", limit=10)["results"]
        assert [memory["memory_type"] for memory in found] == ["consolidated"]

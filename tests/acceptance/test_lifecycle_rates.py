"""Changed rates of decay: importance goes on from where it was, also when the process is killed on the way."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.lifecycle import DAY_S, Ageing, ageing_orchestrator, faded

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

NEAR = 2e-4
SHORT_04 = {"lifecycle__short__decay_rate": 0.4}
SHORT_01 = {"lifecycle__short__decay_rate": 0.1}


def near(value: float) -> Any:
    return pytest.approx(value, abs=NEAR)


def test_the_days_before_a_change_count_under_the_old_rates(tmp_path: Path) -> None:
    with ageing_orchestrator(tmp_path, **SHORT_01) as service:
        short, long = service.add("short", importance=0.9), service.add("long", importance=0.9, memory_tier="long")
        service.clock.advance(3 * DAY_S)
        service.restart_with(**SHORT_04)
        at_change = faded(0.9, 0.1, 3)
        assert service.record(short)["importance"] == near(at_change)  # continuous
        service.clock.advance(2 * DAY_S)
        assert service.record(short)["importance"] == near(faded(at_change, 0.4, 2))
        assert service.record(long)["importance"] == near(faded(0.9, 0.01, 5))
        service.restart()
        assert service.record(short)["importance"] == near(faded(at_change, 0.4, 2))
        service.restart_with(**SHORT_01)
        service.clock.advance(DAY_S)
        assert service.record(short)["importance"] == near(faded(faded(at_change, 0.4, 2), 0.1, 1))


def test_what_is_due_follows_the_new_rates(tmp_path: Path) -> None:
    """0.9 falls to 0.1 in 22 days at 0.1 a day; at 0.4 a day it takes 5.5."""
    with ageing_orchestrator(tmp_path, **SHORT_01, lifecycle__short__max_age_days=1000) as service:
        memory_id = service.add("due sooner", importance=0.9)
        service.clock.advance(DAY_S)
        service.restart_with(**SHORT_04)
        service.clock.advance(5 * DAY_S)  # ln(0.9 / 0.1) / 0.4 - 0.1 / 0.4 = 5.24
        assert service.ok("run_decay")["changes"] == 0
        service.clock.advance(0.5 * DAY_S)
        assert [change["memory_id"] for change in service.ok("run_decay")["results"]] == [memory_id]


def test_reads_before_the_change_slow_the_decay_after_it(tmp_path: Path) -> None:
    with ageing_orchestrator(tmp_path, **SHORT_01) as service:
        memory_id = service.add("read", importance=0.8)
        service.ok("reinforce_memory", memory_id=memory_id, reinforcement_factor=1.0)
        service.clock.advance(2 * DAY_S)
        service.restart_with(**SHORT_04)
        service.clock.advance(2 * DAY_S)
        assert service.record(memory_id)["importance"] == near(faded(faded(0.8, 0.1, 2, 1), 0.4, 2, 1))


def end_between_slices(service: Ageing, way: str) -> bool:
    """Start, and kill or stop it while rows are being re-based; whether some were and some were not."""
    service.orchestrator.start(wait=False)
    deadline_s = time.monotonic() + 60.0
    while time.monotonic() < deadline_s:
        found = service.query("SELECT value FROM meta WHERE key = 'lifecycle_rebase'")
        if found and json.loads(found[0][0])["row_id"] > 0:
            break
    if way == "killed":
        service.orchestrator.kill()
    else:
        assert service.orchestrator.terminate() == 0
        service.orchestrator._forget()
    found = service.query("SELECT value FROM meta WHERE key = 'lifecycle_rebase'")
    last = service.query("SELECT max(row_id) FROM memories")[0][0]
    return bool(found) and 0 < json.loads(found[0][0])["row_id"] < last


@pytest.mark.parametrize("way", ["killed", "stopped"])
def test_a_change_that_ends_on_the_way_is_finished_as_of_its_first_instant(tmp_path: Path, way: str) -> None:
    for many in (30_000, 100_000):  # the more memories, the longer it is on the way
        folder = tmp_path / str(many)
        folder.mkdir()
        if ends_on_the_way(folder, way, many):
            return
    raise AssertionError(f"it was not {way} on the way: more memories are needed")


def ends_on_the_way(folder: Path, way: str, many: int) -> bool:
    """Whether the change was ended while it was under way; then all that is to be so afterwards is."""
    with ageing_orchestrator(folder, **SHORT_01, embedding__provider="off", storage__idempotency="false") as service:
        for start in range(0, many, 1000):
            memories = [{"content": f"number {start + number}", "importance": 0.8} for number in range(1000)]
            service.ok("batch_add_memories", memories=memories)
        before = service.query("SELECT row_id, access_count, version, state, content_digest FROM memories")
        service.clock.advance(3 * DAY_S)
        assert service.orchestrator.terminate() == 0
        service.orchestrator._forget()
        service.configure(**SHORT_04)
        if not end_between_slices(service, way):
            return False
        rebased = service.query("SELECT count(*), count(DISTINCT importance_at) FROM memories WHERE importance < 0.7")
        assert 0 < rebased[0][0] < many
        assert rebased[0][1] == 1

        # Another day passes before it is started again: it counts under the new rate.
        service.clock.advance(DAY_S)
        service.orchestrator.start()
        expected = faded(faded(0.8, 0.1, 3), 0.4, 1)
        page = service.ok("list_memories", sort_field="importance", limit=1)["results"]
        last = service.ok("list_memories", sort_field="importance", sort_order="asc", limit=1)["results"]
        assert page[0]["importance"] == near(expected) == last[0]["importance"]
        assert service.query("SELECT count(DISTINCT importance_at) FROM memories") == [(1,)]
        batches = many // 1000
        assert service.query("SELECT count(DISTINCT importance) FROM memories")[0][0] < batches + 10
        after = service.query("SELECT row_id, access_count, version, state, content_digest FROM memories")
        assert after == before
        service.restart()
        assert service.query("SELECT count(*) FROM meta WHERE key = 'lifecycle_rebase'") == [(0,)]
        assert service.ok("list_memories", limit=1)["results"][0]["importance"] == near(expected)
        return True

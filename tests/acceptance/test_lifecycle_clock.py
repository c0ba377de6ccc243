"""A clock that is set: reads follow it, and what cannot be undone waits until it has settled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.lifecycle import DAY_S, Ageing, ageing_orchestrator, asking, faded
from tests.support.process import wait_until
from tests.support.wire import decode, request_id

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

SWEEPS = ("run_decay", "run_consolidation", "run_cleanup")
GUARDED: dict[str, Any] = {"clock__jump_s": 60, "clock__settle_s": 600}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Ageing]:
    with ageing_orchestrator(tmp_path, **GUARDED) as running:
        yield running


def unsettled(service: Ageing, action: str) -> None:
    reply = service.fails("clock_unsettled", action)
    assert reply["retryable"] is True
    assert 500_000 < reply["details"]["retry_after_ms"] <= 600_000


@pytest.mark.parametrize("jump_s", [8 * DAY_S, -3600.0])
def test_nothing_irreversible_happens_after_a_jump(service: Ageing, jump_s: float) -> None:
    memory_id = service.add("soon forgotten", importance=0.15)
    expiring = service.add("for a day", expires_at=service.clock.time() + DAY_S)
    for action in SWEEPS:
        service.ok(action)
    service.clock.advance(jump_s)
    stored = service.rows()
    for action in SWEEPS:
        unsettled(service, action)
        unsettled(service, action)  # and the refusal itself does not settle it
        assert service.ok(action, dry_run=True)["dry_run"] is True
    assert service.rows() == stored
    assert service.record(memory_id)["importance"] == pytest.approx(
        faded(0.15, 0.1, max(0.0, jump_s) / DAY_S), rel=1e-3
    )
    assert (expiring in service.listed()) == (jump_s < 0)  # reads follow the clock
    assert service.ok("reinforce_memory", memory_id=memory_id)["new_importance"] > 0.0
    assert service.ok("get_memory", memory_id=service.add("writes go on"))["memory"]["state"] == "active"
    assert service.ok("health_check")["state"] == "healthy"


def test_a_clock_that_is_corrected_by_little_holds_up_nothing(service: Ageing) -> None:
    service.clock.advance(20.0)
    service.ok("run_decay")
    service.clock.advance(-35.0)
    service.ok("run_decay")


def test_many_small_steps_are_a_jump_too(service: Ageing) -> None:
    service.ok("run_decay")
    service.clock.advance(40.0)
    service.ok("run_decay")
    service.clock.advance(40.0)
    unsettled(service, "run_decay")


def test_when_the_clock_has_settled_runs_go_on(tmp_path: Path) -> None:
    with ageing_orchestrator(tmp_path, clock__jump_s=60, clock__settle_s=2) as service:
        memory_id = service.add("soon forgotten", importance=0.15)
        service.clock.advance(6 * DAY_S)
        service.fails("clock_unsettled", "run_decay")
        wait_until(lambda: service.orchestrator.ask("run_decay")["status"] == "success", "the clock has settled")
        assert service.record(memory_id)["state"] == "archived"


def test_a_run_that_a_jump_meets_ends_there(tmp_path: Path) -> None:
    slow = {"maintenance__slice_rows": 1, "maintenance__share": 0.02}
    with ageing_orchestrator(tmp_path, **slow, embedding__provider="off") as service:
        memories = [{"content": f"number {number}", "importance": 0.15} for number in range(100)]
        service.ok("batch_add_memories", memories=memories)
        service.clock.advance(6 * DAY_S)
        service.restart_with(**GUARDED)
        key = request_id()
        archived = "SELECT count(*) FROM memories WHERE state = 'archived'"
        with asking(service, "run_decay", {"request_id": key}) as caller:
            wait_until(lambda: service.query(archived)[0][0] > 5, "the run is under way")
            service.clock.advance(365 * DAY_S)
            assert decode(caller.receive(30), "msgpack")["error_code"] == "clock_unsettled"
        done = service.query(archived)[0][0]
        assert 5 < done < 100
        [run] = service.ok("list_runs")["results"]
        assert (run["state"], run["error"]["error_code"]) == ("failed", "clock_unsettled")
        unsettled(service, "run_decay")
        assert service.query(archived)[0][0] == done


def test_a_clock_that_was_set_back_while_the_service_was_down_is_noticed(service: Ageing) -> None:
    service.add("there")
    service.ok("run_decay")
    service.orchestrator.kill()
    service.clock.advance(-2 * 3600.0)
    service.orchestrator.start()
    unsettled(service, "run_decay")


def test_time_that_passed_while_the_service_was_down_is_time(service: Ageing) -> None:
    memory_id = service.add("soon forgotten", importance=0.15)
    service.ok("run_decay")
    service.orchestrator.kill()
    service.clock.advance(6 * DAY_S)
    service.orchestrator.start()
    assert service.ok("run_decay")["changes"] == 1
    assert service.record(memory_id)["state"] == "archived"

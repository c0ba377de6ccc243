"""A clock that jumps by a day and back under all programs: no timer notices, nothing is archived, merged or deleted."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from memory_client import MemoryClient
from tests.support.lifecycle import DAY_S, MovableClock, ageing_orchestrator
from tests.support.mesh import PROGRAMS, Mesh, running_mesh
from tests.support.process import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

SWEEPS = ("decay", "consolidation", "cleanup")
INTERVAL_S = 2
# Longer than the scheduler's interval and than what the health manager gives a program that does not speak.
STAYS_S = 6.0
CALL_S = 20.0


class Caller(threading.Thread):
    """Adds and reads for as long as the test lasts."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(name="caller")
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0
        self._endpoint = endpoint
        self._ended = threading.Event()

    def run(self) -> None:
        with MemoryClient(self._endpoint, agent_id="caller", namespace="calls", timeout_ms=CALL_S * 1000.0) as client:
            while not self._ended.wait(0.05):
                began_s = time.monotonic()
                for reply in (client.add_memory("a note of the caller"), client.list_memories(limit=5)):
                    self.outcomes[str(reply.get("error_code", reply["status"]))] += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)

    def end(self) -> None:
        self._ended.set()
        self.join(30)


def add(mesh: Mesh, content: str, **data: Any) -> str:
    memory_id: str = mesh.succeed("orchestrator", "add_memory", content=content, **data)["memory_id"]
    return memory_id


def memories(mesh: Mesh) -> dict[str, tuple[str, int]]:
    """State and version of every memory, read without a trace; what has expired is not listed."""
    reply = mesh.succeed("orchestrator", "list_memories", limit=1000, include_archived=True)
    return {each["memory_id"]: (each["state"], each["version"]) for each in reply["results"]}


def watch(mesh: Mesh, for_s: float) -> set[tuple[str, str]]:
    """Programs that the health manager took for dead or restless during this time."""
    seen: set[tuple[str, str]] = set()
    deadline_s = time.monotonic() + for_s
    while time.monotonic() < deadline_s:
        seen |= {(program, mesh.component(program)["state"]) for program in PROGRAMS}
        time.sleep(0.2)
    return {each for each in seen if each[1] in ("down", "flapping")}


def test_a_day_ahead_and_back_again_changes_nothing(tmp_path: Path) -> None:
    jobs = {"scheduler__reset_timeout_s": 0.5}
    for name in SWEEPS:
        job = f"scheduler__jobs__{name}"
        jobs |= {f"{job}__enabled": True, f"{job}__every": f"{INTERVAL_S}s", f"{job}__jitter_s": 0}
    clock = MovableClock(tmp_path / "clock")
    with running_mesh(tmp_path, supervised=False, start=False, **jobs) as mesh:
        mesh.environ |= clock.environ
        mesh.start()
        for number in range(20):
            add(mesh, f"the same thing said again, number {number % 2}", importance=0.11 + number * 0.001)
        add(mesh, "for half a day", expires_at=clock.time() + DAY_S / 2)
        swept = {job: runs_of(mesh, job) for job in SWEEPS}
        wait_until(lambda: all(runs_of(mesh, job) > swept[job] for job in SWEEPS), "every sweep has run", 90.0)
        before, pids = memories(mesh), [mesh.pid(program) for program in PROGRAMS]
        caller = Caller(mesh.endpoints["orchestrator"])
        caller.start()
        try:
            clock.advance(DAY_S)
            assert watch(mesh, STAYS_S) == set()
            clock.advance(-DAY_S)
            assert watch(mesh, STAYS_S) == set()
        finally:
            caller.end()
        assert memories(mesh) == before
        assert [mesh.pid(program) for program in PROGRAMS] == pids
        assert set(caller.outcomes) == {"success"}
        assert caller.slowest_s < 2 * CALL_S  # the budgets of its two calls
        for job in SWEEPS:
            run = mesh.succeed("orchestrator", "list_runs", job=job, limit=1)["results"][0]
            assert run.get("changes", 0) == 0 or run["state"] == "failed"
        assert mesh.succeed("session_memory_agent", "health_check")["breaker"] == "closed"
    clock.close()


def test_without_the_comparison_of_clocks_a_day_archives(tmp_path: Path) -> None:
    """The negative control: what the jump leaves alone above is due after a day."""
    with ageing_orchestrator(tmp_path, embedding__provider="off") as service:
        service.add("soon forgotten", importance=0.11)
        service.clock.advance(DAY_S)
        assert service.ok("run_decay")["changes"] == 1


def runs_of(mesh: Mesh, job: str) -> int:
    """How many runs of a job were done to the end."""
    found = mesh.succeed("orchestrator", "list_runs", job=job, limit=200)["results"]
    return sum(run["state"] == "done" for run in found)

"""The scheduler with the real orchestrator: every fire time has one run on record, whoever is killed in between."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from memory_system.cron import Interval
from memory_system.scheduling.schedule import Schedule
from tests.support.mesh import Mesh, running_mesh
from tests.support.process import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

INTERVAL_S = 4


def jobs(tmp_path: Path, *names: str) -> dict[str, Any]:
    """Settings of a mesh in which these jobs run."""
    found: dict[str, Any] = {"backup__dir": tmp_path / "backups", "scheduler__reset_timeout_s": 0.5}
    for name in names:
        job = f"scheduler__jobs__{name}"
        found |= {f"{job}__enabled": True, f"{job}__every": f"{INTERVAL_S}s", f"{job}__jitter_s": 0}
    return found


def runs(mesh: Mesh, job: str) -> list[dict[str, Any]]:
    """Those of fire times, oldest first."""
    found: list[dict[str, Any]] = mesh.succeed("orchestrator", "list_runs", job=job, limit=200)["results"]
    return [run for run in reversed(found) if str(run["request_id"]).startswith("scheduled-")]


def job_of(mesh: Mesh, name: str) -> dict[str, Any]:
    results = mesh.succeed("memory_scheduler", "list_jobs")["results"]
    found: dict[str, Any] = next(each for each in results if each["name"] == name)
    return found


def assert_each_once(found: list[dict[str, Any]], job: str) -> None:
    fires = [Schedule(job, Interval(1)).fire_time(run["request_id"]) for run in found]
    assert [fire for fire, count in Counter(fires).items() if count > 1] == []
    assert all(run["state"] == "done" for run in found[:-1]), found


def test_every_job_runs_and_tells(tmp_path: Path) -> None:
    names = ["checkpoint", "cleanup", "decay", "consolidation", "backup", "integrity_check", "index_snapshot"]
    with running_mesh(tmp_path, supervised=False, **jobs(tmp_path, *names)) as mesh:
        mesh.succeed("orchestrator", "add_memory", content="a memory", importance=0.5)
        for name in names:
            wait_until(lambda name=name: (job_of(mesh, name)["last"] or {}).get("state") == "done", f"{name} has run")  # type: ignore[misc]
        assert list((tmp_path / "backups").iterdir()) != []
        reply = mesh.succeed("memory_scheduler", "run_job", name="decay", dry_run=True)
        assert (reply["job"], reply["dry_run"]) == ("decay", True)
        mesh.wait_state("memory_scheduler", "healthy")


def test_kills_of_either_side_leave_one_run_for_a_fire_time(tmp_path: Path) -> None:
    with running_mesh(tmp_path, supervised=False, **jobs(tmp_path, "decay", "backup")) as mesh:
        wait_until(lambda: len(runs(mesh, "backup")) >= 1, "the first run")
        for program in ("memory_scheduler", "orchestrator", "memory_scheduler", "orchestrator"):
            # A moment after a fire time, when a run was just begun, is the worst moment there is.
            time.sleep(INTERVAL_S - time.time() % INTERVAL_S + 0.05)
            mesh.kill9(program)
            mesh.start_program(program)
            mesh.wait_answer(program)
        for job in ("decay", "backup"):
            known = len(runs(mesh, job))
            wait_until(lambda job=job, known=known: len(runs(mesh, job)) >= known + 2, "two more runs", 90.0)  # type: ignore[misc]
            assert_each_once(runs(mesh, job), job)


def test_an_orchestrator_that_stays_away_delays_and_kills_nothing(tmp_path: Path) -> None:
    with running_mesh(tmp_path, supervised=False, **jobs(tmp_path, "decay")) as mesh:
        wait_until(lambda: len(runs(mesh, "decay")) >= 1, "the first run")
        pid, known = mesh.pid("memory_scheduler"), len(runs(mesh, "decay"))
        mesh.kill9("orchestrator")
        wait_until(lambda: job_of(mesh, "decay")["state"] == "delayed", "the job is delayed", 60.0)
        mesh.wait_state("memory_scheduler", "degraded")
        mesh.start_program("orchestrator")
        mesh.wait_answer("orchestrator")
        wait_until(lambda: len(runs(mesh, "decay")) > known, "it runs again")
        mesh.wait_state("memory_scheduler", "healthy")
        assert mesh.pid("memory_scheduler") == pid
        assert_each_once(runs(mesh, "decay"), "decay")

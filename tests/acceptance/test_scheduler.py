"""The real scheduler against an orchestrator that keeps runs: no run of a fire time is skipped, and none done twice."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from memory_system.cron import Interval
from memory_system.scheduling.schedule import Schedule
from tests.acceptance.test_metrics import Scrape
from tests.support.fake_bus import FakeBus
from tests.support.process import PROJECT, free_port, wait_until
from tests.support.scheduler import JOBS, KeepingOrchestrator, SchedulerProcess, running_scheduler

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

SEED = int(os.environ.get("SCHEDULER_SEED", "20260131"))
RANDOM_NAMES = """
from memory_system.protocol import new_request_id
from memory_system.scheduling.schedule import Schedule
Schedule.request_id = lambda self, fire_s: f"scheduled-{self.job}-{new_request_id()}"
"""


@pytest.fixture
def keeper() -> Iterator[KeepingOrchestrator]:
    with KeepingOrchestrator() as orchestrator:
        yield orchestrator


def fire_times(keeper: KeepingOrchestrator, job: str) -> list[int]:
    """Those whose run was begun, each as often as it was."""
    schedule = Schedule(job, Interval(1))
    found = [schedule.fire_time(request_id) for request_id in keeper.fires(job)]
    return [fire_s for fire_s in found if fire_s is not None]


def skipped(found: list[int], interval_s: int, away: list[tuple[float, float]]) -> list[int]:
    """Fire times without a run, but for those before the last one of a time in which nothing ran the scheduler: what
    was missed then is one run."""
    missing = sorted(set(range(found[0], found[-1], interval_s)) - set(found))
    slack_s = 2.0  # from a fire time to the request for its run
    return [
        fire_s
        for fire_s in missing
        if not any(since - slack_s < fire_s <= until + slack_s - interval_s for since, until in away)
    ]


# -- none skipped, none doubled ---------------------------------------------------------------------------------------


def test_killed_between_fire_and_reply_it_neither_skips_nor_doubles(
    keeper: KeepingOrchestrator, tmp_path: Path
) -> None:
    dice = random.Random(SEED)
    keeper.takes_s = 1.2
    with running_scheduler(tmp_path, keeper.port, decay="every 3s") as scheduler:
        away = []
        for kill in range(4):
            known = len(keeper.begun)
            wait_until(lambda known=known: len(keeper.begun) > known, "a run is begun")  # type: ignore[misc]
            # While it runs, or after its reply.
            time.sleep(dice.uniform(0.0, 0.8) if kill % 2 == 0 else keeper.takes_s + 0.2)
            killed_at = time.time()
            scheduler.kill()
            time.sleep(dice.uniform(0.0, 1.0))
            scheduler.start()
            away.append((killed_at, time.time()))
        known = len(keeper.begun)
        wait_until(lambda: len(keeper.begun) > known, "one more run is begun")
        found = fire_times(keeper, "decay")
        assert len(set(found)) == len(found) >= 5, f"SCHEDULER_SEED={SEED}"
        assert skipped(found, 3, away) == [], f"SCHEDULER_SEED={SEED}"


def test_the_check_notices_names_that_are_not_made_of_the_fire_time(
    keeper: KeepingOrchestrator, tmp_path: Path
) -> None:
    """The negative control: with random request_ids the same kill has the run done twice."""
    keeper.takes_s = 1.0
    with running_scheduler(tmp_path, keeper.port, decay="every 1d", code=RANDOM_NAMES) as scheduler:
        wait_until(lambda: len(keeper.begun) == 1, "the run is begun")
        scheduler.kill()
        scheduler.start()
        wait_until(lambda: len(keeper.begun) == 2, "it is done a second time")


def test_with_names_of_the_fire_time_it_is_done_once(keeper: KeepingOrchestrator, tmp_path: Path) -> None:
    keeper.takes_s = 12.0  # longer than a start
    with running_scheduler(tmp_path, keeper.port, decay="every 1d") as scheduler:
        wait_until(lambda: len(keeper.begun) == 1, "the run is begun")
        scheduler.kill()
        scheduler.start()
        wait_until(lambda: scheduler.job("decay")["state"] == "idle", "the new one has joined it and seen its end")
        assert scheduler.job("decay")["last"]["state"] == "done"
        assert len(keeper.asked) == 2
        assert list(keeper.begun.values()) == [1]


def test_a_run_that_ended_while_the_scheduler_was_dead_is_not_even_asked_for(
    keeper: KeepingOrchestrator, tmp_path: Path
) -> None:
    keeper.takes_s = 0.5
    with running_scheduler(tmp_path, keeper.port, decay="every 1d") as scheduler:
        wait_until(lambda: len(keeper.begun) == 1, "the run is begun")
        scheduler.kill()
        time.sleep(0.6)
        scheduler.start()
        wait_until(lambda: scheduler.state() == "healthy", "it knows the last runs")
        last = scheduler.job("decay")["last"]
        assert (last["state"], last["result"]) == ("done", "promote 2")
        assert last["duration_s"] == pytest.approx(0.5, abs=0.01)
        assert len(keeper.asked) == 1


def test_what_was_missed_while_it_was_down_runs_once(keeper: KeepingOrchestrator, tmp_path: Path) -> None:
    day = int(time.time()) // 86_400 * 86_400
    names = [Schedule("backup", Interval(1)).request_id(day - 86_400 * ago) for ago in (9, 8, 7)]
    for name in names:
        keeper.note("backup", name)
    with running_scheduler(tmp_path, keeper.port, backup="cron 0 0 * * *", decay="every 1d") as scheduler:
        wait_until(lambda: len(keeper.begun) == 2, "both jobs have run")
        wait_until(lambda: scheduler.job("backup")["state"] == "idle", "and are seen to")
        assert fire_times(keeper, "backup") == fire_times(keeper, "decay") == [day]


def test_an_interrupted_run_is_taken_up_again_and_a_failed_one_tried_again(
    keeper: KeepingOrchestrator, tmp_path: Path
) -> None:
    day = int(time.time()) // 86_400 * 86_400
    keeper.note("backup", Schedule("backup", Interval(1)).request_id(day), "interrupted")
    keeper.note("decay", Schedule("decay", Interval(1)).request_id(day), "failed", error="storage_full: no room")
    with running_scheduler(tmp_path, keeper.port, backup="every 1d", decay="every 1d"):
        wait_until(lambda: len(keeper.asked) == 2, "both are asked for")
        asked = {request["request_id"] for request in keeper.asked}
        assert asked == {row["request_id"] for row in keeper.rows}


# -- an orchestrator that is away -------------------------------------------------------------------------------------


def test_a_job_that_is_due_while_the_orchestrator_is_down_is_delayed_and_runs_once_when_it_is_back(
    keeper: KeepingOrchestrator, tmp_path: Path
) -> None:
    with running_scheduler(tmp_path, keeper.port, decay="every 3s") as scheduler:
        wait_until(lambda: scheduler.state() == "healthy" and len(keeper.begun) >= 1, "it runs")
        wait_until(lambda: scheduler.job("decay")["state"] == "idle", "the run is done")
        pid = scheduler.pid
        keeper.die()
        before = len(keeper.begun)
        wait_until(lambda: scheduler.job("decay")["state"] == "delayed", "the next run is delayed")
        job = scheduler.job("decay")
        assert job["reason"] == "the orchestrator does not answer"
        assert time.time() - job["delayed_since"] < 30
        health = scheduler.ok("health_check")
        assert (health["state"], health["readiness"]) == ("degraded", {"orchestrator": "unavailable"})
        wait_until(lambda: scheduler.ok("health_check")["breakers"]["orchestrator"] == "open", "the breaker opens")
        time.sleep(3.5)  # at least one more fire time passes
        keeper.come_back()
        back = time.time()
        wait_until(lambda: len(keeper.begun) > before, "the job runs")
        assert time.time() - back < 30
        wait_until(lambda: scheduler.state() == "healthy", "it is well again")
        assert scheduler.pid == pid
        assert scheduler.answers()
        found = fire_times(keeper, "decay")[before:]
        assert found[0] >= int(back) // 3 * 3, "of those that were missed the last alone"
        assert len(set(found)) == len(found)


def test_an_orchestrator_that_is_restarted_during_a_run_is_asked_for_the_same_run(
    keeper: KeepingOrchestrator, tmp_path: Path
) -> None:
    keeper.takes_s = 1.5
    with running_scheduler(tmp_path, keeper.port, decay="every 1d") as scheduler:
        wait_until(lambda: len(keeper.begun) == 1, "the run is begun")
        keeper.die()
        keeper.come_back()
        wait_until(lambda: (scheduler.job("decay")["last"] or {}).get("state") == "done", "the run is done")
        wait_until(lambda: scheduler.job("decay")["state"] == "idle", "and known to be")
        assert list(keeper.begun.values()) == [1]


def test_it_starts_before_the_orchestrator_and_says_so(tmp_path: Path) -> None:
    with (
        KeepingOrchestrator() as keeper,
        running_scheduler(tmp_path, keeper.port, start=False, decay="every 1d") as scheduler,
    ):
        keeper.die()
        scheduler.start()
        health = scheduler.ok("health_check")
        assert (health["state"], health["readiness"]) == ("starting", {"orchestrator": "loading"})
        assert scheduler.job("decay")["state"] == "waiting"
        keeper.come_back()
        wait_until(lambda: scheduler.state() == "healthy", "the orchestrator is found")
        wait_until(lambda: len(keeper.begun) == 1, "what is due runs")
        assert "warning" not in scheduler.log


# -- long, refused, failing runs --------------------------------------------------------------------------------------


def test_a_run_that_takes_longer_than_a_call_is_waited_for(keeper: KeepingOrchestrator, tmp_path: Path) -> None:
    keeper.takes_s = 6.0
    settings = {"scheduler__call_s": 0.5}
    with running_scheduler(tmp_path, keeper.port, decay="every 1d", settings=settings) as scheduler:
        wait_until(lambda: len(keeper.asked) >= 3, "it is asked for again and again")
        job = scheduler.job("decay")
        assert (job["state"], job["running"]) == ("running", True)
        assert scheduler.state() == "healthy"
        assert scheduler.ok("health_check")["breakers"] == {"orchestrator": "closed"}
        wait_until(lambda: scheduler.job("decay")["state"] == "idle", "it ends")
        assert list(keeper.begun.values()) == [1]
        assert scheduler.job("decay")["last"]["duration_s"] == pytest.approx(6.0, abs=0.01)


@pytest.mark.parametrize("code", ["busy", "clock_unsettled", "storage_full", "vectors_unavailable"])
def test_a_run_that_is_refused_for_now_is_delayed_and_tried_again(
    keeper: KeepingOrchestrator, tmp_path: Path, code: str
) -> None:
    wait = {} if code == "storage_full" else {"retry_after_ms": 1500}
    keeper.refusals = [{"code": code, "retryable": True, **wait} for _ in range(2)]
    settings = {"scheduler__call_s": 0.5}
    with running_scheduler(tmp_path, keeper.port, decay="every 1d", settings=settings) as scheduler:
        seen: list[dict[str, Any]] = []

        def is_delayed() -> bool:
            seen.append(scheduler.job("decay"))
            return bool(seen[-1]["state"] == "delayed")

        wait_until(is_delayed, "it is delayed")
        assert seen[-1]["reason"] == code
        assert scheduler.state() == "healthy"  # a short delay is no trouble
        wait_until(lambda: scheduler.job("decay")["state"] == "idle", "it has run")
        assert list(keeper.begun.values()) == [1]
        assert len({request["request_id"] for request in keeper.asked}) == 1


def test_a_run_that_fails_is_told_and_left_until_its_next_time(keeper: KeepingOrchestrator, tmp_path: Path) -> None:
    keeper.refusals = [{"code": "internal_error"} for _ in range(1000)]  # until somebody has looked
    with FakeBus() as bus:
        settings = {"error_bus__enabled": True, "error_bus__address": bus.address}
        with running_scheduler(tmp_path, keeper.port, decay="every 4s", settings=settings) as scheduler:
            wait_until(lambda: scheduler.state() == "degraded", "the failure shows")
            wait_until(lambda: scheduler.ok("health_check")["readiness"].get("decay") == "failed", "and of what")
            last = scheduler.job("decay")["last"]
            assert (last["state"], last["error"]) == ("failed", "internal_error: internal_error")
            event = bus.wait("job_failed")[0]
            assert event["details"]["job"] == "decay"
            keeper.refusals.clear()
            wait_until(lambda: scheduler.state() == "healthy", "the next run succeeds")
            assert len({request["request_id"] for request in keeper.asked}) == len(keeper.asked) >= 2


# -- what a person asks -----------------------------------------------------------------------------------------------


def test_list_jobs_tells_all_of_every_job(keeper: KeepingOrchestrator, tmp_path: Path) -> None:
    with running_scheduler(tmp_path, keeper.port, decay="every 6h", backup="cron 30 3 * * *") as scheduler:
        wait_until(lambda: len(keeper.begun) == 2, "both have run")
        wait_until(lambda: scheduler.job("backup")["state"] == "idle", "and are done")
        reply = scheduler.ok("list_jobs")
        jobs = {each["name"]: each for each in reply["results"]}
        assert list(jobs) == JOBS
        assert (reply["count"], reply["orchestrator"]) == (len(JOBS), "ready")
        now = time.time()
        assert jobs["decay"]["trigger"] == "every 6h"
        assert jobs["decay"]["next_run_at"] == (now // 21_600 + 1) * 21_600
        next_run = datetime.fromtimestamp(jobs["backup"]["next_run_at"], UTC)
        assert (next_run.hour, next_run.minute) == (3, 30)
        assert now < jobs["backup"]["next_run_at"] <= now + 86_400
        assert jobs["backup"]["enabled"] is True
        assert jobs["backup"]["running"] is False
        assert jobs["backup"]["last"]["started_at"] == pytest.approx(now, abs=60)
        assert jobs["checkpoint"]["enabled"] is False
        assert jobs["checkpoint"]["state"] == "off"
        assert jobs["checkpoint"]["next_run_at"] is None
        assert jobs["checkpoint"]["last"] is None


def test_run_job_hands_on_what_is_asked_and_what_is_answered(keeper: KeepingOrchestrator, tmp_path: Path) -> None:
    with running_scheduler(tmp_path, keeper.port) as scheduler:
        reply = scheduler.ok("run_job", name="consolidation", dry_run=True, as_of=1_769_860_800.5)
        assert (reply["dry_run"], reply["as_of"], reply["counts"]) == (True, 1_769_860_800.5, {"promote": 2})
        (asked,) = keeper.asked
        assert (asked["action"], asked["agent_id"]) == ("run_consolidation", "operator")
        assert asked["data"] == {"dry_run": True, "as_of": 1_769_860_800.5}
        assert scheduler.job("consolidation")["last"] is None  # a dry run is no run of the job
        assert scheduler.ok("run_job", name="decay")["dry_run"] is False
        assert scheduler.job("decay")["last"]["state"] == "done"


def test_run_job_repeated_under_its_request_id_is_one_run(keeper: KeepingOrchestrator, tmp_path: Path) -> None:
    keeper.takes_s = 3.0
    around = {"request_id": "the-same-run-of-a-person"}
    with running_scheduler(tmp_path, keeper.port) as scheduler:
        with pytest.raises(TimeoutError):
            scheduler.ask("run_job", around=around, timeout_s=0.3, name="decay")
        assert scheduler.ask("run_job", around=around, name="decay")["status"] == "success"
        assert scheduler.ask("run_job", around=around, name="decay")["replayed"] is True
        assert dict(keeper.begun) == {"the-same-run-of-a-person": 1}


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"name": "bakup"}, "name"),
        ({"name": "checkpoint", "dry_run": True}, "dry_run"),
        ({"name": "backup", "as_of": 1.0}, "as_of"),
        ({"name": "decay", "dryrun": True}, "dryrun"),
        ({}, "name"),
    ],
)
def test_run_job_names_what_is_wrong(
    keeper: KeepingOrchestrator, tmp_path: Path, data: dict[str, Any], field: str
) -> None:
    with running_scheduler(tmp_path, keeper.port) as scheduler:
        reply = scheduler.ask("run_job", **data)
        assert (reply["error_code"], reply["details"]["field"]) == ("invalid_field", field)
        assert keeper.asked == []


def test_run_job_fails_as_the_orchestrator_does_or_for_its_absence(keeper: KeepingOrchestrator, tmp_path: Path) -> None:
    keeper.refusals = [{"code": "idempotency_mismatch"}]
    with running_scheduler(tmp_path, keeper.port) as scheduler:
        wait_until(lambda: scheduler.state() == "healthy", "the orchestrator is found")
        assert scheduler.ask("run_job", name="decay")["error_code"] == "idempotency_mismatch"
        keeper.die()
        reply = scheduler.ask("run_job", name="decay")
        assert reply["error_code"] in ("unreachable", "timeout", "circuit_open")
        assert reply["retryable"] is True


def script(scheduler: SchedulerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROJECT / "scripts" / "jobs.py"), *arguments],
        env={**os.environ, "MEMORY_CONFIG": os.devnull, **scheduler.environ, "TZ": "UTC"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_script_prints_a_table_and_what_a_run_would_change(keeper: KeepingOrchestrator, tmp_path: Path) -> None:
    with running_scheduler(tmp_path, keeper.port, decay="every 6h") as scheduler:
        wait_until(lambda: scheduler.job("decay")["state"] == "idle" and len(keeper.begun) == 1, "it has run")
        done = script(scheduler, "list")
        assert (done.returncode, done.stderr) == (0, "")
        headings, *rows = done.stdout.splitlines()
        assert headings.split() == ["JOB", "TRIGGER", "STATE", "NEXT", "LAST", "TOOK", "RESULT"]
        assert [row.split()[0] for row in rows] == JOBS
        decay = next(row for row in rows if row.startswith("decay"))
        assert "every 6h" in decay
        assert "promote 2" in decay
        assert json.loads(script(scheduler, "list", "--json").stdout)["count"] == len(JOBS)

        shown = script(scheduler, "run", "decay", "--dry-run", "--as-of", "2026-01-31T12:00+00:00")
        assert (shown.returncode, shown.stderr) == (0, "")
        lines = shown.stdout.splitlines()
        assert lines[0].startswith("decay (dry run: nothing was changed) as of 2026-01-31 12:00:00 UTC")
        assert "would change 2 memories:" in lines
        assert lines[-1] == "to change exactly this: make run-job JOB=decay AS_OF=1769860800.0"

        wrong = script(scheduler, "run", "bakup")
        assert wrong.returncode == 1
        assert wrong.stderr == "error: there is no job 'bakup'; did you mean backup? (invalid_field)\n"
        assert script(scheduler, "run", "decay", "--as-of", "soon").returncode == 2
    gone = script(scheduler, "list")
    assert gone.returncode == 1
    assert gone.stderr.startswith("error: the scheduler does not answer at tcp://127.0.0.1:")


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["jobs"], "scripts/jobs.py list"),
        (["run-job", "JOB=consolidation", "DRY_RUN=1"], 'scripts/jobs.py run "consolidation" --dry-run'),
        (["run-job", "JOB=decay", "DRY_RUN=0", "AS_OF=12.5"], 'scripts/jobs.py run "decay"  --as-of "12.5"'),
    ],
)
def test_make_runs_the_script(arguments: list[str], command: str) -> None:
    made = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", ".venv/.service-installed", *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert made.returncode == 0
    assert made.stdout.splitlines()[-1].strip().endswith(command)


# -- its own life -----------------------------------------------------------------------------------------------------


def test_it_stops_at_once_and_the_run_goes_on(keeper: KeepingOrchestrator, tmp_path: Path) -> None:
    keeper.takes_s = 30.0
    with running_scheduler(tmp_path, keeper.port, decay="every 1d") as scheduler:
        wait_until(lambda: len(keeper.begun) == 1, "the run is begun")
        status, took_s = scheduler.terminate()
        assert status == 0
        assert took_s < 15.0
        assert keeper.rows[-1]["finished_at"] > time.time()
        assert '"event": "stopped"' in scheduler.log


def test_a_second_one_names_the_port(keeper: KeepingOrchestrator, tmp_path: Path) -> None:
    with running_scheduler(tmp_path, keeper.port) as scheduler:
        second = subprocess.run(
            [sys.executable, str(PROJECT / "memory_scheduler.py")],
            env={**os.environ, "MEMORY_CONFIG": os.devnull, **scheduler.environ},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert second.returncode == 1
        assert "scheduler.port" in second.stderr
        assert scheduler.address.rpartition(":")[2] in second.stderr


def test_a_trigger_that_cannot_be_is_refused_with_its_key(tmp_path: Path) -> None:
    environ = {"MEMORY_CONFIG": os.devnull, "MEMORY__SCHEDULER__JOBS__BACKUP__CRON": "61 * * * *"}
    done = subprocess.run(
        [sys.executable, str(PROJECT / "memory_scheduler.py")],
        env={**os.environ, **environ},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "scheduler.jobs.backup.cron = '61 * * * *': expected empty, or five cron fields" in done.stderr


def test_it_beats_and_tells_that_the_orchestrator_went_and_came(keeper: KeepingOrchestrator, tmp_path: Path) -> None:
    with FakeBus() as bus:
        settings = {
            "error_bus__enabled": True,
            "error_bus__address": bus.address,
            "health__heartbeat_s": 0.5,
        }
        with running_scheduler(tmp_path, keeper.port, decay="every 1s", settings=settings):
            beat = bus.wait_for_heartbeat(component="memory_scheduler", state="healthy")
            assert beat["readiness"] == {"orchestrator": "ready"}
            keeper.die()
            bus.wait("orchestrator_unavailable", 45.0)
            bus.wait_for_heartbeat(45.0, component="memory_scheduler", state="degraded")
            keeper.come_back()
            bus.wait("orchestrator_ready", 45.0)


def test_metrics(keeper: KeepingOrchestrator, tmp_path: Path) -> None:
    port = free_port()
    settings = {"metrics__memory_scheduler_port": port}
    with running_scheduler(tmp_path, keeper.port, decay="every 6h", settings=settings) as scheduler:
        wait_until(lambda: len(keeper.begun) == 1, "the job has run")
        wait_until(lambda: scheduler.job("decay")["state"] == "idle", "and is done")
        scheduler.ok("run_job", name="backup")
        scrape = Scrape(port)
        assert scrape("state", component="memory_scheduler", state="healthy") == 1
        assert scrape("job_runs_total", job="decay", outcome="success") == 1
        assert scrape("job_runs_total", job="backup", outcome="success") == 1
        assert scrape("job_state", job="decay", state="idle") == 1
        assert scrape("job_state", job="backup", state="off") == 1
        assert scrape("job_next_run_timestamp_seconds", job="decay") == scheduler.job("decay")["next_run_at"]
        assert scrape("job_last_start_timestamp_seconds", job="decay") == pytest.approx(time.time(), abs=60)
        assert scrape("job_last_duration_seconds", job="decay") == pytest.approx(0.0, abs=0.1)
        assert scrape("requests_total", action="run_job", outcome="success") == 1
        assert all(family.documentation for family in scrape.families)

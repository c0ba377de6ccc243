"""The scheduler's parts without a socket: settings, what is known of runs, waits, the timetable, who may ask."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from memory_system.cron import Interval, parse_cron
from memory_system.envelope import Request
from memory_system.errors import AccessDenied, ConfigError, InvalidField
from memory_system.scheduler_settings import JobsSettings, SchedulerSettings
from memory_system.scheduling.desk import Desk
from memory_system.scheduling.jobs import jobs_of
from memory_system.scheduling.link import Link, pause_s
from memory_system.scheduling.runner import LONG_DELAY_S, Runner
from memory_system.scheduling.runs import Run, summary
from memory_system.scheduling.schedule import Schedule
from memory_system.scheduling.timetable import Timetable
from memory_system.settings import load_settings

NOW_S = 1_769_860_800.0  # 2026-01-31T12:00:00Z
NOWHERE = "tcp://127.0.0.1:1"


# -- settings ---------------------------------------------------------------------------


def loaded(file: str | None, tmp_path: Path, **variables: str) -> JobsSettings:
    path = os.devnull
    if file is not None:
        path = str(tmp_path / "my.yaml")
        Path(path).write_text(file)
    environ = {f"MEMORY__SCHEDULER__JOBS__{name.upper()}": value for name, value in variables.items()}
    return load_settings(path, environ).scheduler.jobs


def test_every_job_has_a_trigger_and_a_recurrence_by_default(tmp_path: Path) -> None:
    jobs = loaded(None, tmp_path)
    assert jobs == JobsSettings()
    for name, job in jobs.items():
        assert job.enabled, name
        assert job.trigger in (f"cron {job.cron}", f"every {job.every}")
        assert job.recurrence().latest(NOW_S) <= NOW_S


def test_a_trigger_replaces_the_other_kind_of_a_lower_layer(tmp_path: Path) -> None:
    file = "scheduler: {jobs: {decay: {cron: 5 * * * *}, backup: {every: 6h}, cleanup: {every: 2h}}}"
    jobs = loaded(file, tmp_path, backup__cron="0 1 * * *", index_snapshot__jitter_s="0")
    assert jobs.decay.trigger == "cron 5 * * * *"
    assert jobs.decay.recurrence() == parse_cron("5 * * * *")
    assert jobs.backup.trigger == "cron 0 1 * * *"
    assert jobs.cleanup.recurrence() == Interval(7200)
    assert jobs.index_snapshot.trigger == JobsSettings().index_snapshot.trigger


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("{cron: '0 1 * * *', every: 6h}", "scheduler.jobs.decay has both cron and every"),
        ("{cron: '', every: ''}", "scheduler.jobs.decay has neither cron nor every"),
        ("{cron: '0 25 * * *'}", "scheduler.jobs.decay.cron = '0 25 * * *': expected empty, or five cron fields"),
        ("{every: 90}", "scheduler.jobs.decay.every = 90: expected empty, or an interval such as 90s"),
        ("{every: 1h30m}", "expected empty, or an interval such as 90s"),
        ("{enabled: maybe}", "scheduler.jobs.decay.enabled"),
        ("{evry: 1h}", "scheduler.jobs.decay.evry; the nearest known one is scheduler.jobs.decay.every"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(tmp_path: Path, file: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(f"scheduler: {{jobs: {{decay: {file}}}}}", tmp_path)
    assert words in caught.value.message


# -- what is known of runs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"counts": {"archive": 3, "promote": 0}, "changes": 3}, "archive 3"),
        ({"job": "decay", "counts": {"archive": 0}, "changes": 0}, "nothing to do"),
        ({"job": "backup", "counts": {"memories": 0}, "changes": 0}, "done"),
        ({"counts": {}, "changes": 7}, "changes 7"),
        ({"progress": {"part": "due", "done": 40, "total": 90}, "counts": {}}, "due 40 of 90"),
        ({"progress": {"part": "due", "done": 40, "total": None}}, "due 40"),
        ({}, ""),
        ({"counts": 5, "changes": "x", "progress": []}, ""),
    ],
)
def test_summary(fields: Mapping[str, Any], words: str) -> None:
    assert summary(fields) == words


def test_a_run_is_what_list_runs_says() -> None:
    run = Run.of({"request_id": "r", "state": "failed", "started_at": 5, "finished_at": 7.25, "error": "timeout: why"})
    assert run.shown() == {
        "started_at": 5.0,
        "duration_s": 2.25,
        "state": "failed",
        "dry_run": False,
        "result": "",
        "error": "timeout: why",
    }
    assert Run.of({"error": {"error_code": "busy", "message": "not now"}}).error == "busy: not now"
    assert Run.of({"started_at": 5.0, "finished_at": None}).duration_s is None
    assert Run.of({"started_at": 5.0, "finished_at": 4.0}).duration_s == 0.0  # the clock was put back


class Clock:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


def runner(clock: Clock) -> Runner:
    job = jobs_of(JobsSettings())["decay"]
    link = Link(NOWHERE, SchedulerSettings(), on_change=lambda state: None, on_ready=lambda: asyncio.sleep(0))
    return Runner(job, link, asyncio.Semaphore(1), now=clock)


def named(job: str, fire_s: float, state: str, **fields: Any) -> Run:
    request_id = Schedule(job, Interval(1)).request_id(int(fire_s))
    return Run.of({"request_id": request_id, "state": state, "started_at": fire_s, **fields})


def test_only_a_run_that_is_done_concludes_its_fire_time() -> None:
    async def scenario() -> None:
        decay = runner(Clock())
        due = decay.pending()
        assert due is not None
        decay.learn([named("decay", due, state) for state in ("running", "interrupted", "failed")])
        assert decay.pending() == due
        decay.learn([named("backup", due, "done"), named("decay", due - 3600, "done")])
        assert decay.pending() == due
        decay.learn([named("decay", due, "done")])
        assert decay.pending() is None

    asyncio.run(scenario())


def test_the_last_run_is_the_newest_that_was_no_dry_run() -> None:
    async def scenario() -> None:
        decay = runner(Clock())
        rows = [named("decay", NOW_S + 5, "done", dry_run=True), named("decay", NOW_S, "failed")]
        decay.learn([*rows, named("decay", NOW_S - 5, "done")])
        assert decay.last == rows[1]
        assert decay.failed
        # The record of a restored store is older than what was seen here.
        decay.learn([named("decay", NOW_S - 5, "done")])
        assert decay.last == rows[1]
        decay.learn([named("decay", NOW_S + 9, "done")])
        assert not decay.failed

    asyncio.run(scenario())


def test_a_delay_is_late_after_five_minutes() -> None:
    async def scenario() -> None:
        clock = Clock()
        decay = runner(clock)
        assert not decay.is_late
        decay._delay("why")
        clock.now_s += LONG_DELAY_S
        assert not decay.is_late
        clock.now_s += 1.0
        assert decay.is_late

    asyncio.run(scenario())


# -- waits ---------------------------------------------------------------------------


def test_a_refusal_is_waited_for_as_long_as_it_asks_else_twice_as_long_each_time() -> None:
    asked = {"retryable": True, "details": {"retry_after_ms": 1500.0}}
    assert 1.5 < pause_s(asked, 7, 60.0) < 1.6
    assert pause_s(asked, 1, 1.0) == 1.0
    silent = {"retryable": True, "details": {}}
    assert [pause_s(silent, tries, 60.0) for tries in (1, 2, 3, 4, 20, 5000)] == [1.0, 2.0, 4.0, 8.0, 60.0, 60.0]


def test_the_timetable_notices_a_clock_that_was_set() -> None:
    """Timers wait in monotonic time: after a jump of the clock they would come too late, or far too late."""

    async def scenario() -> None:
        ahead_s = 0.0
        woken: list[str] = []
        schedule = Schedule("decay", Interval(3600))
        table = Timetable({"decay": schedule}, woken.append, now=lambda: time.time() + ahead_s)
        table.start()
        try:
            job = table._scheduler.get_job("decay")
            for ahead_s in (0.0, 7200.0, -86_400.0):
                woken.clear()
                table._look()
                assert woken == ["decay"]
                expected_s = schedule.next_start(time.time() + ahead_s)
                assert table.next_start_s("decay") == expected_s
                assert table._scheduler.get_job("decay").next_run_time.timestamp() == expected_s
            assert job is not None
            assert table.next_start_s("backup") is None
        finally:
            table.close()
            await asyncio.sleep(0)

    asyncio.run(scenario())


# -- who may ask for what ---------------------------------------------------------------------------


def request(address: str) -> Request:
    rest: dict[str, Any] = dict.fromkeys(("request_id", "agent_id", "session_id", "deadline_s"))
    return Request("run_job", {}, namespace="default", legacy=True, as_json=True, peer=b"", address=address, **rest)


@pytest.mark.parametrize("address", ["10.0.0.7", "fe80::1", "not an address"])
def test_run_job_is_for_callers_of_this_machine(address: str) -> None:
    async def scenario() -> None:
        desk = Desk(SchedulerSettings(), NOWHERE, bind="10.0.0.5")
        with pytest.raises(AccessDenied):
            await desk.run_job(request=request(address), name="decay")
        for local in ("", "127.0.0.1", "::1", "::ffff:127.0.0.1", "10.0.0.5"):
            with pytest.raises(InvalidField):
                await desk.run_job(request=request(local), name="no such job")
        await desk.close()

    asyncio.run(scenario())


def test_a_part_that_ends_by_a_defect_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        crashed = asyncio.Event()
        desk = Desk(SchedulerSettings(), NOWHERE, on_crash=crashed.set)

        async def broken() -> None:
            raise ZeroDivisionError

        desk.link.watch = broken  # type: ignore[method-assign]
        desk.start()
        await asyncio.wait_for(crashed.wait(), 5)
        await desk.close()

    asyncio.run(scenario())
    assert any("scheduler_crashed" in record.getMessage() for record in caplog.records)

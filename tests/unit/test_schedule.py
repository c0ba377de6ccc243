"""Which run of a job is due: each fire time once, none skipped, whatever stops and jumps in between."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_system.cron import Interval, Recurrence, parse_cron
from memory_system.protocol import MAX_ID_CHARS, MIN_REQUEST_ID_CHARS
from memory_system.scheduler_settings import JobsSettings
from memory_system.scheduling.schedule import Schedule

START_S = 1_769_860_800  # 2026-01-31T12:00:00Z
RECURRENCES: list[Recurrence] = [Interval(60), Interval(3600), parse_cron("*/7 * * * *"), parse_cron("5 3 * * *")]
JITTERS = [0.0, 1.0, 20.0, 45.0, 90.0, 3600.0]
SCHEDULES = st.builds(Schedule, st.just("decay"), st.sampled_from(RECURRENCES), st.sampled_from(JITTERS), st.text())
TIMES = st.floats(min_value=START_S, max_value=START_S + 10_000_000)


@given(SCHEDULES, TIMES)
def test_what_is_due_has_begun_and_what_is_next_has_not(schedule: Schedule, now_s: float) -> None:
    due, start_s = schedule.due(now_s), schedule.next_start(now_s)
    assert due + schedule.delay_s(due) <= now_s < start_s
    assert schedule.due(start_s - 1) == due
    assert schedule.due(start_s) > due
    assert schedule.due(start_s) + schedule.delay_s(schedule.due(start_s)) == start_s


@given(SCHEDULES, TIMES)
def test_a_delay_is_within_the_jitter_and_half_of_an_interval_and_always_the_same(
    schedule: Schedule, now_s: float
) -> None:
    fire_s = schedule.due(now_s)
    delay_s = schedule.delay_s(fire_s)
    assert 0 <= delay_s <= schedule.jitter_s
    if isinstance(schedule.recurrence, Interval):
        assert delay_s <= schedule.recurrence.interval_s / 2
    again = Schedule(schedule.job, schedule.recurrence, schedule.jitter_s, schedule.seed)
    assert again.delay_s(fire_s) == delay_s


def test_delays_are_spread_over_the_jitter_and_differ_between_jobs_and_deployments() -> None:
    schedule = Schedule("decay", Interval(3600), 300.0)
    delays = [schedule.delay_s(3600 * number) for number in range(2000)]
    assert 130 < sum(delays) / len(delays) < 170
    assert min(delays) < 10
    assert max(delays) > 290
    for other in (Schedule("backup", Interval(3600), 300.0), Schedule("decay", Interval(3600), 300.0, "here")):
        assert [other.delay_s(3600 * number) for number in range(20)] != delays[:20]


@given(SCHEDULES, st.lists(st.integers(1, 90), min_size=1, max_size=300))
def test_looked_at_often_enough_every_fire_time_runs_once(schedule: Schedule, steps: list[int]) -> None:
    """As a scheduler does that is woken at each start, and now and then besides."""
    concluded: set[int] = set()
    now_s = float(START_S)
    first = schedule.due(now_s)
    for step in steps:
        end_s = now_s + step
        while now_s < end_s:
            fire_s = schedule.pending(concluded, now_s)
            if fire_s is not None:
                assert fire_s not in concluded
                concluded.add(fire_s)
            now_s = min(end_s, float(schedule.next_start(now_s)))
    fire_s, expected = first, {first}
    while (fire_s := schedule.recurrence.following(fire_s)) + schedule.delay_s(fire_s) < now_s:
        expected.add(fire_s)
    # With a jitter that reaches beyond the next fire time, a later run can stand for an earlier one.
    if schedule.jitter_s < 60:
        assert expected <= concluded | {schedule.due(now_s)}


@given(SCHEDULES, TIMES, st.floats(0, 1_000_000))
def test_fire_times_that_were_missed_are_one_run(schedule: Schedule, down_s: float, for_s: float) -> None:
    concluded = {schedule.due(down_s)}
    runs = 0
    while (fire_s := schedule.pending(concluded, down_s + for_s)) is not None:
        concluded.add(fire_s)
        runs += 1
    assert runs == (schedule.due(down_s + for_s) > schedule.due(down_s))


def test_what_has_never_run_is_overdue() -> None:
    schedule = Schedule("backup", parse_cron("30 3 * * *"))
    assert schedule.pending(set(), START_S) == datetime(2026, 1, 31, 3, 30, tzinfo=UTC).timestamp()


def test_a_clock_that_was_ahead_and_was_put_back_stops_nothing_and_doubles_nothing() -> None:
    schedule = Schedule("decay", Interval(3600))
    concluded = {START_S}
    ahead = schedule.pending(concluded, START_S + 86_400 * 365)
    assert ahead == START_S + 86_400 * 365
    concluded.add(ahead)
    assert schedule.pending(concluded, START_S + 10) is None
    assert schedule.pending(concluded, START_S + 3600) == START_S + 3600


def test_a_clock_that_was_put_back_repeats_nothing() -> None:
    schedule = Schedule("decay", Interval(3600))
    concluded = {START_S, START_S + 3600}
    assert schedule.pending(concluded, START_S + 3599) is None
    assert schedule.pending(concluded, START_S + 3601) is None


def test_what_was_done_for_a_later_time_needs_no_earlier_one() -> None:
    """As when the jitter of the job was raised since: by the new one the last run has not begun yet."""
    schedule = Schedule("decay", Interval(3600), jitter_s=600.0)
    fire_s = next(each for each in range(int(START_S), int(START_S) + 86_400, 3600) if schedule.delay_s(each) > 0)
    assert schedule.due(fire_s) == fire_s - 3600
    assert schedule.pending({fire_s}, fire_s) is None
    assert schedule.pending(set(), fire_s) == fire_s - 3600


@pytest.mark.parametrize("job", [name for name, _ in JobsSettings().items()])
def test_the_name_of_a_run_is_made_of_the_job_and_the_fire_time_and_tells_both(job: str) -> None:
    schedule = Schedule(job, Interval(60), 30.0, "here")
    request_id = schedule.request_id(START_S)
    assert request_id == f"scheduled-{job}-2026-01-31T12:00:00Z"
    assert MIN_REQUEST_ID_CHARS <= len(request_id) <= MAX_ID_CHARS
    assert Schedule(job, Interval(3600)).request_id(START_S) == request_id
    assert schedule.fire_time(request_id) == START_S
    assert Schedule("other", Interval(60)).fire_time(request_id) is None
    for foreign in (None, "", "0123456789abcdef", f"scheduled-{job}-", f"scheduled-{job}-2026-13-31T12:00:00Z"):
        assert schedule.fire_time(foreign) is None

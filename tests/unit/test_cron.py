"""When something recurs: five fields read as cron(8) reads them, and intervals, in UTC whatever the local zone does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from apscheduler.triggers.cron import CronTrigger
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from memory_system.cron import Interval, parse_cron, parse_interval

YEAR_2000, YEAR_2100 = 946_684_800, 4_102_444_800
TIMES = st.floats(min_value=YEAR_2000, max_value=YEAR_2100)


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def shown(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M")


@pytest.mark.parametrize(
    ("text", "now", "latest", "following"),
    [
        ("* * * * *", "2026-01-31 12:00:30", "2026-01-31 12:00", "2026-01-31 12:01"),
        ("* * * * *", "2026-01-31 12:00:00", "2026-01-31 12:00", "2026-01-31 12:01"),
        ("15 3 * * *", "2026-01-31 03:14:59", "2026-01-30 03:15", "2026-01-31 03:15"),
        ("15 3 * * *", "2026-01-31 03:15:00", "2026-01-31 03:15", "2026-02-01 03:15"),
        ("*/20 8-10 * * *", "2026-01-31 10:50", "2026-01-31 10:40", "2026-02-01 08:00"),
        ("5/20 * * * *", "2026-01-31 10:50", "2026-01-31 10:45", "2026-01-31 11:05"),
        ("0 0 1 * *", "2026-01-31 10:50", "2026-01-01 00:00", "2026-02-01 00:00"),
        ("0 0 31 * *", "2026-02-10 00:00", "2026-01-31 00:00", "2026-03-31 00:00"),
        ("0 0 29 2 *", "2026-02-10 00:00", "2024-02-29 00:00", "2028-02-29 00:00"),
        ("0 0 29 feb *", "2099-12-31 00:00", "2096-02-29 00:00", "2104-02-29 00:00"),
        ("30 4 * * 0", "2026-01-31 10:50", "2026-01-25 04:30", "2026-02-01 04:30"),  # a Saturday; Sunday is 0
        ("30 4 * * 7", "2026-01-31 10:50", "2026-01-25 04:30", "2026-02-01 04:30"),  # and 7
        ("30 4 * * SUN", "2026-01-31 10:50", "2026-01-25 04:30", "2026-02-01 04:30"),
        ("0 9 * * 1-5", "2026-01-31 10:50", "2026-01-30 09:00", "2026-02-02 09:00"),
        ("0 9 * * mon-fri", "2026-01-31 10:50", "2026-01-30 09:00", "2026-02-02 09:00"),
        ("0 9 * * 5-7", "2026-02-01 10:00", "2026-02-01 09:00", "2026-02-06 09:00"),
        ("0 0 * * */2", "2026-01-31 10:00", "2026-01-31 00:00", "2026-02-01 00:00"),  # sun tue thu sat
        ("0 0 13 * fri", "2026-01-08 00:00", "2026-01-02 00:00", "2026-01-09 00:00"),  # any Friday, any 13th
        ("0 0 13 * fri", "2026-01-12 00:00", "2026-01-09 00:00", "2026-01-13 00:00"),
        ("0 0 */2 * fri", "2026-01-10 00:00", "2026-01-09 00:00", "2026-01-23 00:00"),  # with a star both have to fit
        ("0 12 1,15 mar,sep *", "2026-05-01 00:00", "2026-03-15 12:00", "2026-09-01 12:00"),
    ],
)
def test_cron(text: str, now: str, latest: str, following: str) -> None:
    cron = parse_cron(text)
    assert (shown(cron.latest(at(now))), shown(cron.following(at(now)))) == (latest, following)


@pytest.mark.parametrize(
    "text",
    [
        *("", "@daily", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *", "* * * 13 *"),
        *("* * * * 8", "5-3 * * * *", "*/0 * * * *", "a * * * *", "1,,2 * * * *", "-1 * * * *", "1- * * * *"),
        *("* * * sun *", "* * * * fri-mon", "0 0 30 2 *", "0 0 31 4,6,9,11 *", "1.5 * * * *", "\u0663 * * * x"),
    ],
)
def test_what_is_no_cron_or_never_happens_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_cron(text)


@pytest.mark.parametrize(("text", "seconds"), [("1s", 1), ("90s", 90), (" 15M ", 900), ("6h", 21_600), ("1d", 86_400)])
def test_intervals(text: str, seconds: int) -> None:
    assert parse_interval(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "15", "m", "-1h", "1.5h", "367d", "1h30m", "99999999999999999999d", "1w"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_interval(text)


@given(st.integers(1, 100_000), TIMES)
def test_an_interval_counts_from_the_epoch(interval_s: int, now_s: float) -> None:
    interval = Interval(interval_s)
    latest, following = interval.latest(now_s), interval.following(now_s)
    assert latest % interval_s == 0
    assert latest <= now_s < following == latest + interval_s
    assert interval.latest(float(following)) == following


def field(low: int, high: int) -> st.SearchStrategy[str]:
    value = st.integers(low, high)
    pair = st.tuples(value, value).map(sorted)
    step = st.integers(1, 30)
    part = st.one_of(
        value.map(str),
        pair.map(lambda ends: f"{ends[0]}-{ends[1]}"),
        st.tuples(pair, step).map(lambda found: f"{found[0][0]}-{found[0][1]}/{found[1]}"),
        step.map(lambda each: f"*/{each}"),
        st.just("*"),
    )
    return st.lists(part, min_size=1, max_size=3).map(",".join)


CRONS = st.tuples(field(0, 59), field(0, 23), field(1, 31), field(1, 12), st.just("*")).map(" ".join)


@settings(deadline=None)
@given(CRONS, st.integers(YEAR_2000, YEAR_2100))
@example("0 0 29 2 *", int(at("2097-01-01 00:00")))
def test_times_are_those_of_apscheduler(text: str, now_s: int) -> None:
    """Where both read a field alike, that is without days of the week, of which APScheduler's 0 is a Monday."""
    try:
        cron = parse_cron(text)
        other = CronTrigger.from_crontab(text, UTC)  # refuses steps that are longer than their range
    except ValueError:
        assume(False)
    now = datetime.fromtimestamp(now_s, UTC)
    following = cron.following(now_s)
    assert following == other.get_next_fire_time(None, now + timedelta(seconds=1)).timestamp()
    assert cron.latest(now_s) <= now_s < following
    assert cron.latest(following) == following
    assert cron.following(cron.latest(now_s)) == following


@pytest.fixture
def new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A zone in which clocks are put forward and back."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("day", ["2026-03-08 00:00", "2026-11-01 00:00"])
def test_a_day_has_each_time_once_also_when_local_clocks_are_put_forward_or_back(new_york: None, day: str) -> None:
    cron = parse_cron("30 * * * *")
    found, now_s = [], at(day) - 1.0
    for _ in range(48):
        now_s = float(cron.following(now_s))
        found.append(now_s)
    assert found == [at(day) + 1800 + 3600 * hour for hour in range(48)]
    assert parse_cron("30 2 * * *").following(at(day)) == at(day) + 9000

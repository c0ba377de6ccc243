"""Decay and due times as pure functions of stored values and an instant."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_system import lifecycle
from memory_system.lifecycle import SECONDS_PER_DAY, crossing_time, importance_at
from memory_system.settings import LifecycleSettings, TierSettings

quick = settings(deadline=None)
SETTINGS = LifecycleSettings()
units = st.floats(0.0, 1.0)
counts = st.integers(0, 10_000)
rates = st.floats(0.0, 10.0)
days = st.floats(0.0, 10_000.0)


def test_known_values() -> None:
    day = SECONDS_PER_DAY
    assert importance_at(0.8, 1000.0, 0, 0.1, 1000.0) == 0.8
    assert importance_at(0.8, 0.0, 0, 0.1, 10 * day) == pytest.approx(0.8 * math.exp(-1.0))
    assert importance_at(0.8, 0.0, 9, 0.1, 10 * day) == pytest.approx(0.8 * math.exp(-1.0 / (1 + math.log(10))))
    assert importance_at(0.8, 0.0, 0, 0.0, 1e12) == 0.8
    assert importance_at(1.0, 0.0, 0, 100.0, 1e15) == 0.0


@quick
@given(units, counts, rates, days, days)
def test_importance_never_grows_and_stays_in_its_range(
    importance: float, count: int, rate: float, first: float, more: float
) -> None:
    early = importance_at(importance, 0.0, count, rate, first * SECONDS_PER_DAY)
    late = importance_at(importance, 0.0, count, rate, (first + more) * SECONDS_PER_DAY)
    assert 0.0 <= late <= early <= importance <= 1.0


@quick
@given(units, counts, rates, days)
def test_a_clock_set_back_changes_nothing(importance: float, count: int, rate: float, back: float) -> None:
    assert importance_at(importance, 1e9, count, rate, 1e9 - back * SECONDS_PER_DAY) == importance


@quick
@given(units, st.integers(0, 1000), st.floats(0.001, 1.0), st.floats(0.1, 100.0))
def test_use_slows_the_decay(importance: float, count: int, rate: float, age_days: float) -> None:
    now_s = age_days * SECONDS_PER_DAY
    assert importance_at(importance, 0.0, count + 1, rate, now_s) >= importance_at(importance, 0.0, count, rate, now_s)


@quick
@given(units, st.integers(0, 100), st.floats(0.01, 1.0), st.floats(0.0, 50.0), st.floats(0.0, 50.0))
def test_computing_in_two_steps_is_computing_at_once(
    importance: float, count: int, rate: float, first: float, second: float
) -> None:
    middle = importance_at(importance, 0.0, count, rate, first * SECONDS_PER_DAY)
    stepped = importance_at(middle, 0.0, count, rate, second * SECONDS_PER_DAY)
    at_once = importance_at(importance, 0.0, count, rate, (first + second) * SECONDS_PER_DAY)
    assert stepped == pytest.approx(at_once, rel=1e-9, abs=1e-12)


@quick
@given(st.floats(0.01, 1.0), counts, st.floats(0.001, 10.0), st.floats(0.001, 1.0), st.floats(0.0, 2e9))
def test_the_crossing_is_where_importance_meets_the_threshold(
    importance: float, count: int, rate: float, threshold: float, since_s: float
) -> None:
    crossing = crossing_time(importance, since_s, count, rate, threshold)
    assert crossing is not None
    if importance <= threshold:
        assert crossing == since_s
    else:
        assert crossing >= since_s
        assert importance_at(importance, since_s, count, rate, crossing) == pytest.approx(threshold, rel=1e-4)


def test_crossings_that_never_come() -> None:
    assert crossing_time(0.5, 7.0, 0, 0.0, 0.1) is None
    assert crossing_time(0.5, 7.0, 0, 0.1, 0.0) is None
    assert crossing_time(0.0, 7.0, 0, 0.0, 0.0) == 7.0


def due_at(settings: LifecycleSettings = SETTINGS, **changes: object) -> float | None:
    values = {
        "memory_type": "general", "memory_tier": "short", "importance": 0.5, "importance_at_s": 0.0,
        "access_count": 0, "tier_since_s": 0.0, "expires_at_s": None,
    }  # fmt: skip
    return lifecycle.due_at(settings, **(values | changes))  # type: ignore[arg-type]


def test_due_is_the_earliest_reason() -> None:
    tier = SETTINGS.short
    max_age_s = tier.max_age_days * SECONDS_PER_DAY
    assert due_at() == max_age_s
    assert due_at(expires_at_s=5.0) == 5.0
    assert due_at(expires_at_s=1e12) == max_age_s
    assert due_at(importance=0.11) == crossing_time(0.11, 0.0, 0, tier.decay_rate, tier.archive_threshold)
    assert due_at(importance=0.05) == 0.0
    assert due_at(tier_since_s=100.0, importance=1.0) == max_age_s + 100.0


def test_sessions_are_due_at_their_expiry_alone() -> None:
    assert due_at(memory_type="session") is None
    assert due_at(memory_type="session", importance=0.0, expires_at_s=9.0) == 9.0
    assert lifecycle.decay_rate(SETTINGS, "session", "short") == 0.0


def test_each_tier_has_its_rate() -> None:
    settings = LifecycleSettings(medium=TierSettings(0.07, 1.0, 0.5, 0.1))
    assert [lifecycle.decay_rate(settings, "general", tier) for tier in ("short", "medium", "long")] == [
        0.1,
        0.07,
        0.01,
    ]
    assert lifecycle.tier_settings(settings, "medium").max_age_days == 1.0

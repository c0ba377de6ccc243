"""Nothing irreversible is done for a while after the wall clock was set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_system.clock_guard import ClockGuard
from memory_system.errors import ClockUnsettled

JUMP_S = 60.0
SETTLE_S = 600.0
START_S = 1.7e9

seconds = st.floats(0.0, 1e5)
small = st.floats(-JUMP_S / 2 + 0.01, JUMP_S / 2 - 0.01)
large = st.floats(JUMP_S + 1.0, 1e8) | st.floats(-1e8, -JUMP_S - 1.0)


def guard(not_before_s: float | None = None) -> ClockGuard:
    return ClockGuard(START_S, 100.0, jump_s=JUMP_S, settle_s=SETTLE_S, not_before_s=not_before_s)


@given(st.lists(st.tuples(seconds, small), max_size=20))
def test_a_clock_that_goes_evenly_is_always_settled(steps: list[tuple[float, float]]) -> None:
    """It may be off by up to half of what is allowed, in either direction, at every look."""
    clock, monotonic_s = guard(), 100.0
    for step_s, off_s in steps:
        monotonic_s += step_s
        clock.check(START_S + monotonic_s - 100.0 + off_s, monotonic_s)
        assert clock.unsettled_s(monotonic_s) == 0.0


@given(seconds, large, st.floats(0.0, SETTLE_S - 1.0))
def test_a_jump_is_found_and_waited_out(before_s: float, jump_s: float, waited_s: float) -> None:
    clock, monotonic_s = guard(), 100.0 + before_s
    wall_s = START_S + before_s + jump_s
    with pytest.raises(ClockUnsettled) as raised:
        clock.check(wall_s, monotonic_s)
    assert raised.value.details["retry_after_ms"] == pytest.approx(SETTLE_S * 1000.0)
    with pytest.raises(ClockUnsettled) as raised:
        clock.check(wall_s + waited_s, monotonic_s + waited_s)
    assert raised.value.details["retry_after_ms"] == pytest.approx((SETTLE_S - waited_s) * 1000.0, abs=1.0)
    clock.check(wall_s + SETTLE_S, monotonic_s + SETTLE_S + 0.001)


@given(st.lists(st.floats(JUMP_S * 0.6, JUMP_S * 0.9), min_size=2, max_size=10))
def test_small_jumps_in_one_direction_add_up(jumps_s: list[float]) -> None:
    clock, monotonic_s, off_s = guard(), 100.0, 0.0
    found = []
    for jump_s in jumps_s:
        monotonic_s += 1.0
        off_s += jump_s
        found.append(clock.observe(START_S + monotonic_s - 100.0 + off_s, monotonic_s))
    assert found[0] is False
    assert found[1] is True


@given(large, large)
def test_a_second_jump_begins_the_wait_anew(first_s: float, second_s: float) -> None:
    clock = guard()
    assert clock.observe(START_S + first_s + 1.0, 101.0)
    later_s = 101.0 + SETTLE_S - 1.0
    assert clock.observe(START_S + first_s + second_s + later_s - 100.0, later_s)
    assert clock.unsettled_s(later_s) == pytest.approx(SETTLE_S)
    assert clock.unsettled_s(later_s + SETTLE_S) == 0.0


def test_the_way_back_is_a_jump_too() -> None:
    clock = guard()
    assert clock.observe(START_S + 3600.0, 100.0)
    assert not clock.observe(START_S + 3601.0, 101.0)
    assert clock.observe(START_S + 2.0, 102.0)
    assert clock.unsettled_s(102.0) == SETTLE_S


def test_a_clock_that_was_set_back_while_nobody_watched() -> None:
    """The store was at work an hour after what the clock says now."""
    clock = guard(not_before_s=START_S + 3600.0)
    assert clock.unsettled_s(100.0) == SETTLE_S
    with pytest.raises(ClockUnsettled):
        clock.check(START_S, 100.0)
    clock.check(START_S + SETTLE_S + 1.0, 101.0 + SETTLE_S)
    assert guard(not_before_s=START_S + JUMP_S / 2).unsettled_s(100.0) == 0.0
    assert guard(not_before_s=START_S - 1e6).unsettled_s(100.0) == 0.0

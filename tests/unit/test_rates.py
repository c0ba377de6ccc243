"""Token buckets: bursts, the rate in the long run, batches above a bucket's size, and how many callers are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_system.rates import Rates


def test_a_burst_is_let_through_and_then_the_rate() -> None:
    rates = Rates(2.0, 3)
    assert [rates.take("ada", 0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert rates.take("ada", 0.25) == pytest.approx(0.25)  # a refusal costs nothing
    assert rates.take("ada", 0.5) == 0.0
    assert rates.take("ada", 0.5) == pytest.approx(0.5)


def test_a_pause_fills_the_bucket_and_no_more() -> None:
    rates = Rates(10.0, 3)
    assert rates.take("ada", 0.0, 3) == 0.0
    assert [rates.take("ada", 1000.0) > 0.0 for _ in range(5)] == [False, False, False, True, True]


def test_each_caller_has_a_bucket_of_its_own() -> None:
    rates = Rates(1.0, 1)
    assert (rates.take("ada", 0.0), rates.take("ben", 0.0)) == (0.0, 0.0)
    assert rates.take("ada", 0.0) > 0.0


def test_a_clock_that_stands_or_goes_back_gives_nothing() -> None:
    rates = Rates(1.0, 1)
    assert rates.take("ada", 100.0) == 0.0
    assert rates.take("ada", 50.0) == pytest.approx(1.0)
    assert rates.take("ada", 51.0) == 0.0


def test_what_is_larger_than_a_bucket_waits_for_a_full_one_and_is_paid_afterwards() -> None:
    rates = Rates(10.0, 5)
    assert rates.take("ada", 0.0, 25) == 0.0  # 20 are owed
    assert rates.take("ada", 1.0) == pytest.approx(1.1)
    assert rates.take("ada", 2.1) == 0.0


def test_the_parts_of_a_request_need_no_more_than_a_bucket_together() -> None:
    rates = Rates(1.0, 5)
    assert rates.take("ada", 0.0) == 0.0
    assert rates.take("ada", 0.0, 99, taken=1) == 0.0
    assert rates.take("ben", 0.0, 2) == 0.0
    assert rates.take("ben", 0.0) == 0.0
    assert rates.take("ben", 0.0, 99, taken=1) == pytest.approx(2.0)


def test_the_callers_that_are_remembered_are_bounded() -> None:
    rates = Rates(1.0, 1, max_callers=3)
    for name in "abc":
        assert rates.take(name, 0.0) == 0.0
    assert rates.take("a", 0.0) > 0.0
    assert rates.take("d", 0.0) == 0.0  # b was not seen for longest
    assert rates.take("a", 0.0) > 0.0
    assert rates.take("b", 0.0) == 0.0
    assert "3 callers" in repr(rates)


@given(
    st.floats(0.5, 100.0),
    st.integers(1, 50),
    st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(1, 120)), max_size=60),
)
def test_no_caller_gets_more_than_its_rate_and_a_burst(
    rate_per_s: float, burst: int, calls: list[tuple[float, int]]
) -> None:
    """Beside its rate and a burst, at most the rest of one request that was larger than a bucket."""
    rates, now_s, had = Rates(rate_per_s, burst), 0.0, 0
    for pause_s, cost in calls:
        now_s += pause_s
        wait_s = rates.take("ada", now_s, cost)
        if wait_s == 0.0:
            assert had + min(cost, burst) <= burst + rate_per_s * now_s + 1e-6
            had += cost
        else:
            assert rates.take("ada", now_s + wait_s + 1e-9, cost) == 0.0
            now_s += wait_s + 1e-9
            had += cost

"""The circuit breaker against a model of a few lines, and its rules one by one."""

from __future__ import annotations

import threading
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_system.breaker import CircuitBreaker

THRESHOLD = 3
RESET_S = 10.0


def opened(now_s: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker(THRESHOLD, RESET_S)
    for _ in range(THRESHOLD):
        assert breaker.allow(now_s)
        breaker.failure(now_s)
    assert breaker.state == "open"
    return breaker


def test_it_opens_at_the_threshold_and_not_before() -> None:
    breaker = CircuitBreaker(THRESHOLD, RESET_S)
    for _ in range(THRESHOLD - 1):
        breaker.failure(0.0)
    assert breaker.state == "closed"
    assert breaker.allow(0.0)
    breaker.failure(0.0)
    assert breaker.state == "open"
    assert not breaker.allow(0.0)


def test_a_success_forgets_the_failures_before_it() -> None:
    breaker = CircuitBreaker(THRESHOLD, RESET_S)
    for _ in range(10):
        breaker.failure(0.0)
        breaker.failure(0.0)
        breaker.success(0.0)
    assert breaker.state == "closed"


def test_after_the_timeout_exactly_one_probe_goes() -> None:
    breaker = opened(100.0)
    assert not breaker.allow(100.0 + RESET_S - 0.001)
    assert breaker.allow(100.0 + RESET_S)
    assert breaker.state == "half_open"
    assert not breaker.allow(100.0 + RESET_S)
    assert breaker.retry_after_s(100.0 + RESET_S) == RESET_S


def test_a_peer_that_is_back_is_probed_at_once_and_by_one() -> None:
    breaker = opened(100.0)
    breaker.peer_is_back()
    assert breaker.state == "open"
    assert breaker.retry_after_s(100.5) == 0.0
    assert breaker.allow(100.5)
    assert not breaker.allow(100.5)
    breaker.peer_is_back()  # the probe is out already
    assert not breaker.allow(100.5)
    breaker.failure(101.0)
    assert not breaker.allow(101.0 + RESET_S - 0.001)
    breaker.reset()
    breaker.peer_is_back()
    assert breaker.state == "closed"


def test_the_probe_decides() -> None:
    breaker = opened()
    assert breaker.allow(RESET_S)
    breaker.failure(RESET_S + 1.0)
    assert breaker.state == "open"
    assert breaker.retry_after_s(RESET_S + 1.0) == RESET_S
    assert breaker.allow(2 * RESET_S + 1.0)
    breaker.success(2 * RESET_S + 2.0)
    assert breaker.state == "closed"
    assert breaker.snapshot(30.0).failure_count == 0


def test_an_abandoned_probe_goes_to_the_next_caller() -> None:
    breaker = opened()
    assert breaker.allow(RESET_S)
    breaker.abandon()
    assert breaker.state == "half_open"
    assert breaker.retry_after_s(RESET_S) == 0.0
    assert breaker.allow(RESET_S)
    assert not breaker.allow(RESET_S)


def test_abandon_changes_nothing_unless_a_probe_is_out() -> None:
    breaker = CircuitBreaker(THRESHOLD, RESET_S)
    breaker.abandon()
    assert breaker.state == "closed"
    breaker = opened()
    breaker.abandon()
    assert not breaker.allow(RESET_S - 0.001)


def test_a_lost_probe_does_not_lock_it_for_ever() -> None:
    breaker = opened()
    assert breaker.allow(RESET_S)
    assert not breaker.allow(2 * RESET_S - 0.001)
    assert breaker.allow(2 * RESET_S)


def test_late_failures_do_not_prolong_the_outage() -> None:
    breaker = opened(0.0)
    breaker.failure(9.0)
    assert breaker.allow(RESET_S)


def test_a_late_success_closes_it() -> None:
    breaker = opened()
    breaker.success(1.0)
    assert breaker.allow(1.0)


def test_reset_is_as_new() -> None:
    breaker = opened()
    breaker.reset()
    assert breaker.snapshot(0.0) == CircuitBreaker(THRESHOLD, RESET_S).snapshot(0.0)


def test_the_snapshot_is_frozen_and_the_repr_shows_the_state() -> None:
    breaker = opened(5.0)
    seen = breaker.snapshot(6.0)
    assert (seen.state, seen.failure_count, seen.failure_threshold) == ("open", 3, 3)
    assert (seen.reset_timeout_s, seen.retry_after_s, seen.last_failure_s) == (10.0, 9.0, 5.0)
    with pytest.raises(FrozenInstanceError):
        seen.state = "closed"  # type: ignore[misc]
    assert repr(breaker) == "<CircuitBreaker open failures=3/3>"


@pytest.mark.parametrize(
    ("threshold", "reset_s"), [(0, 1.0), (1, 0.0), (1, -1.0), (1, float("inf")), (1, float("nan"))]
)
def test_limits_that_make_no_sense_are_refused(threshold: int, reset_s: float) -> None:
    with pytest.raises(ValueError):
        CircuitBreaker(threshold, reset_s)


class Model:
    """The same rules, written for reading: what is the state, and since when."""

    def __init__(self) -> None:
        self.failures = 0
        self.opened_s: float | None = None
        self.half_open = False
        self.probe_s: float | None = None

    def allow(self, now_s: float) -> bool:
        if self.half_open:
            free = self.probe_s is None or now_s >= self.probe_s + RESET_S
        elif self.opened_s is not None:
            free = now_s >= self.opened_s + RESET_S
        else:
            return True
        if free:
            self.half_open, self.opened_s, self.probe_s = True, None, now_s
        return free

    def success(self, now_s: float) -> None:
        self.__init__()  # type: ignore[misc]

    def failure(self, now_s: float) -> None:
        self.failures += 1
        if self.half_open or (self.opened_s is None and self.failures >= THRESHOLD):
            self.half_open, self.opened_s = False, now_s

    def abandon(self) -> None:
        if self.half_open:
            self.probe_s = None

    @property
    def state(self) -> str:
        return "half_open" if self.half_open else "closed" if self.opened_s is None else "open"


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["allow", "allow", "success", "failure", "failure", "abandon", "reset"]),
        st.sampled_from([0.0, 0.5, 4.0, 10.0, 25.0]),
    ),
    max_size=60,
)


@given(STEPS)
def test_it_behaves_as_the_model(steps: list[tuple[str, float]]) -> None:
    breaker, model, now_s = CircuitBreaker(THRESHOLD, RESET_S), Model(), 1000.0
    for name, later_s in steps:
        now_s += later_s
        if name == "allow":
            promised = breaker.retry_after_s(now_s) == 0.0
            allowed = breaker.allow(now_s)
            assert allowed == model.allow(now_s) == promised
        elif name == "abandon":
            breaker.abandon()
            model.abandon()
        elif name == "reset":
            breaker.reset()
            model.success(now_s)
        else:
            getattr(breaker, name)(now_s)
            getattr(model, name)(now_s)
        assert breaker.state == model.state
        assert breaker.snapshot(now_s).failure_count == model.failures
        assert 0.0 <= breaker.retry_after_s(now_s) <= RESET_S


@given(STEPS)
def test_it_never_stays_shut(steps: list[tuple[str, float]]) -> None:
    """Whatever happened before, a caller who waits as long as it is told may try."""
    breaker, now_s = CircuitBreaker(THRESHOLD, RESET_S), 1000.0
    for name, later_s in steps:
        now_s += later_s
        method = getattr(breaker, name)
        if name in ("abandon", "reset"):
            method()
        else:
            method(now_s)
    assert breaker.allow(now_s + breaker.retry_after_s(now_s))


def test_many_threads_get_one_probe() -> None:
    breaker = opened()
    start = threading.Barrier(16)
    allowed: list[bool] = []

    def ask() -> None:
        start.wait()
        allowed.append(breaker.allow(RESET_S))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(allowed) == [False] * 15 + [True]

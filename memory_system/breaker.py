"""Circuit breaker: a pure state machine; the clock is a parameter, so nothing here waits or reads time.

    CLOSED --failure_threshold failures in a row--> OPEN --reset_timeout_s--> HALF_OPEN (one probe)
    HALF_OPEN --success--> CLOSED        HALF_OPEN --failure--> OPEN        OPEN --peer_is_back--> HALF_OPEN at once

What counts as a failure is the caller's decision. A verdict is about the peer, not about the call that brought it:
a success that arrives late, from a call begun before the breaker opened, closes it as well.
Who opens it, and who closes it, is told so. All times are monotonic seconds.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["closed", "open", "half_open"]
# What a verdict changed. A probe that fails changes nothing: the breaker stays open.
Transition = Literal["opened", "closed"]


@dataclass(frozen=True, slots=True)
class BreakerSnapshot:
    """The breaker at one instant. `last_failure_s` is on the caller's monotonic clock, None if there was none."""

    state: State
    failure_count: int
    failure_threshold: int
    reset_timeout_s: float
    retry_after_s: float
    last_failure_s: float | None

    def figures(self, now_s: float, wall_s: float) -> dict[str, Any]:
        """For a person, with `last_failure_time` in epoch seconds; `wall_s` is those of `now_s`."""
        ago_s = None if self.last_failure_s is None else now_s - self.last_failure_s
        return {
            "state": self.state,
            "failure_count": self.failure_count,
            "failure_threshold": self.failure_threshold,
            "last_failure_time": None if ago_s is None else round(wall_s - ago_s, 3),
            "reset_timeout_s": self.reset_timeout_s,
            "next_attempt_in_s": self.retry_after_s,
        }


class CircuitBreaker:
    """Safe to use from many threads: every method holds a lock for a few instructions and calls nothing outside.

    A caller for whom `allow` returned True reports exactly one of `success`, `failure` and `abandon`. A probe that
    never reports counts as lost after `reset_timeout_s`, and the next caller probes instead.
    """

    def __init__(self, failure_threshold: int = 5, reset_timeout_s: float = 30.0) -> None:
        if failure_threshold < 1:
            raise ValueError(f"failure_threshold must be at least 1, not {failure_threshold}")
        if not 0.0 < reset_timeout_s < float("inf"):
            raise ValueError(f"reset_timeout_s must be positive and finite, not {reset_timeout_s}")
        self.failure_threshold = failure_threshold
        self.reset_timeout_s = reset_timeout_s
        self._lock = threading.Lock()
        self._state: State = "closed"
        self._failure_count = 0
        self._last_failure_s: float | None = None
        # When the next caller may probe: the end of OPEN, or the expiry of the probe that is out.
        self._probe_at_s = 0.0

    def allow(self, now_s: float) -> bool:
        """Whether a call may be made now. While not closed, True means: this call is the probe."""
        with self._lock:
            if self._state == "closed":
                return True
            if now_s < self._probe_at_s:
                return False
            self._state = "half_open"
            self._probe_at_s = now_s + self.reset_timeout_s
            return True

    def success(self, now_s: float) -> Transition | None:
        """The peer answered: close, and forget the failures counted so far."""
        with self._lock:
            self._failure_count = 0
            return self._close()

    def failure(self, now_s: float) -> Transition | None:
        """The peer did not answer. While open it changes no deadline: late failures must not prolong the outage."""
        with self._lock:
            self._failure_count += 1
            self._last_failure_s = now_s
            before = self._state
            if before == "half_open" or (before == "closed" and self._failure_count >= self.failure_threshold):
                self._state = "open"
                self._probe_at_s = now_s + self.reset_timeout_s
                return "opened" if before == "closed" else None
            return None

    def peer_is_back(self) -> None:
        """There is a new sign of the peer (a connection came up): if the breaker is open, the next caller probes."""
        with self._lock:
            if self._state == "open":
                self._probe_at_s = float("-inf")

    def abandon(self) -> None:
        """The call ended without a verdict (busy, cancelled): if it was the probe, the next caller gets it."""
        with self._lock:
            if self._state == "half_open":
                self._probe_at_s = float("-inf")

    def reset(self) -> Transition | None:
        """Back to the state after construction."""
        with self._lock:
            self._failure_count = 0
            self._last_failure_s = None
            return self._close()

    def _close(self) -> Transition | None:
        before, self._state = self._state, "closed"
        return None if before == "closed" else "closed"

    def retry_after_s(self, now_s: float) -> float:
        """Seconds until `allow` can return True; 0.0 if it would now."""
        with self._lock:
            return self._retry_after_s(now_s)

    def _retry_after_s(self, now_s: float) -> float:
        return 0.0 if self._state == "closed" else max(0.0, self._probe_at_s - now_s)

    @property
    def state(self) -> State:
        """`open` stays until a caller asks `allow` after `reset_timeout_s`: time alone changes nothing here."""
        return self._state

    def snapshot(self, now_s: float) -> BreakerSnapshot:
        with self._lock:
            return BreakerSnapshot(
                state=self._state,
                failure_count=self._failure_count,
                failure_threshold=self.failure_threshold,
                reset_timeout_s=self.reset_timeout_s,
                retry_after_s=self._retry_after_s(now_s),
                last_failure_s=self._last_failure_s,
            )

    def __repr__(self) -> str:
        return f"<CircuitBreaker {self._state} failures={self._failure_count}/{self.failure_threshold}>"

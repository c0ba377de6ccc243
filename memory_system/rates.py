"""How many requests each caller may make: token buckets. Pure: the clock is passed in."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

_MAX_CALLERS: Final = 10_000


class Rates:
    """A bucket for each caller: it holds `burst` tokens, and gets `rate_per_s` of them a second.

    At most `max_callers` are remembered, those seen last; one that was forgotten begins with a full bucket. What costs
    more than a bucket holds is let through when the bucket is full, and paid afterwards: the rate holds on average.
    """

    def __init__(self, rate_per_s: float, burst: float, *, max_callers: int = _MAX_CALLERS) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._max_callers = max_callers
        # Ordered by when they were last seen. caller -> tokens (below 0: owed), and when there were so many
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __repr__(self) -> str:
        return f"Rates({self._rate_per_s:g} per s, burst {self._burst:g}, {len(self._buckets)} callers)"

    def take(self, caller: str, now_s: float, cost: int = 1, *, taken: int = 0) -> float:
        """Take `cost` tokens, and 0.0; or take none, and the seconds until it is worth to try again.

        `now_s`: monotonic. `taken`: what the same request has taken before, so that its parts need no more together
        than a bucket holds.
        """
        tokens, then_s = self._buckets.get(caller, (self._burst, now_s))
        tokens = min(self._burst, tokens + max(0.0, now_s - then_s) * self._rate_per_s)
        missing = min(float(cost), self._burst - taken) - tokens
        if missing <= 0.0:
            tokens -= cost
        self._buckets[caller] = tokens, now_s
        self._buckets.move_to_end(caller)
        if len(self._buckets) > self._max_callers:
            self._buckets.popitem(last=False)
        return max(0.0, missing) / self._rate_per_s

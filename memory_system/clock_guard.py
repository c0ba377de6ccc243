"""Whether the wall clock can be trusted with what cannot be undone. Pure: both clocks are passed in.

A clock that is set forward makes every memory look old, one that is set back makes `now` come before what was written.
Reads follow the clock whatever it does, for they change nothing. What archives, merges or deletes waits: the wall
clock is compared with the monotonic one, which nobody can set, and when the two have gone apart by more than `jump_s`,
nothing irreversible is done for `settle_s`. Then the wall clock is taken for right, as whoever set it had the time to
set it right.
"""

from __future__ import annotations

from memory_system.errors import ClockUnsettled


class ClockGuard:
    """Compares wall and monotonic time, both in seconds.

    `not_before_s`: the wall time at which the store was last known to be at work, where there is one. A clock that
    begins before it by more than `jump_s` was set back while the program was down.
    """

    def __init__(
        self, wall_s: float, monotonic_s: float, *, jump_s: float, settle_s: float, not_before_s: float | None = None
    ) -> None:
        self._jump_s = jump_s
        self._settle_s = settle_s
        self._ahead_s = wall_s - monotonic_s
        self._settled_at_s = monotonic_s
        if not_before_s is not None and not_before_s - wall_s > jump_s:
            self._settled_at_s += settle_s

    def __repr__(self) -> str:
        return f"ClockGuard(ahead_s={self._ahead_s:.3f}, settled_at_s={self._settled_at_s:.3f})"

    def observe(self, wall_s: float, monotonic_s: float) -> bool:
        """Compare the clocks as of now; True when a jump was found, which begins the wait anew.

        They are compared with how they stood at the start or at the last jump, so that many small steps count too.
        """
        ahead_s = wall_s - monotonic_s
        if abs(ahead_s - self._ahead_s) <= self._jump_s:
            return False
        self._ahead_s = ahead_s
        self._settled_at_s = monotonic_s + self._settle_s
        return True

    def unsettled_s(self, monotonic_s: float) -> float:
        """How long nothing irreversible is to be done yet; 0 when the clock is settled."""
        return max(0.0, self._settled_at_s - monotonic_s)

    def check(self, wall_s: float, monotonic_s: float) -> None:
        """Observe, and raise ClockUnsettled while the clock is not settled."""
        self.observe(wall_s, monotonic_s)
        left_s = self.unsettled_s(monotonic_s)
        if left_s > 0.0:
            raise ClockUnsettled(
                f"the clock of this machine was moved a moment ago; nothing irreversible is done for {left_s:.0f} s",
                retry_after_ms=round(left_s * 1000.0),
            )

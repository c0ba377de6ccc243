"""When the index applies what was committed: at once while that is little, together while commits follow each other."""

from __future__ import annotations

import threading
import time
from typing import Final

# A commit that nobody told of is applied after this at the latest.
_POLL_S: Final = 1.0
# To apply one row alone costs ten times what it does among others, and searches look at what is not applied by
# themselves: so commits are gathered, longer while they go on.
_GATHER_S: Final = (0.005, 0.1)


class Pace:
    """`wait` is the index thread's; the rest is cheap, and for any thread."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self._hurry = threading.Event()
        self._gather_s = _GATHER_S[0]
        self._stopped = threading.Event()

    def __repr__(self) -> str:
        return f"<Pace gather={self._gather_s}>"

    def tell(self) -> None:
        """Something was committed."""
        self._told.set()

    def hurry(self) -> None:
        """Somebody waits for what is being committed: the next of it is gathered for the least time only."""
        self._hurry.set()

    def ask(self) -> None:
        """Something else is to be done, and somebody waits for it."""
        self._hurry.set()
        self._told.set()

    def stop(self) -> None:
        """End a wait, and those to come."""
        self._stopped.set()
        self.ask()

    def begin(self) -> None:
        """Whatever is told from now on is to be looked at again."""
        self._told.clear()
        if self._stopped.is_set():
            self._told.set()

    def wait(self) -> None:
        """Return when something was told since `begin`, and what follows it is gathered."""
        least_s, longest_s = _GATHER_S
        began_s = time.monotonic()
        if not self._told.wait(_POLL_S):
            self._gather_s = least_s
            return
        at_once = time.monotonic() - began_s < self._gather_s
        self._gather_s = min(longest_s, 2 * self._gather_s) if at_once else least_s
        # Who waits is told of each step, and hurries again: so not even then a commit is applied without any other.
        if not self._stopped.wait(least_s) and self._hurry.wait(self._gather_s - least_s):
            self._gather_s = least_s
            self._hurry.clear()

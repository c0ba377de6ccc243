"""What the thread of the index tells others, and who waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future


class News:
    """What was applied, by whichever thread; told by one of them alone."""

    def __init__(self, on_missing: Callable[[list[int]], None], on_advance: Callable[[int], None]) -> None:
        self._on_missing, self._on_advance = on_missing, on_advance
        self._missing: deque[list[int]] = deque()
        self._told_seq = -1

    def note(self, missing: list[int]) -> None:
        """Rows that have no vector yet. From any thread."""
        if missing:
            self._missing.append(missing)

    def tell(self, seq: int, anew: bool = False) -> None:
        """Every change up to `seq` can be searched. `anew`: to be told even if it was before."""
        while self._missing:
            self._on_missing(self._missing.popleft())
        if seq != self._told_seq or anew:
            self._told_seq = seq
            self._on_advance(seq)


class Saves:
    """Who waits for a snapshot."""

    def __init__(self) -> None:
        self._wanted: deque[Future[bool]] = deque()

    def __len__(self) -> int:
        return len(self._wanted)

    def ask(self) -> Future[bool]:
        """Whether the next snapshot was saved. From any thread."""
        wanted: Future[bool] = Future()
        self._wanted.append(wanted)
        return wanted

    def answer(self, count: int, saved: bool) -> None:
        """Tell the first `count` of those who wait: those who asked before the snapshot was begun."""
        for _ in range(count):
            wanted = self._wanted.popleft()
            if wanted.set_running_or_notify_cancel():
                wanted.set_result(saved)

    def cancel(self) -> None:
        while self._wanted:
            self._wanted.popleft().cancel()

"""Contexts that were built before, given again while nothing they were made of has changed.

A context is kept with the namespace's commit_seq that was asked for *before* it was built, so whatever was written
since then has raised it: as long as `get_commit_seq` gives the same number, no memory has changed. What changes without
a commit (importance fades, days pass) is bounded by a time to live, and what expires by its own end. What was made
while vectors were missing is kept for one purpose only, to be there when the service is not.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

T = TypeVar("T")
Key = tuple[str, Hashable]  # namespace, and the question

MIB: Final = 2**20
SWEEP_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Kept(Generic[T]):
    """A context with its commit_seq. Monotonic seconds: asked for at `made_s`, as it should be until `until_s`."""

    value: T
    commit_seq: int
    made_s: float
    until_s: float
    size: int


class ContextCache(Generic[T]):
    """The contexts used last, up to a number and a size. Monotonic seconds are given with each call."""

    def __init__(self, entries: int, max_bytes: float, ttl_s: float, stale_s: float) -> None:
        self._entries = entries
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._stale_s = stale_s
        self._kept: OrderedDict[Key, Kept[T]] = OrderedDict()
        self._bytes = 0
        self._swept_s = 0.0
        self._dropped_s = -math.inf
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"<ContextCache {len(self)} entries {self.counts}>"

    @property
    def megabytes(self) -> float:
        return self._bytes / MIB

    @property
    def hit_rate(self) -> float | None:
        """The share of questions that were answered from here while the service answered; None before the first."""
        asked = self.counts["hit"] + self.counts["miss"]
        return self.counts["hit"] / asked if asked else None

    def current(self, key: Key, commit_seq: int, now_s: float) -> Kept[T] | None:
        """What was built for this key, if it would be built the same now."""
        kept = self._kept.get(key)
        if kept is None or kept.commit_seq != commit_seq or now_s >= kept.until_s:
            self.counts["miss"] += 1
            return None
        self.counts["hit"] += 1
        self._kept.move_to_end(key)
        return kept

    def last(self, key: Key, now_s: float) -> Kept[T] | None:
        """What was last built for this key, however much may have changed since, unless that is too long ago."""
        kept = self._kept.get(key)
        if kept is None or now_s - kept.made_s > self._stale_s:
            return None
        self.counts["stale"] += 1
        return kept

    def put(self, key: Key, value: T, commit_seq: int, asked_s: float, *, lasts_s: float, size: int) -> None:
        """Keep what was built for a question of `asked_s`, when commit_seq was asked for. `lasts_s`: how long it stays
        as it is even if nothing is changed; 0: it is stale at once."""
        self._forget(key)
        self._sweep(asked_s)
        # What was read before something was dropped may have it.
        if self._entries <= 0 or size > self._max_bytes or asked_s <= self._dropped_s:
            return
        self._kept[key] = Kept(value, commit_seq, asked_s, asked_s + min(lasts_s, self._ttl_s), size)
        self._bytes += size
        while len(self._kept) > self._entries or self._bytes > self._max_bytes:
            self._forget(next(iter(self._kept)))

    def drop(self, namespace: str, now_s: float) -> None:
        """Drop all contexts of a namespace, and those that are being built: they must not be given again, stale or
        not."""
        self._dropped_s = now_s
        for key in [key for key in self._kept if key[0] == namespace]:
            self._forget(key)

    def _sweep(self, now_s: float) -> None:
        """Drop, now and then, what is too old to be given even stale: it may have been deleted long ago."""
        if now_s - self._swept_s >= SWEEP_S:
            self._swept_s = now_s
            oldest_s = now_s - max(self._stale_s, self._ttl_s)
            for key in [key for key, kept in self._kept.items() if kept.made_s < oldest_s]:
                self._forget(key)

    def _forget(self, key: Key) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._bytes -= kept.size

"""Accesses are counted in memory and written in batches, so that a read never waits for a write."""

from __future__ import annotations

from memory_system.models import Memory

Accesses = dict[int, tuple[int, float, float]]


class AccessBuffer:
    """row_id -> (how many, summed weight, time of the last). A crash loses at most one interval of counts."""

    def __init__(self) -> None:
        self._accesses: Accesses = {}

    def __len__(self) -> int:
        return len(self._accesses)

    def note(self, memory: Memory, weight: float, now_s: float) -> None:
        count, total, _ = self._accesses.get(memory.row_id, (0, 0.0, 0.0))
        self._accesses[memory.row_id] = (count + 1, total + weight, now_s)

    def put_back(self, accesses: Accesses) -> None:
        """Count again what could not be written."""
        for row_id, (count, weight, last_s) in accesses.items():
            now_count, now_weight, now_last_s = self._accesses.get(row_id, (0, 0.0, 0.0))
            self._accesses[row_id] = (count + now_count, weight + now_weight, max(last_s, now_last_s))

    def take(self) -> Accesses:
        taken, self._accesses = self._accesses, {}
        return taken

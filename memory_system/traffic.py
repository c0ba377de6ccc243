"""Requests counted by action and outcome, with their latencies; pure, and about half a microsecond for each."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

SUCCESS: Final = "success"
# Upper bounds of the histogram's buckets, from a cached read to the longest deadline of a client.
BOUNDS_S: Final = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_SUM: Final = len(BOUNDS_S) + 1


@dataclass(frozen=True, slots=True)
class Latency:
    """How long requests took. `counts[i]`: those of at most BOUNDS_S[i] seconds and above the bound before it; the
    last is of those above all bounds."""

    counts: tuple[int, ...]
    total_s: float

    @property
    def count(self) -> int:
        return sum(self.counts)


class Traffic:
    """What one program answered since its start.

    `record` belongs to one thread; the rest may be called from any. Both labels must come from closed lists (actions
    that exist, error codes), so that no caller can make this grow.
    """

    __slots__ = ("_cells",)

    def __init__(self) -> None:
        # (action, outcome) -> a counter for each bucket, then the sum of seconds
        self._cells: dict[tuple[str, str], list[float]] = {}

    def record(self, action: str, outcome: str, elapsed_s: float) -> None:
        """A request was answered; `outcome` is SUCCESS or an error code."""
        cell = self._cells.get((action, outcome))
        if cell is None:
            cell = self._cells[action, outcome] = [0] * _SUM + [0.0]
        cell[bisect_left(BOUNDS_S, elapsed_s)] += 1
        cell[_SUM] += elapsed_s

    def latencies(self) -> dict[tuple[str, str], Latency]:
        """By (action, outcome), as of now."""
        # Copied in one step each: another thread may be recording.
        cells = {labels: cell.copy() for labels, cell in self._cells.copy().items()}
        return {labels: Latency(tuple(int(n) for n in cell[:_SUM]), cell[_SUM]) for labels, cell in cells.items()}

    def counts(self) -> dict[tuple[str, str], int]:
        """Answers by (action, outcome)."""
        return {labels: latency.count for labels, latency in self.latencies().items()}

    def requests(self) -> dict[str, int]:
        """The `requests` of health_check: successes by action and errors by code."""
        found: Counter[str] = Counter()
        for (action, outcome), count in self.counts().items():
            found[action if outcome == SUCCESS else outcome] += count
        return dict(found)


def by_action(latencies: Mapping[tuple[str, str], Latency]) -> dict[str, Latency]:
    """The latencies of each action, whatever its outcome."""
    found: dict[str, Latency] = {}
    for (action, _), latency in latencies.items():
        known = found.get(action)
        if known is not None:
            counts = tuple(a + b for a, b in zip(known.counts, latency.counts, strict=True))
            latency = Latency(counts, known.total_s + latency.total_s)
        found[action] = latency
    return found

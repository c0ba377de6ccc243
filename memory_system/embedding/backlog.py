"""The rows that wait for a vector, and whose turn it is. Pure: no clock, no I/O."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Origin = Literal["fresh", "backfill", "suspect"]


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows that are embedded together, in the order of their turn."""

    row_ids: tuple[int, ...]
    origin: Origin


class _RowHeap:
    """A set of row ids that gives the largest (or smallest) first; a discarded row leaves the heap lazily."""

    def __init__(self, *, newest_first: bool) -> None:
        self._sign = -1 if newest_first else 1
        self._heap: list[int] = []
        self._rows: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row_id: int) -> bool:
        return row_id in self._rows

    def add(self, row_id: int) -> None:
        if row_id not in self._rows:
            self._rows.add(row_id)
            heapq.heappush(self._heap, self._sign * row_id)

    def discard(self, row_id: int) -> None:
        self._rows.discard(row_id)
        if len(self._heap) > 2 * len(self._rows) + 64:
            self._heap = [self._sign * row for row in self._rows]
            heapq.heapify(self._heap)

    def take(self, limit: int) -> tuple[int, ...]:
        taken: list[int] = []
        while self._heap and len(taken) < limit:
            row_id = self._sign * heapq.heappop(self._heap)
            # A row that was discarded and added again stands in the heap twice.
            if row_id in self._rows:
                self._rows.remove(row_id)
                taken.append(row_id)
        return tuple(taken)


class RowBacklog:
    """Three queues without duplicates: newest writes, backfill, and suspects (rows of a batch that failed).

    The newest writes go first; while another queue waits too, that one gets `backfill_share` of the batches.
    Suspects share the turns of backfill and go before it.
    """

    def __init__(self, backfill_share: float) -> None:
        self._share = backfill_share
        self._credit = 0.0
        self._fresh = _RowHeap(newest_first=True)
        self._backfill = _RowHeap(newest_first=False)
        self._suspects: deque[tuple[int, ...]] = deque()

    def __len__(self) -> int:
        return len(self._fresh) + len(self._backfill) + sum(map(len, self._suspects))

    @property
    def depth(self) -> tuple[int, int]:
        """How many rows wait as newest writes, and how many otherwise."""
        return len(self._fresh), len(self) - len(self._fresh)

    def add(self, row_ids: Iterable[int]) -> None:
        for row_id in row_ids:
            if not self._suspected(row_id):
                self._backfill.discard(row_id)
                self._fresh.add(row_id)

    def backfill(self, row_ids: Iterable[int]) -> None:
        for row_id in row_ids:
            if row_id not in self._fresh and not self._suspected(row_id):
                self._backfill.add(row_id)

    def discard(self, row_ids: Iterable[int]) -> None:
        gone = set(row_ids)
        for row_id in gone:
            self._fresh.discard(row_id)
            self._backfill.discard(row_id)
        if self._suspects:
            kept = (tuple(row for row in group if row not in gone) for group in self._suspects)
            self._suspects = deque(group for group in kept if group)

    def take(self, limit: int) -> RowBatch | None:
        """Take up to `limit` rows of the queue whose turn it is; None when nothing waits."""
        others = len(self._backfill) or self._suspects
        if not self._fresh and not others:
            return None
        if self._fresh and not (others and self._others_turn()):
            return RowBatch(self._fresh.take(limit), "fresh")
        if self._suspects:
            return RowBatch(self._suspects.popleft(), "suspect")
        return RowBatch(self._backfill.take(limit), "backfill")

    def put_back(self, row_ids: Sequence[int], origin: Origin) -> None:
        """Return rows that were taken and not embedded; they keep their place."""
        if not row_ids:
            return
        if origin == "suspect":
            self._suspect(row_ids)
        elif origin == "fresh":
            self.add(row_ids)
        else:
            self.backfill(row_ids)

    def split(self, row_ids: Sequence[int]) -> None:
        """Return rows at which the embedder failed, in halves, so that the one to blame is found."""
        middle = (len(row_ids) + 1) // 2
        self._suspect(row_ids[:middle])
        self._suspect(row_ids[middle:])

    def _suspect(self, row_ids: Sequence[int]) -> None:
        # A suspect that was added again meanwhile must not go with others: they would fail with it.
        for row_id in row_ids:
            self._fresh.discard(row_id)
            self._backfill.discard(row_id)
        if row_ids:
            self._suspects.append(tuple(row_ids))

    def _suspected(self, row_id: int) -> bool:
        return any(row_id in group for group in self._suspects)

    def _others_turn(self) -> bool:
        self._credit += self._share
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True

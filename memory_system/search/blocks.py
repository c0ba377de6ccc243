"""Rows of numbers by slot, in blocks: more rows never move those that are there, so growth stalls nobody."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Slots = npt.NDArray[np.int64]

_ROWS: Final = 1 << 16
# Rows copied together before they are multiplied: they stay in the processor's cache.
_TOGETHER: Final = 1024


class Blocks:
    """Float32 rows of one width. Memory is taken as rows are written. Not thread-safe.

    `by_axis`: the first numbers of all rows of a block stand together, then their second ones, and so on. Products with
    all rows in order then take half the time, those with some of them longer.
    """

    def __init__(self, width: int, by_axis: bool = False) -> None:
        self.width = width
        self._by_axis = by_axis
        self._blocks: list[Floats] = []

    def __repr__(self) -> str:
        return f"<Blocks width={self.width} blocks={len(self._blocks)}>"

    def put(self, slot: int, row: Floats) -> None:
        self._reserve(slot)
        self._blocks[slot // _ROWS][slot % _ROWS] = row

    def put_each(self, slots: Slots, rows: Floats) -> None:
        """Write rows of ascending slots."""
        if len(slots):
            self._reserve(int(slots[-1]))
            for block, base, part in self._parts(slots):
                first, last = int(slots[part.start]) - base, int(slots[part.stop - 1]) - base
                whole = last - first + 1 == part.stop - part.start
                block[slice(first, last + 1) if whole else slots[part] - base] = rows[part]

    def row(self, slot: int) -> Floats:
        row: Floats = self._blocks[slot // _ROWS][slot % _ROWS]
        return row

    def rows(self, slots: Slots) -> Floats:
        """Copies of the rows of ascending slots: [slots, width]."""
        if self._by_axis:
            turned = np.empty((self.width, len(slots)), np.float32)
            for block, base, part in self._parts(slots):
                block.T.take(slots[part] - base, axis=1, out=turned[:, part], mode="clip")
            return turned.T
        found = np.empty((len(slots), self.width), np.float32)
        for block, base, part in self._parts(slots):
            block.take(slots[part] - base, axis=0, out=found[part], mode="clip")
        return found

    def products(self, query: Floats, first: int, end: int) -> Floats:
        """The inner products of the query with the rows of all slots from `first` up to `end`; 0 for those never
        written."""
        found = np.empty(max(0, end - first), np.float32)
        found[max(0, len(self._blocks) * _ROWS - first) :] = 0.0
        for at in range(first // _ROWS, min(len(self._blocks), -(-end // _ROWS))):
            begin, stop = max(first, at * _ROWS), min(end, (at + 1) * _ROWS)
            rows = self._blocks[at][begin - at * _ROWS : stop - at * _ROWS]
            # matmul, because dot copies rows that stand by axis.
            multiply = np.matmul if self._by_axis else np.dot
            multiply(rows, query, out=found[begin - first : stop - first])
        return found

    def products_between(self, query: Floats, firsts: Slots, ends: Slots) -> Floats:
        """The inner products of the query with the rows of ascending ranges of slots, all of them written, one range
        behind the other."""
        found = np.empty(int((ends - firsts).sum()), np.float32)
        at = 0
        for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
            while first < end:
                block, row = divmod(first, _ROWS)
                count = min(end - first, _ROWS - row)
                np.dot(self._blocks[block][row : row + count], query, out=found[at : at + count])
                first, at = first + count, at + count
        return found

    def products_of(self, query: Floats, slots: Slots) -> Floats:
        """The inner products of the query with the rows of ascending slots."""
        found = np.empty(len(slots), np.float32)
        for start in range(0, len(slots), _TOGETHER):
            part = slice(start, start + _TOGETHER)
            np.dot(self.rows(slots[part]), query, out=found[part])
        return found

    def _parts(self, slots: Slots) -> list[tuple[Floats, int, slice]]:
        """Each block that some of the ascending slots are in, its first slot, and which of them are."""
        if not len(slots):
            return []
        first, last = int(slots[0]) // _ROWS, int(slots[-1]) // _ROWS
        if first == last:
            return [(self._blocks[first], first * _ROWS, slice(0, len(slots)))]
        cuts = [0, *np.searchsorted(slots, np.arange(first + 1, last + 1) * _ROWS).tolist(), len(slots)]
        return [
            (self._blocks[at], at * _ROWS, slice(cuts[at - first], cuts[at - first + 1]))
            for at in range(first, last + 1)
            if cuts[at - first] < cuts[at - first + 1]
        ]

    def _reserve(self, slot: int) -> None:
        while slot >= len(self._blocks) * _ROWS:
            block = _zeros((self.width, _ROWS) if self._by_axis else (_ROWS, self.width))
            self._blocks.append(block.T if self._by_axis else block)


def _zeros(shape: tuple[int, int]) -> Floats:
    """Zeroed by the system, which gives pages only where rows are written, and gets them back with the last reference:
    malloc would keep what one half of a gigabyte of short forms leaves behind when another takes its place."""
    area = mmap.mmap(-1, max(1, 4 * shape[0] * shape[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without huge pages
        area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, np.float32, shape[0] * shape[1]).reshape(shape)

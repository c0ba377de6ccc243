"""Where short forms stand once they are in cells: cell after cell, and behind these, as they came, those in none."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from memory_system.search.blocks import Slots

NONE: Final = -1


class Order:
    """Places by slot and slots by place. Not thread-safe.

    `bounds`: [cells + 1], each cell's first place, and the one behind the last cell; `top`: the number of places ever
    used. A slot that is written again gets a place behind the cells, and its old one stands for none. One that is
    dropped keeps its place: nobody asks for it until it is written again.
    """

    def __init__(self, slots: Slots, cells: npt.NDArray[np.uint16], count: int) -> None:
        """`cells`: which of `count` cells each of the ascending slots belongs to."""
        by_cell = np.argsort(cells, kind="stable")
        reach = int(slots.max(initial=-1)) + 1
        self.count = count
        self.bounds: Slots = np.searchsorted(cells[by_cell], np.arange(count + 1))
        self.top = len(slots)
        self._slots = slots[by_cell].astype(np.int32)
        self._places = np.full(reach, NONE, np.int32)
        self._places[self._slots] = np.arange(len(slots))
        self._cells = np.full(reach, count, np.uint16)
        self._cells[slots] = cells

    def __repr__(self) -> str:
        return f"<Order cells={self.count} places={self.top} loose={self.loose}>"

    @property
    def loose(self) -> int:
        """How many places are behind the cells."""
        return self.top - int(self.bounds[-1])

    def slots(self, places: Slots) -> Slots:
        """The slot at each place, -1 where there is none."""
        return self._slots.take(places).astype(np.int64)

    def places(self, slots: Slots) -> Slots:
        """The ascending places of slots, all of which have one."""
        return np.sort(self._places.take(slots)).astype(np.int64)

    def cells(self, slots: Slots) -> npt.NDArray[np.uint16]:
        """The cell of each slot, all of which have a place; `count` behind the cells."""
        return self._cells.take(slots)

    def put(self, slot: int) -> int:
        """Where a slot's form is to be written."""
        self._reserve(slot)
        place = int(self._places[slot])
        if place >= self.bounds[-1]:
            return place
        if place != NONE:
            self._slots[place] = NONE
        place, self.top = self.top, self.top + 1
        self._slots[place], self._places[slot], self._cells[slot] = slot, place, self.count
        return place

    def _reserve(self, slot: int) -> None:
        if slot >= len(self._places):
            more = slot + 1 - len(self._places) + len(self._places) // 8
            self._places, self._cells = _longer(self._places, more, NONE), _longer(self._cells, more, self.count)
        if self.top == len(self._slots):
            self._slots = _longer(self._slots, 1024 + self.top // 8, NONE)


def _longer(array: npt.NDArray[Any], more: int, value: int) -> npt.NDArray[Any]:
    return np.concatenate([array, np.full(more, value, array.dtype)])

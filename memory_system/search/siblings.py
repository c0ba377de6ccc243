"""The order of memories below one parent, as links from each slot to the ones before and after it."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import Final

import numpy as np
import numpy.typing as npt

Links = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]
Times = npt.NDArray[np.float64]
Key = tuple[float, int]

NONE: Final = -1
_START: Final = 1024


class Siblings:
    """Slots in the order of (time in epoch seconds, row id) below each parent. Not thread-safe.

    `before`, `after`: for each slot its neighbours' slots, NONE at either end and for a slot without a parent. The last
    element is of no slot, and always NONE: so NONE has NONE beside it.
    A parent is a number of the caller's.
    """

    def __init__(self) -> None:
        self.before: Links = np.full(_START, NONE, np.int32)
        self.after: Links = np.full(_START, NONE, np.int32)
        self._times = np.zeros(_START)
        self._row_ids = np.zeros(_START, np.int64)
        self._families: dict[int, array[int]] = {}

    def __repr__(self) -> str:
        return f"<Siblings parents={len(self._families)}>"

    def add(self, slot: int, parent: int, time_s: float, row_id: int) -> None:
        """Put a slot that has no place yet into its own."""
        self._reserve(slot)
        self._times[slot], self._row_ids[slot] = time_s, row_id
        family = self._families.setdefault(parent, array("i"))
        # Nearly always what is new is the last.
        at = len(family) if not family or self._key(family[-1]) < (time_s, row_id) else self._place(family, slot)
        family.insert(at, slot)
        self._link(family[at - 1] if at > 0 else NONE, slot)
        self._link(slot, family[at + 1] if at + 1 < len(family) else NONE)

    def load(self, slots: Ids, parents: Ids, times_s: Times, row_ids: Ids) -> None:
        """Put many slots into their places at once; none has a place yet, nor has anything below these parents."""
        if not len(slots):
            return
        self._reserve(int(slots.max()))
        self._times[slots], self._row_ids[slots] = times_s, row_ids
        order = np.lexsort((row_ids, times_s, parents))
        slots, parents = slots[order].astype(np.int32), parents[order]
        begins = np.flatnonzero(np.append(True, parents[1:] != parents[:-1]))
        linked = np.ones(len(slots), np.bool_)
        linked[begins] = False
        at = np.flatnonzero(linked)
        self.before[slots[at]], self.after[slots[at - 1]] = slots[at - 1], slots[at]
        every = array("i", slots.tobytes())
        ends = [*begins[1:].tolist(), len(slots)]
        for parent, begin, end in zip(parents[begins].tolist(), begins.tolist(), ends, strict=True):
            self._families[parent] = every[begin:end]

    def remove(self, slot: int, parent: int) -> None:
        """Take a slot out of its place, if it has one below this parent."""
        family = self._families.get(parent)
        if family is None:
            return
        at = self._place(family, slot)
        if at == len(family) or family[at] != slot:
            return
        del family[at]
        self._link(int(self.before[slot]), int(self.after[slot]))
        self.before[slot] = self.after[slot] = NONE
        if not family:
            del self._families[parent]

    def reserve(self, slots: int) -> None:
        """Have links for so many slots."""
        self._reserve(slots - 1)

    def family(self, parent: int) -> npt.NDArray[np.int64]:
        """The slots below a parent, in order."""
        return np.array(self._families.get(parent, ()), np.int64)

    def around(self, slots: Ids, reach: int) -> Ids:
        """The slots from `reach` before to `reach` after each: [2 * reach + 1, slots], NONE where there is none."""
        found = np.empty((2 * reach + 1, len(slots)), np.int64)
        found[reach] = slots
        for step in range(reach):
            found[reach - step - 1] = self.before.take(found[reach - step])
            found[reach + step + 1] = self.after.take(found[reach + step])
        return found

    def _key(self, slot: int) -> Key:
        return float(self._times[slot]), int(self._row_ids[slot])

    def _place(self, family: array[int], slot: int) -> int:
        return bisect_left(family, self._key(slot), key=self._key)

    def _link(self, slot: int, next_slot: int) -> None:
        if slot != NONE:
            self.after[slot] = next_slot
        if next_slot != NONE:
            self.before[next_slot] = slot

    def _reserve(self, slot: int) -> None:
        size = len(self.before)
        if slot + 1 >= size:
            more = max(slot + 2 - size, size)
            self.before = np.concatenate([self.before, np.full(more, NONE, np.int32)])
            self.after = np.concatenate([self.after, np.full(more, NONE, np.int32)])
            self._times = np.concatenate([self._times, np.zeros(more)])
            self._row_ids = np.concatenate([self._row_ids, np.zeros(more, np.int64)])

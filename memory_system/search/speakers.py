"""Which archived memories speak for the consolidated one that they became, as links between their slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Links = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Times = npt.NDArray[np.float64]

NONE: Final = -1
_START: Final = 1024


class Speakers:
    """Not thread-safe.

    `into`: for each slot that of the consolidated memory that its row speaks for, NONE for most; `voices`: by how many
    slots each is spoken for; `count`: how many speak.
    """

    def __init__(self) -> None:
        self.into: Links = np.full(_START, NONE, np.int32)
        self.voices: Links = np.zeros(_START, np.int32)
        self.count = 0
        self._waiting: dict[int, int] = {}  # slot -> the row that it speaks for, which has no slot yet

    def __repr__(self) -> str:
        return f"<Speakers count={self.count} waiting={len(self._waiting)}>"

    def put(self, slot: int, row_id: int, merged_into: int | None, slots: Mapping[int, int]) -> None:
        """A row is at a slot, and was merged into another row, or not. `slots`: where each row is."""
        for other in [other for other, awaited in self._waiting.items() if awaited == row_id]:
            self._link(other, slot)
        target = NONE if merged_into is None else slots.get(merged_into, NONE)
        if self.into[slot] != target:
            self._unlink(slot)
        if merged_into is None:
            self._waiting.pop(slot, None)
        elif target == NONE:
            self._waiting[slot] = merged_into
        elif self.into[slot] == NONE:
            self._link(slot, target)

    def load(self, slots: Ids, merged_into: Sequence[int | None]) -> None:
        """Note what many rows were merged into; `settle` is to follow when all rows have their slots."""
        found = zip(slots.tolist(), merged_into, strict=True)
        self._waiting.update((slot, row_id) for slot, row_id in found if row_id is not None)

    def settle(self, slots: Mapping[int, int]) -> None:
        """Link what `load` has noted."""
        for slot, row_id in list(self._waiting.items()):
            if row_id in slots:
                self._link(slot, slots[row_id])

    def remove(self, slot: int) -> None:
        """The row of this slot is gone: it speaks for none, and none for it."""
        self._waiting.pop(slot, None)
        self._unlink(slot)
        if self.voices[slot]:
            for speaker in np.flatnonzero(self.into == slot).tolist():
                self._unlink(speaker)

    def reserve(self, slots: int) -> None:
        """Have links for so many slots."""
        more = slots - len(self.into)
        if more > 0:
            self.into = np.concatenate([self.into, np.full(more, NONE, np.int32)])
            self.voices = np.concatenate([self.voices, np.zeros(more, np.int32)])

    def shown(self, slots: Ids) -> Ids:
        """For each slot the one that is shown for it: of the consolidated memory, or itself."""
        into = self.into[slots]
        return np.where(into == NONE, slots, into).astype(np.int64)

    def heard(self, mask: Mask, expires: Times, now_s: float) -> Mask:
        """The mask, with those that speak for what it allows. `expires`: when each slot's row does, inf for never."""
        if not self.count:
            return mask
        speaking = np.flatnonzero(self.into[: len(mask)] != NONE)
        wider = mask.copy()
        wider[speaking] = mask.take(self.into.take(speaking)) & (expires[speaking] > now_s)
        return wider

    def _link(self, slot: int, target: int) -> None:
        self._waiting.pop(slot, None)
        self.into[slot] = target
        self.voices[target] += 1
        self.count += 1

    def _unlink(self, slot: int) -> None:
        target = int(self.into[slot])
        if target != NONE:
            self.into[slot] = NONE
            self.voices[target] -= 1
            self.count -= 1

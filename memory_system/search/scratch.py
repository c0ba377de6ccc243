"""Room by slot for what a question adds up or looks for, so that none is made and zeroed for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from memory_system.search.places import Numbers, Occurrences
from memory_system.search.segment import Floats


class Scratch:
    """For one question at a time. `sums`: all 0 between questions."""

    def __init__(self, slots: int) -> None:
        self.sums: Floats = np.zeros(slots, np.float32)
        self._wanted: npt.NDArray[np.bool_] = np.zeros(slots, np.bool_)
        self._place: npt.NDArray[np.int32] = np.zeros(slots, np.int32)

    def __repr__(self) -> str:
        return f"<Scratch slots={len(self.sums)}>"

    @property
    def size_bytes(self) -> int:
        return self.sums.nbytes + self._wanted.nbytes + self._place.nbytes

    def among(self, slots: Numbers, wanted: Numbers) -> tuple[Numbers, npt.NDArray[np.int32]]:
        """Where those of the slots stand that are wanted, and which of the wanted ones each is."""
        try:
            self._wanted[wanted] = True
            at = self._wanted.take(slots).nonzero()[0]
        finally:
            self._wanted[wanted] = False
        self._place[wanted] = np.arange(len(wanted), dtype=np.int32)
        return at, self._place.take(slots[at])

    def read_off(self, read: Sequence[Occurrences], slots: Numbers, columns: Numbers, out: Floats) -> None:
        """Write what was read of the texts of some slots into these columns of out[term, text]."""
        try:
            self._wanted[slots] = True
            self._place[slots] = columns
            for every in read:
                at = self._wanted.take(every.slots).nonzero()[0]
                out[every.which[at], self._place[every.slots[at]]] = every.counts[at]
        finally:
            self._wanted[slots] = False

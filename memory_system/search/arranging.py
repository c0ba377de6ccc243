"""The making of cells, aside and step by step: from the vectors that there are to short forms that stand in cells."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from memory_system.search.blocks import Blocks, Floats, Slots
from memory_system.search.cells import Cells, centres_of, left_out, nearest_of
from memory_system.search.order import Order
from memory_system.search.sketch import SAMPLE, Axes, Sketch

Sums = npt.NDArray[np.float64]

# Of the vectors of a sample for each cell its centre is found.
_OF_EACH: Final = 40
_STEP: Final = 8192
_MOST: Final = 60_000


class Arranging:
    """Short forms in cells, in the making. `made` is None until all steps are made."""

    def __init__(self, axes: Axes, matrix: Blocks, slots: Slots) -> None:
        """`slots`: of the vectors, ascending. They may change meanwhile: who changes one has to put it in again."""
        self.made: tuple[Sketch, Cells] | None = None
        self._axes = axes
        self._matrix = matrix
        self._slots = slots
        self._steps = self._all_steps()

    def step(self) -> bool:
        """Do some of it, for about a tenth of a second; whether anything is left to be done."""
        return next(self._steps, None) is not None

    def _all_steps(self) -> Iterator[bool]:
        slots, count = self._slots, min(_MOST, max(1, math.isqrt(len(self._slots))))
        head = np.ascontiguousarray(self._axes.axes[:, : self._axes.head])
        sample = self._matrix.rows(slots[:: max(1, len(slots) // (_OF_EACH * count))]) @ head
        yield True
        centres = yield from centres_of(sample, count)
        of = np.empty(len(slots), np.uint16)
        for start in range(0, len(slots), _STEP):
            part = slice(start, start + _STEP)
            of[part] = nearest_of(self._matrix.rows(slots[part]) @ head, centres)
            yield True
        sketch = Sketch(self._axes, Order(slots, of, len(centres)))
        sums = np.zeros((2, len(centres), self._axes.length))
        for start in range(0, len(slots), _STEP):
            self._fill(sketch, start, min(len(slots), start + _STEP), sums)
            yield True
        self.made = sketch, self._cells(sketch, centres, sums)

    def _forms(self, slots: Slots) -> Floats:
        forms: Floats = self._matrix.rows(slots) @ self._axes.axes
        return forms

    def _fill(self, sketch: Sketch, start: int, end: int, sums: Sums) -> None:
        """Write the forms of some places, and add them and their squares to the sums of their cells."""
        assert sketch.order is not None
        places = np.arange(start, end)
        slots = sketch.order.slots(places)
        ascending = np.argsort(slots)
        forms = np.empty((end - start, self._axes.length), np.float32)
        forms[ascending] = self._forms(slots[ascending])
        sketch.put_forms(places, forms)
        bounds = sketch.order.bounds
        held = np.flatnonzero((bounds[1:] > np.maximum(bounds[:-1], start)) & (bounds[:-1] < end))
        starts = np.maximum(bounds[held], start) - start
        for total, values in zip(sums, (forms, forms * forms), strict=True):
            total[held] += np.add.reduceat(values, starts, axis=0)

    def _cells(self, sketch: Sketch, centres: Floats, sums: Sums) -> Cells:
        assert sketch.order is not None
        sizes = np.diff(sketch.order.bounds)
        means, squares = sums / np.maximum(1, sizes)[:, None]
        variances = np.maximum(0.0, squares - means * means)
        sample = self._matrix.rows(self._slots[:: max(1, len(self._slots) // SAMPLE)])
        forms = sample @ self._axes.axes
        lost = float(sample.var(axis=0).sum() - forms.var(axis=0).sum())
        rest = max(0.0, lost) / max(1, sample.shape[1] - self._axes.length)
        cells = Cells(means.astype(np.float32), variances.astype(np.float32), rest)
        of = nearest_of(forms[:, : self._axes.head], centres)
        return replace(cells, left=left_out(cells, self._axes, sizes.astype(np.float32), sample, of))

"""The making of cells, aside and step by step: from the vectors that there are to short forms that stand in cells."""

from __future__ import annotations

import math
from collections.abc import Generator
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


Made = tuple[Sketch, Cells]


class Arranging:
    """Short forms in cells, in the making. `made` is None until all steps are made."""

    def __init__(self, axes: Axes, matrix: Blocks, slots: Slots) -> None:
        """`slots`: of the vectors, ascending. They may change meanwhile: who changes one has to put it in again."""
        self.made: Made | None = None
        # Nothing of the steps refers to this object: a cycle would hold the matrix until cycles are looked for.
        self._steps = _steps(axes, matrix, slots)

    def step(self) -> bool:
        """Do some of it, for about a tenth of a second; whether anything is left to be done."""
        try:
            next(self._steps)
        except StopIteration as end:
            self.made = end.value
            return False
        return True


def _steps(axes: Axes, matrix: Blocks, slots: Slots) -> Generator[None, None, Made]:
    count = min(_MOST, max(1, math.isqrt(len(slots))))
    head = np.ascontiguousarray(axes.axes[:, : axes.head])
    sample = matrix.rows(slots[:: max(1, len(slots) // (_OF_EACH * count))]) @ head
    yield
    centres = yield from centres_of(sample, count)
    of = np.empty(len(slots), np.uint16)
    for start in range(0, len(slots), _STEP):
        part = slice(start, start + _STEP)
        of[part] = nearest_of(matrix.rows(slots[part]) @ head, centres)
        yield
    order = Order(slots, of, len(centres))
    sketch = Sketch(axes, order)
    sums = np.zeros((2, len(centres), axes.length))
    for start in range(0, len(slots), _STEP):
        _fill(sketch, order, matrix, (start, min(len(slots), start + _STEP)), sums)
        yield
    sample = matrix.rows(slots[:: max(1, len(slots) // SAMPLE)])
    return sketch, _cells(sketch.axes, np.diff(order.bounds), centres, sums, sample)


def _fill(sketch: Sketch, order: Order, matrix: Blocks, between: tuple[int, int], sums: Sums) -> None:
    """Write the forms of the places between two, and add them and their squares to the sums of their cells."""
    start, end = between
    places = np.arange(start, end)
    slots = order.slots(places)
    ascending = np.argsort(slots)
    forms = np.empty((end - start, sketch.axes.length), np.float32)
    forms[ascending] = matrix.rows(slots[ascending]) @ sketch.axes.axes
    sketch.put_forms(places, forms)
    bounds = order.bounds
    held = np.flatnonzero((bounds[1:] > np.maximum(bounds[:-1], start)) & (bounds[:-1] < end))
    starts = np.maximum(bounds[held], start) - start
    for total, values in zip(sums, (forms, forms * forms), strict=True):
        total[held] += np.add.reduceat(values, starts, axis=0)


def _cells(axes: Axes, sizes: Slots, centres: Floats, sums: Sums, sample: Floats) -> Cells:
    """`sample`: [vectors, dimension]."""
    means, squares = sums / np.maximum(1, sizes)[:, None]
    variances = np.maximum(0.0, squares - means * means)
    forms = sample @ axes.axes
    lost = float(sample.var(axis=0).sum() - forms.var(axis=0).sum())
    rest = max(0.0, lost) / max(1, sample.shape[1] - axes.length)
    cells = Cells(means.astype(np.float32), variances.astype(np.float32), rest)
    of = nearest_of(forms[:, : axes.head], centres)
    return replace(cells, left=left_out(cells, axes, sizes.astype(np.float32), sample, of))

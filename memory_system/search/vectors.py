"""The vector side: unit vectors by slot, and four ways to the nearest ones among those that a mask allows.

- Few are compared one by one (`search.exact_max`).
- More are compared by their short forms, and exactly where these leave it open (sketch.py, narrowing.py). Nothing has
  to be built for that, and a filter only makes it faster.
- Of very many, short forms stand in cells of like ones, of which only some are read (cells.py). What is in no cell yet
  is always compared.
- Still more, hardly filtered, are looked up in a graph (`search.graph_from`) once it is built. Rows that it does not
  hold yet are compared by their short forms, so an unfinished graph loses nothing.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from memory_system.log import get_logger
from memory_system.search.arranging import Arranging
from memory_system.search.blocks import Blocks
from memory_system.search.cells import Cells
from memory_system.search.columns import Columns, Ids, Mask
from memory_system.search.graph import Graph
from memory_system.search.narrowing import FIRST, Narrowing, by_all, by_cells
from memory_system.search.rows import Embedded
from memory_system.search.sketch import NEAREST, SAMPLE, Sketch, fit
from memory_system.settings import SearchSettings

log = get_logger(__name__)

Vectors = npt.NDArray[np.float32]
Found = tuple[Ids, npt.NDArray[np.float32]]
"""Slots, and their cosines"""

# Below this share of the slots, rows are read one by one; above, reading all in order is faster.
_DENSE_SHARE: Final = 0.25
# The axes are found anew when there are so many times as many vectors.
_REFIT: Final = 4
# From this many vectors on, short forms stand in cells. Measured.
_CELLS_FROM: Final = 300_000
# Cells are made anew when this share of all stands behind them.
_LOOSE_SHARE: Final = 0.125
# Making cells that failed is tried again after this.
_AGAIN_S: Final = 600.0
# What was written while something was made is taken in with the lock held, if it is no more than this.
_TAKEN_IN: Final = 256
# Below this share of allowed rows a graph would mostly return rows that are to be dropped.
_GRAPH_MIN_SHARE: Final = 0.5
# As long as a graph lacks more of them than this, comparing them all takes no longer.
_REST_SHARE: Final = 0.3


def unit(vector: npt.ArrayLike) -> Vectors | None:
    """The vector as float32 of length 1, or None if it is not finite or has no direction."""
    array = np.asarray(vector, np.float32)
    norm = math.sqrt(float(array @ array))
    return array / np.float32(norm) if 0.0 < norm < math.inf else None


def units(found: Embedded) -> Embedded:
    """Those of the vectors that are finite and have a direction, as vectors of length 1."""
    norms = np.sqrt(np.einsum("ij,ij->i", found.vectors, found.vectors))
    sound = np.isfinite(norms) & (norms > 0.0)
    if not sound.all():
        found, norms = _chosen(found, sound), norms[sound]
    return replace(found, vectors=found.vectors / norms[:, None])


def _chosen(found: Embedded, mask: Mask) -> Embedded:
    return Embedded(found.row_ids[mask], found.digests[mask], found.vectors[mask])


def best(scores: npt.NDArray[Any], row_ids: Ids, k: int) -> Ids:
    """Positions of the k highest scores, best first; equal scores in the order of their row ids."""
    if k < len(scores):
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        chosen = np.flatnonzero(scores >= threshold)
    else:
        chosen = np.arange(len(scores))
    order: Ids = chosen[np.lexsort((row_ids[chosen], -scores[chosen]))][:k]
    return order


class VectorIndex:
    """Vectors of one model. The owner's lock guards everything but what `Graph` says of itself."""

    def __init__(self, columns: Columns, dimension: int, settings: SearchSettings) -> None:
        self.dimension = dimension
        self.graph = Graph(settings)
        self._columns = columns
        self._settings = settings
        self._matrix = Blocks(dimension)
        self._sketch: Sketch | None = None
        self._cells: Cells | None = None
        self._arranging: Arranging | None = None
        self._cells_from_s = 0.0  # not before, by the monotonic clock
        self._fitted_at = 0  # how many vectors there were
        self._count = 0
        self._meanwhile: set[int] | None = None  # slots written while a sketch is made

    def __repr__(self) -> str:
        return f"<VectorIndex vectors={self.count} dimension={self.dimension} {self._sketch!r} {self.graph!r}>"

    @property
    def count(self) -> int:
        """How many rows have a vector."""
        return self._count

    @property
    def improving(self) -> bool:
        """Whether searches would be faster with short forms or cells that are still to be made, or are being made."""
        return self._axes_due() or self._cells_due() or self._meanwhile is not None

    def put(self, slot: int, vector: Vectors) -> bool:
        """Store a slot's vector; False if it is no vector of this index (then the slot has none)."""
        ready = unit(vector) if vector.shape == (self.dimension,) else None
        if ready is None:
            self.drop(slot)
            return False
        if self._columns.has_vector[slot] and np.array_equal(self._matrix.row(slot), ready):
            return True
        self.graph.remove(slot)
        self._matrix.put(slot, ready)
        if self._sketch is not None:
            self._sketch.put(slot, ready)
        if self._meanwhile is not None:
            self._meanwhile.add(slot)
        self._set(slot, True)
        return True

    def extend(self, found: Embedded) -> None:
        """Store the unit vectors of many rows, in the order of row ids as the columns' rows are; none has one yet.
        Those of other contents than the rows have now, or of rows that are not held, are no vectors of theirs."""
        columns = self._columns
        row_ids = columns.row_ids[: columns.top]
        slots = np.searchsorted(row_ids, found.row_ids)
        at = np.minimum(slots, len(row_ids) - 1)
        held = (row_ids[at] == found.row_ids) & (columns.digests[at] == found.digests) if len(row_ids) else slots < 0
        kept = slots[held]
        self._matrix.put_each(kept, found.vectors if held.all() else found.vectors[held])
        columns.has_vector[kept] = True  # counted by the columns' `settle`
        self._count += len(kept)

    def drop(self, slot: int) -> None:
        """Take away a slot's vector. To be called before the slot is given to another row."""
        self.graph.remove(slot)
        self._set(slot, False)

    def vector(self, slot: int) -> Vectors | None:
        return self._matrix.row(slot).copy() if self._columns.has_vector[slot] else None

    def similarities(self, query: Vectors, slots: Ids) -> npt.NDArray[np.float32]:
        """Cosines of the query with the vectors of ascending `slots`, NaN where there is none."""
        held = self._columns.has_vector[slots]
        if held.all():
            return self._matrix.products_of(query, slots)
        found = np.full(len(slots), np.nan, np.float32)
        found[held] = self._matrix.products_of(query, slots[held])
        return found

    # ---- search ----

    def search(self, query: Vectors, mask: Mask, k: int) -> Found:
        """Slots and cosines of the k allowed vectors nearest to the unit vector `query`, best first."""
        allowed = mask & self._columns.has_vector[: len(mask)]
        count = int(np.count_nonzero(allowed))
        if count == 0 or k <= 0:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        if self._are_few(count, k):
            return self._by_each(query, allowed, k)
        by_graph = count >= max(_GRAPH_MIN_SHARE * self._count, self._settings.graph_from)
        found = self._by_graph(query, allowed, count, k) if by_graph else None
        return self._by_sketch(query, allowed, count, k) if found is None else found

    def nearest(self, query: Vectors, mask: Mask, k: int) -> Found:
        """What `search` finds if it compares every allowed vector."""
        return self._by_each(query, mask & self._columns.has_vector[: len(mask)], k)

    def _are_few(self, count: int, k: int) -> bool:
        """Whether so many are compared one by one. Short forms need more than they look at: see `_by_sketch`."""
        return count <= max(self._settings.exact_max, 2 * FIRST * max(k, NEAREST))

    def _by_each(self, query: Vectors, allowed: Mask, k: int) -> Found:
        slots = np.flatnonzero(allowed)
        return self._best(slots, self._products(query, slots, len(allowed)), k)

    def _best(self, slots: Ids, scores: npt.NDArray[np.float32], k: int) -> Found:
        order = best(scores, self._columns.row_ids[slots], k)
        return slots[order], scores[order]

    def _products(self, query: Vectors, slots: Ids, top: int) -> npt.NDArray[np.float32]:
        if len(slots) > _DENSE_SHARE * top:
            return self._matrix.products(query, 0, top)[slots]
        return self._matrix.products_of(query, slots)

    def _by_sketch(self, query: Vectors, allowed: Mask, count: int, k: int) -> Found:
        sketch, cells = self._sketch, self._cells
        if sketch is None:
            return self._by_each(query, allowed, k)
        search = Narrowing(sketch, self._matrix, query, allowed, max(k, NEAREST))
        if cells is None:
            by_all(search, sketch, allowed, count)
        else:
            by_cells(search, sketch, cells, allowed, count)
        return self._best(*search.found(), k)

    def _by_graph(self, query: Vectors, allowed: Mask, count: int, k: int) -> Found | None:
        """None when the graph cannot answer for most of the rows."""
        held = allowed & self.graph.held(len(allowed))
        reachable = int(np.count_nonzero(held))
        if count - reachable > _REST_SHARE * count:
            return None
        slots = self.graph.search(query, k * self.graph.count / max(1, reachable))
        slots = np.sort(slots[held[slots]])
        cosines = self._matrix.products_of(query, slots)
        if count == reachable:
            return self._best(slots, cosines, k)
        others = allowed & ~held
        if self._are_few(count - reachable, k):
            rest = self._by_each(query, others, k)
        else:
            rest = self._by_sketch(query, others, count - reachable, k)
        return self._best(np.concatenate([slots, rest[0]]), np.concatenate([cosines, rest[1]]), k)

    # ---- what makes searches faster, made aside ----

    def improve(self, lock: AbstractContextManager[object]) -> bool:
        """Make one step towards faster searches; whether there was one to make. Called without the owner's `lock`."""
        if self._arranging is None and self._axes_due():
            self.fit(lock)
            return True
        if self._arranging is not None or self._cells_due():
            self._arrange(lock)
            return True
        if self._count < max(self._settings.graph_from, self._settings.exact_max):
            return False
        axes = None if self._sketch is None else self._sketch.axes.axes
        return self.graph.grow(lock, self._columns, self._matrix, axes)

    def fit(self, lock: AbstractContextManager[object]) -> None:
        """Find the axes of the vectors as they are now, and shorten them all."""
        with lock:
            slots, top = np.flatnonzero(self._columns.has_vector), self._columns.top
            if not len(slots):
                return  # they are of another model than the one to come: this index is on its way out
            self._fitted_at = len(slots)
            self._meanwhile = set()
        sample = slots[slots < top][:: max(1, len(slots) // SAMPLE)]
        axes = fit(self._matrix.rows(sample))
        sketch = None if axes is None else Sketch(axes)
        if sketch is not None:
            sketch.put_each(slots, self._matrix)
        if sketch is not None:
            self._take_over(lock, sketch, None)
            return
        with lock:
            self._sketch = self._cells = self._meanwhile = None

    def _axes_due(self) -> bool:
        return self._count > self._settings.exact_max and self._count >= _REFIT * self._fitted_at

    def _cells_due(self) -> bool:
        if self._sketch is None or self._count < max(_CELLS_FROM, self._settings.exact_max):
            return False
        if time.monotonic() < self._cells_from_s:
            return False
        order = self._sketch.order
        return order is None or order.loose > _LOOSE_SHARE * order.top

    def _arrange(self, lock: AbstractContextManager[object]) -> None:
        """Make a step towards new cells, and with the last one take them over."""
        assert self._sketch is not None
        if self._arranging is None:
            with lock:
                slots = np.flatnonzero(self._columns.has_vector)
                if not len(slots):
                    return  # they are of another model than the one to come: this index is on its way out
                self._meanwhile = set()
            self._arranging = Arranging(self._sketch.axes, self._matrix, slots)
        try:
            if self._arranging.step():
                return
        except Exception:  # cells only make searches faster: whatever keeps them from being made, search goes on
            log.exception("search_cells_failed", action="searches go on as before", retry_in_s=_AGAIN_S)
            self._arranging, self._cells_from_s = None, time.monotonic() + _AGAIN_S
            with lock:
                self._meanwhile = None
            return
        made, self._arranging = self._arranging.made, None
        assert made is not None
        self._take_over(lock, *made)

    def _take_over(self, lock: AbstractContextManager[object], sketch: Sketch, cells: Cells | None) -> None:
        """Search by this from now on, once it has what was written while it was made."""
        while True:
            with lock:
                written = sorted(self._meanwhile or ())
                self._meanwhile = set()
                if len(written) <= _TAKEN_IN:
                    for slot in written:
                        sketch.put(slot, self._matrix.row(slot))
                    self._sketch, self._cells, self._meanwhile = sketch, cells, None
                    return
            for slot in written:
                sketch.put(slot, self._matrix.row(slot))

    def _set(self, slot: int, present: bool) -> None:
        self._count += int(present) - int(self._columns.has_vector[slot])
        self._columns.set_vector(slot, present)

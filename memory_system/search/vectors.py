"""The vector side: unit vectors by slot, and three ways to the nearest ones among those that a mask allows.

- Few are compared one by one (`search.exact_max`).
- More are compared by their short forms, and exactly where these leave it open (sketch.py). Nothing has to be built
  for that, and a filter only makes it faster.
- Very many, hardly filtered, are looked up in a graph (`search.graph_from`) once it is built. Rows that it does not
  hold yet are compared by their short forms, so an unfinished graph loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from memory_system.search.blocks import Blocks
from memory_system.search.columns import Columns, Ids, Mask
from memory_system.search.graph import Graph
from memory_system.search.rows import Embedded
from memory_system.search.sketch import NEAREST, SAMPLE, Reading, Sketch, fit, read_along
from memory_system.settings import SearchSettings

Vectors = npt.NDArray[np.float32]
Found = tuple[Ids, npt.NDArray[np.float32]]
"""Slots, and their cosines"""

# Below this share of the slots, rows are read one by one; above, reading all in order is faster.
_DENSE_SHARE: Final = 0.25
# The same for heads, which stand by axis.
_HEADS_SHARE: Final = 0.05
# The axes are found anew when there are so many times as many vectors.
_REFIT: Final = 4
# So many times the wanted number are looked at more closely, and so many exactly, to learn how near the nearest are.
_FIRST: Final = 8
_SECOND: Final = 2
_THRESHOLD_SAMPLE: Final = 8192
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


def highest(scores: npt.NDArray[np.float32], count: int) -> Ids:
    """Positions of at least `count` of the highest scores, in order; fewer only if there are no more than that.

    A threshold is guessed from a sample, because sorting out a million scores takes longer than computing them.
    """
    step = len(scores) // _THRESHOLD_SAMPLE
    if step >= 2 and count * 64 < len(scores):
        sample = scores[::step]
        rank = min(len(sample) - 1, int(1.3 * count * len(sample) / len(scores)) + 8)
        threshold = np.partition(sample, len(sample) - 1 - rank)[len(sample) - 1 - rank]
        found = np.flatnonzero(scores >= threshold)
        if count <= len(found) <= 8 * count + 1024:
            return found
    if count >= len(scores):
        return np.arange(len(scores))
    return (scores >= _least(scores, count)).nonzero()[0]


def _least(scores: npt.NDArray[np.float32], count: int) -> float:
    """The count-th highest of the scores, or the lowest if there are fewer."""
    at = max(0, len(scores) - count)
    return float(np.partition(scores, at)[at])


def _range(mask: Mask) -> tuple[int, int]:
    """From the first to behind the last that is true, of which there is one."""
    return int(mask.argmax()), len(mask) - int(mask[::-1].argmax())


class VectorIndex:
    """Vectors of one model. The owner's lock guards everything but what `Graph` says of itself."""

    def __init__(self, columns: Columns, dimension: int, settings: SearchSettings) -> None:
        self.dimension = dimension
        self.graph = Graph(settings)
        self._columns = columns
        self._settings = settings
        self._matrix = Blocks(dimension)
        self._sketch: Sketch | None = None
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
        """Whether searches would be faster with short forms that are still to be made, or are being made."""
        due = self._count > self._settings.exact_max and self._count >= _REFIT * self._fitted_at
        return due or self._meanwhile is not None

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
        return count <= max(self._settings.exact_max, 2 * _FIRST * max(k, NEAREST))

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
        sketch = self._sketch
        if sketch is None:
            return self._by_each(query, allowed, k)
        head, whole = read_along(sketch.axes, query)
        those, about = self._by_heads(sketch, head, allowed, count)
        wanted = max(k, NEAREST)
        first = highest(about, _FIRST * wanted)
        by_whole = sketch.by_whole(whole, those(first), about[first])
        second = highest(by_whole, _SECOND * wanted)
        chosen = those(first[second])
        cosines = self._matrix.products_of(query, chosen)
        least = _least(cosines, wanted)
        about[first] = by_whole[second] = -np.inf  # done with
        rest = np.flatnonzero(about >= head.floor(least))
        near = first[by_whole >= whole.floor(least)]
        by_whole = sketch.by_whole(whole, those(rest), about[rest])
        near = np.concatenate([near, rest[by_whole >= whole.floor(least)]])
        near.sort()
        also = those(near)
        also_cosines = self._matrix.products_of(query, also)
        return self._best(np.concatenate([chosen, also]), np.concatenate([cosines, also_cosines]), k)

    def _by_heads(
        self, sketch: Sketch, head: Reading, allowed: Mask, count: int
    ) -> tuple[Callable[[Ids], Ids], npt.NDArray[np.float32]]:
        """The products of the heads of all slots that are allowed, and which slots places among them are; what else is
        among them has -inf."""
        first, end = _range(allowed)
        if count <= _HEADS_SHARE * (end - first):
            slots = np.flatnonzero(allowed)
            return slots.take, sketch.by_heads_of(head, slots)
        about = sketch.by_heads(head, first, end)
        if count < end - first:
            about[~allowed[first:end]] = -np.inf
        return lambda places: places + first, about

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
        if self._count > self._settings.exact_max and self._count >= _REFIT * self._fitted_at:
            self.fit(lock)
            return True
        if self._count < max(self._settings.graph_from, self._settings.exact_max):
            return False
        axes = None if self._sketch is None else self._sketch.axes.axes
        return self.graph.grow(lock, self._columns, self._matrix, axes)

    def fit(self, lock: AbstractContextManager[object]) -> None:
        """Find the axes of the vectors as they are now, and shorten them all."""
        with lock:
            slots, top = np.flatnonzero(self._columns.has_vector), self._columns.top
            self._fitted_at = max(1, len(slots))
            self._meanwhile = set()
        sample = slots[slots < top][:: max(1, len(slots) // SAMPLE)]
        axes = fit(self._matrix.rows(sample))
        sketch = None if axes is None else Sketch(axes)
        if sketch is not None:
            sketch.put_each(slots, self._matrix)
        with lock:
            if sketch is not None and self._meanwhile:
                sketch.put_each(np.array(sorted(self._meanwhile), np.int64), self._matrix)
            self._sketch, self._meanwhile = sketch, None

    def _set(self, slot: int, present: bool) -> None:
        self._count += int(present) - int(self._columns.has_vector[slot])
        self._columns.set_vector(slot, present)

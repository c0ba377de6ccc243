"""One search by short forms: from what their heads say, over whole forms, to the vectors that these leave open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from memory_system.search.blocks import Blocks, Floats, Slots
from memory_system.search.cells import Cells, Standing, runs
from memory_system.search.order import Order
from memory_system.search.sketch import Reading, Sketch, read_along

Mask = npt.NDArray[np.bool_]

# Below this share of the places, heads that stand by axis are read one by one; above, reading all in order is faster.
_HEADS_SHARE: Final = 0.05
# Below this share of the vectors what is allowed is picked out before cells are read, and not after.
_PICKED_SHARE: Final = 0.5
# So many times the wanted number are looked at more closely, and so many exactly, to learn how near the nearest are.
FIRST: Final = 8
_SECOND: Final = 2
_THRESHOLD_SAMPLE: Final = 8192


def highest(scores: Floats, count: int) -> Slots:
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


def _least(scores: Floats, count: int) -> float:
    """The count-th highest of the scores, or the lowest if there are fewer."""
    at = max(0, len(scores) - count)
    return float(np.partition(scores, at)[at])


@dataclass(slots=True)
class Read:
    """The products of some heads, -inf of those that do not count; `places`: of ascending positions among them, which
    are ascending too."""

    about: Floats
    places: Callable[[Slots], Slots]


class Narrowing:
    """A search for `wanted` vectors, of those slots that are `allowed`. First `begin`, then `go_on` with all that was
    read; then `found`."""

    def __init__(self, sketch: Sketch, matrix: Blocks, query: Floats, allowed: Mask, wanted: int) -> None:
        self.head, self.whole = read_along(sketch.axes, query)
        self.least = -np.inf  # what the wanted one of those looked at exactly reaches
        self._sketch = sketch
        self._matrix = matrix
        self._query = query
        self._allowed = allowed
        self.wanted = wanted
        self._near: list[Slots] = []  # to be looked at exactly
        self._chosen: tuple[Slots, Floats] = np.zeros(0, np.int64), np.zeros(0, np.float32)

    def begin(self, read: Read) -> bool:
        """Look at the most promising ones exactly, to learn how near the nearest are; False: too few are allowed."""
        at, slots, by_whole = self._by_whole(read, highest(read.about, FIRST * self.wanted))
        if len(at) < _SECOND * self.wanted:
            return False
        second = highest(by_whole, _SECOND * self.wanted)
        self._chosen = self._exactly(slots[second])
        self.least = _least(self._chosen[1], self.wanted)
        read.about[at] = by_whole[second] = -np.inf  # done with
        self._near.append(slots[by_whole >= self.whole.floor(self.least)])
        return True

    def go_on(self, read: Read) -> None:
        """Look more closely at all others of these that may be near enough."""
        _, slots, by_whole = self._by_whole(read, np.flatnonzero(read.about >= self.head.floor(self.least)))
        self._near.append(slots[by_whole >= self.whole.floor(self.least)])

    def found(self) -> tuple[Slots, Floats]:
        """Slots and cosines, among them those wanted."""
        also, cosines = self._exactly(np.concatenate(self._near))
        return np.concatenate([self._chosen[0], also]), np.concatenate([self._chosen[1], cosines])

    def _exactly(self, slots: Slots) -> tuple[Slots, Floats]:
        slots = np.sort(slots)
        return slots, self._matrix.products_of(self._query, slots)

    def _by_whole(self, read: Read, at: Slots) -> tuple[Slots, Slots, Floats]:
        """Which of the positions count, their slots, and the products of their whole forms."""
        places = read.places(at)
        slots = self._sketch.slots(places)
        if self._sketch.order is not None:
            passes = self._passes(slots)
            at, places, slots = at[passes], places[passes], slots[passes]
        return at, slots, self._sketch.by_whole(self.whole, places, read.about[at])

    def _passes(self, slots: Slots) -> Mask:
        known = slots.view(np.uint64) < len(self._allowed)  # what is negative becomes very great
        passes: Mask = self._allowed.take(slots, mode="clip") & known
        return passes


def by_all(search: Narrowing, sketch: Sketch, allowed: Mask, count: int) -> None:
    """Read all heads whose slots are allowed, of which there are `count`."""
    first, end = int(allowed.argmax()), len(allowed) - int(allowed[::-1].argmax())
    if count <= _HEADS_SHARE * (end - first):
        slots = np.flatnonzero(allowed)
        read = Read(sketch.by_heads_of(search.head, slots), slots.take)
    else:
        about = sketch.by_heads(search.head, first, end)
        if count < end - first:
            about[~allowed[first:end]] = -np.inf
        read = Read(about, lambda places: places + first)
    search.begin(read)
    search.go_on(read)


def by_cells(search: Narrowing, sketch: Sketch, cells: Cells, allowed: Mask, count: int) -> None:
    """Read the heads of the most promising cells, and then of those that may hold something near enough."""
    assert sketch.order is not None
    standing = cells.along(search.whole)
    if count < _PICKED_SHARE * sketch.order.top:
        _by_cells(search, standing, _Picked(sketch, sketch.order, search.head, allowed))
    elif not _by_cells(search, standing, _Whole(sketch, sketch.order, search.head, count)):
        # Where the nearest are, next to nothing is allowed.
        _by_cells(search, standing, _Picked(sketch, sketch.order, search.head, allowed))


def _by_cells(search: Narrowing, standing: Standing, way: _Whole | _Picked) -> bool:
    first = standing.first(way.counts, 2.0 * FIRST * search.wanted)
    begun = way.read(first, True)
    if not search.begin(begun):
        return False
    search.go_on(begun)
    search.go_on(way.read(standing.reaching(way.counts, search.least) & ~first, False))
    return True


class _Picked:
    """Of the cells that are read only what is allowed. `counts`: how much of each that is."""

    def __init__(self, sketch: Sketch, order: Order, head: Reading, allowed: Mask) -> None:
        self._sketch, self._order, self._head = sketch, order, head
        self._slots = np.flatnonzero(allowed)
        self._cells = order.cells(self._slots)
        self.counts = np.bincount(self._cells, minlength=order.count + 1)[:-1].astype(np.float32)

    def read(self, cells: Mask, loose: bool) -> Read:
        """What is in the cells, and what is in none or not."""
        places = self._order.places(self._slots[np.append(cells, loose).take(self._cells)])
        return Read(self._sketch.by_heads_of(self._head, places), places.take)


class _Whole:
    """Cells as they are: of what comes up in them, what is not allowed is dropped."""

    def __init__(self, sketch: Sketch, order: Order, head: Reading, count: int) -> None:
        self._sketch, self._order, self._head = sketch, order, head
        self.counts = np.diff(order.bounds) * np.float32(count / order.top)

    def read(self, cells: Mask, loose: bool) -> Read:
        """What is in the cells, and what is in none or not."""
        firsts, ends = runs(self._order.bounds, cells)
        if loose:
            firsts, ends = np.append(firsts, self._order.bounds[-1]), np.append(ends, self._order.top)
        return Read(self._sketch.by_heads_between(self._head, firsts, ends), _Places(firsts, ends))


class _Places:
    """The places at ascending positions in ranges of places that stand one behind the other."""

    def __init__(self, firsts: Slots, ends: Slots) -> None:
        lengths = ends - firsts
        self._begin = lengths.cumsum() - lengths
        self._shift = firsts - self._begin

    def __call__(self, positions: Slots) -> Slots:
        shifted: Slots = positions + self._shift[np.searchsorted(self._begin, positions, side="right") - 1]
        return shifted

"""Short forms of vectors: their coordinates along a few principal axes.

Inner products of short forms are near those of the vectors, and reading a twelfth of the numbers takes a twelfth of the
time. How near is measured when the axes are found, so that a search knows whom to look at more closely: see `Reading`.
There are two lengths: a search reads the head of every short form, the rest of a form where the head leaves it open,
and a vector where that does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from memory_system.search.blocks import Blocks, Floats, Slots

SAMPLE: Final = 20_000
_HEADS: Final = (16, 24, 32, 48, 64, 96)
_LENGTHS: Final = (32, 48, 64, 96, 128, 192)
# Reading a row by itself takes so many times as long as reading it in order.
_BY_ITSELF: Final = 5.0
# What saves less than this is not worth its memory.
_WORTH: Final = 0.6
_QUERIES: Final = 128
# Of how many nearest the margin is right: the single nearest is often a copy, which says nothing of the others.
NEAREST: Final = 20
# Of the nearest vectors of a sample each margin misses so many; a search wants a smaller share of the vectors, which
# are harder to tell from the next ones, so of its nearest some more.
_MISSED: Final = 0.002
_PUT_TOGETHER: Final = 4096


@dataclass(frozen=True, slots=True)
class Axes:
    """`axes`: [dimension, length], orthonormal; `head`: how many of them are read of every vector; `mean`: of the
    vectors; `spreads`: of what head and whole leave out of an inner product, in units of what they leave out of the
    query."""

    axes: Floats
    head: int
    mean: Floats
    spreads: tuple[float, float]

    @property
    def length(self) -> int:
        return int(self.axes.shape[1])


@dataclass(frozen=True, slots=True)
class Reading:
    """A query's short form along some axes. `offset` is to be added to inner products of short forms, which then are at
    most `margin` below what the nearest vectors have to reach, but for very few of these."""

    form: Floats
    offset: float
    margin: float


def read_along(axes: Floats, mean: Floats, spread: float, query: Floats) -> Reading:
    form = query @ axes
    rest = query - axes @ form
    return Reading(form, float(rest @ mean), spread * float(np.linalg.norm(rest)))


def fit(sample: Floats) -> Axes | None:
    """The axes along which the sample ([vectors, dimension]) spreads most, and as many as make a search read least;
    None when no short form would save much."""
    dimension = sample.shape[1]
    mean = sample.mean(axis=0)
    centred = sample - mean
    values, vectors = np.linalg.eigh(centred.T @ centred)
    ordered = np.ascontiguousarray(vectors[:, np.argsort(-values)].astype(np.float32))
    measured = _measure(ordered[:, : min(max(_LENGTHS), dimension // 2)], mean, sample)
    ways = {
        (head, length): _read(head, length, measured[head][1], measured[length][1], dimension)
        for head in _HEADS
        for length in _LENGTHS
        if head < length and length in measured
    }
    best = min(ways, key=lambda way: ways[way], default=None)
    if best is None or ways[best] >= _WORTH * dimension:
        return None
    head, length = best
    spreads = measured[head][0], measured[length][0]
    return Axes(np.ascontiguousarray(ordered[:, :length]), head, mean, spreads)


def _read(head: int, length: int, open_to_head: float, open_to_whole: float, dimension: int) -> float:
    """How many numbers of each vector a search reads, as if all were read in order."""
    return head + _BY_ITSELF * (open_to_head * (length - head) + open_to_whole * dimension)


def _measure(axes: Floats, mean: Floats, sample: Floats) -> dict[int, tuple[float, float]]:
    """For each number of axes the spread, and for which share of the sample a search is left open by it, on the
    average."""
    queries = sample[:: max(1, len(sample) // _QUERIES)][:_QUERIES]
    exact = queries @ sample.T
    near = np.argpartition(-exact, min(NEAREST, exact.shape[1] - 1), axis=1)[:, : NEAREST + 1]
    least = np.take_along_axis(exact, near, axis=1).min(axis=1)
    forms = sample @ axes
    measured = {}
    for count in sorted({*_HEADS, *_LENGTHS}):
        if count <= axes.shape[1]:
            readings = [read_along(axes[:, :count], mean, 1.0, query) for query in queries]
            guessed = np.stack([reading.form for reading in readings]) @ forms[:, :count].T
            guessed += np.array([reading.offset for reading in readings], np.float32)[:, None]
            units = np.maximum(np.array([reading.margin for reading in readings]), 1e-6)
            below = (least[:, None] - np.take_along_axis(guessed, near, axis=1)) / units[:, None]
            spread = max(0.0, float(np.quantile(below, 1.0 - _MISSED)))
            measured[count] = spread, float(np.mean(guessed >= (least - spread * units)[:, None]))
    return measured


class Sketch:
    """The short forms of vectors by slot. Not thread-safe."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self._heads = Blocks(axes.head)
        self._tails = Blocks(axes.length - axes.head)

    def __repr__(self) -> str:
        spreads = ", ".join(f"{spread:.2f}" for spread in self.axes.spreads)
        return f"<Sketch head={self.axes.head} length={self.axes.length} spreads={spreads}>"

    def put(self, slot: int, vector: Floats) -> None:
        form = vector @ self.axes.axes
        self._heads.put(slot, form[: self.axes.head])
        self._tails.put(slot, form[self.axes.head :])

    def put_each(self, slots: Slots, matrix: Blocks) -> None:
        """Take in the vectors of ascending slots."""
        for start in range(0, len(slots), _PUT_TOGETHER):
            part = slots[start : start + _PUT_TOGETHER]
            forms = matrix.rows(part) @ self.axes.axes
            self._heads.put_each(part, forms[:, : self.axes.head])
            self._tails.put_each(part, forms[:, self.axes.head :])

    def readings(self, query: Floats) -> tuple[Reading, Reading]:
        """The query along the axes of the heads, and along all of them."""
        axes, mean = self.axes.axes, self.axes.mean
        by_head, by_whole = self.axes.spreads
        return read_along(axes[:, : self.axes.head], mean, by_head, query), read_along(axes, mean, by_whole, query)

    def by_heads(self, query: Reading, first: int, end: int) -> Floats:
        """About the inner products of the query with the vectors of all slots from `first` up to `end`."""
        found = self._heads.products(query.form, first, end)
        found += np.float32(query.offset)
        return found

    def by_heads_of(self, query: Reading, slots: Slots) -> Floats:
        """The same for ascending slots."""
        found = self._heads.products_of(query.form, slots)
        found += np.float32(query.offset)
        return found

    def by_whole(self, head: Reading, whole: Reading, slots: Slots, by_heads: Floats) -> Floats:
        """The same for ascending slots by their whole forms; `by_heads`: what their heads said."""
        found = self._tails.products_of(whole.form[self.axes.head :], slots)
        found += by_heads
        found += np.float32(whole.offset - head.offset)
        return found

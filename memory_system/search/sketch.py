"""Short forms of vectors: their coordinates along a few principal axes.

Inner products of short forms are near those of the vectors, and reading a twelfth of the numbers takes a twelfth of the
time. How near is measured when the axes are found, so that a search knows whom to look at more closely: see `Reading`.
There are two lengths: a search reads the head of every short form, the rest of a form where the head leaves it open,
and a vector where that does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from memory_system.search.blocks import Blocks, Floats, Slots
from memory_system.search.order import Order

SAMPLE: Final = 20_000
_HEADS: Final = (16, 24, 32, 48, 64, 96)
_LENGTHS: Final = (32, 48, 64, 96, 128, 192)
# Reading a row by itself takes so many times as long as reading it in order.
_BY_ITSELF: Final = 10.0
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
    vectors, and `mean_form`: its coordinates along the axes; `spreads`: of what head and whole leave out of an inner
    product, in units of what they leave out of the query."""

    axes: Floats
    head: int
    mean: Floats
    mean_form: Floats
    spreads: tuple[float, float]

    @property
    def length(self) -> int:
        return int(self.axes.shape[1])


@dataclass(frozen=True, slots=True)
class Reading:
    """A query's short form along some axes. `offset`: by how much the inner products of vectors are above those of
    short forms, on the average; the nearest vectors are at most `margin` below what they then have to reach, but for
    very few of these."""

    form: Floats
    offset: float
    margin: float

    def floor(self, least: float) -> float:
        """What the inner product of a short form has to reach, for that of the vector to be perhaps at least this."""
        return least - self.margin - self.offset


def read_along(axes: Axes, query: Floats) -> tuple[Reading, Reading]:
    """A query along the axes of the heads, and along all of them. These being orthonormal, what they leave out of a
    length or a product follows from what they do not."""
    form = query @ axes.axes
    length, above = float(query @ query), float(query @ axes.mean)
    by_head, by_whole = axes.spreads

    def part(count: int, spread: float) -> Reading:
        short = form[:count]
        left_out = max(0.0, length - float(short @ short))
        return Reading(short, above - float(short @ axes.mean_form[:count]), spread * math.sqrt(left_out))

    return part(axes.head, by_head), part(axes.length, by_whole)


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
    axes = np.ascontiguousarray(ordered[:, :length])
    return Axes(axes, head, mean, mean @ axes, spreads)


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
    forms, asked, middle = sample @ axes, queries @ axes, mean @ axes
    lengths, above = np.einsum("ij,ij->i", queries, queries), queries @ mean
    measured = {}
    for count in sorted({*_HEADS, *_LENGTHS}):
        if count <= axes.shape[1]:
            short = asked[:, :count]
            guessed = short @ forms[:, :count].T + (above - short @ middle[:count])[:, None]
            units = np.sqrt(np.maximum(lengths - np.einsum("ij,ij->i", short, short), 1e-12))
            below = (least[:, None] - np.take_along_axis(guessed, near, axis=1)) / units[:, None]
            spread = max(0.0, float(np.quantile(below, 1.0 - _MISSED)))
            measured[count] = spread, float(np.mean(guessed >= (least - spread * units)[:, None]))
    return measured


class Sketch:
    """The short forms of vectors by place: their slot, unless there is an `order`. Not thread-safe."""

    def __init__(self, axes: Axes, order: Order | None = None) -> None:
        self.axes = axes
        self.order = order
        # By axis is for reading all; of cells, some are read, and of these only what a filter lets pass.
        self._heads = Blocks(axes.head, by_axis=order is None)
        self._tails = Blocks(axes.length - axes.head)

    def __repr__(self) -> str:
        spreads = ", ".join(f"{spread:.2f}" for spread in self.axes.spreads)
        order = "" if self.order is None else f" {self.order!r}"
        return f"<Sketch head={self.axes.head} length={self.axes.length} spreads={spreads}{order}>"

    def put(self, slot: int, vector: Floats) -> None:
        form = vector @ self.axes.axes
        place = slot if self.order is None else self.order.put(slot)
        self._heads.put(place, form[: self.axes.head])
        self._tails.put(place, form[self.axes.head :])

    def put_each(self, slots: Slots, matrix: Blocks) -> None:
        """Take in the vectors of ascending slots, each at the place of its slot."""
        for start in range(0, len(slots), _PUT_TOGETHER):
            part = slots[start : start + _PUT_TOGETHER]
            self.put_forms(part, matrix.rows(part) @ self.axes.axes)

    def put_forms(self, places: Slots, forms: Floats) -> None:
        """Write short forms at ascending places."""
        self._heads.put_each(places, forms[:, : self.axes.head])
        self._tails.put_each(places, forms[:, self.axes.head :])

    def slots(self, places: Slots) -> Slots:
        """The slot at each place, -1 where there is none."""
        return places if self.order is None else self.order.slots(places)

    def by_heads(self, query: Reading, first: int, end: int) -> Floats:
        """The inner products of the query's form with the heads of all places from `first` up to `end`."""
        return self._heads.products(query.form, first, end)

    def by_heads_between(self, query: Reading, firsts: Slots, ends: Slots) -> Floats:
        """The same for several ascending ranges, one behind the other."""
        return self._heads.products_between(query.form, firsts, ends)

    def by_heads_of(self, query: Reading, places: Slots) -> Floats:
        """The same for ascending places."""
        return self._heads.products_of(query.form, places)

    def by_whole(self, query: Reading, places: Slots, by_heads: Floats) -> Floats:
        """The inner products of the query's form with the whole forms of ascending places; `by_heads`: with their
        heads."""
        return by_heads + self._tails.products_of(query.form[self.axes.head :], places)

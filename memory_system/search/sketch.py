"""Short forms of vectors: their coordinates along a few principal axes.

Inner products of short forms are near those of the vectors, and reading a sixth of the numbers takes a sixth of the
time. How near is measured when the axes are found, so that a search knows whom to look at exactly: see `margin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from memory_system.search.blocks import Blocks, Floats, Slots

SAMPLE: Final = 20_000
_LENGTHS: Final = (32, 48, 64, 96, 128, 192)
# Reading a row by itself takes so many times as long as reading it in order.
_BY_ITSELF: Final = 5.0
# What saves less than this is not worth its memory.
_WORTH: Final = 0.6
_QUERIES: Final = 128
# Of how many nearest the margin is right: the single nearest is often a copy, which says nothing of the others.
NEAREST: Final = 20
# Of the nearest vectors of a sample the margin misses so many; a search wants a smaller share of the vectors, which
# are harder to tell from the next ones, so of its nearest some more.
_MISSED: Final = 0.002
_PUT_TOGETHER: Final = 4096


@dataclass(frozen=True, slots=True)
class Axes:
    """`axes`: [dimension, length], orthonormal, the first of `longer`, which has twice as many; `mean`: of the vectors;
    `spread`: of what a short form leaves out of an inner product, in units of what it leaves out of the query."""

    longer: Floats
    axes: Floats
    mean: Floats
    spread: float

    @property
    def length(self) -> int:
        return int(self.axes.shape[1])


@dataclass(frozen=True, slots=True)
class ShortQuery:
    """A query's short form; `offset` is to be added to inner products of short forms, which then are at most `margin`
    below what the nearest vectors have to reach, but for very few of these."""

    form: Floats
    offset: float
    margin: float


def shorten(axes: Axes, query: Floats) -> ShortQuery:
    form = query @ axes.axes
    rest = query - axes.axes @ form
    return ShortQuery(form, float(rest @ axes.mean), axes.spread * float(np.linalg.norm(rest)))


def fit(sample: Floats) -> Axes | None:
    """The axes along which the sample ([vectors, dimension]) spreads most, as many as make a search read least; None
    when no short form would save much."""
    dimension = sample.shape[1]
    mean = sample.mean(axis=0)
    centred = sample - mean
    values, vectors = np.linalg.eigh(centred.T @ centred)
    ordered = np.ascontiguousarray(vectors[:, np.argsort(-values)].astype(np.float32))
    queries = sample[:: max(1, len(sample) // _QUERIES)][:_QUERIES]
    exact = queries @ sample.T
    near = np.argpartition(-exact, min(NEAREST, exact.shape[1] - 1), axis=1)[:, : NEAREST + 1]
    found, least_read = None, _WORTH * dimension
    for length in _LENGTHS:
        if 2 * length > dimension:
            break
        longer, short = (np.ascontiguousarray(ordered[:, :count]) for count in (2 * length, length))
        spread, share = _measure(Axes(longer, short, mean, 1.0), queries, sample, exact, near)
        read = length + _BY_ITSELF * share * dimension
        if read < least_read:
            found, least_read = Axes(longer, short, mean, spread), read
        elif found is not None:
            break
    return found


def _measure(
    axes: Axes, queries: Floats, sample: Floats, exact: Floats, near: npt.NDArray[np.intp]
) -> tuple[float, float]:
    """The spread, and which share of the sample a search looks at exactly, on the average."""
    short = [shorten(axes, query) for query in queries]
    guessed = np.stack([query.form for query in short]) @ (sample @ axes.axes).T
    guessed += np.array([query.offset for query in short], np.float32)[:, None]
    units = np.maximum(np.array([query.margin for query in short]), 1e-6)
    least = np.take_along_axis(exact, near, axis=1).min(axis=1)
    below = (least[:, None] - np.take_along_axis(guessed, near, axis=1)) / units[:, None]
    spread = max(0.0, float(np.quantile(below, 1.0 - _MISSED)))
    return spread, float(np.mean(guessed >= (least - spread * units)[:, None]))


class Sketch:
    """The short forms of vectors by slot. Not thread-safe."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self._forms = Blocks(axes.length)

    def __repr__(self) -> str:
        return f"<Sketch length={self.axes.length} spread={self.axes.spread:.2f}>"

    def put(self, slot: int, vector: Floats) -> None:
        self._forms.put(slot, vector @ self.axes.axes)

    def put_each(self, slots: Slots, matrix: Blocks) -> None:
        """Take in the vectors of ascending slots."""
        for start in range(0, len(slots), _PUT_TOGETHER):
            part = slots[start : start + _PUT_TOGETHER]
            self._forms.put_each(part, matrix.rows(part) @ self.axes.axes)

    def products(self, query: ShortQuery, first: int, end: int) -> npt.NDArray[np.float32]:
        """About the inner products of the query's vector with those of all slots from `first` up to `end`."""
        found = self._forms.products(query.form, first, end)
        found += np.float32(query.offset)
        return found

    def products_of(self, query: ShortQuery, slots: Slots) -> npt.NDArray[np.float32]:
        """The same for ascending slots."""
        found = self._forms.products_of(query.form, slots)
        found += np.float32(query.offset)
        return found

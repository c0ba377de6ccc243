"""Cells of like short forms, and which of them a search has to read.

Along the few axes of one query the products of a cell's vectors lie around that of its centre, nearly normally. So how
many of them can be expected to reach a given product follows from the cell's mean and variances; a search leaves out
those cells that together are expected to hold almost none. How many that may be is measured when cells are made.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from memory_system.search.blocks import Floats, Slots
from memory_system.search.sketch import NEAREST, Axes, Reading, read_along

Flags = npt.NDArray[np.bool_]

# Of the nearest vectors of a sample those that are left out with their cells.
_MISSED: Final = 0.004
_QUERIES: Final = 256
# A search begins with the cells that so many standard deviations above their means are highest, until they hold this
# share of what it compares.
_ABOVE: Final = 2.5
_BEGIN: Final = 0.03
_SLICE: Final = 4096
_ROUNDS: Final = 6


@dataclass(frozen=True, slots=True)
class Cells:
    """`centres`, `variances`: [cells, length], of the short forms of each cell; `rest`: the variance of vectors along
    an axis that the forms leave out; `left`: what share of the nearest that are expected may stay unread."""

    centres: Floats
    variances: Floats
    rest: float
    left: float = 0.0

    def __len__(self) -> int:
        return len(self.centres)

    def along(self, query: Reading) -> Standing:
        """How the cells stand to a query's whole form."""
        left_out = max(0.0, 1.0 - float(query.form @ query.form))
        spreads = np.sqrt(self.variances @ (query.form * query.form) + np.float32(self.rest * left_out))
        return Standing(self.centres @ query.form + np.float32(query.offset), np.maximum(spreads, 1e-6), self.left)


@dataclass(frozen=True, slots=True)
class Standing:
    """The mean and the spread, of each cell, of its vectors' products with a query."""

    means: Floats
    spreads: Floats
    left: float

    def first(self, counts: Floats, least: float) -> Flags:
        """The cells to begin with; `counts`: how many are to be compared of each; `least`: so many at least."""
        order = np.argsort(-(self.means + np.float32(_ABOVE) * self.spreads))
        held = counts[order].cumsum()
        chosen = np.zeros(len(order), np.bool_)
        chosen[order[: 1 + int(np.searchsorted(held, max(_BEGIN * float(held[-1]), least)))]] = True
        return chosen & (counts > 0.0)

    def reaching(self, counts: Floats, least: float) -> Flags:
        """The cells to be read for those whose product is at least this."""
        chances = _tail((np.float32(least) - self.means) / self.spreads)
        order = np.argsort(chances)
        expected = (counts * chances)[order].cumsum()
        chosen = np.ones(len(order), np.bool_)
        chosen[order[: int(np.searchsorted(expected, self.left * float(expected[-1])))]] = False
        return chosen & (counts > 0.0)


def _tail(above: Floats) -> Floats:
    """About how much of a normal distribution is so many standard deviations above its mean, or more; at most half."""
    above = np.maximum(above, 0.0)
    chances: Floats = np.float32(0.5) * np.exp(-above * (np.float32(0.717) + np.float32(0.416) * above))
    return chances


def nearest_of(heads: Floats, centres: Floats) -> npt.NDArray[np.uint16]:
    """Which of the centres ([cells, head]) is nearest to each head."""
    half = np.float32(0.5) * np.einsum("ij,ij->i", centres, centres)
    found = np.empty(len(heads), np.uint16)
    for start in range(0, len(heads), _SLICE):
        products = heads[start : start + _SLICE] @ centres.T
        products -= half
        found[start : start + _SLICE] = products.argmax(axis=1)
    return found


def centres_of(heads: Floats, count: int) -> Generator[None, None, Floats]:
    """Centres of at most `count` cells, by Lloyd's method from some of the heads on: [cells, head]. In steps."""
    centres = heads[:: max(1, len(heads) // count)][:count].copy()
    for _ in range(_ROUNDS):
        cells = nearest_of(heads, centres).astype(np.int64)
        sizes = np.bincount(cells, minlength=len(centres))
        held = np.flatnonzero(sizes)
        starts = (sizes.cumsum() - sizes)[held]
        centres = np.add.reduceat(heads[np.argsort(cells, kind="stable")], starts, axis=0)
        centres /= sizes[held, None].astype(np.float32)
        yield
    return centres


def left_out(cells: Cells, axes: Axes, sizes: Floats, sample: Floats, of: npt.NDArray[np.uint16]) -> float:
    """`Cells.left`, as some vectors of a sample ([vectors, dimension]) want it, which are in the cells `of`."""
    asked = np.arange(0, len(sample), max(1, len(sample) // _QUERIES))
    exact = sample[asked] @ sample.T
    exact[np.arange(len(asked)), asked] = -np.inf
    shares = []
    for query, products in zip(sample[asked], exact, strict=True):
        near = np.argpartition(-products, min(NEAREST, len(products)) - 1)[:NEAREST]
        standing = cells.along(read_along(axes, query)[1])
        shares.append(_shares(standing, sizes, float(products[near].min()))[of[near]])
    return float(np.quantile(np.concatenate(shares), _MISSED))


def _shares(standing: Standing, sizes: Floats, least: float) -> Floats:
    """For each cell, what share of those expected to reach `least` is in it and in what is less promising."""
    chances = _tail((np.float32(least) - standing.means) / standing.spreads)
    order = np.argsort(chances)
    expected = (sizes * chances)[order].cumsum()
    shares = np.empty(len(order), np.float32)
    shares[order] = expected / max(float(expected[-1]), math.ulp(0.0))
    return shares


def runs(bounds: Slots, chosen: Flags) -> tuple[Slots, Slots]:
    """The first place of each run of chosen cells that stand together, and the one behind its last."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False])).view(np.int8)))
    return bounds[edges[::2]], bounds[edges[1::2]]

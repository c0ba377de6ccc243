"""The texts that score best, found without scoring every text that has a word of the query.

After H. Turtle, J. Flood, Query Evaluation: Strategies and Optimizations, 1995 (MaxScore): no term adds more to a score
than its bound. Terms are read from the greatest bound to the least, and what they add is summed by text. Once the
bounds of those still unread, all together, are less than the k-th best sum, no text that has only these can be among
the k best, and they are looked up in those texts alone that can still reach it.

Bounds and sums decide only which texts are left; these are then scored as if every text was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from memory_system.search.places import Numbers, Occurrences, Places
from memory_system.search.postings import Postings
from memory_system.search.segment import Floats

Mask = npt.NDArray[np.bool_]

# Of fewer postings all are read.
_MANY: Final = 65_536
# So many of the rarest terms are read before it is asked what else is needed.
_STEP: Final = 4096
# So many for each that is wanted are looked at first, to learn how good the best are.
_FIRST: Final = 2
# A text without any of the words has less.
_TINY: Final = float(np.finfo(np.float32).tiny)
_EPS: Final = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, slots=True)
class Formula:
    """What a term adds to the score of a text of `length` terms where it stands `count` times, at most its weight:

    weight * count / (count + base + slope * length), in float32. `weights`: of each term.
    """

    weights: Floats
    base: np.float32
    slope: np.float32

    def of(self, every: Occurrences, lengths: npt.NDArray[np.int32]) -> Floats:
        """What each of the postings adds. `lengths`: by slot."""
        return self.added(self.weights.take(every.which), every.counts, lengths.take(every.slots))

    def added(self, weights: Floats | np.float32, counts: Floats, lengths: npt.NDArray[np.int32]) -> Floats:
        """What terms of these weights add."""
        norm = lengths.astype(np.float32)
        norm *= self.slope
        norm += self.base
        norm += counts
        added: Floats = weights * counts
        added /= norm
        return added


def likely(postings: Postings, places: Places, formula: Formula, mask: Mask, k: int) -> tuple[Numbers, Floats]:
    """Slots that the mask allows, among which are the k that score best, and their scores. Of what has an equal score
    either all or none are among them. Nothing of the places was read before."""
    if sum(places.sizes.values()) < _MANY:
        return _each(postings, places, formula, mask, k)
    texts = _Texts(postings, places, formula, mask, k)
    try:
        done = texts.read(postings.scratch.sums)
        texts.choose(postings.scratch.sums, done)
    finally:
        texts.clear(postings.scratch.sums)
    texts.look_up(done)
    return texts.slots, texts.scores()


def _each(postings: Postings, places: Places, formula: Formula, mask: Mask, k: int) -> tuple[Numbers, Floats]:
    """By scoring every text that has any of the terms: of few, that takes fewer steps."""
    every = _allowed(postings, places.take(places.sizes), mask)
    scores = np.zeros(len(postings.lengths), np.float32)
    np.add.at(scores, every.slots, formula.of(every, postings.lengths))
    floor = _TINY
    for term in sorted(places.sizes, key=lambda term: places.sizes[term]):
        if places.sizes[term] >= k and len(reached := scores.take(every.slots[every.which == term])) >= k:
            floor = max(floor, _kth(reached, k))
            break
    found = (scores >= floor).nonzero()[0]
    return found, scores[found]


def _allowed(postings: Postings, every: Occurrences, mask: Mask) -> Occurrences:
    """The postings whose texts the mask allows."""
    allowed = postings.allowed(mask, every.slots)
    return every if allowed is None else every.of(allowed)


def _kth(values: Floats, k: int) -> float:
    """The k-th greatest of at least k values."""
    kth: float = np.partition(values, len(values) - k)[len(values) - k].item()
    return kth


class _Texts:
    """The allowed texts that may be among the k best.

    `_terms`: from the greatest bound on, which is a term's weight; `_rests`: the bounds of all from each on, together.
    `_read`: postings of allowed texts, as slot, term and what that adds. `_rows`: what each term that was looked up
    adds to the texts that are left.
    """

    def __init__(self, postings: Postings, places: Places, formula: Formula, mask: Mask, k: int) -> None:
        self._postings, self._places, self._formula, self._mask, self._k = postings, places, formula, mask, k
        bounds = formula.weights.tolist()
        self._terms = sorted(places.sizes, key=lambda term: -bounds[term])
        self._rests = np.cumsum([0.0, *(bounds[term] for term in reversed(self._terms))])[::-1].tolist()
        # Sums of float32 in another order differ: what comes so near to the floor may be above it.
        self._slack = 1.0 - (4 * len(bounds) + 8) * _EPS
        self._floor = 0.0  # k texts have as much, or a trifle more
        self._read: list[tuple[Numbers, Numbers, Floats]] = []
        self._rows: dict[int, Floats] = {}
        self.slots: Numbers = np.zeros(0, np.int64)
        self._sums: Floats = np.zeros(0, np.float32)

    def read(self, sums: Floats) -> int:
        """Read terms, into these sums by slot, until those left cannot make a text one of the best by themselves; how
        many were."""
        done, slots = 0, np.zeros(0, np.int64)
        while done < len(self._terms) and self._rests[done] >= self._floor:
            begin, room = done, _STEP if len(slots) < self._k else math.inf
            while done < len(self._terms) and room > 0 and (done == begin or self._rests[done] >= self._floor):
                room -= self._places.sizes[self._terms[done]]
                done += 1
            new = self._add(self._terms[begin:done], sums)
            # The rarest terms' texts are likely the best: a floor of these alone is a floor too.
            slots = np.concatenate((slots, new)) if len(slots) < self._k else slots
            self._raise(_most(sums, slots, self._k * done))
        return done

    def _add(self, terms: list[int], sums: Floats) -> Numbers:
        """Read these terms, and add what they add; the slots of their postings."""
        every = _allowed(self._postings, self._places.take(terms), self._mask)
        added = self._formula.of(every, self._postings.lengths)
        self._read.append((every.slots, every.which, added))
        np.add.at(sums, every.slots, added)
        return every.slots

    def choose(self, sums: Floats, done: int) -> None:
        """Of the texts that were read leave those that can still reach the floor."""
        least = max(_TINY, self._floor - self._rests[done])
        found = [slots[sums.take(slots) >= least] for slots, _, _ in self._read]
        self.slots = _distinct(np.concatenate(found)) if found else self.slots
        self._sums = sums.take(self.slots)

    def clear(self, sums: Floats) -> None:
        """Leave zeros behind."""
        for slots, _, _ in self._read:
            sums[slots] = 0.0

    def look_up(self, done: int) -> None:
        """Look the terms that were not read up in the texts that are left, and leave those that reach the floor."""
        # First in those that have most: what is then known of the floor leaves fewer.
        if done < len(self._terms) and len(self.slots) > 2 * _FIRST * self._k:
            first = np.argpartition(self._sums, len(self._sums) - _FIRST * self._k)[-_FIRST * self._k :]
            whole = self._sums[first]
            for term in self._terms[done:]:
                whole += self._added(term, self.slots[first])
            self._raise(whole)
            self._leave(self._rests[done])
        for place in range(done, len(self._terms)):
            term = self._terms[place]
            self._rows[term] = self._added(term, self.slots)
            self._sums += self._rows[term]
            self._raise(self._sums)
            self._leave(self._rests[place + 1])

    def _added(self, term: int, slots: Numbers) -> Floats:
        often = self._postings.often(self._places, term, slots)
        return self._formula.added(self._formula.weights[term], often, self._postings.lengths.take(slots))

    def _raise(self, sums: Floats) -> None:
        if len(sums) >= self._k:
            self._floor = max(self._floor, self._slack * _kth(sums, self._k))

    def _leave(self, rest: float) -> None:
        """Leave the texts that reach the floor if no more than the rest is to come."""
        kept = (self._sums >= self._floor - rest).nonzero()[0]
        self.slots, self._sums = self.slots[kept], self._sums[kept]
        self._rows = {term: row[kept] for term, row in self._rows.items()}

    def scores(self) -> Floats:
        """What the texts score, added in the order of the terms."""
        terms = sorted(self._places.sizes)  # the others add nothing
        row_of = np.zeros(len(self._formula.weights), np.int64)
        row_of[terms] = np.arange(len(terms))
        added = np.zeros((len(terms), len(self.slots)), np.float32)
        for slots, which, parts in self._read:
            at, columns = self._postings.scratch.among(slots, self.slots)
            added[row_of[which[at]], columns] = parts[at]
        for term, looked_up in self._rows.items():
            added[row_of[term]] = looked_up
        scores = np.zeros(len(self.slots), np.float32)
        for row in added:
            scores += row
        return scores


def _most(sums: Floats, slots: Numbers, count: int) -> Floats:
    """The sums of the slots that have most, each once, though it may be named up to `count` / k times."""
    found = sums.take(slots)
    if len(slots) > count:
        slots = slots[np.argpartition(found, len(slots) - count)[-count:]]
    return sums.take(_distinct(slots))


def _distinct(slots: Numbers) -> Numbers:
    """Each of the slots once, in order. numpy's own `unique` takes many times as long."""
    ordered = np.sort(slots)
    new = np.ones(len(slots), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return ordered[new]

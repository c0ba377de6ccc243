"""An order of results in which each says something that those before it do not: maximal marginal relevance.

After J. Carbonell, J. Goldstein, The Use of MMR, Diversity-Based Reranking for Reordering Documents and Producing
Summaries, 1998: the next result is the one with the greatest

    value = (1 - diversity) * relevance - diversity * the greatest likeness to a result before it

Relevance is the score scaled to 0..1 over what can be returned. Likeness is the cosine of two memories' vectors, at
least 0; where one of them has no vector, the cosine of their sets of words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Likeness = Callable[[int], Floats]

# The best so many are compared with each other; what follows them stays in its order.
MAX_COMPARED: Final = 1000


def relevance(score: Floats) -> Floats:
    """Scores mapped to 0..1 between the least and the greatest; all 1 where they are equal."""
    low, high = score.min(initial=np.inf), score.max(initial=-np.inf)
    return (score - low) / (high - low) if high > low else np.ones(len(score))


def order(relevant: Floats, likeness: Likeness, diversity: float, count: int) -> tuple[Ids, Floats, Floats]:
    """The first `count` of n results in their order, the value of each, and the part taken off it.

    `relevant`: [n], best first; `likeness(i)`: how like result i each of the first MAX_COMPARED is, 0..1. Values never
    rise: what is taken off a result only grows while it waits. A longer order begins with the shorter one.
    """
    compared = min(len(relevant), MAX_COMPARED)
    worth = (1.0 - diversity) * relevant
    nearest = np.zeros(compared)
    waiting = np.ones(compared, np.bool_)
    chosen, taken_off = [], []
    for _ in range(min(count, compared)):
        values = np.where(waiting, worth[:compared] - diversity * nearest, -np.inf)
        best = int(np.argmax(values))
        waiting[best] = False
        chosen.append(best)
        taken_off.append(diversity * float(nearest[best]))
        nearest = np.maximum(nearest, likeness(best))
    rest = range(compared, min(count, len(relevant)))
    places = np.array([*chosen, *rest], np.int64)
    off = np.array([*taken_off, *(diversity for _ in rest)])
    return places, worth[places] - off, off


class Comparison:
    """How like each other n memories are.

    `vectors`: [n, dimension], of unit length; `held`: [n], whether there is one; `hashes`, `counts`: the terms of all
    texts, one text after the other, and how many each has (needed of all if any vector is lacking, else left empty).
    """

    def __init__(
        self,
        vectors: npt.NDArray[np.float32],
        held: npt.NDArray[np.bool_],
        hashes: npt.NDArray[np.uint64],
        counts: npt.NDArray[np.int64],
    ) -> None:
        self._vectors = vectors
        self._held = held
        self._by_words = not bool(held.all())
        self._owner, self._term, self._terms, self._sizes = _sets(hashes, counts)

    def likeness(self, at: int) -> Floats:
        """How like memory `at` each memory is, 0..1."""
        if not self._by_words:
            return self._by_vector(at)
        words = self._by_word(at)
        return np.where(self._held, self._by_vector(at), words) if self._held[at] else words

    def _by_vector(self, at: int) -> Floats:
        cosines: Floats = (self._vectors @ self._vectors[at]).astype(np.float64)
        return np.clip(cosines, 0.0, 1.0)

    def _by_word(self, at: int) -> Floats:
        its = np.zeros(self._terms, np.bool_)
        its[self._term[self._owner == at]] = True
        shared = np.bincount(self._owner, weights=its[self._term], minlength=len(self._sizes))
        norm = np.sqrt(self._sizes * self._sizes[at])
        return np.where(norm > 0.0, shared / np.maximum(norm, 1.0), 0.0)


def _sets(hashes: npt.NDArray[np.uint64], counts: npt.NDArray[np.int64]) -> tuple[Ids, Ids, int, Ids]:
    """Pairs of (text, term), each once, how many terms there are, and how many pairs each text has."""
    different, numbers = np.unique(hashes, return_inverse=True)
    terms = max(1, len(different))
    pairs = np.unique(np.repeat(np.arange(len(counts)), counts) * terms + numbers.reshape(-1))
    owner, term = np.divmod(pairs, terms)
    return owner, term, terms, np.bincount(owner, minlength=len(counts))

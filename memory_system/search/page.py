"""From a ranked pool to the hits that a caller asked for: the floor, the order by diversity, the cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from memory_system.search import diversity, ranking
from memory_system.search.columns import Ids, Mask
from memory_system.search.query import Hit, SearchQuery


@dataclass(frozen=True, slots=True)
class Pool:
    """Candidates, and what is known of each: content digest, cosine (NaN without a vector), BM25, share of the query,
    when it happened, and in hybrid mode what stands around it.

    `shown`: the place of what is shown for each, where originals speak for the consolidated memory that they became.
    `current`: the index had caught up with the database, so all that is not so there has changed just now.
    """

    row_ids: Ids
    digests: npt.NDArray[np.void]
    similarity: ranking.Floats
    bm25: ranking.Floats
    share: ranking.Floats
    happened_at: ranking.Floats
    surroundings: ranking.Surroundings | None
    reason: str | None
    pending: int
    current: bool
    shown: Ids | None = None

    def evidence(self, mode: str) -> Mask:
        """Which candidates a search of this mode may return."""
        near: Mask = ~np.isnan(self.similarity)
        return near if mode == "dense" else near | (self.bm25 > 0.0)

    @property
    def shown_rows(self) -> Ids:
        """The row that is shown for each candidate."""
        return self.row_ids if self.shown is None else self.row_ids[self.shown]

    def folded(self, ranked: ranking.Ranked) -> ranking.Ranked:
        """What is shown, each as well placed as the best that speaks for it."""
        if self.shown is None:
            return ranked
        at = self.shown[self.places(ranked.row_ids)]
        best = np.sort(np.unique(at, return_index=True)[1])
        at, parts = at[best], ranked.of(best).parts
        return ranking.Ranked(self.row_ids[at], ranked.score[best], self.similarity[at], self.bm25[at], parts)

    def places(self, row_ids: Ids) -> Ids:
        """Where in the pool the rows are."""
        order = np.argsort(self.row_ids)
        at: Ids = order[np.searchsorted(self.row_ids, row_ids, sorter=order)]
        return at


def page(
    query: SearchQuery, ranked: ranking.Ranked, pool: Pool, compare: Callable[[Ids], diversity.Likeness]
) -> list[Hit]:
    """The asked-for part of what reaches min_score. `compare` makes the likeness of rows to each other."""
    if query.min_score is not None:
        at = pool.places(ranked.row_ids)
        reaches = ranking.reaches(query.mode, pool.similarity[at], pool.share[at], query.min_score)
        ranked = ranked.of(np.flatnonzero(reaches))
    if query.diversity > 0.0 and len(ranked.row_ids) > 1:
        ranked = _diversified(query, ranked, compare)
    shown = ranked.of(np.arange(len(ranked.row_ids))[query.offset : query.offset + query.k])
    return [_hit(query, shown, place, pool, at) for place, at in enumerate(pool.places(shown.row_ids).tolist())]


def _diversified(
    query: SearchQuery, ranked: ranking.Ranked, compare: Callable[[Ids], diversity.Likeness]
) -> ranking.Ranked:
    relevant = diversity.relevance(ranked.score)
    likeness = compare(ranked.row_ids[: diversity.MAX_COMPARED])
    places, value, off = diversity.order(relevant, likeness, query.diversity, query.offset + query.k)
    chosen = ranked.of(places)
    return replace(chosen, score=value, parts={**chosen.parts, "relevance": relevant[places], "diversity": -off})


def _hit(query: SearchQuery, ranked: ranking.Ranked, place: int, pool: Pool, at: int) -> Hit:
    similarity = None if np.isnan(pool.similarity[at]) else min(1.0, max(-1.0, float(pool.similarity[at])))
    keyword = None if query.mode == "dense" else float(pool.share[at])
    parts = {name: float(part[place]) for name, part in ranked.parts.items()} if query.explain else None
    score = float(ranked.score[place])
    return Hit(int(pool.row_ids[at]), pool.digests[at].tobytes(), score, similarity, keyword, parts)

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
        at = self.shown[ranked.at]
        best = np.sort(np.unique(at, return_index=True)[1])
        at, chosen = at[best], ranked.of(best)
        return replace(chosen, row_ids=self.row_ids[at], at=at)


def page(
    query: SearchQuery, ranked: ranking.Ranked, pool: Pool, compare: Callable[[Ids], diversity.Likeness]
) -> list[Hit]:
    """The asked-for part of what reaches min_score. `compare` makes the likeness of rows to each other."""
    if query.min_score is not None:
        at = ranked.at
        reaches = ranking.reaches(query.mode, pool.similarity[at], pool.share[at], query.min_score)
        ranked = ranked.of(np.flatnonzero(reaches))
    if query.diversity > 0.0 and len(ranked.row_ids) > 1:
        ranked = _diversified(query, ranked, compare)
    return _hits(query, ranked.of(slice(query.offset, query.offset + query.k)), pool)


def _diversified(
    query: SearchQuery, ranked: ranking.Ranked, compare: Callable[[Ids], diversity.Likeness]
) -> ranking.Ranked:
    relevant = diversity.relevance(ranked.score)
    likeness = compare(ranked.row_ids[: diversity.MAX_COMPARED])
    places, value, off = diversity.order(relevant, likeness, query.diversity, query.offset + query.k)
    chosen = ranked.of(places)
    return replace(chosen, score=value, parts={**chosen.parts, "relevance": relevant[places], "diversity": -off})


def _hits(query: SearchQuery, shown: ranking.Ranked, pool: Pool) -> list[Hit]:
    at = shown.at
    digests = pool.digests[at].tobytes()
    similarity = [None if cosine != cosine else cosine for cosine in pool.similarity[at].clip(-1.0, 1.0).tolist()]
    keyword = [None] * len(at) if query.mode == "dense" else pool.share[at].tolist()
    figures = zip(shown.row_ids.tolist(), shown.score.tolist(), similarity, keyword, strict=True)
    parts = [(name, part.tolist()) for name, part in shown.parts.items()]
    return [
        Hit(
            row_id,
            digests[16 * place : 16 * place + 16],
            score,
            cosine,
            share,
            {name: part[place] for name, part in parts} if query.explain else None,
        )
        for place, (row_id, score, cosine, share) in enumerate(figures)
    ]

"""From candidates of two sides to one order. Pure functions on arrays.

score = dense_weight * (cosine, scaled to 0..1 over the pool) + keyword_weight * (bm25 / best bm25 of the pool)

Scores are fused, not ranks: on short texts the margin by which the keyword side prefers a hit is evidence, and
ranks would throw it away. The score orders one result list and means nothing beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ranked:
    """The pool, best first. All arrays have the pool's length; `similarity` is NaN for a row without a vector."""

    row_ids: Ids
    score: Floats
    similarity: Floats
    bm25: Floats
    dense_part: Floats
    keyword_part: Floats


def scaled(similarity: Floats) -> Floats:
    """Cosines mapped to 0..1 between the pool's least and greatest; NaN gives 0, a pool of equals gives 1."""
    known = ~np.isnan(similarity)
    part = np.zeros(len(similarity))
    if known.any():
        low, high = similarity[known].min(), similarity[known].max()
        part[known] = (similarity[known] - low) / (high - low) if high > low else 1.0
    return part


def relative(bm25: Floats) -> Floats:
    """Scores divided by the greatest of the pool."""
    top = bm25.max(initial=0.0)
    return bm25 / top if top > 0.0 else np.zeros(len(bm25))


def rank(
    mode: str, row_ids: Ids, similarity: Floats, bm25: Floats, *, dense_weight: float, keyword_weight: float
) -> Ranked:
    """Order a pool by its mode's score (hybrid | dense | keyword), equal scores by row id."""
    dense, keyword = scaled(similarity), relative(bm25)
    if mode == "dense":
        score = np.where(np.isnan(similarity), -1.0, similarity)
    elif mode == "keyword":
        score = keyword
    else:
        score = dense_weight * dense + keyword_weight * keyword
    order = np.lexsort((row_ids, -score))
    return Ranked(row_ids[order], score[order], similarity[order], bm25[order], dense[order], keyword[order])


def passes(mode: str, similarity: float | None, keyword: float | None, min_score: float | None) -> bool:
    """Whether a result's absolute figures reach the floor: those of its mode, and in hybrid either of them."""
    if min_score is None:
        return True
    figures = {"dense": (similarity,), "keyword": (keyword,)}.get(mode, (similarity, keyword))
    return any(figure is not None and figure >= min_score for figure in figures)

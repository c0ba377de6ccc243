"""From candidates of two sides to one order. Pure functions on arrays.

score = keyword_weight * (BM25 of the window / the best of the pool)
      + dense_weight * (cosine, scaled to 0..1 over the pool)
      + parent_weight * (the best sum of these two below the same parent)
      + date_weight * (how near it occurred to a date in the query)
      + the turn: answer_weight after a question, - question_weight as a question, length_weight * its length

The window of a memory is its text with those around it below the same parent, each counted by its weight: an answer is
found by the words of the question before it. Scores are fused, not ranks: on short texts the margin by which the
keyword side prefers a hit is evidence, and ranks would throw it away. A memory without a parent is its own window and
its own best, and the terms of the turn are centred, so that they neither help it nor harm it. The score orders one
result list and means nothing beyond it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from memory_system.ranking_settings import RankingSettings
from memory_system.search.dates import Date, nearness

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# The rows of `Surroundings.around`, from the second text before a memory to the second one after it.
AROUND: Final = (-2, -1, 0, 1, 2)
_BEFORE, _SELF = AROUND.index(-1), AROUND.index(0)
_BESIDE: Final = (np.array(AROUND) != 0)[:, None]
_NOTHING: Final[Mapping[str, Floats]] = {}
# Longer turns say no more about the same thing.
_LONG_TERMS: Final = 80.0
_TINY: Final = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is known of n memories and of the texts around them.

    There are m texts, the last of which stands for none and has no words. `around`: [5, n], for each memory the
    numbers of the texts of AROUND; `frequencies`: [terms, m]; `lengths`: [m], in terms; `asks`: [m], whether it ends
    with a question; `parents`: [n], -1 for none; `occurred_at`: [n], epoch seconds, NaN where it is not known.
    """

    around: Ids
    frequencies: npt.NDArray[np.float32]
    lengths: npt.NDArray[np.float32]
    asks: Flags
    parents: Ids
    occurred_at: Floats
    idf: npt.NDArray[np.float32]
    average_length: float
    dates: tuple[Date, ...] = ()

    def own(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The frequencies ([terms, n]) and lengths of the memories' own texts."""
        texts = self.around[_SELF]
        return self.frequencies[:, texts], self.lengths[texts]

    def of(self, chosen: Flags | Ids) -> Surroundings:
        """That of some of the memories."""
        parents, occurred_at = self.parents[chosen], self.occurred_at[chosen]
        return replace(self, around=self.around[:, chosen], parents=parents, occurred_at=occurred_at)


@dataclass(frozen=True, slots=True)
class Ranked:
    """A pool, best first. `at`: where in the pool each stands.

    `parts`: what `explain` shows, by name, where it was asked for; those that are weighted are as they entered the sum.
    """

    row_ids: Ids
    at: Ids
    score: Floats
    parts: dict[str, Floats] = field(default_factory=dict)

    def of(self, places: Ids | slice) -> Ranked:
        """Those at the places of the order, in their order."""
        parts = {name: part[places] for name, part in self.parts.items()}
        return Ranked(self.row_ids[places], self.at[places], self.score[places], parts)


def scaled(similarity: Floats) -> Floats:
    """Cosines mapped to 0..1 between the pool's least and greatest; a pool of equals gives 1. What has no vector yet
    gives the mean of those that have one, being neither near nor far, and 0 where none has."""
    known = ~np.isnan(similarity)
    if known.all():
        return _scaled(similarity) if len(similarity) else np.zeros(0)
    part = np.zeros(len(similarity))
    if known.any():
        part[known] = _scaled(similarity[known])
        part[~known] = part[known].mean()
    return part


def _scaled(similarity: Floats) -> Floats:
    low, high = similarity.min(), similarity.max()
    return (similarity - low) / (high - low) if high > low else np.ones(len(similarity))


def relative(bm25: Floats) -> Floats:
    """Scores divided by the greatest of the pool."""
    top = bm25.max(initial=0.0)
    return bm25 / top if top > 0.0 else np.zeros(len(bm25))


def rank(
    mode: str,
    row_ids: Ids,
    similarity: Floats,
    bm25: Floats,
    settings: RankingSettings,
    surroundings: Surroundings | None = None,
    boosts: Mapping[str, Floats] = _NOTHING,
    explain: bool = True,
) -> Ranked:
    """Order a pool by its mode's score (hybrid | dense | keyword), equal scores by row id.

    `bm25` is of each text alone. Without `surroundings` every memory stands for itself. `boosts`: what the caller has
    added to each score, by name and weighted. `explain`: whether the parts are wanted.
    """
    near = surroundings if mode == "hybrid" else None
    dense, keyword = scaled(similarity), relative(bm25 if near is None else window_bm25(near, settings))
    parts = {"dense": dense, "keyword": keyword, "bm25": bm25}
    if mode == "dense":
        score = np.where(np.isnan(similarity), -1.0, similarity)
    elif mode == "keyword":
        score = keyword
    else:
        score = settings.dense_weight * dense + settings.keyword_weight * keyword
    if near is not None:
        added = _added(score, near, settings)
        parts |= added
        score = score + added["parent"] + added["date"] + added["turn"]
    for boost in boosts.values():
        score = score + boost
    parts |= boosts
    order = np.lexsort((row_ids, -score))
    chosen = {name: part[order] for name, part in parts.items()} if explain else {}
    return Ranked(row_ids[order], order, score[order], chosen)


def _added(evidence: Floats, near: Surroundings, settings: RankingSettings) -> dict[str, Floats]:
    return {
        "parent": settings.parent_weight * best_below(near.parents, evidence),
        "date": settings.date_weight * nearness(near.dates, near.occurred_at),
        "turn": turn(near, settings),
    }


def window_bm25(near: Surroundings, settings: RankingSettings) -> Floats:
    """BM25 of each memory's window: frequencies and lengths are sums over its texts, each by its weight, before they
    saturate (as over the fields of a text in S. Robertson et al., Simple BM25 Extension to Multiple Weighted Fields,
    2004)."""
    weights = _weights(settings)
    total = float(weights.sum())
    count = near.around.shape[1]
    texts = near.around.ravel()
    frequencies = weights @ near.frequencies.take(texts, axis=1).reshape(len(near.idf), len(weights), count)
    lengths = weights @ near.lengths.take(texts).reshape(len(weights), count)
    b = settings.length_norm
    norm = settings.saturation * total * (1.0 - b + b * lengths / (max(1.0, near.average_length) * total))
    score: Floats = near.idf @ (frequencies / np.maximum(frequencies + norm, _TINY))
    return score


def _weights(settings: RankingSettings) -> Floats:
    """Those of the texts of AROUND."""
    before, after = settings.window_before, settings.window_after
    return np.array([before, before, 1.0, after, after])


def best_below(parents: Ids, evidence: Floats) -> Floats:
    """For each memory the best evidence below its parent; its own without a parent."""
    best = evidence.copy()
    below = np.flatnonzero(parents >= 0)
    if len(below):
        order = below[parents[below].argsort()]
        families = parents[order]
        first = np.ones(len(order), np.bool_)
        np.not_equal(families[1:], families[:-1], out=first[1:])
        of_each = np.maximum.reduceat(evidence[order], first.nonzero()[0])
        best[order] = of_each[first.cumsum() - 1]
    return best


def turn(near: Surroundings, settings: RankingSettings) -> Floats:
    """What speaks for a turn of a conversation whatever is asked, centred over the turns of the pool; 0 elsewhere."""
    nothing = len(near.lengths) - 1
    turns = ((near.around != nothing) & _BESIDE).any(axis=0)
    if not turns.any():
        return np.zeros(len(turns))
    own = near.around[_SELF]
    part = settings.answer_weight * near.asks[near.around[_BEFORE]]
    part -= settings.question_weight * near.asks[own]
    part += settings.length_weight * np.sqrt(np.minimum(near.lengths[own], _LONG_TERMS) / _LONG_TERMS)
    return np.where(turns, part - part[turns].sum() / np.count_nonzero(turns), 0.0)


def reaches(mode: str, similarity: Floats, keyword: Floats, min_score: float) -> Flags:
    """Which results' absolute figures (NaN: none) reach the floor: those of its mode, and in hybrid either of them."""
    near: Flags = similarity >= min_score
    said: Flags = keyword >= min_score
    return {"dense": near, "keyword": said}.get(mode, near | said)

"""One search: candidates of both sides within one scope, fused, checked against the database, and cut to a page.

The in-memory index trails the database by milliseconds. A search therefore reads the log of what the index has not
applied yet and corrects for it, and what it returns exists, is in scope, and has the content it was judged by.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.search import feed, ranking
from memory_system.search.columns import Ids, Mask
from memory_system.search.connections import Connections
from memory_system.search.index import SearchIndex
from memory_system.search.keywords import FtsKeywordIndex, KeywordIndex, KeywordQuery
from memory_system.search.query import Hit, SearchOutcome, SearchQuery
from memory_system.search.scope import Scope
from memory_system.search.vectors import VectorIndex, Vectors, unit
from memory_system.search.view import View
from memory_system.settings import SearchSettings

# Contents fetched at once while results are tested against min_score.
_SLICE: Final = 32


@dataclass(frozen=True, slots=True)
class _Lag:
    """What the index has not applied yet: the rows that changed, and digests of those of them that exist.

    `rows`: content digests of those in the namespace; `digests`: of those in scope. `cut_off`: there is more than one
    batch of it. Such rows may be missing among the candidates of the vector side until the index has caught up; none
    that is out of scope is returned.
    """

    changed: frozenset[int]
    rows: dict[int, bytes]
    digests: dict[int, bytes]
    cut_off: bool


@dataclass(frozen=True, slots=True)
class _Pool:
    row_ids: Ids
    similarity: ranking.Floats
    bm25: ranking.Floats
    digests: dict[int, bytes]
    reason: str | None
    pending: int


class SearchEngine:
    """Runs searches in a small pool of threads; each uses a query-only connection of its own while it runs."""

    def __init__(
        self,
        settings: SearchSettings,
        lifecycle: LifecycleSettings,
        database_path: Path | str,
        index: SearchIndex,
        connect: Callable[[], sqlite3.Connection],
        keywords: KeywordIndex | None = None,
        query_s: float = 5.0,
    ) -> None:
        self._settings = settings
        self._lifecycle = lifecycle
        self._path = database_path
        self._index = index
        self._keywords = keywords or FtsKeywordIndex(lifecycle)
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="search")
        self._connections = Connections(connect, query_s)

    def __repr__(self) -> str:
        return f"<SearchEngine {self._path} {self._index!r}>"

    def submit(self, query: SearchQuery) -> Future[SearchOutcome]:
        """Run `search` in the pool."""
        return self._pool.submit(self.search, query)

    def submit_similar(self, query: SearchQuery, row_id: int, digest: bytes | None = None) -> Future[SearchOutcome]:
        """Run `similar` in the pool."""
        return self._pool.submit(self.similar, query, row_id, digest)

    def close(self) -> None:
        """Give up running searches and close the connections. Idempotent."""
        self._connections.closing = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._connections.close()
        self._keywords.close()

    def similar(self, query: SearchQuery, row_id: int, digest: bytes | None = None) -> SearchOutcome:
        """The memories nearest to a stored one (of this content, if given), itself left out.

        Degraded (`no_vector`) while that content has no vector.
        """
        vector = model_id = None
        if self._index.has_vector(row_id, digest):
            with self._index.reading() as view:
                slot = view.columns.slot(row_id) if view else None
                if view is not None and view.vectors is not None and slot is not None:
                    vector, model_id = view.vectors.vector(slot), view.model_id
        if vector is None:
            return SearchOutcome([], self._index.pending(query.namespace), 0, "no_vector")
        return self.search(replace(query, mode="dense", vector=vector, vector_model=model_id, exclude_row_id=row_id))

    def search(self, query: SearchQuery) -> SearchOutcome:
        """Search. Raises sqlite3.Error when the database cannot be read."""
        with self._connections.one() as conn, feed.snapshot(conn):
            words = self._keywords.prepare(conn, query.text) if query.mode != "dense" else KeywordQuery((), {})
            pool = self._candidates(conn, query, words)
            present = self._digests(conn, query.scope, pool.row_ids.tolist()) if len(pool.row_ids) else {}
            ranked = self._rank(query, pool, present)
            hits = self._page(conn, query, words, ranked, present)
            return SearchOutcome(hits, pool.pending, len(ranked.row_ids), pool.reason)

    # ---- candidates ----

    def _candidates(self, conn: sqlite3.Connection, query: SearchQuery, words: KeywordQuery) -> _Pool:
        # Both sides are scaled over the pool, so the pages of one hybrid search share one pool, and end with it.
        depth = query.k if query.mode == "hybrid" else query.offset + query.k
        wanted = max(self._settings.candidates, depth) + (query.exclude_row_id is not None)
        found = dict(self._keywords.candidates(conn, words, query.scope, wanted))
        found.pop(query.exclude_row_id or 0, None)
        vector = None if query.vector is None else unit(query.vector)
        lag = self._lag(conn, query)
        allowed = self._allowed_ids(conn, query.scope)
        with self._index.reading() as view:
            reason = self._obstacle(view, query, vector)
            if view is None or view.vectors is None or vector is None or reason is not None:
                pool = _keyword_pool(found, reason)
            else:
                mask = self._mask(view, query, allowed, lag)
                nearest = 0 if query.mode == "keyword" else wanted
                pool = _pool(view, view.vectors, vector, mask, found, nearest)
            pending = None if view is None or lag.cut_off else _pending(view, query.namespace, lag)
        if pending is None:
            # What a search could not look at is never nothing: such an outcome must not be kept.
            pending = max(1 if lag.cut_off else 0, feed.count_pending(conn, query.namespace, self._index.model_id))
        return replace(pool, pending=pending)

    def _obstacle(self, view: View | None, query: SearchQuery, vector: Vectors | None) -> str | None:
        """Why the vector side has to stay out, None if it can answer or is not asked."""
        if query.mode == "keyword":
            return None
        if vector is None:
            return "no_query_vector"
        if view is None or view.vectors is None:
            return "index_failed" if self._index.state == "failed" else "index_loading"
        other = query.vector_model not in (None, view.model_id) or vector.shape != (view.vectors.dimension,)
        return "other_model" if other else None

    def _allowed_ids(self, conn: sqlite3.Connection, scope: Scope) -> list[int] | None:
        """The row ids in scope by SQL; None when the columns can tell by themselves."""
        with self._index.reading() as view:
            if view is None or view.columns.covers(scope.filter):
                return None
        where, params = scope.where(self._lifecycle)
        return [row_id for (row_id,) in conn.execute(f"SELECT m.row_id FROM memories AS m WHERE {where}", params)]

    def _lag(self, conn: sqlite3.Connection, query: SearchQuery) -> _Lag:
        changes = feed.read_log(conn, self._index.applied_seq)
        changed = frozenset(row_id for _, row_id, _ in changes)
        if not changed:
            return _Lag(changed, {}, {}, False)
        rows = feed.read_digests(conn, query.namespace, list(changed))
        digests = self._digests(conn, query.scope, list(changed))
        return _Lag(changed, rows, digests, len(changes) == feed.LOG_BATCH)

    def _digests(self, conn: sqlite3.Connection, scope: Scope, row_ids: list[int]) -> dict[int, bytes]:
        """The content digests of those of the rows that are in scope now."""
        where, params = scope.where(self._lifecycle)
        # CROSS JOIN: each row by its id, where the planner might rather walk the whole namespace.
        sql = (
            "SELECT m.row_id, m.content_digest FROM json_each(?) AS wanted CROSS JOIN memories AS m"
            f" ON m.row_id = wanted.value WHERE {where}"
        )
        return dict(conn.execute(sql, [json.dumps(row_ids), *params]))

    def _mask(self, view: View, query: SearchQuery, allowed: list[int] | None, lag: _Lag) -> Mask:
        columns = view.columns
        mask = columns.mask(query.scope) if allowed is None else None
        if mask is None:
            mask = np.zeros(columns.top, np.bool_)
            mask[columns.slots(allowed or ())] = True
        for row_id in lag.changed:
            slot = columns.slot(row_id)
            if slot is not None:
                mask[slot] = lag.digests.get(row_id) == columns.digests[slot].tobytes()
        excluded = columns.slot(query.exclude_row_id) if query.exclude_row_id is not None else None
        if excluded is not None:
            mask[excluded] = False
        return mask

    # ---- order and page ----

    def _rank(self, query: SearchQuery, pool: _Pool, present: dict[int, bytes]) -> ranking.Ranked:
        """Rank what is in scope in the database; a similarity to content that has changed since is dropped."""
        similarity = pool.similarity.copy()
        for position, row_id in enumerate(pool.row_ids.tolist()):
            if present.get(row_id) != pool.digests.get(row_id):
                similarity[position] = np.nan
        keep = np.fromiter((row_id in present for row_id in pool.row_ids.tolist()), np.bool_, len(pool.row_ids))
        keep &= ~np.isnan(similarity) if query.mode == "dense" else ~np.isnan(similarity) | (pool.bm25 > 0.0)
        return ranking.rank(
            query.mode,
            pool.row_ids[keep],
            similarity[keep],
            pool.bm25[keep],
            dense_weight=self._settings.dense_weight,
            keyword_weight=self._settings.keyword_weight,
        )

    def _page(
        self,
        conn: sqlite3.Connection,
        query: SearchQuery,
        words: KeywordQuery,
        ranked: ranking.Ranked,
        present: dict[int, bytes],
    ) -> list[Hit]:
        """The asked-for part of what passes min_score. Texts are read only as far as needed."""
        hits: list[Hit] = []
        end = query.offset + query.k
        # Without a floor, what stands before the page need not be looked at.
        start = query.offset if query.min_score is None else 0
        step = query.k if query.min_score is None else max(query.k, _SLICE)
        for low in range(start, len(ranked.row_ids), step):
            if start + len(hits) >= end:
                break
            positions = range(low, min(low + step, len(ranked.row_ids)))
            shares = self._shares(conn, query, words, [int(ranked.row_ids[at]) for at in positions])
            made = (_hit(ranked, at, shares, present, query) for at in positions)
            hits += [hit for hit in made if ranking.passes(query.mode, hit.similarity, hit.keyword, query.min_score)]
        return hits[query.offset - start : end - start]

    def _shares(
        self, conn: sqlite3.Connection, query: SearchQuery, words: KeywordQuery, row_ids: list[int]
    ) -> dict[int, float]:
        if query.mode == "dense":
            return {}
        marks = ", ".join("?" * len(row_ids))
        rows = conn.execute(f"SELECT row_id, content FROM memories WHERE row_id IN ({marks})", row_ids).fetchall()
        contents = dict(rows)
        return dict(zip(contents, self._keywords.shares(words, list(contents.values())), strict=True))


def _pending(view: View, namespace: str, lag: _Lag) -> int:
    """How many memories of the namespace this view cannot compare: without a vector, or not as they are now."""
    columns = view.columns
    slots = {row_id: columns.slot(row_id) for row_id in lag.rows}
    trailing = sum(
        1
        for row_id, slot in slots.items()
        if slot is None or not columns.has_vector[slot] or columns.digests[slot].tobytes() != lag.rows[row_id]
    )
    return columns.pending(namespace, lag.changed) + trailing


def _keyword_pool(found: dict[int, float], reason: str | None) -> _Pool:
    row_ids = np.fromiter(found, np.int64, len(found))
    bm25 = np.fromiter(found.values(), np.float64, len(found))
    return _Pool(row_ids, np.full(len(found), np.nan), bm25, {}, reason, 0)


def _pool(
    view: View, vectors: VectorIndex, vector: Vectors, mask: Mask, found: dict[int, float], nearest: int
) -> _Pool:
    """Both sides' candidates, each with its exact similarity where it has a vector."""
    columns = view.columns
    slots, _ = vectors.search(vector, mask, nearest)
    merged = {row_id: 0.0 for row_id in columns.row_ids[slots].tolist()} | found
    row_ids = np.fromiter(merged, np.int64, len(merged))
    similarity = np.full(len(merged), np.nan)
    held = np.fromiter((columns.slot(row_id) is not None for row_id in merged), np.bool_, len(merged))
    held_slots = columns.slots(merged)
    similarity[held] = vectors.similarities(vector, held_slots)
    digests = dict(zip(row_ids[held].tolist(), (d.tobytes() for d in columns.digests[held_slots]), strict=True))
    return _Pool(row_ids, similarity, np.fromiter(merged.values(), np.float64, len(merged)), digests, None, 0)


def _hit(
    ranked: ranking.Ranked, at: int, shares: dict[int, float], present: dict[int, bytes], query: SearchQuery
) -> Hit:
    row_id = int(ranked.row_ids[at])
    similarity = None if np.isnan(ranked.similarity[at]) else min(1.0, max(-1.0, float(ranked.similarity[at])))
    parts: dict[str, Any] | None = None
    if query.explain:
        parts = {
            "dense": float(ranked.dense_part[at]),
            "keyword": float(ranked.keyword_part[at]),
            "bm25": float(ranked.bm25[at]),
        }
    return Hit(row_id, present[row_id], float(ranked.score[at]), similarity, shares.get(row_id), parts)


__all__ = ["Hit", "SearchEngine", "SearchOutcome", "SearchQuery"]

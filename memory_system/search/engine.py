"""One search: candidates of both sides within one scope, fused, checked against the database, and cut to a page.

The in-memory index trails the database by milliseconds. A search therefore has it catch up with the state that the
search reads, and what it returns exists, is in scope, and has the content it was judged by.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.ma  # np.unique imports it when first called, which fails when no file is left to open it
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.ranking_settings import RankingSettings
from memory_system.search import boosting, diversity, feed, gathering, in_scope, ranking, word_keeping
from memory_system.search.columns import Columns, Ids, Mask
from memory_system.search.connections import Connections
from memory_system.search.highlights import Span, highlights
from memory_system.search.index import SearchIndex
from memory_system.search.keywords import NO_QUERY, bm25, shares
from memory_system.search.page import Pool, page
from memory_system.search.query import Hit, SearchOutcome, SearchQuery
from memory_system.search.scope import Scope
from memory_system.search.vectors import Vectors, unit
from memory_system.search.view import View
from memory_system.settings import SearchSettings

# How long a search waits for an index that is being loaded, before it does with the newest memories.
_LOADING_S: Final = 0.5
# A search among whose candidates a row changed between index and database is made anew.
_ATTEMPTS: Final = 2


class SearchEngine:
    """Runs searches in a small pool of threads; each uses a query-only connection of its own while it runs."""

    def __init__(
        self,
        settings: SearchSettings,
        lifecycle: LifecycleSettings,
        database_path: Path | str,
        index: SearchIndex,
        connect: Callable[[], sqlite3.Connection],
        query_s: float = 5.0,
        weights: RankingSettings | None = None,
    ) -> None:
        self._settings = settings
        self._weights = weights or RankingSettings()
        self._lifecycle = lifecycle
        self._path = database_path
        self._index = index
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="search")
        # Each thread computes by itself: on cores that are busy, those that share a product wait for each other.
        threadpool_limits(1, "blas")
        # Of the views' columns, also where there is no view yet.
        self._covers = Columns(settings.filterable_metadata).covers
        self._connections = Connections(connect, query_s)
        self._connections.warm(settings.threads)

    def __repr__(self) -> str:
        return f"<SearchEngine {self._path} {self._index!r}>"

    def submit(self, query: SearchQuery) -> Future[SearchOutcome]:
        """Run `search` in the pool."""
        return self._threads.submit(self.search, query)

    def submit_similar(self, query: SearchQuery, row_id: int, digest: bytes | None = None) -> Future[SearchOutcome]:
        """Run `similar` in the pool."""
        return self._threads.submit(self.similar, query, row_id, digest)

    def submit_highlights(self, text: str, contents: Sequence[str]) -> Future[list[list[Span]]]:
        """Find the words of a query in contents, in the pool: books take their time."""
        return self._threads.submit(highlights, self._index.tokenizer, text, contents)

    def close(self) -> None:
        """Give up running searches and close the connections. Idempotent."""
        self._connections.closing = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._connections.close()
        self._index.tokenizer.close()

    def similar(self, query: SearchQuery, row_id: int, digest: bytes | None = None) -> SearchOutcome:
        """The memories nearest to a stored one (of this content, if given), itself left out.

        Degraded (`no_vector`) while that content has no vector.
        """
        vector = model_id = None
        if self._index.has_vector(row_id, digest) or self._has_followed_to(row_id, digest):
            with self._index.reading() as view:
                slot = view.columns.slot(row_id) if view else None
                if view is not None and view.vectors is not None and slot is not None:
                    vector, model_id = view.vectors.vector(slot), view.model_id
        if vector is None:
            return SearchOutcome([], self._index.pending(query.namespace), 0, "no_vector")
        return self.search(replace(query, mode="dense", vector=vector, vector_model=model_id, exclude_row_id=row_id))

    def _has_followed_to(self, row_id: int, digest: bytes | None) -> bool:
        with self._connections.one() as conn, feed.snapshot(conn) as target:
            return self._index.catch_up(conn, target) and self._index.has_vector(row_id, digest)

    def search(self, query: SearchQuery) -> SearchOutcome:
        """Search. Raises sqlite3.Error when the database cannot be read."""
        self._index.wait_loaded(_LOADING_S)
        for attempt in range(1, _ATTEMPTS + 1):
            with self._connections.one() as conn, feed.snapshot(conn) as target:
                pool = self._candidates(conn, query, target)
                importance = self._importances(conn, query, pool)
                ranked, hits, records, moved = self._verified(conn, query, pool, importance)
            if not moved or attempt == _ATTEMPTS:
                break
        hits = self._with_neighbours(query, hits)
        return SearchOutcome(hits, pool.pending, len(ranked.row_ids), pool.reason, records)

    def _verified(
        self, conn: sqlite3.Connection, query: SearchQuery, pool: Pool, importance: ranking.Floats
    ) -> tuple[ranking.Ranked, list[Hit], in_scope.Records, bool]:
        """The ranked pool and its page, all of which is so in the database, with the page's records; and whether what
        the index had caught up with has changed since.

        Ranked first: of a pool of hundreds a page shows ten. Only where one of them is not so the whole pool is
        checked, as it is where the order of the others depends on each.
        """
        keep = pool.evidence(query.mode)
        if query.offset == 0 and query.diversity == 0.0:
            ranked = self._rank(query, pool, keep, importance)
            hits = page(query, ranked, pool, partial(self._likeness, conn))
            records = in_scope.records(conn, self._lifecycle, query.scope, hits)
            if all(hit.row_id in records and records[hit.row_id].content_digest == hit.digest for hit in hits):
                return ranked, hits, records, False
        row_ids = pool.shown_rows.tolist()
        held = (pool.digests if pool.shown is None else pool.digests[pool.shown]).tolist()
        present = in_scope.digests(conn, self._lifecycle, query.scope, row_ids)
        same = np.fromiter((present.get(row) == one for row, one in zip(row_ids, held, strict=True)), np.bool_)
        moved = pool.current and any(row in present for row, so in zip(row_ids, same.tolist(), strict=True) if not so)
        ranked = self._rank(query, pool, keep & same, importance)
        hits = page(query, ranked, pool, partial(self._likeness, conn))
        return ranked, hits, in_scope.records(conn, self._lifecycle, query.scope, hits), moved

    # ---- candidates ----

    def _candidates(self, conn: sqlite3.Connection, query: SearchQuery, target: int) -> Pool:
        """The pool, of an index that has followed the log up to `target`."""
        # Where the order depends on what else is in the pool, the pages of one search share one pool, and end with it.
        one_pool = query.mode == "hybrid" or bool(query.boost) or query.diversity > 0.0
        depth = query.k if one_pool else query.offset + query.k
        wanted = max(self._settings.candidates, depth)
        vector = None if query.vector is None else unit(query.vector)
        current = self._index.catch_up(conn, target)
        allowed = self._allowed_ids(conn, query.scope)
        with self._index.reading() as view:
            # It may be another one than that which has caught up.
            current = current and view is not None and view.seq >= target
            if view is not None:
                pool = self._pool(view, query, vector, allowed, wanted, current)
        if view is None:
            keys = self._settings.filterable_metadata
            newest = word_keeping.newest(conn, query.namespace, self._index.tokenizer, keys)
            pool = self._pool(newest, query, vector, allowed, wanted, current)
        if current:
            return pool
        # What a search could not look at is never nothing: such an outcome must not be kept.
        pending = feed.count_pending(conn, query.namespace, self._index.model_id)
        return replace(pool, pending=max(pending, 0 if view is None else 1))

    def _pool(
        self,
        view: View,
        query: SearchQuery,
        vector: Vectors | None,
        allowed: list[int] | None,
        wanted: int,
        current: bool,
    ) -> Pool:
        """Both sides' candidates, each with all that is known of it."""
        columns = view.columns
        reason = self._obstacle(view, query, vector)
        mask = self._mask(columns, query, allowed)
        heard = mask
        if query.mode == "hybrid" and not query.include_archived:
            heard = columns.speakers.heard(mask, columns.expires, query.scope.now_s)
        words = NO_QUERY if query.mode == "dense" else view.words.prepare(query.namespace, query.text)
        slots, _ = view.words.candidates(words, heard, columns.row_ids, wanted)
        compared = view.vectors if reason is None and query.mode != "keyword" else None
        if compared is not None and vector is not None:
            slots = np.union1d(slots, compared.search(vector, heard, wanted)[0])
        slots, near, frequencies, lengths = gathering.evidence(view, query, words, slots, heard)
        similarity = np.full(len(slots), np.nan, np.float32)
        if compared is not None and vector is not None:
            similarity = compared.similarities(vector, slots)
        shown = None if heard is mask else np.searchsorted(slots, columns.speakers.shown(slots))
        return Pool(
            columns.row_ids[slots],
            columns.digests[slots],
            similarity.astype(np.float64),
            bm25(words, frequencies, lengths).astype(np.float64),
            shares(words, frequencies),
            columns.happened_at[slots if shown is None else slots[shown]],
            near,
            reason or self._shortfall(view, query, current),
            columns.pending(query.namespace),
            current,
            shown,
        )

    def _shortfall(self, view: View, query: SearchQuery, current: bool) -> str | None:
        """Why the keyword side cannot see everything."""
        if query.mode == "dense":
            return None
        if view is not self._index.view or view.lacking:
            return "index_failed" if self._index.state == "failed" else "index_loading"
        return None if current else "index_behind"

    def _obstacle(self, view: View, query: SearchQuery, vector: Vectors | None) -> str | None:
        """Why the vector side has to stay out, None if it can answer or is not asked."""
        if query.mode == "keyword":
            return None
        if vector is None:
            return "no_query_vector"
        if view.vectors is None:
            return "index_failed" if self._index.state == "failed" else "index_loading"
        other = query.vector_model not in (None, view.model_id) or vector.shape != (view.vectors.dimension,)
        return "other_model" if other else None

    def _allowed_ids(self, conn: sqlite3.Connection, scope: Scope) -> list[int] | None:
        """The row ids in scope by SQL; None when the columns can tell by themselves."""
        if self._covers(scope.filter):
            return None
        where, params = scope.where(self._lifecycle)
        return [row_id for (row_id,) in conn.execute(f"SELECT m.row_id FROM memories AS m WHERE {where}", params)]

    def _mask(self, columns: Columns, query: SearchQuery, allowed: list[int] | None) -> Mask:
        mask = columns.mask(query.scope) if allowed is None else None
        if mask is None:
            mask = np.zeros(columns.top, np.bool_)
            mask[columns.slots(allowed or ())] = True
        excluded = columns.slot(query.exclude_row_id) if query.exclude_row_id is not None else None
        if excluded is not None:
            mask = mask.copy()
            mask[excluded] = False
        return mask

    def _rank(self, query: SearchQuery, pool: Pool, keep: Mask, importance: ranking.Floats) -> ranking.Ranked:
        chosen = None if keep.all() else np.flatnonzero(keep)  # mostly all of them are, and copies cost

        def those(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return values if chosen is None else values[chosen]

        near = pool.surroundings
        ranked = ranking.rank(
            query.mode,
            those(pool.row_ids),
            those(pool.similarity),
            those(pool.bm25),
            self._weights,
            near if near is None or chosen is None else near.of(chosen),
            boosting.added(query.boost, query.now_s, those(pool.happened_at), those(importance)),
            query.explain,
        )
        return pool.folded(ranked if chosen is None else replace(ranked, at=chosen[ranked.at]))

    def _importances(self, conn: sqlite3.Connection, query: SearchQuery, pool: Pool) -> ranking.Floats:
        """The importance now of each candidate, 0 where nobody asked for it."""
        if query.boost.importance == 0.0:
            return np.zeros(len(pool.row_ids))
        return boosting.importances(conn, self._lifecycle, pool.shown_rows, query.now_s)

    # ---- what a caller may ask for beside the order ----

    def _likeness(self, conn: sqlite3.Connection, row_ids: Ids) -> diversity.Likeness:
        """How like each other the rows are: by their vectors, and by their words where one is lacking."""
        with self._index.reading() as view:
            vectors, held = gathering.vectors(view, row_ids)
        texts: dict[int, str] = {}
        if not held.all():
            texts = {row_id: text for row_id, _, text in feed.read_texts(conn, row_ids.tolist())}
        words = self._index.tokenizer.hashes([texts.get(row_id, "") for row_id in row_ids.tolist()])
        return diversity.Comparison(vectors, held, *words).likeness

    def _with_neighbours(self, query: SearchQuery, hits: list[Hit]) -> list[Hit]:
        if not query.neighbours:
            return hits
        with self._index.reading() as view:
            return hits if view is None else gathering.with_neighbours(view.columns, query, hits)


__all__ = ["Hit", "SearchEngine", "SearchOutcome", "SearchQuery"]

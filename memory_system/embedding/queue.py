"""The micro-batching queue before an embedder: queries first, then the newest writes, then backfill."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, NamedTuple

from memory_system.digest import content_digest
from memory_system.embedding.backlog import RowBacklog, RowBatch
from memory_system.embedding.interface import Embedder, EmbedderState, VectorCache, Vectors
from memory_system.embedding.pace import Pace
from memory_system.embedding.queries import WaitingQueries
from memory_system.embedding.strikes import Strikes
from memory_system.errors import MemorySystemError, VectorsUnavailable
from memory_system.log import get_logger
from memory_system.settings import EmbeddingSettings

LoadTexts = Callable[[Sequence[int]], Awaitable[dict[int, tuple[str, bytes]]]]
StoreVectors = Callable[[str, list[tuple[int, bytes, Vectors]]], Awaitable[None]]

# Queries that never end must not keep writes from being found: rows get one batch after this many of queries.
_QUERY_BATCHES_IN_A_ROW: Final = 16
_FIRST_BACK_OFF_S: Final = 0.25
_LAST_BACK_OFF_S: Final = 15.0

_log = get_logger("embedding.queue")


class Depth(NamedTuple):
    """Rows that wait."""

    fresh: int
    backfill: int


class EmbeddingQueue:
    """All work for one embedder, one batch at a time. Lives on one event loop.

    `load_texts(row_ids)` returns {row_id: (content, content_digest)}; a row it leaves out is gone.
    `store(model_id, [(row_id, content_digest, vector)])` keeps vectors durably; the rows of a store that raises are
    tried again. A row leaves the queue after `store`; if its content changed meanwhile, it must be added again.
    """

    def __init__(
        self,
        embedder: Embedder,
        settings: EmbeddingSettings,
        *,
        load_texts: LoadTexts,
        store: StoreVectors,
        vectors: VectorCache,
    ) -> None:
        self.poisoned = 0
        self._embedder = embedder
        self._settings = settings
        self._load_texts = load_texts
        self._store = store
        self._cache = vectors
        self._rows = RowBacklog(settings.backfill_share)
        self._pace = Pace(settings.batch_ms, settings.batch_texts)
        self._strikes = Strikes()
        self._queries = WaitingQueries()
        self._in_flight: set[int] = set()
        self._query_batches = 0
        self._back_off_s = 0.0
        self._rows_wait_until = 0.0
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def depth(self) -> Depth:
        """How many rows wait; those of the batch that is being embedded not counted."""
        return Depth(*self._rows.depth)

    def start(self) -> None:
        """Begin to work; a second call changes nothing."""
        if self._worker is None and not self._closed:
            self._embedder.on_state(self._on_state)
            self._worker = asyncio.create_task(self._run(), name="embedding-queue")

    async def close(self) -> None:
        """Stop; waiting queries raise VectorsUnavailable, rows not yet stored are left to the next start."""
        self._closed = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])
            self._worker = None
        self._queries.fail_waiting(VectorsUnavailable("the embedding queue is closed"))

    def add(self, row_ids: Iterable[int]) -> None:
        """Queue rows that were just written."""
        self._rows.add(row_ids)
        self._wake.set()

    def backfill(self, row_ids: Iterable[int]) -> None:
        """Queue rows that lack a vector from before."""
        self._rows.backfill(row_ids)
        self._wake.set()

    def discard(self, row_ids: Iterable[int]) -> None:
        """Forget rows, also those of the running batch: no vector of them is cached or stored any more."""
        gone = list(row_ids)
        self._rows.discard(gone)
        self._in_flight.difference_update(gone)

    async def embed_query(self, text: str) -> Vectors:
        """Return the vector of `text`, shape (dimension,), read-only.

        Raises VectorsUnavailable when there is no cached vector and the embedder is not ready, or fails.
        """
        return (await self.embed_queries([text]))[0]

    async def embed_queries(self, texts: Sequence[str]) -> list[Vectors]:
        """Return one vector for each text, in order; see `embed_query`. All or nothing."""
        digests = [content_digest(text) for text in texts]
        found = await self._cached(digests)
        missing = {digest: text for digest, text in zip(digests, texts, strict=True) if digest not in found}
        if missing:
            self._require_ready(missing)
            found |= await self._wait_for(missing)
        return [found[digest] for digest in digests]

    def _require_ready(self, digests: Iterable[bytes]) -> None:
        if self._closed:
            raise VectorsUnavailable("the embedding queue is closed")
        if self._embedder.state != "ready":
            raise VectorsUnavailable(f"no embedding now: {self._embedder.reason or self._embedder.state}")
        if any(self._strikes.out(digest) for digest in digests):
            raise VectorsUnavailable("the embedder failed at this text before and does not try it again")

    async def _wait_for(self, texts: dict[bytes, str]) -> dict[bytes, Vectors]:
        queries = [self._queries.join(digest, text) for digest, text in texts.items()]
        self._wake.set()
        try:
            return {query.digest: await asyncio.shield(query.vector) for query in queries}
        finally:
            for query in queries:
                self._queries.leave(query)

    def _on_state(self, state: EmbedderState) -> None:
        if state != "ready":
            self._queries.fail_waiting(VectorsUnavailable(f"no embedding now: {self._embedder.reason or state}"))
        self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                worked = await self._work()
            except Exception:  # noqa: BLE001 - a defect behind one of the callbacks must not end embedding for good
                _log.exception("embedding_batch_failed")
                self._hold_rows()
                worked = True
            # A batch may have been done without waiting for anything; others have work on this loop too.
            await (asyncio.sleep(0) if worked else self._sleep())

    async def _work(self) -> bool:
        """Do one batch; returns whether there was one."""
        if self._embedder.state != "ready":
            return False
        rows_waiting = len(self._rows) > 0 and time.monotonic() >= self._rows_wait_until
        if self._queries and not (rows_waiting and self._query_batches >= _QUERY_BATCHES_IN_A_ROW):
            self._query_batches += 1
            await self._query_batch()
            return True
        self._query_batches = 0
        batch = self._rows.take(self._settings.batch_texts) if rows_waiting else None
        if batch is None:
            return False
        await self._row_batch(batch)
        return True

    async def _sleep(self) -> None:
        """Wait for a call, a change of state, or the end of the rows' back-off."""
        held_s = self._rows_wait_until - time.monotonic()
        waiting = len(self._rows) > 0 and held_s > 0 and self._embedder.state == "ready"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(held_s if waiting else None):
                await self._wake.wait()

    async def _query_batch(self) -> None:
        batch = self._queries.take(self._settings.batch_texts, self._pace, self._strikes)
        vectors: dict[bytes, Vectors] = {}
        failure = VectorsUnavailable("the embedding queue is closed")
        try:
            vectors = await self._encode({query.digest: query.text for query in batch})
        except VectorsUnavailable as error:
            failure = error
        finally:
            self._queries.settle(batch, vectors, failure)
        if vectors:
            await self._put(vectors)

    async def _row_batch(self, batch: RowBatch) -> None:
        self._in_flight = set(batch.row_ids)
        try:
            await self._embed_rows(batch)
            self._back_off_s = 0.0
        except MemorySystemError as error:
            _log.warning("embedding_rows_held", error_code=error.code, reason=error.message, rows=len(self._in_flight))
            self._hold_rows()
        finally:
            # Whatever was not stored, set aside or discarded waits again, also after an error or at the end.
            self._rows.put_back([row for row in batch.row_ids if row in self._in_flight], batch.origin)
            self._in_flight = set()

    async def _embed_rows(self, batch: RowBatch) -> None:
        texts = await self._load_texts(batch.row_ids)
        self._in_flight.intersection_update(texts)
        row_ids = [row for row in batch.row_ids if row in self._in_flight and not self._set_aside(row, texts[row][1])]
        fitting = self._pace.fitting([texts[row][0] for row in row_ids])
        chosen = row_ids[:fitting]
        if not chosen:
            return
        by_digest = {texts[row][1]: texts[row][0] for row in chosen}
        try:
            vectors = await self._row_vectors(by_digest)
        except VectorsUnavailable:
            self._after_failure(chosen, texts)
            return
        # Callers may discard rows at every await: what is gone by now is not cached, what is gone then not stored.
        await self._put({texts[row][1]: vectors[texts[row][1]] for row in chosen if row in self._in_flight})
        items = [(row, texts[row][1], vectors[texts[row][1]]) for row in chosen if row in self._in_flight]
        if items:
            await self._store(self._model_id(), items)
        self._in_flight.difference_update(chosen)

    async def _row_vectors(self, texts: dict[bytes, str]) -> dict[bytes, Vectors]:
        found = await self._cached(list(texts))
        missing = {digest: text for digest, text in texts.items() if digest not in found}
        return found | (await self._encode(missing) if missing else {})

    def _after_failure(self, row_ids: Sequence[int], texts: dict[int, tuple[str, bytes]]) -> None:
        """The embedder failed at these rows: try them again in halves, a single row until it has struck out."""
        alive = [row for row in row_ids if row in self._in_flight and not self._set_aside(row, texts[row][1])]
        self._in_flight.difference_update(alive)
        self._rows.split(alive)

    def _set_aside(self, row_id: int, digest: bytes) -> bool:
        """Drop the row if its text has struck out; returns whether it has."""
        if not self._strikes.out(digest):
            return False
        self.poisoned += 1
        self._in_flight.discard(row_id)
        reason = "the model failed at this memory again and again; keywords alone find it"
        _log.error("embedding_row_set_aside", reason=reason, row_id=row_id)
        return True

    async def _encode(self, texts: dict[bytes, str]) -> dict[bytes, Vectors]:
        started = time.monotonic()
        try:
            rows = await self._embedder.encode(list(texts.values()))
        except VectorsUnavailable:
            self._strikes.failed(list(texts))
            raise
        self._strikes.passed(texts)
        self._pace.measured(list(texts.values()), time.monotonic() - started)
        rows.setflags(write=False)
        return dict(zip(texts, rows, strict=True))

    async def _cached(self, digests: Sequence[bytes]) -> dict[bytes, Vectors]:
        model_id = self._embedder.model_id
        if model_id is None or not digests:
            return {}
        found = await self._cache.get_many(model_id, digests)
        shape = (self._embedder.dimension,)
        return {digest: vector for digest, vector in found.items() if vector.shape == shape}

    async def _put(self, vectors: dict[bytes, Vectors]) -> None:
        # A copy of each row: a cached view would keep its whole batch in memory.
        await self._cache.put_many(self._model_id(), {digest: vector.copy() for digest, vector in vectors.items()})

    def _model_id(self) -> str:
        model_id = self._embedder.model_id
        if model_id is None:
            raise VectorsUnavailable("the embedder has no model")
        return model_id

    def _hold_rows(self) -> None:
        """Let rows wait before the next try, twice as long each time."""
        self._back_off_s = min(max(2 * self._back_off_s, _FIRST_BACK_OFF_S), _LAST_BACK_OFF_S)
        self._rows_wait_until = time.monotonic() + self._back_off_s

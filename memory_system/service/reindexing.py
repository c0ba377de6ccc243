"""Making the indexes anew: the full text, and the vectors of all memories."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

from memory_system.cache import Caches
from memory_system.embedding import Embedder, EmbeddingQueue
from memory_system.errors import VectorsUnavailable
from memory_system.service.run import Run
from memory_system.storage import reindexing
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.readers import Readers

# Text that one slice takes into the full-text index, beside the limit in memories.
_SLICE_CHARS: Final = 64 * 1024
_QUEUED: Final = 256
_LOOK_S: Final = 0.05


class Reindexing:
    """The work of the job reindex."""

    def __init__(
        self, readers: Readers, caches: Caches, embedder: Embedder, embedding: EmbeddingQueue, slice_rows: int
    ) -> None:
        self._readers = readers
        self._caches = caches
        self._embedder = embedder
        self._embedding = embedding
        self._slice_rows = slice_rows

    async def is_unfinished(self) -> bool:
        """Whether the full-text index was being made anew when the service ended."""
        return await reindexing.is_under_way(self._readers)

    async def reindex(self, keywords: bool, vectors: bool, run: Run) -> None:
        """Make the full-text index anew, or all vectors, or both.

        Meanwhile searches find older memories by their words again as the index comes to them, newest first; each
        memory keeps its vector until the new one is there. Raises VectorsUnavailable when there is no model.
        """
        if vectors:
            self._require_model()
        if keywords:
            await self._keywords(run)
        if vectors:
            await self._vectors(run)

    async def _keywords(self, run: Run) -> None:
        total = await reindexing.count_texts(self._readers)
        await run.write(reindexing.begin, rows=self._slice_rows)
        take = partial(reindexing.add_slice, limit=self._slice_rows, max_chars=_SLICE_CHARS)
        run.progress("keywords", 0, total)
        while added := (await run.write(take, rows=self._slice_rows))["added"]:
            run.counts["texts"] += added
            run.progress("keywords", run.counts["texts"], max(total, run.counts["texts"]))
        for namespace in await reindexing.namespaces(self._readers):
            # What was found, and kept, while a part was missing counts no more.
            await run.write(_nothing, namespace, counted=True)

    async def _vectors(self, run: Run) -> None:
        """Queue all memories for embedding, behind what is new, and see it through."""
        total = await reindexing.count_texts(self._readers)
        after = 0
        while found := await reindexing.texts_after(self._readers, after, _QUEUED):
            self._caches.vectors.delete_many([digest for _, digest in found])
            self._embedding.backfill([row_id for row_id, _ in found])
            after = found[-1][0]
            await self._embedded()
            run.counts["vectors"] += len(found)
            run.progress("vectors", run.counts["vectors"], max(total, run.counts["vectors"]))

    async def _embedded(self) -> None:
        while self._embedding.depth.backfill > 0:
            self._require_model()
            await asyncio.sleep(_LOOK_S)

    def _require_model(self) -> None:
        if self._embedder.state != "ready":
            raise VectorsUnavailable(f"no embedding now: {self._embedder.reason or self._embedder.state}")


def _nothing(context: WriteContext) -> Reply:
    return {}

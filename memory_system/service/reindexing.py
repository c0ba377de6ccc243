"""Making the indexes anew: that of words, and the vectors of all memories."""

from __future__ import annotations

import asyncio
from typing import Final

from memory_system.cache import Caches
from memory_system.embedding import Embedder, EmbeddingQueue
from memory_system.errors import VectorsUnavailable
from memory_system.search.index import SearchIndex
from memory_system.service.run import Run
from memory_system.storage import reindexing
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.readers import Readers

_QUEUED: Final = 256
_LOOK_S: Final = 0.05


class Reindexing:
    """The work of the job reindex."""

    def __init__(
        self, readers: Readers, index: SearchIndex, caches: Caches, embedder: Embedder, embedding: EmbeddingQueue
    ) -> None:
        self._readers = readers
        self._index = index
        self._caches = caches
        self._embedder = embedder
        self._embedding = embedding

    async def reindex(self, keywords: bool, vectors: bool, run: Run) -> None:
        """Make the index of words anew, or all vectors, or both.

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
        while not await asyncio.to_thread(self._index.rebuild_words):
            run.progress("keywords", 0, total)  # the index is still being loaded
            await asyncio.sleep(_LOOK_S)
        while lacking := self._index.words_lacking:
            run.progress("keywords", max(0, total - lacking), total)
            await asyncio.sleep(_LOOK_S)
        run.counts["texts"] += total
        for namespace in await reindexing.namespaces(self._readers):
            # What was found, and kept, in the index before counts no more.
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

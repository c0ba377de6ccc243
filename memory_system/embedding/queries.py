"""The queries that wait for a vector, each with the callers that wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memory_system.embedding.interface import Vectors
from memory_system.embedding.pace import Pace
from memory_system.embedding.strikes import Strikes
from memory_system.errors import VectorsUnavailable


@dataclass(slots=True, eq=False)
class Query:
    """A text that callers wait for; identical ones share it."""

    digest: bytes
    text: str
    vector: asyncio.Future[Vectors]
    callers: int = 0
    taken: bool = False


class WaitingQueries:
    """Queries in the order they came; one that all its callers have left before its turn is dropped."""

    def __init__(self) -> None:
        self._queries: dict[bytes, Query] = {}

    def __len__(self) -> int:
        return len(self._queries)

    def join(self, digest: bytes, text: str) -> Query:
        """Wait with others for the same text, or as the first; every join needs its leave()."""
        query = self._queries.get(digest)
        if query is None:
            query = Query(digest, text, asyncio.get_running_loop().create_future())
            # Read the outcome even when all callers have left: asyncio logs exceptions that nobody saw.
            query.vector.add_done_callback(lambda future: future.cancelled() or future.exception())
            self._queries[digest] = query
        query.callers += 1
        return query

    def leave(self, query: Query) -> None:
        query.callers -= 1
        if query.callers == 0 and not query.taken and self._queries.get(query.digest) is query:
            del self._queries[query.digest]

    def take(self, limit: int, pace: Pace, strikes: Strikes) -> list[Query]:
        """Take the next queries that make one batch; at least one, if any waits. They need settle()."""
        batch = list(self._queries.values())[:limit]
        if batch and strikes.suspected(batch[0].digest):
            batch = batch[:1]
        batch = batch[:1] + [query for query in batch[1:] if not strikes.suspected(query.digest)]
        batch = batch[: pace.fitting([query.text for query in batch])]
        for query in batch:
            query.taken = True
        return batch

    def settle(self, batch: Sequence[Query], vectors: Mapping[bytes, Vectors], error: VectorsUnavailable) -> None:
        """Hand each query its vector, or the error if it has none."""
        for query in batch:
            self._queries.pop(query.digest, None)
            if query.vector.done():
                continue
            if query.digest in vectors:
                query.vector.set_result(vectors[query.digest])
            else:
                query.vector.set_exception(error)

    def fail_waiting(self, error: VectorsUnavailable) -> None:
        """Give up on the queries that were not taken yet."""
        self.settle([query for query in self._queries.values() if not query.taken], {}, error)

"""The searches: embed the query, ask the engine, fetch the records that it found."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Final

import msgspec

from memory_system import cursors, protocol
from memory_system import models as m
from memory_system.access import AccessBuffer
from memory_system.cache import ResultCache, ResultKey
from memory_system.calls import Call, ResultList, names_state
from memory_system.digest import content_digest
from memory_system.embedding import Embedder, EmbeddingQueue, Vectors
from memory_system.errors import InvalidField, MemorySystemError, StorageFailed, VectorsUnavailable
from memory_system.filters import And, Condition, Filter, conditions
from memory_system.models import Memory
from memory_system.search.engine import Hit, SearchEngine, SearchOutcome, SearchQuery
from memory_system.service import Reply, Result
from memory_system.service.own_writes import OwnWrites
from memory_system.settings import Settings
from memory_system.storage.queries import Queries
from memory_system.storage.readers import too_slow
from memory_system.storage.rows import RecordView, is_alive, not_found

# A result that depends on these changes without a commit, so it is not kept.
_MOVING_FIELDS: Final = frozenset({"importance", "access_count", "last_accessed_at"})
_EMBED_TIMEOUT_S: Final = 5.0
# A search whose hits changed before their records were read is made anew; what changes all the time is left out.
_ATTEMPTS: Final = 2


class SearchingService:
    """search_memory, semantic_search, search_similar, batch_search."""

    def __init__(
        self,
        settings: Settings,
        engine: SearchEngine,
        queries: Queries,
        view: RecordView,
        embedder: Embedder,
        embedding: EmbeddingQueue,
        own_writes: OwnWrites,
        results: ResultCache,
        accesses: AccessBuffer,
        epoch: str,
        commit_seq: Callable[[str], int],
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._queries = queries
        self._view = view
        self._embedder = embedder
        self._embedding = embedding
        self._own_writes = own_writes
        self._results = results
        self._accesses = accesses
        self._epoch = epoch
        self._commit_seq = commit_seq
        self._fingerprint = cursors.scope(settings.search, settings.lifecycle)

    def search_memory(self, call: Call, p: m.SearchMemory) -> Result:
        filters = call.filters(p.filters)
        parts: list[Filter] = [filters]
        if p.memory_type is not None:
            parts.append(Condition("memory_type", (), "eq", p.memory_type))
        if p.parent_id is not None:
            parts.append(Condition("parent_id", (), "eq", p.parent_id))
        scope = cursors.scope(
            "search_memory", call.namespace, msgspec.structs.asdict(p) | {"cursor": None, "filters": bytes(p.filters)}
        )
        query = SearchQuery(
            namespace=call.namespace,
            text=p.query,
            mode="keyword",
            k=p.limit,
            offset=cursors.offset_of(p.cursor, scope),
            filter=And(tuple(parts)),
            include_archived=p.include_archived or names_state(filters),
            min_score=p.min_score,
            explain=p.explain,
            now_s=call.now_s,
        )
        return self._answer(call, query, scope, touch=p.touch)

    def semantic_search(self, call: Call, p: m.SemanticSearch) -> Result:
        query, scope = self._query(call, p)
        return self._semantic(call, query, scope, p.touch)

    async def _semantic(self, call: Call, query: SearchQuery, scope: str, touch: bool) -> Reply:
        if query.mode != "keyword":
            await self._wait_for_own_writes(call)
            vector = (await self._vectors(call, [query.text]))[0]
            query = replace(query, vector=vector, vector_model=self._embedder.model_id)
        return await self._answer(call, query, scope, touch=touch)

    async def search_similar(self, call: Call, p: m.SearchSimilar) -> Reply:
        parts = msgspec.structs.asdict(p) | {"cursor": None, "touch": None, "filters": bytes(p.filters)}
        scope = cursors.scope("search_similar", call.namespace, call.encoding.name, parts)
        filters = call.filters(p.filters)
        query = SearchQuery(
            namespace=call.namespace,
            text="",
            mode="dense",
            k=p.k,
            offset=cursors.offset_of(p.cursor, scope),
            filter=filters,
            include_archived=p.include_archived or names_state(filters),
            min_score=p.min_score,
            explain=p.explain,
            now_s=call.now_s,
        )
        memory = await self._queries.memory(call.namespace, p.memory_id)
        if memory is None or not is_alive(memory, call.now_s):
            raise not_found(p.memory_id)
        await self._wait_for_own_writes(call)
        wanted = replace(query, k=query.k + 1)
        outcome = await self._run(self._engine.submit_similar, wanted, memory.row_id, memory.content_digest)
        if outcome.degraded:
            raise VectorsUnavailable(
                "there is no vector of this memory yet; try again in a moment", reason=outcome.reason
            )
        return self._reply(call, query, outcome, await self._found(call, query, outcome), scope, p.touch)

    async def batch_search(self, call: Call, p: m.BatchSearch) -> Reply:
        """Many queries in one call; their vectors are made in one batch, and each has a reply of its own."""
        asked = []
        for index, raw in enumerate(p.queries):
            item = call.decode(m.SemanticSearch, raw, f"queries[{index}]")
            if item.cursor is not None:
                raise InvalidField(f"queries[{index}].cursor", "pages are walked with semantic_search")
            try:
                asked.append((item, *self._query(call, item)))
            except MemorySystemError as error:
                error.details["index"] = index
                error.message = f"query {index}: {error.message}"
                raise
        if any(query.mode != "keyword" for _, query, _ in asked):
            await self._wait_for_own_writes(call)
            vectors = await self._vectors(call, [query.text for _, query, _ in asked])
            model_id = self._embedder.model_id
            asked = [
                (item, replace(query, vector=vector, vector_model=model_id), scope)
                for (item, query, scope), vector in zip(asked, vectors, strict=True)
            ]
        replies: list[Reply] = []
        room = protocol.MAX_LIST_REPLY_BYTES  # for all of them together
        for item, query, scope in asked:
            reply = await self._answer(call, query, scope, touch=item.touch, room=room)
            room -= sum(len(bytes(result)) for result in reply["results"])
            replies.append(reply)
        return {"results": replies, "count": len(replies)}

    def _query(self, call: Call, p: m.SemanticSearch) -> tuple[SearchQuery, str]:
        parts = msgspec.structs.asdict(p) | {"cursor": None, "touch": None, "filters": bytes(p.filters)}
        scope = cursors.scope("semantic_search", call.namespace, call.encoding.name, parts)
        filters = call.filters(p.filters)
        query = SearchQuery(
            namespace=call.namespace,
            text=p.query,
            mode=p.mode,
            k=p.k,
            offset=cursors.offset_of(p.cursor, scope),
            filter=filters,
            include_archived=p.include_archived or names_state(filters),
            min_score=p.min_score,
            explain=p.explain,
            now_s=call.now_s,
        )
        return query, scope

    async def _wait_for_own_writes(self, call: Call) -> None:
        if self._embedder.state == "ready":
            wait_s = self._budget_s(call, self._settings.search.wait_ms / 1000.0)
            await self._own_writes.wait((call.namespace, call.caller), wait_s)

    def _budget_s(self, call: Call, limit_s: float) -> float:
        """Half of what is left of the caller's deadline at most: the search itself needs the rest."""
        if call.deadline_s is None:
            return limit_s
        return max(0.0, min(limit_s, (call.deadline_s - time.monotonic()) / 2.0))

    async def _vectors(self, call: Call, texts: list[str]) -> list[Vectors] | list[None]:
        """The queries' vectors; None for each when there are none to be had in time."""
        try:
            async with asyncio.timeout(self._budget_s(call, _EMBED_TIMEOUT_S)):
                return await self._embedding.embed_queries(texts)
        except (VectorsUnavailable, TimeoutError):
            return [None] * len(texts)

    async def _answer(
        self,
        call: Call,
        query: SearchQuery,
        scope: str,
        *,
        touch: bool,
        room: int = protocol.MAX_LIST_REPLY_BYTES,
    ) -> Reply:
        """From the results kept for this very state of the store, or searched anew."""
        key = self._result_key(query, scope)
        outcome = await self._kept(key)
        found = [] if outcome is None else await self._found(call, query, outcome)
        for _ in range(_ATTEMPTS):
            if outcome is not None and len(found) == len(outcome.hits):
                break  # none has expired or changed since it was judged
            outcome = await self._run(self._engine.submit, replace(query, k=query.k + 1))
            await self._keep(key, query, outcome)
            found = await self._found(call, query, outcome)
        assert outcome is not None
        return self._reply(call, query, outcome, found, scope, touch, room)

    async def _run(self, submit: Callable[..., Future[SearchOutcome]], *arguments: Any) -> SearchOutcome:
        try:
            return await asyncio.wrap_future(submit(*arguments))
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
                raise too_slow(self._settings.limits.query_s) from None
            raise StorageFailed(f"the database cannot be read: {error}") from error

    def _result_key(self, query: SearchQuery, scope: str) -> ResultKey | None:
        if any(condition.field in _MOVING_FIELDS for condition in conditions(query.filter)):
            return None
        identity = f"{scope}:{query.offset}:{self._embedder.model_id}:{query.vector is None}:{self._fingerprint}"
        return ResultKey(self._epoch, query.namespace, self._commit_seq(query.namespace), content_digest(identity))

    async def _kept(self, key: ResultKey | None) -> SearchOutcome | None:
        value = None if key is None else await self._results.get(key)
        if value is None:
            return None
        try:
            return msgspec.msgpack.decode(value, type=SearchOutcome)
        except (msgspec.MsgspecError, UnicodeDecodeError):  # written by another version of the program
            return None

    async def _keep(self, key: ResultKey | None, query: SearchQuery, outcome: SearchOutcome) -> None:
        """Keep what can only change by a commit: nothing pending, nothing degraded, and no commit in between."""
        if key is None or outcome.pending or outcome.degraded or self._commit_seq(query.namespace) != key.commit_seq:
            return
        await self._results.put(key, msgspec.msgpack.encode(outcome), self._settings.cache.result_ttl_s)

    async def _found(self, call: Call, query: SearchQuery, outcome: SearchOutcome) -> list[tuple[Hit, Memory]]:
        """The records of the hits, as far as they are still what was judged."""
        memories = await self._queries.by_row_ids(call.namespace, [hit.row_id for hit in outcome.hits])
        found = [(hit, memories[hit.row_id]) for hit in outcome.hits if hit.row_id in memories]
        return [(hit, memory) for hit, memory in found if _is_as_judged(hit, memory, query, call.now_s)]

    def _reply(
        self,
        call: Call,
        query: SearchQuery,
        outcome: SearchOutcome,
        found: list[tuple[Hit, Memory]],
        scope: str,
        touch: bool,
        room: int = protocol.MAX_LIST_REPLY_BYTES,
    ) -> Reply:
        results = ResultList(call.encoding, query.k, room)
        extra: dict[str, Any] = {"pending": outcome.pending, "degraded": outcome.degraded}
        if outcome.degraded:
            extra["degraded_reason"] = outcome.reason
        for hit, memory in found:
            if not results.add(self._record(call, hit, memory)):
                position = query.offset + len(results.items)
                extra["next_cursor"] = cursors.at_offset(position, scope, call.now_s)
                break
            if touch and self._settings.lifecycle.access_weight_search > 0.0:
                self._accesses.note(memory, self._settings.lifecycle.access_weight_search, call.now_s)
        return results.reply(**extra)

    def _record(self, call: Call, hit: Hit, memory: Memory) -> dict[str, Any]:
        record = self._view.record(memory, call.now_s)
        record["score"] = hit.score
        record["similarity"] = hit.similarity
        record["keyword"] = hit.keyword
        if hit.parts is not None:
            record["explain"] = hit.parts
        return record


def _is_as_judged(hit: Hit, memory: Memory, query: SearchQuery, now_s: float) -> bool:
    in_state = query.include_archived or memory.state == "active"
    return in_state and is_alive(memory, now_s) and memory.content_digest == hit.digest

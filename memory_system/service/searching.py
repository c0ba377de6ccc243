"""The searches: embed the query, ask the engine, fetch the records that it found."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import msgspec
from msgspec import Raw

from memory_system import cursors, protocol
from memory_system import search_models as m
from memory_system.access import AccessBuffer
from memory_system.cache import ResultCache, ResultKey
from memory_system.calls import Call, ResultList, names_state
from memory_system.digest import content_digest
from memory_system.embedding import Embedder, EmbeddingQueue, Vectors
from memory_system.errors import InvalidField, MemorySystemError, StorageFailed, VectorsUnavailable
from memory_system.filters import And, Condition, Filter, conditions
from memory_system.models import Memory
from memory_system.params import SearchMode
from memory_system.search.boosting import NO_BOOST, Boost
from memory_system.search.engine import Hit, SearchEngine, SearchOutcome, SearchQuery
from memory_system.service import Reply, Result
from memory_system.service.own_writes import OwnWrites
from memory_system.service.surroundings import NEIGHBOURS, Asked, Found, Surroundings
from memory_system.settings import Settings
from memory_system.storage.queries import Queries
from memory_system.storage.readers import too_slow
from memory_system.storage.rows import RecordView, is_alive, not_found
from memory_system.turns import Turns

# A result that depends on these changes without a commit, so it is not kept; nor is one whose score does, by a boost.
_MOVING_FIELDS: Final = frozenset({"importance", "access_count", "last_accessed_at"})
_EMBED_TIMEOUT_S: Final = 5.0
# Results whose surroundings are read at once.
_SLICE: Final = 64
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
        self._surroundings = Surroundings(engine, queries, view)
        self._embedder = embedder
        self._embedding = embedding
        self._own_writes = own_writes
        self._results = results
        self._accesses = accesses
        self._turns = Turns(settings.search.threads)
        self._epoch = epoch
        self._commit_seq = commit_seq
        self._fingerprint = cursors.scope(settings.search, settings.ranking, settings.lifecycle)

    def search_memory(self, call: Call, p: m.SearchMemory) -> Result:
        within: list[Filter] = []
        if p.memory_type is not None:
            within.append(Condition("memory_type", (), "eq", p.memory_type))
        if p.parent_id is not None:
            within.append(Condition("parent_id", (), "eq", p.parent_id))
        return self._answer(call, self._asked(call, p, "keyword", p.limit, within))

    def semantic_search(self, call: Call, p: m.SemanticSearch) -> Result:
        return self._semantic(call, self._asked(call, p, p.mode, p.k))

    async def _semantic(self, call: Call, asked: Asked) -> Reply:
        if asked.query.mode != "keyword":
            await self._wait_for_own_writes(call)
            (asked,) = self._with_vectors([asked], await self._vectors(call, [asked.query.text]))
        return await self._answer(call, asked)

    async def search_similar(self, call: Call, p: m.SearchSimilar) -> Reply:
        asked = self._asked(call, p, "dense", p.k)
        memory = await self._queries.memory(call.namespace, p.memory_id)
        if memory is None or not is_alive(memory, call.now_s):
            raise not_found(p.memory_id)
        await self._wait_for_own_writes(call)
        wanted = replace(asked.query, k=p.k + 1)
        outcome = await self._run(self._engine.submit_similar, wanted, memory.row_id, memory.content_digest)
        if outcome.degraded:
            raise VectorsUnavailable(
                "there is no vector of this memory yet; try again in a moment", reason=outcome.reason
            )
        return await self._reply(call, asked, outcome, await self._found(call, asked.query, outcome))

    async def batch_search(self, call: Call, p: m.BatchSearch) -> Reply:
        """Many queries in one call; their vectors are made in one batch, and each has a reply of its own."""
        asked = [self._item(call, raw, index) for index, raw in enumerate(p.queries)]
        if any(one.query.mode != "keyword" for one in asked):
            await self._wait_for_own_writes(call)
            asked = self._with_vectors(asked, await self._vectors(call, [one.query.text for one in asked]))
        replies: list[Reply] = []
        room = protocol.MAX_LIST_REPLY_BYTES  # for all of them together
        for one in asked:
            reply = await self._answer(call, one, room)
            room -= sum(len(bytes(result)) for result in reply["results"])
            replies.append(reply)
        return {"results": replies, "count": len(replies)}

    def _item(self, call: Call, raw: Raw, index: int) -> Asked:
        """One query of a batch. Raises what semantic_search would, with its index."""
        item = call.decode(m.SemanticSearch, raw, f"queries[{index}]")
        if item.cursor is not None:
            raise InvalidField(f"queries[{index}].cursor", "pages are walked with semantic_search")
        try:
            return self._asked(call, item, item.mode, item.k)
        except MemorySystemError as error:
            error.details["index"] = index
            error.message = f"query {index}: {error.message}"
            raise

    def _asked(self, call: Call, p: m.SearchOptions, mode: SearchMode, k: int, within: Sequence[Filter] = ()) -> Asked:
        """The search that a request stands for; `within` are filters beside its own."""
        parts = msgspec.structs.asdict(p) | {"cursor": None, "touch": None, "filters": bytes(p.filters)}
        scope = cursors.scope(type(p).__name__, call.namespace, call.encoding.name, parts)
        filters = call.filters(p.filters)
        text, highlight = (p.query, p.highlight) if isinstance(p, m.TextSearch) else ("", False)
        query = SearchQuery(
            namespace=call.namespace,
            text=text,
            mode=mode,
            k=k,
            offset=cursors.offset_of(p.cursor, scope),
            filter=And((filters, *within)) if within else filters,
            include_archived=p.include_archived or names_state(filters),
            min_score=p.min_score,
            explain=p.explain,
            now_s=call.now_s,
            since_s=p.occurred_after,
            until_s=p.occurred_before,
            boost=self._boost(p.boost),
            diversity=p.diversity,
            neighbours=NEIGHBOURS if p.expand == "neighbours" else 0,
        )
        return Asked(query, scope, p.touch, p.expand, highlight)

    def _boost(self, asked: m.Boost | None) -> Boost:
        if asked is None:
            return NO_BOOST
        half_life_days = asked.half_life_days or self._settings.ranking.recency_half_life_days
        return Boost(asked.recency, asked.importance, half_life_days)

    def _with_vectors(self, asked: list[Asked], vectors: Sequence[Vectors | None]) -> list[Asked]:
        model_id = self._embedder.model_id
        return [
            replace(one, query=replace(one.query, vector=vector, vector_model=model_id))
            for one, vector in zip(asked, vectors, strict=True)
        ]

    async def _wait_for_own_writes(self, call: Call) -> None:
        if self._embedder.state == "ready":
            wait_s = self._budget_s(call, self._settings.search.wait_ms / 1000.0)
            await self._own_writes.wait((call.namespace, call.who.own), wait_s)

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

    async def _answer(self, call: Call, asked: Asked, room: int = protocol.MAX_LIST_REPLY_BYTES) -> Reply:
        """From the results kept for this very state of the store, or searched anew."""
        query = asked.query
        key = self._result_key(query, asked.scope)
        outcome = await self._kept(key)
        found: list[Found] = [] if outcome is None else await self._found(call, query, outcome)
        for _ in range(_ATTEMPTS):
            if outcome is not None and len(found) == len(outcome.hits):
                break  # none has expired or changed since it was judged
            outcome = await self._run(self._engine.submit, replace(query, k=query.k + 1))
            await self._keep(key, query, outcome)
            found = await self._found(call, query, outcome)
        assert outcome is not None
        return await self._reply(call, asked, outcome, found, room)

    async def _run(self, submit: Callable[..., Future[SearchOutcome]], *arguments: Any) -> SearchOutcome:
        async with self._turns:
            with self._reading():
                return await asyncio.wrap_future(submit(*arguments))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Name what can go wrong with the database."""
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
                raise too_slow(self._settings.limits.query_s) from None
            raise StorageFailed(f"the database cannot be read: {error}") from error

    def _result_key(self, query: SearchQuery, scope: str) -> ResultKey | None:
        if query.boost or any(condition.field in _MOVING_FIELDS for condition in conditions(query.filter)):
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
        # Without the records: a result names memories, and keeps none of their text.
        kept = msgspec.msgpack.encode(replace(outcome, records={}))
        await self._results.put(key, kept, self._settings.cache.result_ttl_s)

    async def _found(self, call: Call, query: SearchQuery, outcome: SearchOutcome) -> list[Found]:
        """The records of the hits, as far as they are still what was judged."""
        memories = outcome.records
        if outcome.hits and not memories:  # it was kept, without them
            memories = await self._queries.by_row_ids(call.namespace, [hit.row_id for hit in outcome.hits])
        found = [(hit, memories[hit.row_id]) for hit in outcome.hits if hit.row_id in memories]
        return [(hit, memory) for hit, memory in found if _is_as_judged(hit, memory, query, call.now_s)]

    async def _reply(
        self,
        call: Call,
        asked: Asked,
        outcome: SearchOutcome,
        found: list[Found],
        room: int = protocol.MAX_LIST_REPLY_BYTES,
    ) -> Reply:
        results = ResultList(call.encoding, asked.query.k, room)
        extra: dict[str, Any] = {"pending": outcome.pending, "degraded": outcome.degraded}
        if outcome.degraded:
            extra["degraded_reason"] = outcome.reason
        for begin in range(0, len(found), _SLICE):
            if not await self._add(call, asked, found[begin : begin + _SLICE], results):
                position = asked.query.offset + len(results.items)
                extra["next_cursor"] = cursors.at_offset(position, asked.scope, call.now_s)
                break
        return results.reply(**extra)

    async def _add(self, call: Call, asked: Asked, found: list[Found], results: ResultList) -> bool:
        """Take what was found into the results; False when one of it was left out."""
        with self._reading():
            fields = await self._surroundings.of(call, asked, found)
        weight = self._settings.lifecycle.access_weight_search
        for (hit, memory), more in zip(found, fields, strict=True):
            if not results.add(self._record(call, hit, memory) | more):
                return False
            if asked.touch and weight > 0.0:
                self._accesses.note(memory, weight, call.now_s)
        return True

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

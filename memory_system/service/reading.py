"""Operations that read: the record cache first, then one query."""

from __future__ import annotations

from typing import Any, Final

from memory_system import cursors
from memory_system import models as m
from memory_system.access import AccessBuffer
from memory_system.cache import RecordCache
from memory_system.calls import Call, ResultList, names_state, session_of
from memory_system.filters import MATCH_ALL
from memory_system.lifecycle import SESSION_TYPE
from memory_system.models import Memory
from memory_system.service import Reply, Result
from memory_system.storage import relations, sessions
from memory_system.storage.queries import Listing, Page, Queries
from memory_system.storage.rows import RecordView, is_alive, not_found
from memory_system.storage.writer import Writer

# Records that are read at once: at their largest, 100 KB each.
_SLICE: Final = 128


class ReadingService:
    """Records by id, lists in order, relationships, groups, sessions, history."""

    def __init__(
        self,
        writer: Writer,
        queries: Queries,
        view: RecordView,
        cache: RecordCache,
        accesses: AccessBuffer,
        access_weight: float,
    ) -> None:
        self._writer = writer
        self._queries = queries
        self._view = view
        self._cache = cache
        self._accesses = accesses
        self._access_weight = access_weight

    def get_memory(self, call: Call, p: m.GetMemory) -> Result:
        memory = self._cache.get(call.namespace, p.memory_id)
        if memory is None:
            return self._load_and_reply(call, p)
        return self._memory_reply(call, memory, p.touch)

    async def _load_and_reply(self, call: Call, p: m.GetMemory) -> Reply:
        return self._memory_reply(call, await self.living(call, p.memory_id), p.touch)

    def _memory_reply(self, call: Call, memory: Memory, touch: bool) -> Reply:
        if not is_alive(memory, call.now_s):
            raise not_found(memory.memory_id)
        if touch:
            self._touch(memory, call.now_s)
        return {"memory": self._view.record(memory, call.now_s)}

    def _touch(self, memory: Memory, now_s: float) -> None:
        if memory.memory_type != SESSION_TYPE:
            self._accesses.note(memory, self._access_weight, now_s)

    async def living(self, call: Call, memory_id: str) -> Memory:
        """The living memory of this id, from the cache or the database. Raises MemoryNotFound."""
        memory = self._cache.get(call.namespace, memory_id)
        if memory is None:
            token = self._cache.begin_load()
            memory = await self._queries.memory(call.namespace, memory_id)
            if memory is not None:
                self._cache.finish_load(token, memory)
        if memory is None or not is_alive(memory, call.now_s):
            raise not_found(memory_id)
        return memory

    async def batch_get_memories(self, call: Call, p: m.BatchGetMemories) -> Reply:
        scope = cursors.scope("batch_get_memories", p.memory_ids)
        offset = cursors.offset_of(p.cursor, scope)
        wanted = list(dict.fromkeys(p.memory_ids))[offset:]
        results, missing, done = ResultList(call.encoding, len(wanted)), [], 0
        for start in range(0, len(wanted), _SLICE):
            for memory_id, memory in (await self._many(call, wanted[start : start + _SLICE])).items():
                if memory is None:
                    missing.append(memory_id)
                elif not results.add(self._view.record(memory, call.now_s)):
                    cursor = cursors.at_offset(offset + done, scope, call.now_s)
                    return results.reply(missing=missing, next_cursor=cursor)
                elif p.touch:
                    self._touch(memory, call.now_s)
                done += 1
        return results.reply(missing=missing)

    async def _many(self, call: Call, memory_ids: list[str]) -> dict[str, Memory | None]:
        """The living memories of these ids in their order, None for what is not there."""
        found = {memory_id: self._cache.get(call.namespace, memory_id) for memory_id in memory_ids}
        unknown = [memory_id for memory_id, memory in found.items() if memory is None]
        if unknown:
            found.update(await self._queries.memories(call.namespace, unknown))
        alive = {memory_id: memory for memory_id, memory in found.items() if memory and is_alive(memory, call.now_s)}
        return {memory_id: alive.get(memory_id) for memory_id in memory_ids}

    async def get_children(self, call: Call, p: m.GetChildren) -> Reply:
        await self.living(call, p.parent_id)
        listing = Listing(
            namespace=call.namespace,
            now_s=call.now_s,
            filter=MATCH_ALL,
            parent_id=p.parent_id,
            include_archived=p.include_archived,
            include_sessions=True,
        )
        return await self._list(call, listing, p, cursors.scope("get_children", call.namespace, p.parent_id))

    async def list_memories(self, call: Call, p: m.ListMemories) -> Reply:
        filters = call.filters(p.filters)
        listing = Listing(
            namespace=call.namespace,
            now_s=call.now_s,
            filter=filters,
            include_archived=p.include_archived or names_state(filters),
            include_sessions=p.include_sessions,
        )
        return await self._list(call, listing, p, cursors.scope("list_memories", call.namespace, bytes(p.filters)))

    async def _list(self, call: Call, listing: Listing, p: m.GetChildren | m.ListMemories, base: str) -> Reply:
        """A page of a sorted list; all pages see computed importance as of the first."""
        scope = cursors.scope(base, p.sort_field, p.sort_order, p.include_archived, listing.include_sessions)
        start = None if p.cursor is None else cursors.decode(p.cursor, scope)
        as_of = call.now_s if start is None else start.as_of
        last = None if start is None else start.key
        results = ResultList(call.encoding, p.limit)
        while True:
            # One more than wanted, to know whether there is more; in slices, since records can be large.
            limit = min(_SLICE, p.limit + 1 - len(results.items))
            page = Page(sort_field=p.sort_field, sort_order=p.sort_order, limit=limit, as_of=as_of, after=last)
            found = await self._queries.listing(listing, page)
            for memory, key in found:
                if not results.add(self._view.record(memory, as_of)):
                    position = cursors.Position(scope, as_of, last or [])
                    return results.reply(as_of=as_of, next_cursor=cursors.encode(position))
                last = key
            if len(found) < limit:
                return results.reply(as_of=as_of)

    async def get_related_memories(self, call: Call, p: m.GetRelatedMemories) -> Reply:
        memory = await self.living(call, p.memory_id)
        scope = cursors.scope("get_related_memories", call.namespace, p.memory_id, p.relationship_type, p.direction)
        offset = cursors.offset_of(p.cursor, scope)
        found = await self._queries.related(memory, call.now_s, p.relationship_type, p.direction, p.limit, offset)
        items = [{"memory": self._view.record(other, call.now_s), **relation} for other, relation in found]
        return _offset_page(call, items, p.limit, offset, scope)

    async def get_memories_by_group(self, call: Call, p: m.GetMemoriesByGroup) -> Reply:
        scope = cursors.scope("get_memories_by_group", call.namespace, p.group_id, p.include_archived)
        offset = cursors.offset_of(p.cursor, scope)
        found = await self._queries.group_members(
            call.namespace, p.group_id, call.now_s, p.include_archived, p.limit, offset
        )
        if found is None:
            raise relations.group_not_found(p.group_id)
        items = [self._view.record(memory, call.now_s) for memory in found]
        return _offset_page(call, items, p.limit, offset, scope)

    async def list_context_groups(self, call: Call, p: m.ListContextGroups) -> Reply:
        scope = cursors.scope("list_context_groups", call.namespace)
        after = cursors.offset_of(p.cursor, scope)
        groups = await self._queries.groups(call.namespace, call.now_s, after, p.limit)
        results = ResultList(call.encoding, p.limit)
        taken = [group for group in groups if results.add(group)]
        if len(taken) < len(groups):
            return results.reply(next_cursor=cursors.at_offset(taken[-1]["group_id"], scope, call.now_s))
        return results.reply()

    async def get_session(self, call: Call, p: m.GetSession) -> Reply:
        session_id = session_of(call, p.session_id)
        session = await self._queries.session(call.namespace, session_id, call.now_s)
        if session is None:
            raise sessions.not_found(session_id)
        return {"session_id": session_id, "session": session}

    async def list_sessions(self, call: Call, p: m.ListSessions) -> Reply:
        scope = cursors.scope("list_sessions", call.namespace, p.user_id, p.session_state)
        offset = cursors.offset_of(p.cursor, scope)
        found = await self._queries.sessions(call.namespace, call.now_s, p.user_id, p.session_state, p.limit, offset)
        return _offset_page(call, found, p.limit, offset, scope)

    async def get_memory_history(self, call: Call, p: m.GetMemoryHistory) -> Reply:
        memory = await self.living(call, p.memory_id)
        scope = cursors.scope("get_memory_history", call.namespace, p.memory_id)
        below = cursors.offset_of(p.cursor, scope) or 2**62
        versions = await self._queries.history(memory, below, p.limit)
        results = ResultList(call.encoding, p.limit)
        taken = [version for version in versions if results.add(version)]
        fields = {"memory_id": p.memory_id, "version": memory.version}
        if len(taken) < len(versions):
            fields["next_cursor"] = cursors.at_offset(taken[-1]["version"], scope, call.now_s)
        return results.reply(**fields)

    async def get_request_status(self, call: Call, p: m.GetRequestStatus) -> Reply:
        if self._writer.is_under_way((call.namespace, call.who.scope, p.request_id)):
            return {"state": "in_progress"}
        stored = await self._queries.stored_reply(call.namespace, call.who.scope, p.request_id)
        if stored is None:
            return {"state": "unknown"}
        return {"state": "committed", "reply": stored[0], "committed_at": stored[1]}

    def get_commit_seq(self, call: Call, p: m.NoParams) -> Reply:
        return {"commit_seq": self._writer.commit_seq(call.namespace)}


def _offset_page(call: Call, items: list[dict[str, Any]], limit: int, offset: int, scope: str) -> Reply:
    """A page of a list that is walked by offset; `items` may hold one more than `limit`."""
    results = ResultList(call.encoding, limit)
    for item in items:
        if not results.add(item):
            return results.reply(next_cursor=cursors.at_offset(offset + len(results.items), scope, call.now_s))
    return results.reply()

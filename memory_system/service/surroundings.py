"""What a search adds to a result beside its record: where the query's words stand in it, and what stands around it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from memory_system.calls import Call
from memory_system.lifecycle import SESSION_TYPE
from memory_system.models import Memory
from memory_system.search.engine import Hit, SearchEngine, SearchQuery
from memory_system.storage.queries import Queries
from memory_system.storage.rows import RecordView, is_alive

# On either side of a result. With them, the largest result still fits into a reply.
NEIGHBOURS: Final = 2

Found = tuple[Hit, Memory]
Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A search as it was asked for. `scope` ties its cursors to it; `expand`: parent, neighbours or None."""

    query: SearchQuery
    scope: str
    touch: bool
    expand: str | None
    highlight: bool


class Surroundings:
    """Makes `highlights` and `surroundings` of results."""

    def __init__(self, engine: SearchEngine, queries: Queries, view: RecordView) -> None:
        self._engine = engine
        self._queries = queries
        self._view = view

    async def of(self, call: Call, asked: Asked, found: Sequence[Found]) -> list[Fields]:
        """The fields that each result has beside those of every search. Raises sqlite3.Error."""
        fields: list[Fields] = [{} for _ in found]
        if asked.highlight:
            contents = [memory.content for _, memory in found]
            spans = await asyncio.wrap_future(self._engine.submit_highlights(asked.query.text, contents))
            for each, highlights in zip(fields, spans, strict=True):
                each["highlights"] = highlights
        if asked.expand is not None:
            around = self._parents if asked.expand == "parent" else self._neighbours
            for each, surroundings in zip(fields, await around(call, asked.query, found), strict=True):
                each["surroundings"] = surroundings
        return fields

    async def _parents(self, call: Call, query: SearchQuery, found: Sequence[Found]) -> list[Fields]:
        ids = {memory.parent_id for _, memory in found if memory.parent_id is not None}
        parents = await self._queries.memories(call.namespace, sorted(ids)) if ids else {}
        shown = {
            memory_id: self._view.record(parent, call.now_s)
            for memory_id, parent in parents.items()
            if _may_be_seen(parent, query, call.now_s)
        }
        return [{"parent": shown.get(memory.parent_id or "")} for _, memory in found]

    async def _neighbours(self, call: Call, query: SearchQuery, found: Sequence[Found]) -> list[Fields]:
        wanted = {row_id for hit, _ in found for row_id in (*hit.before, *hit.after)}
        memories = await self._queries.by_row_ids(call.namespace, sorted(wanted)) if wanted else {}
        shown = {
            row_id: (memory.parent_id, self._view.record(memory, call.now_s))
            for row_id, memory in memories.items()
            if memory.memory_type != SESSION_TYPE and _may_be_seen(memory, query, call.now_s)
        }

        def those(row_ids: tuple[int, ...], parent_id: str | None) -> list[Fields]:
            near = (shown[row_id] for row_id in row_ids if row_id in shown)
            return [record for parent, record in near if parent == parent_id]

        return [
            {side: those(getattr(hit, side), memory.parent_id) for side in ("before", "after")} for hit, memory in found
        ]


def _may_be_seen(memory: Memory, query: SearchQuery, now_s: float) -> bool:
    return is_alive(memory, now_s) and (query.include_archived or memory.state == "active")

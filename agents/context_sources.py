"""Where the candidates of a context come from: searches and lists of the memory service, none of which leaves a trace.

A scope is whose memories count. Of a user: those of all sessions of that user, and those that belong to nobody (shared
knowledge). Of a session: what was made in it. Without either: the whole namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from agents.agent_memory import AgentMemory
from agents.context_items import Item, Question, Writer
from memory_system.agent_settings import ContextManagerSettings
from memory_system.errors import GroupNotFound
from memory_system.protocol import MAX_NAME_CHARS, MAX_RESULTS

Filters = dict[str, Any]
Record = Mapping[str, Any]

CONTEXT: Final = "context"  # type of the memories that add_to_context makes
SUMMARY: Final = "context_summary"
_PINNED: Final = "pinned"
_DIGEST_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Found:
    """The candidates with their relevance (0 to 1), pinned ones first. `pending`: memories without a vector;
    `degraded`: vectors took no part."""

    items: tuple[tuple[Item, float], ...]
    pending: int = 0
    degraded: bool = False


class Sources:
    """Finds the candidates for a question."""

    def __init__(self, memory: AgentMemory, rules: ContextManagerSettings, writer: Writer) -> None:
        self._memory = memory
        self._rules = rules
        self._writer = writer

    async def find(self, question: Question) -> Found:
        question = await self._with_user(question)
        pins, found = await asyncio.gather(self._pinned(question), self._found(question, scope_filters(question)))
        relevance: dict[str, float] = {}
        items = {pin.memory_id: pin for pin in pins}
        for item, value in found.items:
            relevance.setdefault(item.memory_id, value)
            items.setdefault(item.memory_id, item)
        return replace(found, items=tuple((item, relevance.get(name, 0.0)) for name, item in items.items()))

    async def groups(self, user_id: str | None) -> list[int]:
        """The ids of the groups that have what is pinned for this user and for everybody, as far as there are any."""
        wanted = {group_name(None), group_name(user_id)}
        found: dict[str, int] = {}
        async for group in self._groups():
            if group["name"] in wanted:
                found[group["name"]] = group["group_id"]
            if len(found) == len(wanted):
                break
        return [found[name] for name in sorted(found)]

    async def pinned_ids(self, user_id: str | None) -> set[str]:
        """What is pinned for this user and for everybody; None: for anybody at all."""
        if user_id is None:
            groups = [group["group_id"] async for group in self._groups() if group["name"].startswith(_PINNED)]
        else:
            groups = await self.groups(user_id)
        return {record["memory_id"] for group_id in groups for record in await self._members(group_id)}

    async def _groups(self) -> AsyncIterator[Record]:
        cursor: str | None = None
        while True:
            page = await self._memory.list_context_groups(MAX_RESULTS, cursor=cursor)
            for group in page["results"]:
                yield group
            cursor = page.get("next_cursor")
            if cursor is None:
                return

    async def _members(self, group_id: int) -> list[Record]:
        """The memories of a group, archived ones too."""
        found: list[Record] = []
        cursor: str | None = None
        with contextlib.suppress(GroupNotFound):  # the store was restored from a backup between two calls
            while True:
                page = await self._memory.get_memories_by_group(
                    group_id, limit=MAX_RESULTS, include_archived=True, cursor=cursor
                )
                found += page["results"]
                cursor = page.get("next_cursor")
                if cursor is None:
                    break
        return found

    async def stored(
        self, filters: Filters, sort_field: str = "created_at", sort_order: str = "asc"
    ) -> AsyncIterator[Record]:
        """All memories of these filters, page by page."""
        cursor: str | None = None
        while True:
            page = await self._memory.list_memories(filters, sort_field, sort_order, MAX_RESULTS, cursor=cursor)
            for record in page["results"]:
                yield record
            cursor = page.get("next_cursor")
            if cursor is None:
                return

    async def _with_user(self, question: Question) -> Question:
        """The user of a session that is named alone: what is known from other sessions counts as well."""
        if question.scope == "session" or question.session_id is None or question.user_id is not None:
            return question
        reply = await self._memory.get_session(question.session_id)
        return replace(question, user_id=reply["session"]["user_id"])

    async def _pinned(self, question: Question) -> list[Item]:
        found = [record for group_id in await self.groups(question.user_id) for record in await self._members(group_id)]
        items = [self._writer.item(record, pinned=True) for record in found if _in_scope(record, question)]
        return list({item.memory_id: item for item in items}.values())

    async def _found(self, question: Question, filters: Filters) -> Found:
        if question.query is None:
            return Found(await self._latest(filters))
        mode = "dense" if question.method == "dense" else "hybrid"
        reply = await self._memory.semantic_search(
            question.query, self._rules.candidates, filters, mode=mode, touch=False
        )
        best = max((result["score"] for result in reply["results"]), default=0.0)
        items = tuple(
            (self._writer.item(result), max(0.0, result["score"]) / best if best > 0.0 else 0.0)
            for result in reply["results"]
        )
        if question.method == "full" and len(items) < question.max_items:
            items += await self._latest(filters)
        return Found(items, reply["pending"], reply["degraded"])

    async def _latest(self, filters: Filters) -> tuple[tuple[Item, float], ...]:
        """What is new and what is important, for where there is nothing to search for."""
        listings = (
            self._memory.list_memories(filters, field, "desc", self._rules.candidates)
            for field in ("created_at", "importance")
        )
        pages = await asyncio.gather(*listings)
        records = {record["memory_id"]: record for page in pages for record in page["results"]}
        return tuple((self._writer.item(record), 0.0) for record in records.values())


def scope_filters(question: Question) -> Filters:
    """The filters of a question whose user is known, see above."""
    parts: list[Filters] = []
    if question.scope == "session" and question.session_id is not None:
        parts.append({"session_id": question.session_id})
    elif question.user_id is not None:
        parts.append({"user_id": {"in": [question.user_id, None]}})
    if question.speaker is not None:
        parts.append({"or": [{"metadata.speaker": question.speaker}, {"metadata.role": question.speaker}]})
    return {"and": parts} if parts else {}


def group_name(user_id: str | None) -> str:
    """The name of the group of what is pinned for a user; None: for everybody."""
    if user_id is None:
        return _PINNED
    name = f"{_PINNED} for {user_id}"
    if len(name) <= MAX_NAME_CHARS:
        return name
    return f"{_PINNED} for {hashlib.blake2b(user_id.encode(), digest_size=_DIGEST_BYTES).hexdigest()}"


def _in_scope(record: Record, question: Question) -> bool:
    """Whether a pinned memory, found by its user, is within the rest of the question's scope."""
    kept = record["metadata"]
    if question.speaker is not None and question.speaker not in (kept.get("speaker"), kept.get("role")):
        return False
    return question.scope == "user" or question.session_id in (None, record["session_id"])

"""Clearing and pruning a context: what add_to_context made is deleted, or archived, memory by memory.

What is to go is decided as of an instant, the one at which the request was first begun. A request that is sent again
goes on from there, and leaves alone what was added since.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agents.agent_memory import AgentMemory, caller
from agents.context_choice import DAY_S
from agents.context_sources import CONTEXT, SUMMARY, Filters, Sources
from memory_system.errors import InvalidField, MemoryNotFound

Fields = dict[str, Any]

_AT_ONCE: Final = 16
# More is done by asking again; the reply says that there is more.
MOST: Final = 5000
_SHOWN: Final = 100


@dataclass(frozen=True, slots=True)
class Candidate:
    """What of a memory decides: there may be very many."""

    memory_id: str
    importance: float
    said_s: float

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Candidate:
        said_s = record["created_at"] if record["occurred_at"] is None else record["occurred_at"]
        return cls(record["memory_id"], record["importance"], said_s)


@dataclass(frozen=True, slots=True)
class Removal:
    """What is removed from: the filters of its scope, in the caller's namespace."""

    memory: AgentMemory
    sources: Sources
    namespace: str
    user_id: str | None
    scope: Filters

    @classmethod
    def of(
        cls, memory: AgentMemory, sources: Sources, user_id: str | None, session_id: str | None, everything: bool
    ) -> Removal:
        """`session_id` None: that beside the request's data, where it names nothing else. Raises InvalidField when
        nothing is named."""
        if session_id is None and user_id is None and not everything:
            session_id = caller().session_id
        parts: list[Filters] = [
            {name: value} for name, value in (("user_id", user_id), ("session_id", session_id)) if value is not None
        ]
        if not parts and not everything:
            raise InvalidField("user_id", "name a user_id, a session_id, or everything: true")
        return cls(memory, sources, caller().namespace, user_id, {"and": parts} if parts else {})

    async def clear(self, *, include_pinned: bool, dry_run: bool) -> Fields:
        """Delete all of it."""
        until_s = await self._until_s(dry_run)
        spared = set() if include_pinned else await self.sources.pinned_ids(self.user_id)
        found = await self._candidates([CONTEXT, SUMMARY], until_s, spared)
        return await self._remove("deleted", found, self._delete, dry_run)

    async def prune(
        self, keep: int | None, min_importance: float | None, max_age_days: float | None, *, dry_run: bool
    ) -> Fields:
        """Archive what is worth least, by its importance as of now."""
        until_s = await self._until_s(dry_run)
        found = await self._candidates([CONTEXT], until_s, await self.sources.pinned_ids(self.user_id))
        oldest_s = -math.inf if max_age_days is None else time.time() - max_age_days * DAY_S
        kept = [each for each in found if each.importance >= (min_importance or 0.0) and each.said_s >= oldest_s]
        if keep is not None:
            kept = kept[:keep]
        ids = {each.memory_id for each in kept}
        pruned = [each for each in found if each.memory_id not in ids]
        return {**await self._remove("archived", pruned, self._archive, dry_run), "kept": len(kept)}

    async def _until_s(self, dry_run: bool) -> float:
        """What was created later is left alone: epoch seconds of the service's clock."""
        return math.inf if dry_run else await self.memory.begun_s()

    async def _candidates(self, types: Sequence[str], until_s: float, spared: set[str]) -> list[Candidate]:
        """Everything of these types in the scope, the most important first."""
        filters = {"and": [{"memory_type": {"in": list(types)}}, self.scope]}
        return [
            Candidate.of(record)
            async for record in self.sources.stored(filters, "importance", "desc")
            if record["created_at"] <= until_s and record["memory_id"] not in spared
        ]

    async def _remove(
        self,
        word: str,
        found: Sequence[Candidate],
        remove: Callable[[str], Coroutine[Any, Any, None]],
        dry_run: bool,
    ) -> Fields:
        now = found[-MOST:]  # the least important first
        if not dry_run:
            for start in range(0, len(now), _AT_ONCE):
                await asyncio.gather(*(remove(each.memory_id) for each in now[start : start + _AT_ONCE]))
        shown = [each.memory_id for each in now[:_SHOWN]]
        return {
            word: len(now),
            "left": len(found) - len(now),
            "dry_run": dry_run,
            "results": [{"memory_id": memory_id} for memory_id in shown],
            "count": len(shown),
        }

    async def _delete(self, memory_id: str) -> None:
        """What hangs below it is handed to its parent. Gone already is as good."""
        key = self.memory.key(f"delete {memory_id}")
        with contextlib.suppress(MemoryNotFound):
            await self.memory.delete_memory(memory_id, cascade=False, request_id=key)

    async def _archive(self, memory_id: str) -> None:
        key = self.memory.key(f"archive {memory_id}")
        with contextlib.suppress(MemoryNotFound):
            await self.memory.update_memory(memory_id, {"state": "archived"}, request_id=key)

"""What the knowledge base answers: the facts of a topic, those near in meaning, or that it does not know."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from agents.facts import FACT, SUPERSEDED, Fact, Filters, current, on_topic, without_replaced
from agents.facts_store import FactStore
from memory_system.errors import MemoryNotFound, VectorsUnavailable

_RELATED: int = 100


@dataclass(frozen=True, slots=True)
class Answer:
    """The facts, the best first, and the fields that stand beside them in the reply."""

    facts: list[Fact]
    beside: dict[str, Any]


class Answers:
    def __init__(self, store: FactStore) -> None:
        self.store = store

    async def by_id(self, fact_id: str, as_of: float | None) -> Answer:
        fact = await self.store.get(fact_id)
        if as_of is not None:
            if as_of < fact.since_s:
                raise MemoryNotFound(f"fact {fact_id} was not known then", memory_id=fact_id, since=fact.since_s)
            fact = await self.store.at(fact, as_of)
        return Answer([fact], {"match": "id"})

    async def on(self, topic: str, as_of: float | None, limit: int, cursor: str | None, floor: float | None) -> Answer:
        """The facts on the topic of this name; if there are none, those near it in meaning."""
        name, exists = await self.store.resolve(topic)
        if exists:
            answer = await self._named(name, as_of, limit, cursor)
            if answer.facts or cursor is not None:
                return answer
        return await self._near(topic, as_of, limit, floor)

    async def _named(self, topic: str, as_of: float | None, limit: int, cursor: str | None) -> Answer:
        if as_of is not None:
            known = await self.store.known(topic, as_of)
            return Answer(known[:limit], {"match": "topic", "more": len(known) > limit})
        found, following, _ = await self.store.page(current() | on_topic(topic), limit, cursor)
        beside = {"match": "topic", "more": following is not None}
        return Answer(without_replaced(found), beside | ({"next_cursor": following} if following else {}))

    async def _near(self, query: str, as_of: float | None, limit: int, floor: float | None) -> Answer:
        """Raises MemoryNotFound when nothing reaches the floor: a wrong fact is worse than none."""
        found = await self.store.search(query, limit, current(), floor)
        hits = [hit for hit in found.hits if as_of is None or hit.fact.since_s <= as_of]
        if not hits and found.degraded:
            text = "no fact has these words, and meanings cannot be compared at the moment"
            raise VectorsUnavailable(text, retry_after_ms=1000)
        if not hits:
            lowest = self.store.rules.floor if floor is None else floor
            raise MemoryNotFound(f"there is no fact on {query[:80]!r}", nearest=found.nearest, floor=lowest)
        known = [hit.fact for hit in hits]
        if as_of is not None:
            known = list(await asyncio.gather(*(self.store.at(fact, as_of) for fact in known)))
        return Answer(known, {"match": "meaning", "similarity": hits[0].similarity, "more": found.more})

    async def related(self, fact_id: str) -> tuple[list[dict[str, Any]], bool]:
        """The facts that it was related to, the strongest first, and whether there are more."""
        reply = await self.store.memory.get_related_memories(fact_id, limit=_RELATED)
        told = [
            Fact.of(each["memory"]).told(
                relation=each["relationship_type"], strength=each["strength"], direction=each["direction"]
            )
            for each in reply["results"]
            if each["memory"]["memory_type"] in (FACT, SUPERSEDED)
        ]
        return told, "next_cursor" in reply

    async def search(
        self, query: str, limit: int, kind: Filters, topic: str | None, floor: float | None
    ) -> dict[str, Any]:
        """The reply of a search. Without a topic to search in, facts on the topic that the query names come first."""
        named: list[Fact] = []
        name, exists = await self.store.resolve(query if topic is None else topic)
        if topic is not None:
            kind = kind | on_topic(name)
        elif exists:
            found, _, _ = await self.store.page(kind | on_topic(name), limit + 1)
            named = without_replaced(found)
        near = await self.store.search(query, limit, kind, floor)
        listed = {fact.fact_id for fact in named}
        told = [fact.told(match="topic", score=None, similarity=None, keyword=None) for fact in named]
        told += [hit.told() for hit in near.hits if hit.fact.fact_id not in listed]
        shown = told[:limit]
        beside = {"more": near.more or len(told) > limit, "nearest": near.nearest, "degraded": near.degraded}
        return {"results": shown, "count": len(shown), **beside}

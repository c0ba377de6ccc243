"""Facts in the memory service: what the actions of the knowledge base are made of.

Decay archives memories that nobody asks for. A fact stays a fact: archived ones are found here as well, and what has
been replaced is known by its metadata.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agents.agent_memory import AgentMemory, Reply, acting
from agents.facts import (
    FACT,
    SUPERSEDED,
    SUPERSEDES,
    Draft,
    Fact,
    Filters,
    current,
    facts,
    on_topic,
    placed,
    without_replaced,
)
from agents.facts_text import normal, same_claim
from memory_system.agent_settings import KnowledgeBaseSettings
from memory_system.errors import MemoryNotFound
from memory_system.protocol import MAX_QUERY_CHARS, MAX_RESULTS

_NEAR: Final = 5
_AT_ONCE: Final = 16  # writes of one request that are under way together


@dataclass(frozen=True, slots=True)
class Hit:
    """A fact that a search found, with its absolute figures (None: it has no vector, or shares no word)."""

    fact: Fact
    score: float
    similarity: float | None
    keyword: float | None

    @classmethod
    def of(cls, record: dict[str, Any]) -> Hit:
        return cls(Fact.of(record), record["score"], record["similarity"], record["keyword"])

    def told(self) -> dict[str, Any]:
        return self.fact.told(match="meaning", score=self.score, similarity=self.similarity, keyword=self.keyword)


@dataclass(frozen=True, slots=True)
class Found:
    """`hits` reach the floor, best first; `more` do so too. `nearest`: the best similarity of all that was looked at.
    `degraded`: meanings could not be compared."""

    hits: list[Hit]
    more: bool
    nearest: float | None
    degraded: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known already of a new fact: `same` says what it says, `older` are those that it replaces."""

    same: Fact | None = None
    similarity: float | None = None
    older: tuple[str, ...] = ()


class FactStore:
    """Reads leave no trace, except those that are told to. Raises what the memory service does."""

    def __init__(self, memory: AgentMemory, rules: KnowledgeBaseSettings) -> None:
        self.memory = memory
        self.rules = rules

    # -- reading ------------------------------------------------------------------------------------------------

    async def get(self, fact_id: str, *, touch: bool = False) -> Fact:
        record = (await self.memory.get_memory(fact_id, touch=touch))["memory"]
        if record["memory_type"] not in (FACT, SUPERSEDED):
            raise MemoryNotFound(f"{fact_id} is a memory of another kind, and no fact", memory_id=fact_id)
        return Fact.of(record)

    async def require(self, fact_ids: Sequence[str], field: str) -> None:
        """Raise MemoryNotFound, naming the field, unless all of these are facts."""
        reply = await self.memory.batch_get_memories(list(dict.fromkeys(fact_ids)), touch=False)
        known = {record["memory_id"] for record in reply["results"] if record["memory_type"] in (FACT, SUPERSEDED)}
        for fact_id in fact_ids:
            if fact_id not in known:
                raise MemoryNotFound(f"{field}: there is no fact {fact_id}", field=field, memory_id=fact_id)

    async def touch(self, fact_ids: Sequence[str]) -> None:
        """Count these as asked for."""
        if fact_ids:
            await self.memory.batch_get_memories(list(fact_ids), touch=True)

    async def page(
        self, filters: Filters, limit: int = MAX_RESULTS, cursor: str | None = None
    ) -> tuple[list[Fact], str | None, int]:
        """Newest first: the facts, the cursor of the next page, and the namespace's commit_seq."""
        reply = await self.memory.list_memories(filters, limit=limit, include_archived=True, cursor=cursor)
        return [Fact.of(record) for record in reply["results"]], reply.get("next_cursor"), reply["commit_seq"]

    async def all(self, filters: Filters) -> list[Fact]:
        return (await self.walk(filters))[0]

    async def resolve(self, topic: str) -> tuple[str, bool]:
        """The topic of this name, or the one that it was merged into, and whether there is one; else the name."""
        key = normal(topic)
        named = {"or": [on_topic(topic), {"metadata.former_topics": {"contains": key}}]}
        found, _, _ = await self.page(facts() | named, 1)
        if not found:
            return topic, False
        return (topic if normal(found[0].topic) == key else found[0].topic), True

    async def renamed(self, topics: Iterable[str]) -> dict[str, str]:
        """Of these topics those that were merged into another: normal form -> that other."""
        keys = list(dict.fromkeys(map(normal, topics)))
        found = await self.all(facts(metadata__former_topics={"any": keys}))
        return {key: fact.topic for fact in reversed(found) for key in fact.former_topics if key in keys}

    async def walk(self, filters: Filters) -> tuple[list[Fact], int]:
        """All of them, and the commit_seq from which on they may have changed."""
        found, cursor, seq = await self.page(filters)
        while cursor is not None:
            more, cursor, _ = await self.page(filters, cursor=cursor)
            found += more
        return found, seq

    async def keys_among(self, keys: list[str]) -> set[str]:
        """Which of these text_keys a fact has, or came with."""
        keys = list(dict.fromkeys(keys))
        alike = {"or": [{"metadata.text_key": {"in": keys}}, {"metadata.import_key": {"in": keys}}]}
        found = await self.all(facts() | alike)
        return {fact.text_key for fact in found} | {fact.import_key for fact in found if fact.import_key}

    async def at(self, fact: Fact, as_of_s: float) -> Fact:
        """The version of the fact that was current at that time."""
        cursor = None
        while fact.updated_at > as_of_s and fact.version > 1:
            reply = await self.memory.get_memory_history(fact.fact_id, MAX_RESULTS, cursor=cursor)
            for record in reply["results"]:
                if record["replaced_at"] <= as_of_s:
                    return fact
                fact = Fact.of(record)
            cursor = reply.get("next_cursor")
            if cursor is None:
                break
        return fact

    async def known(self, topic: str, as_of_s: float) -> list[Fact]:
        """What was current on a topic at that time, newest first."""
        found = [fact for fact in await self.all(facts() | on_topic(topic)) if fact.held(as_of_s)]
        return list(await asyncio.gather(*(self.at(fact, as_of_s) for fact in found)))

    async def search(self, query: str, limit: int, filters: Filters, floor: float | None = None) -> Found:
        reply = await self.memory.semantic_search(query, limit + 1, filters, include_archived=True, touch=False)
        hits = [Hit.of(record) for record in reply["results"]]
        kept = {fact.fact_id for fact in without_replaced(hit.fact for hit in hits)}
        lowest = self.rules.floor if floor is None else floor
        good = [hit for hit in hits if hit.fact.fact_id in kept and self._reaches(hit, lowest)]
        nearest = max((hit.similarity for hit in hits if hit.similarity is not None), default=None)
        return Found(good[:limit], len(good) > limit, nearest, reply["degraded"])

    def _reaches(self, hit: Hit, floor: float) -> bool:
        """A fact without a vector, new or while the model loads, is judged by the words that it shares."""
        if hit.similarity is not None:
            return hit.similarity >= floor
        return (hit.keyword or 0.0) >= self.rules.keyword_floor

    async def seen(self, draft: Draft) -> Seen:
        """Compare a new fact with those of its topic."""
        alike: list[Filters] = [{"metadata.text_key": draft.text_key}]
        if draft.frame_key is not None and self.rules.supersede == "auto":
            alike.append({"metadata.frame_key": draft.frame_key})
        found = await self.all(current() | {"or": alike})
        said = normal(draft.content)
        same = next((fact for fact in found if normal(fact.content) == said), None)
        if same is not None:
            return Seen(same)
        if found:
            return Seen(older=tuple(fact.fact_id for fact in found))
        return await self._nearly(draft)

    async def _nearly(self, draft: Draft) -> Seen:
        if len(draft.content) > MAX_QUERY_CHARS:
            return Seen()
        reply = await self.memory.semantic_search(
            draft.content,
            _NEAR,
            current() | on_topic(draft.topic),
            mode="dense",
            min_score=self.rules.duplicate_similarity,
            include_archived=True,
            touch=False,
        )
        for hit in map(Hit.of, reply["results"]):
            if same_claim(hit.fact.content, draft.content):
                return Seen(hit.fact, hit.similarity)
        return Seen()

    # -- writing ------------------------------------------------------------------------------------------------

    async def add(self, draft: Draft, supersedes: Sequence[str]) -> str:
        """The id of the new fact. It belongs to no session, and stays when the one in which it was told is deleted."""
        with acting(session_id=None):
            reply = await self.memory.call("add_memory", draft.memory(supersedes), request_id=self.memory.key("add"))
        return str(reply["memory_id"])

    async def add_all(self, drafts: Iterable[Draft]) -> Reply:
        """All or none, up to 1,000. Reply: memory_ids."""
        with acting(session_id=None):
            memories = [draft.memory() for draft in drafts]
            return await self.memory.batch_add_memories(memories, request_id=self.memory.key("import"))

    async def supersede(self, fact: Fact, older: Iterable[str]) -> None:
        """Say of the older ones that this fact replaces them. Done again, it changes nothing."""
        key = self.memory.key
        for old in older:
            if old not in fact.supersedes:
                listed = {"supersedes": [*fact.supersedes, old]}
                reply = await self.memory.update_memory(
                    fact.fact_id, {"metadata": listed}, request_id=key(f"lists:{old}")
                )
                fact = Fact.of(reply["memory"])
            await self.memory.add_relationship(fact.fact_id, old, SUPERSEDES, request_id=key(f"link:{old}"))
            if (await self.get(old)).superseded_by != fact.fact_id:
                replaced = {"superseded_by": fact.fact_id, "superseded_at": fact.created_at}
                payload = {"memory_type": SUPERSEDED, "state": "archived", "metadata": replaced}
                await self.memory.update_memory(old, payload, request_id=key(f"retire:{old}"))

    async def move(self, fact: Fact, topic: str) -> None:
        """Put a fact under another topic, which then goes by the old name too."""
        names = dict.fromkeys([*fact.former_topics, normal(fact.topic)])
        former = [name for name in names if name and name != normal(topic)]
        metadata = placed(topic, fact.content) | {"former_topics": former or None}
        await self.memory.update_memory(
            fact.fact_id, {"metadata": metadata}, request_id=self.memory.key(f"move:{fact.fact_id}")
        )

    async def ancestors(self, fact_id: str) -> list[str]:
        """The facts that it replaced, those that they replaced, and so on: nearest first."""
        found: dict[str, None] = {}
        layer = [fact_id]
        while layer:
            older = await self.all(facts(metadata__superseded_by={"in": layer[:MAX_RESULTS]}))
            layer = [fact.fact_id for fact in older if fact.fact_id not in found and fact.fact_id != fact_id]
            found.update(dict.fromkeys(layer))
        return list(found)

    async def each(self, work: Iterable[Any]) -> list[Any]:
        """Await these, some at a time, and return what they return. The first error is raised when all have ended."""
        places = asyncio.Semaphore(_AT_ONCE)

        async def one(part: Any) -> Any:
            async with places:
                return await part

        done = await asyncio.gather(*(one(part) for part in work), return_exceptions=True)
        for result in done:
            if isinstance(result, BaseException):
                raise result
        return done

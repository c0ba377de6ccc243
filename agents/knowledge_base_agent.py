#!/usr/bin/env python3
"""The knowledge base: facts by topic, with what replaced what.

python agents/knowledge_base_agent.py [--config FILE]
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

if not __package__:  # run as a file: what it imports lies one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from agents.base_agent import BaseAgent, Fields, Span, action
from agents.facts import SUPERSEDES, Draft, Fact, current, facts, on_topic, placed
from agents.facts_answers import Answers
from agents.facts_import import MAX_RECORDS, MAX_SOURCE_CHARS, MAX_TOPIC_CHARS, columns_of, draft_of
from agents.facts_store import FactStore, Seen
from agents.facts_text import normal
from agents.facts_topics import Topics
from memory_system.errors import InvalidField, MemoryNotFound
from memory_system.protocol import MAX_CONTENT_BYTES, MAX_ID_CHARS, MAX_QUERY_CHARS, MAX_TAG_CHARS, MAX_TAGS
from memory_system.settings import Settings

Topic = Annotated[str, Span(1, MAX_TOPIC_CHARS, blank=False)]
Content = Annotated[str, Span(1, MAX_CONTENT_BYTES, blank=False)]
FactId = Annotated[str, Span(1, MAX_ID_CHARS)]
Share = Annotated[float, Span(0, 1)]
Similarity = Annotated[float, Span(-1, 1)]
Source = Annotated[str, Span(0, MAX_SOURCE_CHARS)]
Tags = Annotated[list[Annotated[str, Span(1, MAX_TAG_CHARS)]], Span(0, MAX_TAGS)]
Limit = Annotated[int, Span(1, 100)]

_DELETED_AT_ONCE: Final = 100  # of a topic; the reply says how many are left


class KnowledgeBaseAgent(BaseAgent):
    """Keeps facts by topic, and says what it knows, what it knew, and that it does not know."""

    name = "knowledge_base_agent"
    section = "agents.knowledge_base"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.store = FactStore(self.memory, settings.agents.knowledge_base)
        self.answers = Answers(self.store)
        self.topics = Topics(self.store)

    # -- facts --------------------------------------------------------------------------------------------------

    @action
    async def add_fact(
        self,
        topic: Topic,
        content: Content,
        confidence: Share = 1.0,
        source: Source | None = None,
        tags: Tags | None = None,
        supersedes: FactId | Annotated[list[FactId], Span(0, 100)] | None = None,
    ) -> Fields:
        """Keep a fact. One that is there already is reinforced; one with an older value of the same is superseded."""
        async with self._topic_held(_topic(topic)) as name:
            draft = Draft(name, content.strip(), confidence, source or None, tags or ())
            if (earlier := await self.memory.done("add")) is not None:
                return await self._added_before(earlier)
            if supersedes is None:
                seen = await self.store.seen(draft)
            else:
                older = [supersedes] if isinstance(supersedes, str) else supersedes
                await self.store.require(older, "supersedes")
                seen = Seen(older=tuple(dict.fromkeys(older)))
            if seen.same is not None:
                return await self._reinforced(seen.same.fact_id, seen.similarity)
            return await self._added(await self.store.add(draft, seen.older))

    async def _added_before(self, earlier: Fields) -> Fields:
        """The same request was sent before: what it did is told, and done to its end."""
        if "new_importance" in earlier:
            return _reinforced(await self.store.get(earlier["memory_id"]), None)
        return await self._added(earlier["memory_id"])

    async def _added(self, fact_id: str) -> Fields:
        fact = await self.store.get(fact_id)
        await self.store.supersede(fact, fact.supersedes)
        told = {"superseded": list(fact.supersedes), "fact": fact.told()}
        return {"fact_id": fact_id, "added": True, "reinforced": False, **told}

    async def _reinforced(self, fact_id: str, similarity: float | None) -> Fields:
        await self.memory.reinforce_memory(fact_id, request_id=self.key("add"))
        return _reinforced(await self.store.get(fact_id), similarity)

    @action
    async def get_fact(
        self,
        topic: Annotated[str, Span(1, MAX_QUERY_CHARS)] | None = None,
        fact_id: FactId | None = None,
        as_of: float | None = None,
        limit: Limit = 10,
        cursor: str | None = None,
        min_similarity: Similarity | None = None,
        related: bool = False,
    ) -> Fields:
        """The facts on a topic, the newest first; if there is none of this name, those whose meaning is near. Or one
        fact by its id. `as_of` (epoch seconds): as they were then."""
        if (topic is None) == (fact_id is None):
            raise InvalidField("topic", "get_fact takes either topic or fact_id")
        if fact_id is not None:
            answer = await self.answers.by_id(fact_id, as_of)
        else:
            answer = await self.answers.on(topic or "", as_of, limit, cursor, min_similarity)
        told = [fact.told() for fact in answer.facts]
        await self.store.touch([fact.fact_id for fact in answer.facts])
        if related and told:
            told[0]["related"], told[0]["more_related"] = await self.answers.related(answer.facts[0].fact_id)
        return {"fact": told[0] if told else None, "results": told, "count": len(told), **answer.beside}

    @action
    async def update_fact(
        self,
        fact_id: FactId,
        content: Content | None = None,
        topic: Topic | None = None,
        confidence: Share | None = None,
        source: Source | None = None,
        tags: Tags | None = None,
        expected_version: Annotated[int, Span(0)] | None = None,
    ) -> Fields:
        """Change what is given, and keep the version before. An empty source or list of tags clears it."""
        if all(each is None for each in (content, topic, confidence, source, tags)):
            hint = "update_fact changes content, topic, confidence, source or tags: none is given"
            raise InvalidField("content", hint)
        payload = _payload(content, confidence, source, tags)
        async with self._fact_held(fact_id, None if topic is None else _topic(topic)) as (fact, about):
            if (earlier := await self.memory.done("update")) is not None:
                return {"fact_id": fact_id, "fact": fact.told(), "version": earlier["version"]}
            if content is not None or topic is not None:
                payload["metadata"] |= placed(about, payload.get("content", fact.content))
            key = self.key("update")
            reply = await self.memory.update_memory(fact_id, payload, expected_version=expected_version, request_id=key)
        return {"fact_id": fact_id, "fact": Fact.of(reply["memory"]).told(), "version": reply["version"]}

    @action
    async def delete_fact(self, fact_id: FactId | None = None, topic: Topic | None = None) -> Fields:
        """Delete a fact, or all on a topic, for good: with its history and with what it had superseded."""
        if (topic is None) == (fact_id is None):
            raise InvalidField("fact_id", "delete_fact takes either fact_id or topic")
        if fact_id is not None:
            return {"deleted": await self._delete(fact_id), "left": 0}
        async with self._topic_held(topic or "") as name:
            begun_s = await self.memory.begun_s()
            there = [fact for fact in await self.store.all(facts() | on_topic(name)) if fact.created_at <= begun_s]
            deleted = await self.store.each(self._delete_one(fact.fact_id) for fact in there[:_DELETED_AT_ONCE])
            return {"deleted": sum(deleted), "left": len(there) - len(deleted)}

    async def _delete(self, fact_id: str) -> int:
        """What it had superseded goes first, so that a retry of a broken request finds the rest."""
        if (earlier := await self.memory.done(f"delete:{fact_id}")) is not None:
            return int(earlier["deleted"])
        await self.store.get(fact_id)
        older = await self.store.ancestors(fact_id)
        await self.store.each(self._delete_one(each) for each in older)
        return len(older) + await self._delete_one(fact_id)

    async def _delete_one(self, fact_id: str) -> int:
        key = self.key(f"delete:{fact_id}")
        with contextlib.suppress(MemoryNotFound):
            return int((await self.memory.delete_memory(fact_id, cascade=False, request_id=key))["deleted"])
        return 0

    @action
    async def search_facts(
        self,
        query: Annotated[str, Span(1, MAX_QUERY_CHARS)],
        limit: Limit = 10,
        topic: Topic | None = None,
        min_similarity: Similarity | None = None,
        include_superseded: bool = False,
    ) -> Fields:
        """Facts that answer a question. If it is the name of a topic, the facts on that topic come first."""
        kind = facts() if include_superseded else current()
        return await self.answers.search(query, limit, kind, topic, min_similarity)

    @action
    async def relate_facts(
        self,
        fact_id: FactId,
        related_id: FactId,
        relation: Annotated[str, Span(1, 128)] = "related_to",
        strength: Share = 1.0,
    ) -> Fields:
        """Relate a fact to another. The relation `supersedes` means what it says: the other one is replaced."""
        if fact_id == related_id:
            raise InvalidField("related_id", "related_id: a fact cannot be related to itself")
        await self.store.require([fact_id], "fact_id")
        await self.store.require([related_id], "related_id")
        if relation == SUPERSEDES:
            newer = await self.store.get(fact_id)
            if newer.superseded_by is not None:
                raise InvalidField("fact_id", f"fact_id: it was itself superseded, by {newer.superseded_by}")
            await self.store.supersede(newer, [related_id])
            return {"created": True}
        key = self.key("relate")
        reply = await self.memory.add_relationship(fact_id, related_id, relation, strength, request_id=key)
        return {"created": reply["created"]}

    # -- topics -------------------------------------------------------------------------------------------------

    @action
    async def list_topics(
        self, prefix: str | None = None, limit: Annotated[int, Span(1, 1000)] = 100, cursor: str | None = None
    ) -> Fields:
        """The topics by name, each with the number of its facts and the time of its last change."""
        return await self.topics.page(prefix, limit, cursor)

    @action
    async def merge_topics(self, source: Topic, target: Topic) -> Fields:
        """Put all facts on one topic under another, which then goes by both names. What both had is kept once."""
        source, target = _topic(source), _topic(target)
        if normal(source) != normal(target):
            target, _ = await self.store.resolve(target)
        async with self._topics_locked([source, target]):
            return await self.topics.merge(source, target)

    # -- import -------------------------------------------------------------------------------------------------

    @action
    async def import_facts(
        self,
        records: Annotated[list[dict[str, Any]], Span(1, MAX_RECORDS)],
        columns: dict[str, str] | None = None,
        topic: Topic | None = None,
        source: Source | None = None,
    ) -> Fields:
        """Keep facts from elsewhere: all of them or, when one is wrong, none. Those that are there change nothing.

        `columns` says by what names the records call the fields, where these are not the usual ones."""
        names = dict.fromkeys(name for record in records for name in record)
        known = columns_of(names, columns)
        drafts: dict[str, Draft] = {}
        for place, record in enumerate(records):
            draft = draft_of(record, known, f"records[{place}]", topic=topic, source=source)
            drafts.setdefault(draft.text_key, draft)
        renamed = await self.store.renamed(draft.topic for draft in drafts.values())
        moved = [replace(draft, topic=renamed.get(normal(draft.topic), draft.topic)) for draft in drafts.values()]
        async with self._topics_locked(draft.topic for draft in moved):
            if (earlier := await self.memory.done("import")) is None:
                there = await self.store.keys_among([*drafts, *(draft.text_key for draft in moved)])
                pairs = zip(drafts, moved, strict=True)
                new = [draft for key, draft in pairs if key not in there and draft.text_key not in there]
                earlier = await self.store.add_all(new) if new else {"memory_ids": []}
            added = len(earlier["memory_ids"])
            return {"added": added, "unchanged": len(records) - added, "fact_ids": earlier["memory_ids"]}

    @contextlib.asynccontextmanager
    async def _topics_locked(self, topics: Iterable[str]) -> AsyncIterator[None]:
        """Hold these topics of the caller, in one order, so that two requests never wait for each other."""
        async with contextlib.AsyncExitStack() as stack:
            for key in sorted({normal(topic) for topic in topics}):
                await stack.enter_async_context(self.lock("topic", key))
            yield

    @contextlib.asynccontextmanager
    async def _topic_held(self, topic: str) -> AsyncIterator[str]:
        """Hold the topic of this name, which may be merged into another while it is waited for."""
        names = {topic}
        while True:
            async with self._topics_locked(names):
                name, _ = await self.store.resolve(topic)
                if normal(name) in map(normal, names):
                    yield name
                    return
            names = {topic, name}

    @contextlib.asynccontextmanager
    async def _fact_held(self, fact_id: str, topic: str | None) -> AsyncIterator[tuple[Fact, str]]:
        """Hold a fact's own topic, and the one that it is to have (None: its own). It may get another meanwhile."""
        names: set[str] = set()
        while True:
            async with self._topics_locked(names):
                fact = await self.store.get(fact_id)
                about = fact.topic if topic is None else (await self.store.resolve(topic))[0]
                if {normal(fact.topic), normal(about)} <= set(map(normal, names)):
                    yield fact, about
                    return
            names = {fact.topic, about}


def _topic(text: str) -> str:
    return " ".join(text.split())


def _payload(content: str | None, confidence: float | None, source: str | None, tags: Tags | None) -> Fields:
    """What an update says to the memory service."""
    payload: Fields = {"metadata": {}}
    if content is not None:
        payload["content"] = content.strip()
    if confidence is not None:
        payload["metadata"]["confidence"] = confidence
    if source is not None:
        payload["metadata"]["source"] = source or None
    if tags is not None:
        payload["tags"] = tags
    return payload


def _reinforced(fact: Fact, similarity: float | None) -> Fields:
    told: Fields = {"superseded": [], "similarity": similarity, "fact": fact.told()}
    return {"fact_id": fact.fact_id, "added": False, "reinforced": True, **told}


if __name__ == "__main__":
    KnowledgeBaseAgent.main()

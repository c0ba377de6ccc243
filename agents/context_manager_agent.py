#!/usr/bin/env python3
"""Builds what the prompt of a language model needs to know: chosen across sessions, within a budget of tokens.

    python agents/context_manager_agent.py [--config FILE]

Everything is in the memory service; what this program keeps is a cache. docs/agents.md has its actions with an example
each, and how a context is chosen.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Final
from zoneinfo import ZoneInfo

if not __package__:  # run as a file: what it imports lies one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from agents import token_counts, utterances
from agents.base_agent import BaseAgent, Fields, Span, acting, action, caller, passed_on, renamed
from agents.context_built import Builder, Built
from agents.context_cache import ContextCache
from agents.context_items import Method, Question, Scope, Writer
from agents.context_removal import Removal
from agents.context_sources import CONTEXT, SUMMARY, Sources, group_name
from agents.context_summary import summarise
from memory_system.errors import InvalidField, Unavailable
from memory_system.metrics import Family, counter
from memory_system.protocol import MAX_CONTENT_BYTES, MAX_NAME_CHARS, MAX_QUERY_CHARS, MAX_RESULTS

Id = Annotated[str, Span(1, MAX_NAME_CHARS)]
Query = Annotated[str, Span(1, MAX_QUERY_CHARS)]
Text = Annotated[str, Span(1, MAX_CONTENT_BYTES, blank=False)]
Speaker = Annotated[str, Span(1, MAX_NAME_CHARS, blank=False)]
Tokens = Annotated[int, Span(1, 1_000_000)]
Items = Annotated[int, Span(1, MAX_RESULTS)]
Share = Annotated[float, Span(0, 1)]

# A summary chooses among this much more than it may say.
_SUMMARISED: Final = 6


class ContextManagerAgent(BaseAgent):
    """Builds the context of a prompt, across sessions and within a budget of tokens."""

    name = "context_manager_agent"
    section = "agents.context_manager"

    async def start(self) -> None:
        rules = self.rules = self.settings.agents.context_manager
        self.writer = Writer(token_counts.load(self.settings), ZoneInfo(rules.time_zone))
        self.judge = utterances.load(self.settings)
        self.sources = Sources(self.memory, rules, self.writer)
        self.builder = Builder(self.sources, self.writer, rules)
        self.cache: ContextCache[Built] = ContextCache(
            rules.cache_entries, rules.cache_mb * 2**20, rules.cache_ttl_s, rules.stale_max_s
        )

    # -- what is remembered -------------------------------------------------------------------------------------

    @action
    async def add_to_context(
        self,
        text: Text,
        speaker: Speaker | None = None,
        metadata: dict[str, Any] | None = None,
        user_id: Id | None = None,
        session_id: Id | None = None,
        importance: Share | None = None,
        occurred_at: float | None = None,
        tags: list[Id] | None = None,
    ) -> Fields:
        """Remember something for contexts to come; its importance is judged by what it says, unless given."""
        judged = self.judge.judge(text)
        kept = {"speaker": speaker, "data": metadata}
        with acting(session_id=session_id or caller().session_id):
            try:
                reply = await self.memory.add_memory(
                    text if speaker is None else f"{speaker}: {text}",
                    CONTEXT,
                    importance=judged.importance if importance is None else importance,
                    metadata={name: value for name, value in kept.items() if value is not None},
                    tags=tags,
                    user_id=user_id,
                    occurred_at=occurred_at,
                    request_id=self.key("add"),
                )
            except InvalidField as error:
                raise renamed(error, "content", "text") from None
        told = {"importance": judged.importance if importance is None else importance}
        return {**passed_on(reply), **told, "reasons": list(judged.reasons) if importance is None else ["given"]}

    @action
    async def pin_context(self, memory_id: Id) -> Fields:
        """Have a memory in every context of its user, before all others; of every user, if it belongs to nobody."""
        record = (await self.memory.get_memory(memory_id, touch=False))["memory"]
        group = await self.memory.create_context_group(group_name(record["user_id"]), request_id=self.key("group"))
        added = await self.memory.add_to_group(memory_id, group["group_id"], request_id=self.key("pin"))
        return {**passed_on(added), "memory_id": memory_id, "pinned": True}

    @action
    async def unpin_context(self, memory_id: Id) -> Fields:
        """Undo pin_context; `removed` is false when it was not pinned."""
        record = (await self.memory.get_memory(memory_id, touch=False))["memory"]
        removed = False
        for group_id in await self.sources.groups(record["user_id"]):
            reply = await self.memory.remove_from_group(memory_id, group_id, request_id=self.key(f"unpin {group_id}"))
            removed = removed or reply["removed"]
        return {"memory_id": memory_id, "pinned": False, "removed": removed}

    # -- contexts -----------------------------------------------------------------------------------------------

    @action
    async def get_context(
        self,
        query: Query | None = None,
        user_id: Id | None = None,
        session_id: Id | None = None,
        token_budget: Tokens | None = None,
        max_items: Items | None = None,
        speaker: Id | None = None,
        scope: Scope = "user",
        method: Method = "full",
        explain: bool = False,
    ) -> Fields:
        """The memories that a prompt should have, best first, each with why it is there."""
        question = self._question(query, user_id, session_id, token_budget, max_items, speaker, scope, method)
        built, how = await self._context(question)
        results = built.results(explain=explain)
        return {"results": results, "count": len(results), **built.figures(), **how}

    @action
    async def get_context_text(
        self,
        query: Query | None = None,
        user_id: Id | None = None,
        session_id: Id | None = None,
        token_budget: Tokens | None = None,
        max_items: Items | None = None,
        speaker: Id | None = None,
        scope: Scope = "user",
        method: Method = "full",
    ) -> Fields:
        """The same context as a text to paste into a prompt: by day, with who said it, what is pinned first."""
        question = self._question(query, user_id, session_id, token_budget, max_items, speaker, scope, method)
        built, how = await self._context(question)
        return {"text": built.text, "memory_ids": built.memory_ids, **built.figures(), **how}

    @action
    async def summarize_context(
        self,
        query: Query | None = None,
        user_id: Id | None = None,
        session_id: Id | None = None,
        token_budget: Tokens = 200,
        scope: Scope = "user",
        store: bool = False,
    ) -> Fields:
        """The sentences that say most of a context, as a short text; `store`: remember it as well."""
        if store and (earlier := await self.memory.done("summary")) is not None:
            record = (await self.memory.get_memory(earlier["memory_id"], touch=False))["memory"]
            sources = record["metadata"]["sources"]
            tokens = self.writer.tokens.count(record["content"])
            return {"text": record["content"], "tokens": tokens, "memory_ids": sources, **passed_on(earlier)}
        question = self._question(
            query, user_id, session_id, _SUMMARISED * token_budget, MAX_RESULTS, None, scope, "full"
        )
        built, how = await self._context(question)
        summary = summarise(built.chosen, query, token_budget, self.judge, self.writer)
        told = {"text": summary.text, "tokens": summary.tokens, "memory_ids": list(summary.memory_ids), **how}
        if not store or not summary.text:
            return told
        with acting(session_id=question.session_id):
            reply = await self.memory.add_memory(
                summary.text,
                SUMMARY,
                "medium",
                metadata={"sources": list(summary.memory_ids)},
                user_id=user_id,
                request_id=self.key("summary"),
            )
        return {**told, **passed_on(reply)}

    # -- what is removed ----------------------------------------------------------------------------------------

    @action
    async def clear_context(
        self,
        user_id: Id | None = None,
        session_id: Id | None = None,
        everything: bool = False,
        include_pinned: bool = False,
        dry_run: bool = False,
    ) -> Fields:
        """Delete for good what add_to_context and summarize_context made: of a session, of a user, or everything."""
        removal = Removal.of(self.memory, self.sources, user_id, session_id, everything)
        removed = await removal.clear(include_pinned=include_pinned, dry_run=dry_run)
        if not dry_run:
            self.cache.drop(removal.namespace, time.monotonic())
        return removed

    @action
    async def prune_context(
        self,
        user_id: Id | None = None,
        session_id: Id | None = None,
        everything: bool = False,
        keep: Annotated[int, Span(0, 10_000)] | None = None,
        min_importance: Share | None = None,
        max_age_days: Annotated[float, Span(0, 100_000)] | None = None,
        dry_run: bool = False,
    ) -> Fields:
        """Archive what add_to_context made and is worth least: beyond `keep`, not important enough, or too old."""
        if keep is None and min_importance is None and max_age_days is None:
            raise InvalidField("keep", "prune_context needs keep, min_importance or max_age_days")
        removal = Removal.of(self.memory, self.sources, user_id, session_id, everything)
        return await removal.prune(keep, min_importance, max_age_days, dry_run=dry_run)

    # -- how it is ----------------------------------------------------------------------------------------------

    def figures(self) -> Fields:
        rate = self.cache.hit_rate
        counts = {name: self.cache.counts[name] for name in ("hit", "miss", "stale")}
        kept = {"entries": len(self.cache), "mb": round(self.cache.megabytes, 3)}
        return {"context_cache": {**counts, "hit_rate": None if rate is None else round(rate, 4), **kept}}

    def families(self) -> list[Family]:
        outcomes: dict[tuple[str, ...], float] = {(name,): count for name, count in dict(self.cache.counts).items()}
        return [counter("contexts", "Contexts asked for: from the cache, built, or stale.", ("outcome",), outcomes)]

    def _question(
        self,
        query: str | None,
        user_id: str | None,
        session_id: str | None,
        token_budget: int | None,
        max_items: int | None,
        speaker: str | None,
        scope: Scope,
        method: Method,
    ) -> Question:
        session_id = session_id or caller().session_id
        if scope == "session" and session_id is None:
            raise InvalidField("session_id", 'scope "session" needs a session_id')
        budget = token_budget or self.rules.token_budget
        return Question(query, user_id, session_id, scope, speaker, budget, max_items or self.rules.max_items, method)

    async def _context(self, question: Question) -> tuple[Built, Fields]:
        """The context, and how it was come by: built, from the cache, or stale."""
        key = (caller().namespace, question)
        asked_s = time.monotonic()
        try:
            commit_seq = (await self.memory.get_commit_seq())["commit_seq"]
            kept = self.cache.current(key, commit_seq, time.monotonic())
            if kept is not None:
                return kept.value, {"cached": True, "stale": False, "commit_seq": commit_seq}
            built = await self.builder.build(question)
        except Unavailable as error:
            if found := self._stale(key, error.details.get("retry_after_ms", 0.0) / 1000.0):
                return found
            raise
        lasts_s = built.lasts_s(time.time())
        self.cache.put(key, built, commit_seq, asked_s, lasts_s=lasts_s, size=built.size)
        return built, {"cached": False, "stale": False, "commit_seq": commit_seq}

    def _stale(self, key: tuple[str, Question], wait_s: float) -> tuple[Built, Fields] | None:
        """What was last built, for while the memory service does not answer."""
        now_s = time.monotonic()
        kept = self.cache.last(key, now_s)
        if kept is None:
            return None
        how = {"cached": True, "stale": True, "commit_seq": kept.commit_seq}
        return kept.value, {**how, "age_s": round(now_s - kept.made_s, 3), "retry_after_ms": round(wait_s * 1000.0, 1)}


if __name__ == "__main__":
    ContextManagerAgent.main()

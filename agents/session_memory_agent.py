#!/usr/bin/env python3
"""Keeps conversations by session: what was said, by whom, in which order.

    python agents/session_memory_agent.py [--config FILE]

Everything is in the memory service; this program remembers nothing between two requests. docs/agents.md has its actions
with an example each.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal

if not __package__:  # run as a file: what it imports lies one folder up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from agents import sessions_window as window
from agents import token_counts, utterances
from agents.base_agent import BaseAgent, Fields, Span, acting, action, passed_on, renamed
from agents.sessions_import import Conversation
from agents.sessions_migration import Migration
from agents.turns import INTERACTION, Importance, Interaction, Role, Said, Turn
from memory_system.errors import InvalidField, MemorySystemError, SessionEnded, SessionNotFound
from memory_system.protocol import MAX_BATCH_ITEMS, MAX_NAME_CHARS, MAX_QUERY_CHARS, MAX_RESULTS

Id = Annotated[str, Span(1, MAX_NAME_CHARS)]
Query = Annotated[str, Span(1, MAX_QUERY_CHARS)]
Limit = Annotated[int, Span(1, MAX_RESULTS)]

_PAGE: Final = 100
_NO_BUDGET: Final = 2**62


class SessionMemoryAgent(BaseAgent):
    """Keeps conversations by session."""

    name = "session_memory_agent"
    section = "agents.session_memory"

    async def start(self) -> None:
        self.rules = self.settings.agents.session_memory
        self.tokens = token_counts.load(self.settings)
        self.judge = utterances.load(self.settings)

    # -- sessions -----------------------------------------------------------------------------------------------

    @action
    async def create_session(
        self,
        user_id: Id,
        session_type: Id = "conversation",
        metadata: dict[str, Any] | None = None,
        idle_timeout_s: Annotated[float, Span(0, 1e10)] | None = None,
    ) -> Fields:
        """Open a session of a user."""
        idle_s = self.rules.idle_timeout_s if idle_timeout_s is None else idle_timeout_s
        with acting(session_id=None):
            try:
                reply = await self.memory.create_session(
                    user_id, session_type, metadata, idle_timeout_s=idle_s or None, request_id=self.key("session")
                )
            except InvalidField as error:
                raise renamed(error, "session_metadata", "metadata") from None
        return passed_on(reply)

    @action
    async def get_session(self, session_id: Id) -> Fields:
        """One session, as it is now."""
        return passed_on(await self.memory.get_session(session_id))

    @action
    async def list_sessions(
        self,
        user_id: Id | None = None,
        session_state: Literal["open", "ended"] | None = None,
        limit: Limit = 50,
        cursor: str | None = None,
    ) -> Fields:
        """Sessions, newest first."""
        found = await self.memory.list_sessions(user_id, session_state=session_state, limit=limit, cursor=cursor)
        return passed_on(found)

    @action
    async def end_session(self, session_id: Id, summary: Annotated[str, Span(0, 4096)] | None = None) -> Fields:
        """End a session; nothing is added to it any more until it is resumed."""
        async with self.lock("session", session_id):
            reply = await self.memory.end_session(session_id, summary=summary, request_id=self.key("end"))
        return passed_on(reply)

    @action
    async def resume_session(self, session_id: Id) -> Fields:
        """Open a session again; its idle time starts anew."""
        async with self.lock("session", session_id):
            reply = await self.memory.resume_session(session_id, request_id=self.key("resume"))
        return passed_on(reply)

    @action
    async def delete_session(self, session_id: Id) -> Fields:
        """Delete a session with all that was said in it, for good."""
        async with self.lock("session", session_id):
            with acting(session_id=None):
                reply = await self.memory.forget(session_id=session_id, request_id=self.key("delete"))
        if not reply["deleted"]:
            raise SessionNotFound(f"no session {session_id} in this namespace", session_id=session_id)
        return passed_on(reply)

    # -- what is said -------------------------------------------------------------------------------------------

    @action
    async def add_interaction(
        self,
        session_id: Id,
        role: Role,
        content: Said,
        speaker: Role | None = None,
        metadata: dict[str, Any] | None = None,
        occurred_at: float | None = None,
        importance: Importance | None = None,
    ) -> Fields:
        """Keep what somebody said."""
        said = Interaction(role, content, speaker, metadata, occurred_at, importance)
        reply = await self._add(session_id, [said], where="")
        (interaction_id,) = reply.pop("memory_ids")
        del reply["count"]
        return {"session_id": session_id, "interaction_id": interaction_id, **passed_on(reply)}

    @action
    async def add_interactions(
        self, session_id: Id, interactions: Annotated[list[Interaction], Span(1, MAX_BATCH_ITEMS)]
    ) -> Fields:
        """Keep several turns in their order: all of them or none."""
        reply = await self._add(session_id, interactions, where="interactions[{index}].")
        return {"session_id": session_id, "interaction_ids": reply.pop("memory_ids"), **passed_on(reply)}

    async def _add(self, session_id: str, said: list[Interaction], where: str) -> Fields:
        memories = [each.memory(self.judge.importance(each.content)) for each in said]
        async with self.lock("session", session_id):
            with acting(session_id=session_id):
                try:
                    await self._check_open(session_id)
                except (SessionEnded, SessionNotFound):
                    earlier = await self.memory.done("interactions")
                    if earlier is None:
                        raise
                    return {**earlier, "replayed": True}
                try:
                    return await self.memory.batch_add_memories(memories, request_id=self.key("interactions"))
                except InvalidField as error:
                    raise _of_the_request(error, where) from None

    async def _check_open(self, session_id: str) -> None:
        session = (await self.memory.get_session(session_id))["session"]
        if session["session_state"] == "ended":
            raise SessionEnded(
                f"session {session_id} has ended; resume_session opens it again",
                session_id=session_id,
                ended_at=session["ended_at"],
            )

    # -- what was said ------------------------------------------------------------------------------------------

    @action
    async def get_context(
        self,
        session_id: Id,
        limit: Limit | None = None,
        token_budget: Annotated[int, Span(1, 1_000_000)] | None = None,
        query: Query | None = None,
        relevant_limit: Annotated[int, Span(1, 100)] = 5,
        cursor: str | None = None,
    ) -> Fields:
        """The newest turns of a session in their order; with a query, older ones that are about it as well."""
        if cursor is not None and (token_budget is not None or query is not None):
            raise InvalidField("cursor", "cursor goes with limit alone: it leads to the turns before those of a page")
        session = (await self.memory.get_session(session_id))["session"]
        if limit is None:
            limit = self.rules.context_limit if token_budget is None else MAX_RESULTS
        newest, more = await self._newest(session_id, limit, token_budget or _NO_BUDGET, cursor)
        relevant = [] if query is None else await self._relevant(session_id, query, relevant_limit)
        chosen = self._choose(newest, relevant, token_budget)
        reply = {
            "session_id": session_id,
            "session": session,
            "results": [{**turn.reply(), "relevant": turn.interaction_id in chosen.relevant} for turn in chosen.turns],
            "count": len(chosen.turns),
            "tokens": chosen.tokens,
            "more": more is not None or len(chosen.turns) - len(chosen.relevant) < len(newest),
        }
        return reply | ({"next_cursor": more} if more is not None and token_budget is None else {})

    @action
    async def search_interactions(
        self,
        query: Query,
        session_id: Id | None = None,
        user_id: Id | None = None,
        limit: Annotated[int, Span(1, 100)] = 10,
        mode: Literal["hybrid", "dense", "keyword"] = "hybrid",
        min_score: Annotated[float, Span(-1, 1)] | None = None,
        include_archived: bool = False,
        touch: bool = True,
        cursor: str | None = None,
    ) -> Fields:
        """What was said about something, in one session or in all of a user's."""
        whose = {name: value for name, value in (("session_id", session_id), ("user_id", user_id)) if value is not None}
        if not whose:
            raise InvalidField("session_id", "name session_id, user_id or both: whose conversations are searched")
        found = await self.memory.semantic_search(
            query,
            limit,
            {"memory_type": INTERACTION, **whose},
            mode=mode,
            min_score=min_score,
            include_archived=include_archived,
            touch=touch,
            cursor=cursor,
        )
        if session_id is not None and not found["results"]:
            await self.memory.get_session(session_id)  # nothing in it, or no such session: that is an error
        scores = ("score", "similarity", "keyword")
        results = [Turn.of(each).reply() | {name: each[name] for name in scores} for each in found["results"]]
        return {**passed_on(found), "results": results}

    async def _newest(
        self, session_id: str, limit: int, budget: int, cursor: str | None
    ) -> tuple[list[Turn], str | None]:
        """The newest turns, newest first: `limit` of them, or as many as have more tokens than `budget`."""
        turns: list[Turn] = []
        while True:
            # By the index of parents, which a filter of list_memories would not use.
            page = await self.memory.get_children(
                session_id, min(_PAGE, limit - len(turns)), include_archived=True, cursor=cursor
            )
            new = [Turn.of(record) for record in page["results"] if record["memory_type"] == INTERACTION]
            turns += new
            if budget < _NO_BUDGET:
                budget -= sum(map(self._cost, new))
            cursor = page.get("next_cursor")
            if cursor is None or len(turns) >= limit or budget < 0:
                return turns, cursor

    async def _relevant(self, session_id: str, query: str, limit: int) -> list[Turn]:
        found = await self.memory.semantic_search(
            query,
            limit,
            {"memory_type": INTERACTION, "session_id": session_id},
            include_archived=True,
            touch=False,
        )
        return [Turn.of(record) for record in found["results"]]

    def _choose(self, newest: list[Turn], relevant: list[Turn], budget: int | None) -> window.Selection:
        if budget is None:
            return window.beside(newest, relevant, self._cost)
        share = self.rules.relevant_share if relevant else 0.0
        return window.select(newest, relevant, budget, share, self._cost)

    def _cost(self, turn: Turn) -> int:
        return self.tokens.count(turn.line)

    # -- conversations of other systems -------------------------------------------------------------------------

    @action
    async def import_sessions(
        self,
        conversations: Annotated[list[Conversation], Span(1, MAX_BATCH_ITEMS)],
        source: Id = "import",
        user_id: Id | None = None,
        dry_run: bool = False,
    ) -> Fields:
        """Take over conversations from another system. What is there already changes nothing."""
        types = self.settings.lifecycle.memory_types
        tier = types[INTERACTION].memory_tier if INTERACTION in types else None
        migration = Migration(self.memory, source, self.rules.idle_timeout_s or None, tier or "short", self.judge)
        async with self.lock("import", source):
            with acting(session_id=None):
                return await migration.run(conversations, user_id, dry_run=dry_run)


def _of_the_request(error: InvalidField, where: str) -> MemorySystemError:
    """The service's error about `memories[3].metadata` as one about the field that the caller sent."""
    index = error.details.get("index", 0)
    sent, own = f"memories[{index}].", where.format(index=index)
    field = str(error.details.get("field", ""))
    return InvalidField(field.replace(sent, own), error.message.replace(sent, own), **({"index": index} if own else {}))


if __name__ == "__main__":
    SessionMemoryAgent.main()

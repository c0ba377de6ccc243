"""Putting conversations of another system into the memory service."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from agents.agent_memory import AgentMemory
from agents.sessions_import import Conversation, Ids, Line, Rules, batches, begins, session_line, times, turn_lines
from agents.utterances import Judge
from memory_system.errors import InvalidField, MemorySystemError

Reply = dict[str, Any]
Place = tuple[int, int | None]  # of a line: which conversation, and which of its turns; None: its session

_SHOWN: Final = 100
_CALL_MS: Final = 30_000.0  # a thousand lines are more than one answer usually waits for
_SAID: Final = ("added", "unchanged", "conflicts")


class Migration:
    """One import: what is to be written, what became of it, and which conversation a line comes from.

    `idle_timeout_s` None: its sessions do not end by themselves. `clock()` in epoch seconds.
    """

    def __init__(
        self,
        memory: AgentMemory,
        source: str,
        idle_timeout_s: float | None,
        memory_tier: str,
        judge: Judge,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._memory = memory
        self._rules = Rules(source, clock(), idle_timeout_s, memory_tier, judge.importance)
        self._counts: Counter[str] = Counter()
        self._conflicts: list[Reply] = []

    async def run(self, conversations: Sequence[Conversation], user_id: str | None, *, dry_run: bool) -> Reply:
        """Raises InvalidField naming the conversation and the turn; what stands before it may be there then."""
        _check(conversations, user_id)
        known = await self._known(conversations)
        lines: list[Line] = []
        places: list[Place] = []
        for index, conversation in enumerate(conversations):
            session_id = self._session_id(conversation)
            whose = conversation.user_id or user_id or ""
            began_s, *made_s = times(conversation, known.get(session_id, begins(conversation, self._rules.now_s)))
            if session_id in known:
                # It may have been resumed or ended since; it is not to be as it was.
                self._counts["sessions_unchanged"] += 1
            else:
                lines.append(session_line(conversation, whose, began_s, self._rules))
                places.append((index, None))
            lines += turn_lines(conversation, whose, made_s, self._rules)
            places += [(index, turn) for turn in range(len(conversation.turns))]
        await self._send(lines, places, conversations, dry_run)
        return self._reply(len(conversations), dry_run)

    def _session_id(self, conversation: Conversation) -> str:
        return Ids.of(self._rules.source, conversation.conversation_id).session

    async def _known(self, conversations: Sequence[Conversation]) -> dict[str, float]:
        """session_id -> when it began, of the conversations that have a session already."""
        ids = [self._session_id(each) for each in conversations]
        known: dict[str, float] = {}
        cursor = None
        while True:
            found = await self._memory.batch_get_memories(ids, touch=False, cursor=cursor)
            known.update((record["memory_id"], record["created_at"]) for record in found["results"])
            cursor = found.get("next_cursor")
            if cursor is None:
                return known

    async def _send(
        self, lines: list[Line], places: list[Place], conversations: Sequence[Conversation], dry_run: bool
    ) -> None:
        done = 0
        for batch in batches(lines):
            try:
                data = {"records": list(batch), "dry_run": dry_run}
                reply = await self._memory.call("import_memories", data, deadline_ms=_CALL_MS)
            except MemorySystemError as error:
                index = error.details.get("index")
                if isinstance(index, int):
                    raise _of_the_request(error, index, places[done + index]) from None
                raise
            self._tally(reply, places[done : done + len(batch)], conversations)
            done += len(batch)

    def _tally(self, reply: Reply, places: list[Place], conversations: Sequence[Conversation]) -> None:
        """The service counts lines of one kind; sessions among them are always new."""
        sessions = sum(turn is None for _, turn in places)
        self._counts["sessions_added"] += sessions
        for what in _SAID:
            self._counts[what] += reply[what].get("memory", 0)
        self._counts["added"] -= sessions
        for each in reply["results"]:
            index, turn = places[each["index"]]
            conversation_id = conversations[index].conversation_id
            self._conflicts.append({"conversation_id": conversation_id, "turn": turn, "fields": each["fields"]})

    def _reply(self, conversations: int, dry_run: bool) -> Reply:
        counts, shown = self._counts, self._conflicts[:_SHOWN]
        return {
            "conversations": conversations,
            "sessions": {"added": counts["sessions_added"], "unchanged": counts["sessions_unchanged"]},
            "interactions": {what: counts[what] for what in _SAID},
            "results": shown,
            "count": len(shown),
            "dry_run": dry_run,
        }


def _check(conversations: Sequence[Conversation], user_id: str | None) -> None:
    """Raises InvalidField for a conversation of nobody, and for one that is there twice."""
    seen: set[str] = set()
    for index, conversation in enumerate(conversations):
        where = f"conversations[{index}]"
        if conversation.user_id is None and user_id is None:
            raise InvalidField(f"{where}.user_id", f"{where}.user_id is required, or user_id for all of them")
        if conversation.conversation_id in seen:
            text = f"{where}.conversation_id: {conversation.conversation_id[:80]!r} is the id of an earlier one too"
            raise InvalidField(f"{where}.conversation_id", text)
        seen.add(conversation.conversation_id)


def _of_the_request(error: MemorySystemError, index: int, place: Place) -> MemorySystemError:
    """The service's error about `records[3].metadata` as one about the field that the caller sent."""
    conversation, turn = place
    sent = f"records[{index}]"
    own = f"conversations[{conversation}]" + ("" if turn is None else f".turns[{turn}]")
    error.message = error.message.replace(sent, own)
    error.details = {"field": str(error.details.get("field", "")).replace(sent, own)}
    return error

"""Conversations of another system as lines that the memory service imports.

Each line has an id that follows from where it comes from: the source, the conversation and the turn's number in it. So
a conversation that is imported again, or goes on where an import was broken off, or has grown since, makes nothing
twice. Pure: the agent does the calls.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from agents.turns import Interaction
from memory_system.fields import Span
from memory_system.protocol import MAX_NAME_CHARS

Line = dict[str, Any]

# Turns without a time of their own, and those that do not come after the turn before, are set this far apart.
TURN_S: Final = 0.001
MAX_LINES: Final = 1000
MAX_BYTES: Final = 4 * 1024 * 1024

_DIGEST_BYTES: Final = 10


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as a caller gives it. `started_at` in epoch seconds; None: that of the first dated turn."""

    conversation_id: Annotated[str, Span(1, 512)]
    turns: Annotated[list[Interaction], Span(1)]
    user_id: Annotated[str, Span(1, MAX_NAME_CHARS)] | None = None
    session_type: Annotated[str, Span(1, MAX_NAME_CHARS)] = "conversation"
    started_at: float | None = None
    summary: Annotated[str, Span(0, 4096)] | None = None
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Ids:
    """The ids of what one conversation of a source becomes: they sort in its order, the session first."""

    prefix: str

    @classmethod
    def of(cls, source: str, conversation_id: str) -> Ids:
        digest = hashlib.blake2b(json.dumps([source, conversation_id]).encode(), digest_size=_DIGEST_BYTES)
        return cls(f"mem-{digest.hexdigest()}")

    @property
    def session(self) -> str:
        return self.turn(-1)

    def turn(self, index: int) -> str:
        """Of the turn with this index, from 0."""
        return f"{self.prefix}{index + 1:08x}"


@dataclass(frozen=True, slots=True)
class Rules:
    """What an import sets itself: who asks, the instant `now_s`, when its sessions end by
    themselves, and the tier that its turns begin in."""

    source: str
    now_s: float
    idle_timeout_s: float | None
    memory_tier: str
    importance: Callable[[str], float]


def begins(conversation: Conversation, now_s: float) -> float:
    """When a conversation began, as far as it tells; else now."""
    if conversation.started_at is not None:
        return conversation.started_at
    dated = (turn.occurred_at for turn in conversation.turns if turn.occurred_at is not None)
    return next(dated, now_s)


def times(conversation: Conversation, began_s: float) -> list[float]:
    """When the session and each of its turns were made: rising, and the same when the conversation has grown."""
    made = [began_s]
    for turn in conversation.turns:
        after_s = made[-1] + TURN_S
        made.append(after_s if turn.occurred_at is None else max(turn.occurred_at, after_s))
    return made


def session_line(conversation: Conversation, user_id: str, made_s: float, rules: Rules) -> Line:
    session_id = Ids.of(rules.source, conversation.conversation_id).session
    return {
        **_line(session_id, made_s, rules),
        "content": f"{conversation.session_type} session of {user_id}",
        "memory_type": "session",
        "memory_tier": "long",
        "importance": 1.0,
        "session_id": session_id,
        "user_id": user_id,
        "metadata": {
            **(conversation.metadata or {}),
            "imported": {"source": rules.source, "conversation_id": conversation.conversation_id},
        },
        "session": {
            "session_type": conversation.session_type,
            "summary": conversation.summary,
            "idle_timeout_s": rules.idle_timeout_s,
        },
    }


def turn_lines(conversation: Conversation, user_id: str, made_s: Sequence[float], rules: Rules) -> Iterator[Line]:
    """The lines of the turns; `made_s` has the time of each."""
    ids = Ids.of(rules.source, conversation.conversation_id)
    for index, (turn, at_s) in enumerate(zip(conversation.turns, made_s, strict=True)):
        yield {
            **_line(ids.turn(index), at_s, rules),
            **turn.memory(rules.importance(turn.content)),
            "memory_tier": rules.memory_tier,
            "parent_id": ids.session,
            "session_id": ids.session,
            "user_id": user_id,
        }


def _line(memory_id: str, made_s: float, rules: Rules) -> Line:
    """Old as it is, it begins to fade only now."""
    return {
        "kind": "memory",
        "memory_id": memory_id,
        "created_at": made_s,
        "updated_at": rules.now_s,
        "importance_at": rules.now_s,
        "tier_since": rules.now_s,
        "created_by": rules.source,
    }


def batches(lines: Sequence[Line]) -> Iterator[Sequence[Line]]:
    """Lines in requests of a size that the service takes, in their order."""
    start, size = 0, 0
    for end, line in enumerate(lines):
        line_size = len(json.dumps(line, ensure_ascii=False).encode())
        if end > start and (size + line_size > MAX_BYTES or end - start == MAX_LINES):
            yield lines[start:end]
            start, size = end, 0
        size += line_size
    if lines:
        yield lines[start:]

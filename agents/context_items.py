"""What a context is made of: a question, the memories that may answer it, and how they are written out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from functools import lru_cache
from typing import Any, Final, Literal

from agents.phrases import words_of
from agents.token_counts import TokenCounter
from agents.turns import Turn

PINNED: Final = "Always keep in mind:"
# Not strftime: the same in any locale.
_MONTHS: Final = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

# The same turns are candidates with every question.
_CACHED: Final = 20_000
_CACHED_CHARS: Final = 1_000

Scope = Literal["user", "session"]
Method = Literal["full", "hybrid", "dense"]


@dataclass(frozen=True, slots=True)
class Question:
    """Which context is wanted; two that are equal have the same one. Budget in tokens."""

    query: str | None
    user_id: str | None
    session_id: str | None
    scope: Scope
    speaker: str | None
    token_budget: int
    max_items: int
    method: Method


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """A memory as a context may have it; each is equal to itself alone.

    Times are epoch seconds; `words` in small letters; `tokens` of its line.
    """

    memory_id: str
    memory_type: str
    parent_id: str | None
    session_id: str | None
    user_id: str | None
    speaker: str | None
    role: str
    text: str
    said_at: float
    importance: float
    expires_at: float | None
    day: str
    line: str
    tokens: int
    words: tuple[str, ...] = field(repr=False)
    metadata: Mapping[str, Any] = field(repr=False)
    pinned: bool = False

    @property
    def heading(self) -> str:
        """What stands above its line in a text."""
        return PINNED if self.pinned else self.day


@dataclass(frozen=True, slots=True)
class Writer:
    """Makes items of records: counts their tokens, and knows on which day something was said."""

    tokens: TokenCounter
    zone: tzinfo

    def item(self, record: Mapping[str, Any], *, pinned: bool = False) -> Item:
        turn = Turn.of(record)
        day = day_of(turn.said_at, self.zone)
        line = f"{turn.line} ({day})" if pinned else turn.line
        return Item(
            memory_id=record["memory_id"],
            memory_type=record["memory_type"],
            parent_id=record["parent_id"],
            session_id=turn.session_id,
            user_id=turn.user_id,
            speaker=turn.speaker,
            role=turn.role,
            text=turn.text,
            said_at=turn.said_at,
            importance=turn.importance,
            expires_at=record["expires_at"],
            day=day,
            line=line,
            tokens=self.cost(line),
            words=_small_words(turn.text) if len(turn.text) <= _CACHED_CHARS else _small_words.__wrapped__(turn.text),
            metadata=turn.metadata if turn.speaker or turn.role else record["metadata"],
            pinned=pinned,
        )

    def cost(self, line: str) -> int:
        """Tokens of a line of a text, with what ends it."""
        return self.tokens.count(f"{line}\n")

    def heading_cost(self, heading: str) -> int:
        """Tokens of a heading, with the empty line before it."""
        return self.tokens.count(f"\n{heading}\n")


@lru_cache(_CACHED)
def _small_words(text: str) -> tuple[str, ...]:
    return tuple(word.lower() for word in words_of(text))


def day_of(at_s: float, zone: tzinfo) -> str:
    """`8 May 2023`."""
    day = datetime.fromtimestamp(at_s, zone)
    return f"{day.day} {_MONTHS[day.month - 1]} {day.year}"


def in_order(items: list[Item]) -> list[Item]:
    """Pinned ones first, in the order given, then the others in the order in which they were said."""
    told = sorted((item for item in items if not item.pinned), key=lambda item: (item.said_at, item.memory_id))
    return [item for item in items if item.pinned] + told


def text_of(items: list[Item]) -> str:
    """The items as a text for a prompt: those pinned, then day by day what was said, and by whom."""
    lines: list[str] = []
    heading = ""
    for item in in_order(items):
        if item.heading != heading:
            heading = item.heading
            lines += ["", heading] if lines else [heading]
        lines.append(item.line)
    return "\n".join(lines)

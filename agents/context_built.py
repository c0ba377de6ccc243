"""A context that is built: what was chosen for a question, and how it is told."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from agents.context_choice import Budget, Choice, Scored, choose, score
from agents.context_items import Question, Writer, text_of
from agents.context_sources import Sources
from memory_system.agent_settings import ContextManagerSettings

_RECORD_BYTES: Final = 500  # of a memory in a cache, besides its texts


@dataclass(frozen=True)
class Built:
    """The memories of a context, best first."""

    question: Question
    choice: Choice
    considered: int
    pending: int
    degraded: bool
    ends_s: float  # epoch seconds at which the first of its candidates expires

    @property
    def chosen(self) -> tuple[Scored, ...]:
        return self.choice.chosen

    @cached_property
    def text(self) -> str:
        return text_of([each.item for each in self.chosen])

    @property
    def memory_ids(self) -> list[str]:
        """In the order in which they are chosen."""
        return [each.item.memory_id for each in self.chosen]

    @property
    def size(self) -> int:
        """About how many bytes it takes to keep."""
        return sum(_RECORD_BYTES + 4 * len(each.item.text) for each in self.chosen)

    def lasts_s(self, now_s: float) -> float:
        """How long it stays as it is if nothing is changed; `now_s`: epoch seconds."""
        return 0.0 if self.pending or self.degraded else max(0.0, self.ends_s - now_s)

    def results(self, *, explain: bool) -> list[dict[str, Any]]:
        """The memories as callers see them."""
        return [_told(each, explain) for each in self.chosen]

    def figures(self) -> dict[str, Any]:
        return {
            "tokens": self.choice.tokens,
            "token_budget": self.question.token_budget,
            "considered": self.considered,
            "left_out": dict(self.choice.left_out),
            "pending": self.pending,
            "degraded": self.degraded,
        }


class Builder:
    """Builds contexts: finds the candidates and chooses among them."""

    def __init__(self, sources: Sources, writer: Writer, rules: ContextManagerSettings) -> None:
        self._sources = sources
        self._writer = writer
        self._rules = rules

    async def build(self, question: Question) -> Built:
        found = await self._sources.find(question)
        plain = question.method != "full"
        scored = score(found.items, self._rules, time.time(), question.query, plain=plain)
        budget = Budget(question.token_budget, self._writer.heading_cost)
        diversity, brevity = (0.0, 0.0) if plain else (self._rules.diversity, self._rules.brevity)
        choice = choose(scored, budget, question.max_items, diversity, brevity=brevity, repeats=plain)
        ends = (item.expires_at for item, _ in found.items if item.expires_at is not None)
        return Built(question, choice, len(found.items), found.pending, found.degraded, min(ends, default=math.inf))


def _told(each: Scored, explain: bool) -> dict[str, Any]:
    item = each.item
    told = {
        "memory_id": item.memory_id,
        "memory_type": item.memory_type,
        "speaker": item.speaker,
        "role": item.role or None,
        "text": item.text,
        "said_at": item.said_at,
        "session_id": item.session_id,
        "user_id": item.user_id,
        "metadata": dict(item.metadata),
        "importance": item.importance,
        "tokens": item.tokens,
        "pinned": item.pinned,
        "score": round(each.score, 6),
        "reason": each.reason,
    }
    return {**told, "explain": {name: round(part, 6) for name, part in each.parts.items()}} if explain else told

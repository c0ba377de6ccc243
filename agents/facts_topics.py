"""The topics: what the facts say they are about, gathered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from agents.agent_memory import caller
from agents.facts import Fact, current, facts, on_topic
from agents.facts_store import FactStore
from agents.facts_text import normal, text_key
from memory_system.errors import MemoryNotFound

_TABLES: Final = 32  # namespaces whose table is kept


@dataclass(slots=True)
class Row:
    topic: str
    facts: int
    updated_at: float


class Topics:
    """Facts name their topic, and nothing else keeps a list of them: so the two cannot differ. The table of a namespace
    is made by a walk over its facts, and made again when the namespace has changed."""

    def __init__(self, store: FactStore) -> None:
        self.store = store
        self._tables: OrderedDict[str, tuple[int, dict[str, Row]]] = OrderedDict()

    async def page(self, prefix: str | None, limit: int, cursor: str | None) -> dict[str, Any]:
        """Topics in the order of their normal forms; the cursor is the last of them, so that a walk ends."""
        wanted, after = normal(prefix or ""), cursor or ""
        table = await self._table()
        keys = [key for key in sorted(table) if key.startswith(wanted)]
        following = [key for key in keys if key > after]
        shown = following[:limit]
        rows = [
            {"topic": row.topic, "facts": row.facts, "updated_at": row.updated_at}
            for row in map(table.get, shown)
            if row
        ]
        reply = {"results": rows, "count": len(rows), "total": len(keys)}
        return reply | {"next_cursor": shown[-1]} if len(following) > limit else reply

    async def merge(self, source: str, target: str) -> dict[str, Any]:
        """Raises MemoryNotFound when nothing is or was under `source`."""
        store, old, new = self.store, normal(source), normal(target)
        moving = await store.all(facts() | on_topic(source))
        there = await store.all(facts() | on_topic(target))
        if old == new:
            moving = [fact for fact in moving if fact.topic != target]
        elif not moving and not any(old in fact.former_topics for fact in there):
            raise MemoryNotFound(f"there is no fact on {source!r}", topic=source)
        await store.each(store.move(fact, target) for fact in moving)
        twice = [] if old == new else _twice(moving, there, target)
        for fact, stays in twice:
            await store.supersede(stays, [fact.fact_id])
        left = sum(fact.superseded_by is None for fact in await store.all(current() | on_topic(target)))
        return {"topic": target, "moved": len(moving), "duplicates": len(twice), "facts": left}

    async def _table(self) -> dict[str, Row]:
        name = caller().namespace
        seq = (await self.store.memory.get_commit_seq())["commit_seq"]
        kept = self._tables.get(name)
        if kept is None or kept[0] != seq:
            found, seq = await self.store.walk(current())
            kept = self._tables[name] = (seq, _gathered(found))
            while len(self._tables) > _TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(name)
        return kept[1]


def _gathered(found: Iterable[Fact]) -> dict[str, Row]:
    """Normal form -> row; found has the newest first, whose way of writing the topic counts."""
    table: dict[str, Row] = {}
    for fact in found:
        row = table.setdefault(normal(fact.topic), Row(fact.topic, 0, 0.0))
        row.facts += 1
        row.updated_at = max(row.updated_at, fact.updated_at)
    table.pop("", None)
    return table


def _twice(moving: list[Fact], there: list[Fact], target: str) -> list[tuple[Fact, Fact]]:
    """Those moved that the target has already, each with the fact that stays."""
    known = {text_key(target, fact.content): fact for fact in there if fact.superseded_by is None}
    same = [(fact, known.get(text_key(target, fact.content))) for fact in moving if fact.superseded_by is None]
    return [(fact, stays) for fact, stays in same if stays is not None]

"""The reading side: every SELECT that answers a request. All of them name the namespace and leave out the expired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from memory_system.errors import InvalidCursor
from memory_system.filters import Filter
from memory_system.lifecycle import SESSION_TYPE
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.models import Memory
from memory_system.storage import rows, sessions
from memory_system.storage.filter_sql import compile_filter, importance_sql
from memory_system.storage.readers import Readers

_M: Final = rows.columns("m")
_ALIVE: Final = "(m.expires_at IS NULL OR m.expires_at > ?)"


class Page(Struct, frozen=True, kw_only=True):
    """What a list asks for. `after` is the key of the last item of the page before."""

    sort_field: str
    sort_order: str
    limit: int
    as_of: float
    after: list[Any] | None = None


class Listing(Struct, frozen=True, kw_only=True):
    """Which memories a list is about."""

    namespace: str
    now_s: float
    filter: Filter
    parent_id: str | None = None
    include_archived: bool = False
    include_sessions: bool = False


class Queries:
    """Read operations over the pool. Rows come back as records of the models, or as plain dicts where noted."""

    def __init__(self, readers: Readers, lifecycle: LifecycleSettings) -> None:
        self._readers = readers
        self._lifecycle = lifecycle

    async def memory(self, namespace: str, memory_id: str) -> Memory | None:
        """The stored memory, expired or not."""
        found = await self._readers.fetch(
            f"SELECT {rows.COLUMNS} FROM memories WHERE namespace = ? AND memory_id = ?", (namespace, memory_id)
        )
        return rows.memory_from_row(found[0]) if found else None

    async def memories(self, namespace: str, memory_ids: Sequence[str]) -> dict[str, Memory]:
        found = await self._readers.fetch(
            f"SELECT {rows.COLUMNS} FROM memories WHERE namespace = ? "
            "AND memory_id IN (SELECT value FROM json_each(?))",
            (namespace, rows.to_json(list(memory_ids))),
        )
        return {memory.memory_id: memory for memory in map(rows.memory_from_row, found)}

    async def by_row_ids(self, namespace: str, row_ids: Sequence[int]) -> dict[int, Memory]:
        # CROSS JOIN: each row by its id, where the planner might rather walk the namespace.
        found = await self._readers.fetch(
            f"SELECT {_M} FROM json_each(?) AS wanted CROSS JOIN memories AS m ON m.row_id = wanted.value "
            "WHERE m.namespace = ?",
            (rows.to_json(list(row_ids)), namespace),
        )
        return {memory.row_id: memory for memory in map(rows.memory_from_row, found)}

    async def listing(self, listing: Listing, page: Page) -> list[tuple[Memory, list[Any]]]:
        """Up to `limit` memories in order, each with the key that a cursor after it carries."""
        where, parameters = self._conditions(listing, page.as_of)
        expression, sort_parameters = self._sort_expression(page)
        descending = page.sort_order == "desc"
        if page.after is not None:
            comparison = "<" if descending else ">"
            where.append(f"({expression}, m.row_id) {comparison} (?, ?)")
            parameters += [*sort_parameters, *_checked_key(page)]
        direction = "DESC" if descending else "ASC"
        found = await self._readers.fetch(
            f"SELECT {_M}, {expression} FROM memories m WHERE {' AND '.join(where)} "
            f"ORDER BY {len(rows.FIELDS) + 1} {direction}, m.row_id {direction} LIMIT ?",
            [*sort_parameters, *parameters, page.limit],
        )
        return [(memory, [row[-1], memory.row_id]) for row in found for memory in [rows.memory_from_row(row[:-1])]]

    def _conditions(self, listing: Listing, as_of: float) -> tuple[list[str], list[Any]]:
        where, parameters = ["m.namespace = ?", _ALIVE], [listing.namespace, listing.now_s]
        if listing.parent_id is not None:
            where.append("m.parent_id = ?")
            parameters.append(listing.parent_id)
        if not listing.include_archived:
            where.append("m.state = 'active'")
        if not listing.include_sessions:
            where.append(f"m.memory_type <> '{SESSION_TYPE}'")
        fragment, filter_parameters = compile_filter(listing.filter, now_s=as_of, lifecycle=self._lifecycle)
        where.append(fragment)
        return where, [*parameters, *filter_parameters]

    def _sort_expression(self, page: Page) -> tuple[str, list[Any]]:
        if page.sort_field == "importance":
            return importance_sql(self._lifecycle), [page.as_of]
        return _SORT_EXPRESSIONS.get(page.sort_field, f"m.{page.sort_field}"), []

    async def related(
        self, memory: Memory, now_s: float, relationship_type: str | None, direction: str, limit: int, offset: int
    ) -> list[tuple[Memory, dict[str, Any]]]:
        """Up to limit + 1 related memories, strongest first, each with its relationship_type, strength, direction."""
        found = await self._readers.fetch(
            f"SELECT {_M}, r.relationship_type, r.strength, r.direction FROM ({_RELATED[direction]}) r "
            "JOIN memories m ON m.row_id = r.row_id "
            "WHERE m.namespace = ?2 AND (m.expires_at IS NULL OR m.expires_at > ?3) "
            "AND (?4 IS NULL OR r.relationship_type = ?4) "
            "ORDER BY r.strength DESC, m.row_id, r.relationship_type, r.direction LIMIT ?5 OFFSET ?6",
            (memory.row_id, memory.namespace, now_s, relationship_type, limit + 1, offset),
        )
        names = ("relationship_type", "strength", "direction")
        return [(rows.memory_from_row(row[:-3]), dict(zip(names, row[-3:], strict=True))) for row in found]

    async def group_members(
        self, namespace: str, group_id: int, now_s: float, include_archived: bool, limit: int, offset: int
    ) -> list[Memory] | None:
        """Up to limit + 1 members in the order they were added; None when there is no such group."""
        if not await self._readers.fetch(
            "SELECT 1 FROM context_groups WHERE group_id = ? AND namespace = ?", (group_id, namespace)
        ):
            return None
        found = await self._readers.fetch(
            f"SELECT {_M} FROM group_members g JOIN memories m ON m.row_id = g.row_id "
            f"WHERE g.group_id = ? AND m.namespace = ? AND {_ALIVE} AND (? OR m.state = 'active') "
            "ORDER BY g.added_at, m.row_id LIMIT ? OFFSET ?",
            (group_id, namespace, now_s, include_archived, limit + 1, offset),
        )
        return [rows.memory_from_row(row) for row in found]

    async def groups(self, namespace: str, now_s: float, after: int, limit: int) -> list[dict[str, Any]]:
        """Up to limit + 1 groups with a higher id than `after`."""
        found = await self._readers.fetch(
            "SELECT g.group_id, g.name, g.description, g.created_at, "
            "(SELECT count(*) FROM group_members gm JOIN memories m ON m.row_id = gm.row_id "
            f"WHERE gm.group_id = g.group_id AND m.state = 'active' AND {_ALIVE}) FROM context_groups g "
            "WHERE g.namespace = ? AND g.group_id > ? ORDER BY g.group_id LIMIT ?",
            (now_s, namespace, after, limit + 1),
        )
        names = ("group_id", "name", "description", "created_at", "members")
        return [dict(zip(names, row, strict=True)) for row in found]

    async def session(self, namespace: str, session_id: str, now_s: float) -> dict[str, Any] | None:
        found = await self._readers.fetch(
            f"{sessions.SELECT} WHERE m.namespace = ? AND m.memory_id = ? AND {_ALIVE}", (namespace, session_id, now_s)
        )
        return sessions.session_from_row(found[0], now_s) if found else None

    async def sessions(
        self, namespace: str, now_s: float, user_id: str | None, state: str | None, limit: int, offset: int
    ) -> list[dict[str, Any]]:
        """Up to limit + 1 sessions, newest first."""
        found = await self._readers.fetch(
            f"{sessions.SELECT} WHERE m.namespace = ?1 AND m.memory_type = '{SESSION_TYPE}' "
            "AND (m.expires_at IS NULL OR m.expires_at > ?2) "
            f"AND (?3 IS NULL OR m.user_id = ?3) AND (?4 IS NULL OR {sessions.is_open_sql('?2')} = (?4 = 'open')) "
            "ORDER BY m.created_at DESC, m.row_id DESC LIMIT ?5 OFFSET ?6",
            (namespace, now_s, user_id, state, limit + 1, offset),
        )
        return [sessions.session_from_row(row, now_s) for row in found]

    async def history(self, memory: Memory, below_version: int, limit: int) -> list[dict[str, Any]]:
        """Up to limit + 1 replaced versions below `below_version`, newest first."""
        found = await self._readers.fetch(
            "SELECT record, replaced_at, replaced_by FROM memory_history WHERE row_id = ? AND version < ? "
            "ORDER BY version DESC LIMIT ?",
            (memory.row_id, below_version, limit + 1),
        )
        return [
            {**msgspec.json.decode(record), "replaced_at": replaced_at, "replaced_by": replaced_by}
            for record, replaced_at, replaced_by in found
        ]

    async def stored_reply(self, namespace: str, caller: str, request_id: str) -> tuple[dict[str, Any], float] | None:
        """The reply that was stored for a request, and when."""
        found = await self._readers.fetch(
            "SELECT reply, created_at FROM idempotency WHERE namespace = ? AND caller = ? AND request_id = ?",
            (namespace, caller, request_id),
        )
        return (msgspec.json.decode(found[0][0]), found[0][1]) if found else None

    async def last_log_seq(self) -> int:
        """Up to where the log of changes goes; 0 while it is empty."""
        return int((await self._readers.fetch("SELECT coalesce(max(seq), 0) FROM index_log"))[0][0])

    async def pending(self, namespace: str, model_id: str | None) -> int:
        """How many memories have no vector of the model; counted, which takes time in a large store."""
        found = await self._readers.fetch(
            "SELECT count(*) FROM memories m LEFT JOIN embeddings e ON e.row_id = m.row_id AND e.model_id = ? "
            "AND e.digest = m.content_digest "
            f"WHERE m.namespace = ? AND m.memory_type <> '{SESSION_TYPE}' AND e.row_id IS NULL",
            (model_id, namespace),
        )
        return int(found[0][0])

    async def counts(self, namespace: str, now_s: float) -> dict[str, Any]:
        """What `stats` says of the namespace's stored memories."""
        found = await self._readers.fetch(
            f"SELECT memory_type, memory_tier, state, count(*) FROM memories m WHERE m.namespace = ? AND {_ALIVE} "
            "GROUP BY memory_type, memory_tier, state",
            (namespace, now_s),
        )
        kept = [row for row in found if row[0] != SESSION_TYPE]
        relationships, groups = (
            await self._readers.fetch(
                "SELECT (SELECT count(*) FROM relationships r JOIN memories m ON m.row_id = r.source_row_id "
                "JOIN memories t ON t.row_id = r.target_row_id WHERE m.namespace = ?1 "
                "AND (m.expires_at IS NULL OR m.expires_at > ?2) AND (t.expires_at IS NULL OR t.expires_at > ?2)), "
                "(SELECT count(*) FROM context_groups WHERE namespace = ?1)",
                (namespace, now_s),
            )
        )[0]
        return {
            "memories": sum(row[3] for row in kept),
            "sessions": sum(row[3] for row in found if row[0] == SESSION_TYPE),
            "relationships": relationships,
            "context_groups": groups,
            "by_type": _sum_by(kept, lambda row: row[0]),
            "by_tier": _sum_by(kept, lambda row: row[1]),
            "by_state": _sum_by(kept, lambda row: row[2]),
        }


_SORT_EXPRESSIONS: Final = {
    "occurred_at": "coalesce(m.occurred_at, m.created_at)",
    "last_accessed_at": "coalesce(m.last_accessed_at, 0.0)",
}
_OUTGOING = (
    "SELECT target_row_id AS row_id, relationship_type, strength, 'outgoing' AS direction "
    "FROM relationships WHERE source_row_id = ?1"
)
_INCOMING = (
    "SELECT source_row_id AS row_id, relationship_type, strength, 'incoming' AS direction "
    "FROM relationships WHERE target_row_id = ?1"
)
_RELATED: Final = {
    "outgoing": _OUTGOING,
    "incoming": _INCOMING,
    "both": f"{_OUTGOING} UNION ALL {_INCOMING}",
}


def _sum_by(found: list[tuple[Any, ...]], key: Callable[[tuple[Any, ...]], str]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for row in found:
        sums[key(row)] = sums.get(key(row), 0) + row[3]
    return sums


def _checked_key(page: Page) -> list[Any]:
    """A cursor comes from outside: only what SQLite can compare is let through."""
    key = page.after or []
    if len(key) == 2 and _is_integer(key[1]):
        value = key[0]
        if isinstance(value, str if page.sort_field == "memory_id" else float) or _is_integer(value):
            return key
    raise InvalidCursor("the cursor is damaged; start again without one")


def _is_integer(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63

"""Reading everything out: one state of the store as lines, page by page.

The lines of a namespace stand in an order in which each names only what came before it, so that they can be put into
another store one after the other. Where a parent stands below its child, the child's line says so and a line of kind
`parent` makes the tie. What has expired is left out: it is gone from every read.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from memory_system.models import Memory
from memory_system.storage import rows, sessions
from memory_system.storage.database import connect_reader

Line = dict[str, Any]
Key = list[Any]
Row = tuple[Any, ...]

# Rows of one query; a page may take several.
_SLICE: Final = 200
_NOT_EXPORTED: Final = frozenset({"row_id", "namespace", "content_digest", "due_at"})
_EXPORTED: Final = tuple(name for name in rows.FIELDS if name not in _NOT_EXPORTED)


class Position(Struct, frozen=True, array_like=True):
    """Where the next page begins: `kind` of line, and the key of the last one that was given, [] for none."""

    namespace: str
    kind: str
    key: Key


@dataclass(frozen=True, slots=True)
class _Part:
    """How lines of a kind are read: `sql` gives the key's columns first, from a key on, in its order."""

    sql: str
    first: tuple[Any, ...]  # lies before every key
    line: Callable[[Dump, Row], Line]


class Dump:
    """One state of the store. Pages may be asked for in any order and again; by one thread at a time.

    `namespaces`: those to read, in this order; None: all. `vectors`: whether lines of memories carry theirs.
    """

    def __init__(self, database: Path, namespaces: Sequence[str] | None, now_s: float, *, vectors: bool) -> None:
        self.as_of_s = now_s
        self._vectors = vectors
        self._lock = threading.Lock()
        self._db = connect_reader(database)
        try:
            self._db.execute("BEGIN")
            # The state is fixed by the first read.
            found = [row[0] for row in self._db.execute("SELECT namespace FROM namespaces ORDER BY namespace")]
        except BaseException:
            self._db.close()
            raise
        self.namespaces = list(found if namespaces is None else namespaces)

    def __repr__(self) -> str:
        return f"Dump({len(self.namespaces)} namespaces as of {self.as_of_s:.0f})"

    def close(self) -> None:
        """Let the state go. What still reads is broken off."""
        self._db.interrupt()
        with self._lock:
            self._db.close()

    def totals(self) -> dict[str, int]:
        """How many lines there are, by kind."""
        with self._lock:
            return {
                kind: sum(self._count(part, namespace) for namespace in self.namespaces)
                for kind, part in _parts(self._vectors).items()
            }

    def page(self, position: Position | None, take: Callable[[Line], bool]) -> Position | None:
        """Hand lines to `take` from a position on (None: the first) until it refuses one; where the next page begins,
        None when there is none. Raises sqlite3.Error, KeyError for a position of another state."""
        with self._lock:
            last = position or Position(self.namespaces[0] if self.namespaces else "", next(iter(_KINDS)), [])
            for at, line in self._lines(last):
                if not take(line):
                    return last
                last = at
        return None

    def _lines(self, start: Position) -> Iterator[tuple[Position, Line]]:
        parts = _parts(self._vectors)
        begun = self.namespaces.index(start.namespace) if self.namespaces else 0
        for namespace in self.namespaces[begun:]:
            kinds = list(_KINDS)
            if namespace == start.namespace:
                kinds = kinds[kinds.index(start.kind) :]
            for kind in kinds:
                part = parts[kind]
                is_start = namespace == start.namespace and kind == start.kind and start.key
                yield from self._of_kind(kind, part, namespace, start.key if is_start else list(part.first))

    def _of_kind(self, kind: str, part: _Part, namespace: str, key: Key) -> Iterator[tuple[Position, Line]]:
        width = len(part.first)
        while True:
            found = self._rows(part, namespace, key, _SLICE)
            for row in found:
                key = list(row[:width])
                yield (
                    Position(namespace, kind, key),
                    {
                        "kind": kind,
                        "namespace": namespace,
                        **part.line(self, row[width:]),
                    },
                )
            if len(found) < _SLICE:
                return

    def _rows(self, part: _Part, namespace: str, key: Sequence[Any], limit: int) -> list[Row]:
        return self._db.execute(part.sql, self._parameters(namespace, key, limit)).fetchall()

    def _count(self, part: _Part, namespace: str) -> int:
        parameters = self._parameters(namespace, part.first, -1)
        return int(self._db.execute(f"SELECT count(*) FROM ({part.sql})", parameters).fetchone()[0])

    def _parameters(self, namespace: str, key: Sequence[Any], limit: int) -> dict[str, Any]:
        names = ("a", "b", "c")
        return {"ns": namespace, "now": self.as_of_s, "limit": limit, **dict(zip(names, key, strict=False))}

    # -- lines --------------------------------------------------------------------------------------------------------

    def group(self, row: Row) -> Line:
        return dict(zip(("group_id", "name", "description", "created_at"), row, strict=True))

    def memory(self, row: Row) -> Line:
        width = len(rows.FIELDS)
        memory = rows.memory_from_row(row[:width])
        has_parent, undone_at, *more = row[width:]
        session, vector = more[: len(sessions.STORED)], more[len(sessions.STORED) :]
        line = _memory_fields(memory)
        if not has_parent:
            line["parent_id"] = None
        elif memory.parent_id is not None and memory.parent_id > memory.memory_id:
            line["parent_follows"] = True
        if undone_at is not None:
            line["undone_at"] = undone_at
        if session[0] is not None:
            line["session"] = dict(zip(sessions.STORED, session, strict=True))
        if vector and vector[0] is not None:
            line["vector"] = {"model_id": vector[0], "data": base64.b64encode(vector[1]).decode()}
        return line

    def parent(self, row: Row) -> Line:
        return dict(zip(("memory_id", "parent_id"), row, strict=True))

    def history(self, row: Row) -> Line:
        memory_id, version, record, replaced_at, replaced_by = row
        return {
            "memory_id": memory_id,
            "version": version,
            "record": msgspec.json.decode(record),
            "replaced_at": replaced_at,
            "replaced_by": replaced_by,
        }

    def relationship(self, row: Row) -> Line:
        names = ("source_id", "target_id", "relationship_type", "strength", "created_at")
        return dict(zip(names, row, strict=True))

    def member(self, row: Row) -> Line:
        return dict(zip(("group", "memory_id", "added_at"), row, strict=True))

    def consolidation(self, row: Row) -> Line:
        row_id, memory_id, kind, summariser, pieces, created_at = row
        members = self._db.execute(_MEMBERS_OF, {"row": row_id, "now": self.as_of_s}).fetchall()
        return {
            "memory_id": memory_id,
            "consolidation_kind": kind,
            "summariser": summariser,
            "created_at": created_at,
            "pieces": _named_pieces(pieces, {member_row: member_id for member_row, member_id, _ in members}),
            "members": [{"memory_id": name, "before": msgspec.json.decode(before)} for _, name, before in members],
        }


def _memory_fields(memory: Memory) -> Line:
    return {name: getattr(memory, name) for name in _EXPORTED}


def _named_pieces(pieces: str | None, names: dict[int, str]) -> list[list[str]] | None:
    """With memory ids for row ids; None when one of the memories is not exported."""
    if pieces is None:
        return None
    opened = msgspec.json.decode(pieces)
    if any(row_id not in names for row_id, _ in opened):
        return None
    return [[names[row_id], text] for row_id, text in opened]


# -- queries ----------------------------------------------------------------------------------------------------------

_ALIVE: Final = "({0}.expires_at IS NULL OR {0}.expires_at > :now)"
_M: Final = _ALIVE.format("m")
_MEMBERS_OF: Final = (
    "SELECT c.member_row_id, m.memory_id, c.before FROM consolidation_members c JOIN memories m "
    f"ON m.row_id = c.member_row_id WHERE c.row_id = :row AND {_M} ORDER BY m.memory_id"
)
# CROSS JOIN keeps the order of the tables: from a memory to what hangs on it, never the other way round. CASE makes of
# a key a bound that the index of the inner table can be searched by: a page of what hangs on one memory, however much
# that is, begins where the one before ended.
_GROUPS: Final = (
    "SELECT group_id, group_id, name, description, created_at FROM context_groups "
    "WHERE namespace = :ns AND group_id > :a ORDER BY group_id LIMIT :limit"
)
_PARENTS: Final = (
    "SELECT m.memory_id, m.memory_id, m.parent_id FROM memories m CROSS JOIN memories p "
    "ON p.namespace = m.namespace AND p.memory_id = m.parent_id "
    "WHERE m.namespace = :ns AND m.memory_id > :a AND m.parent_id > m.memory_id "
    f"AND {_M} AND {_ALIVE.format('p')} ORDER BY m.memory_id LIMIT :limit"
)
_HISTORY: Final = (
    "SELECT m.memory_id, h.version, m.memory_id, h.version, h.record, h.replaced_at, h.replaced_by "
    "FROM memories m CROSS JOIN memory_history h ON h.row_id = m.row_id "
    f"WHERE m.namespace = :ns AND m.memory_id >= :a AND h.version > CASE m.memory_id WHEN :a THEN :b ELSE 0 END "
    f"AND {_M} ORDER BY m.memory_id, h.version LIMIT :limit"
)
_RELATIONSHIPS: Final = (
    "SELECT m.memory_id, r.target_row_id, r.relationship_type, "
    "m.memory_id, t.memory_id, r.relationship_type, r.strength, r.created_at "
    "FROM memories m CROSS JOIN relationships r ON r.source_row_id = m.row_id "
    "CROSS JOIN memories t ON t.row_id = r.target_row_id WHERE m.namespace = :ns AND m.memory_id >= :a "
    "AND r.target_row_id >= CASE m.memory_id WHEN :a THEN :b ELSE 0 END "
    "AND (m.memory_id > :a OR r.target_row_id > :b OR r.relationship_type > :c) "
    f"AND {_M} AND {_ALIVE.format('t')} ORDER BY m.memory_id, r.target_row_id, r.relationship_type LIMIT :limit"
)
_MEMBERS: Final = (
    "SELECT g.name, gm.row_id, g.name, m.memory_id, gm.added_at FROM context_groups g "
    "CROSS JOIN group_members gm ON gm.group_id = g.group_id CROSS JOIN memories m ON m.row_id = gm.row_id "
    f"WHERE g.namespace = :ns AND g.name >= :a AND gm.row_id > CASE g.name WHEN :a THEN :b ELSE 0 END AND {_M} "
    "ORDER BY g.name, gm.row_id LIMIT :limit"
)
_CONSOLIDATIONS: Final = (
    "SELECT m.memory_id, m.row_id, m.memory_id, c.kind, c.summariser, c.pieces, c.created_at "
    "FROM memories m CROSS JOIN consolidations c ON c.row_id = m.row_id "
    f"WHERE m.namespace = :ns AND m.memory_id > :a AND {_M} ORDER BY m.memory_id LIMIT :limit"
)


def _memories(vectors: bool) -> str:
    vector, join = ("", "")
    if vectors:
        vector = ", e.model_id, e.vector"
        join = "LEFT JOIN embeddings e ON e.row_id = m.row_id AND e.digest = m.content_digest "
    return (
        f"SELECT m.memory_id, {rows.columns('m')}, EXISTS (SELECT 1 FROM memories p WHERE p.namespace = m.namespace "
        f"AND p.memory_id = m.parent_id AND {_ALIVE.format('p')}), "
        f"u.undone_at, {', '.join(f's.{name}' for name in sessions.STORED)}{vector} "
        "FROM memories m LEFT JOIN sessions s ON s.row_id = m.row_id "
        f"LEFT JOIN consolidations_undone u ON u.row_id = m.row_id {join}"
        f"WHERE m.namespace = :ns AND m.memory_id > :a AND {_M} ORDER BY m.memory_id LIMIT :limit"
    )


def _parts(vectors: bool) -> dict[str, _Part]:
    return _KINDS if not vectors else {**_KINDS, "memory": _Part(_memories(True), ("",), Dump.memory)}


_KINDS: Final[dict[str, _Part]] = {
    "group": _Part(_GROUPS, (-(2**63),), Dump.group),
    "memory": _Part(_memories(False), ("",), Dump.memory),
    "parent": _Part(_PARENTS, ("",), Dump.parent),
    "history": _Part(_HISTORY, ("", 0), Dump.history),
    "relationship": _Part(_RELATIONSHIPS, ("", 0, ""), Dump.relationship),
    "member": _Part(_MEMBERS, ("", 0), Dump.member),
    "consolidation": _Part(_CONSOLIDATIONS, ("",), Dump.consolidation),
}

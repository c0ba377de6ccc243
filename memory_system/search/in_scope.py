"""What the database has of rows that a search found, of those that are in its scope now."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any, Final

from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.models import Memory
from memory_system.search.query import Hit
from memory_system.search.scope import Scope
from memory_system.storage import rows

Records = dict[int, Memory]
_MEMORY: Final = rows.columns("m")


def records(conn: sqlite3.Connection, settings: LifecycleSettings, scope: Scope, hits: Sequence[Hit]) -> Records:
    """The memories of these hits, by row_id."""
    found = _read(conn, settings, scope, _MEMORY, [hit.row_id for hit in hits]) if hits else []
    return {record.row_id: record for record in map(rows.memory_from_row, found)}


def digests(
    conn: sqlite3.Connection, settings: LifecycleSettings, scope: Scope, row_ids: Sequence[int]
) -> dict[int, bytes]:
    """The content digests of these rows."""
    return dict(_read(conn, settings, scope, "m.row_id, m.content_digest", row_ids))


def _read(
    conn: sqlite3.Connection, settings: LifecycleSettings, scope: Scope, columns: str, row_ids: Sequence[int]
) -> list[Any]:
    where, params = scope.where(settings)
    # CROSS JOIN: each row by its id, where the planner might rather walk the whole namespace.
    sql = f"SELECT {columns} FROM json_each(?) AS wanted CROSS JOIN memories AS m ON m.row_id = wanted.value"
    return conn.execute(f"{sql} WHERE {where}", [json.dumps(list(row_ids)), *params]).fetchall()

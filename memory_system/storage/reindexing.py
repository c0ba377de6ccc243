"""Making the full-text index anew, in slices, while memories are read and written.

While it lasts, the index holds the memories from `lowest` on, and the triggers that keep it follow these alone: so no
memory is taken out that is not in. It goes down from the newest memory, and what is written meanwhile is newer still
and found at once; older memories are found by their words again when the index comes to them. How far it came stands
in `meta`, in the transaction of each slice: what was cut off goes on where it was.
"""

from __future__ import annotations

from typing import Final

import msgspec

from memory_system.storage import rows
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.readers import Readers

KEY: Final = "full_text_rebuild"
_TRIGGERS: Final = ("memories_fts_insert", "memories_fts_delete", "memories_fts_update")
_GUARD: Final = f"WHEN {{row}}.row_id >= (SELECT json_extract(value, '$.lowest') FROM meta WHERE key = '{KEY}') AND "


class Rebuild(msgspec.Struct, frozen=True):
    """How far it came, and the triggers as they were and are to be again (name -> SQL)."""

    lowest: int
    triggers: dict[str, str]


def begin(context: WriteContext) -> Reply:
    """Empty the index, unless a rebuild is under way: that goes on. Returns `lowest`."""
    rebuild = _read(context)
    if rebuild is None:
        found = dict(context.db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"))
        triggers = {name: found[name] for name in _TRIGGERS}
        newest = context.db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'memories'").fetchone()
        rebuild = Rebuild((newest[0] if newest else 0) + 1, triggers)
        context.db.execute("INSERT INTO memory_fts (memory_fts) VALUES ('delete-all')")
        _write(context, rebuild)
        for name, sql in triggers.items():
            row = "new" if name == "memories_fts_insert" else "old"
            context.db.execute(f"DROP TRIGGER {name}")
            context.db.execute(sql.replace("WHEN ", _GUARD.format(row=row), 1))
    return {"lowest": rebuild.lowest}


def add_slice(context: WriteContext, limit: int, max_chars: int) -> Reply:
    """Take the next memories in: at most `limit`, and no more after `max_chars` of text. Returns `added`, 0 at the end.

    The last slice leaves everything as it was before `begin`, with a whole index.
    """
    rebuild = _read(context)
    if rebuild is None:
        return {"added": 0}
    found = context.db.execute(
        "SELECT row_id, content FROM searchable_texts WHERE row_id < ? ORDER BY row_id DESC LIMIT ?",
        (rebuild.lowest, limit),
    ).fetchall()
    texts, chars = [], 0
    for row_id, content in found:
        texts.append((row_id, content))
        chars += len(content)
        if chars >= max_chars:
            break
    context.db.executemany("INSERT INTO memory_fts (rowid, content) VALUES (?, ?)", texts)
    if texts:
        _write(context, Rebuild(texts[-1][0], rebuild.triggers))
    else:
        _end(context, rebuild)
    return {"added": len(texts)}


async def count_texts(readers: Readers) -> int:
    """How many memories the index is to have."""
    return int((await readers.fetch("SELECT count(*) FROM memories WHERE memory_type <> 'session'"))[0][0])


async def is_under_way(readers: Readers) -> bool:
    """Whether a rebuild was begun and has not come to its end."""
    return bool(await readers.fetch("SELECT 1 FROM meta WHERE key = ?", (KEY,)))


async def texts_after(readers: Readers, row_id: int, limit: int) -> list[tuple[int, bytes]]:
    """The next memories that have a vector or are to have one: row_id, content digest."""
    found = await readers.fetch(
        "SELECT row_id, content_digest FROM memories WHERE row_id > ? AND memory_type <> 'session' "
        "ORDER BY row_id LIMIT ?",
        (row_id, limit),
    )
    return [(row_id, digest) for row_id, digest in found]


async def namespaces(readers: Readers) -> list[str]:
    """All that were ever written to."""
    return [name for (name,) in await readers.fetch("SELECT namespace FROM namespaces ORDER BY namespace")]


def _end(context: WriteContext, rebuild: Rebuild) -> None:
    for name, sql in rebuild.triggers.items():
        context.db.execute(f"DROP TRIGGER {name}")
        context.db.execute(sql)
    context.db.execute("DELETE FROM meta WHERE key = ?", (KEY,))


def _read(context: WriteContext) -> Rebuild | None:
    row = context.db.execute("SELECT value FROM meta WHERE key = ?", (KEY,)).fetchone()
    return None if row is None else msgspec.json.decode(row[0], type=Rebuild)


def _write(context: WriteContext, rebuild: Rebuild) -> None:
    context.db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (KEY, rows.to_json(rebuild)))

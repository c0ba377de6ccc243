"""Stores made for a test, and what they hold, read by a connection that knows nothing of the service."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.support.service import Service, eventually, running_service

SHORT_LOG_BYTES = 64 * 1024


@dataclass(frozen=True)
class Holdings:
    """The epoch of a store, and the text of every memory."""

    epoch: str
    texts: frozenset[str]


def holdings(database: Path) -> Holdings:
    """Recovers the store first if it was left by a crash, as the service would."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        (epoch,) = db.execute("SELECT value FROM meta WHERE key = 'store_epoch'").fetchone()
        return Holdings(epoch, frozenset(text for (text,) in db.execute("SELECT content FROM memories")))


def make_store(folder: Path, *texts: str, crashed: bool = False) -> Path:
    """A store with these memories; `crashed`: as kill -9 leaves it, with the last of them in its log alone."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "memory.db"

    async def make() -> None:
        async with running_service(folder / "made") as service:
            for text in texts[:-1]:
                await service.add(text)
            if crashed:
                await eventually(partial(_has_short_log, service))
            await service.add(texts[-1])
            await service.settled()
            if crashed:
                for path in (service.path, service.path.with_name(service.path.name + "-wal")):
                    shutil.copy(path, folder / path.name)
        if not crashed:
            shutil.copy(service.path, target)

    asyncio.run(make())
    shutil.rmtree(folder / "made")
    return target


async def _has_short_log(service: Service) -> bool:
    """After a checkpoint, which a reader that is at work keeps from cutting the log. The run itself is noted in it."""
    await service.ok("run_checkpoint")
    return service.path.with_name(service.path.name + "-wal").stat().st_size < SHORT_LOG_BYTES


_COLUMNS = (
    "m.namespace, m.memory_id, m.content, m.content_digest, m.memory_type, m.memory_tier, m.importance, "
    "m.importance_at, m.access_count, m.last_accessed_at, m.created_at, m.updated_at, m.occurred_at, m.expires_at, "
    "m.tier_since, m.tier_accesses, m.promote_at, m.metadata, m.tags, m.parent_id, m.session_id, m.user_id, "
    "m.created_by, m.version, m.state, m.archived_at"
)
_EVERYTHING = {
    "memories": f"SELECT {_COLUMNS} FROM memories m",
    "sessions": "SELECT m.memory_id, s.session_type, s.ended_at, s.summary, s.idle_timeout_s, s.resumed_at "
    "FROM sessions s JOIN memories m USING (row_id)",
    "history": "SELECT m.memory_id, h.version, h.record, h.replaced_at, h.replaced_by "
    "FROM memory_history h JOIN memories m USING (row_id)",
    "relationships": "SELECT s.memory_id, t.memory_id, r.relationship_type, r.strength, r.created_at "
    "FROM relationships r JOIN memories s ON s.row_id = source_row_id JOIN memories t ON t.row_id = target_row_id",
    "groups": "SELECT group_id, namespace, name, description, created_at FROM context_groups",
    "members": "SELECT g.name, m.memory_id, gm.added_at FROM group_members gm JOIN context_groups g USING (group_id) "
    "JOIN memories m USING (row_id)",
    "consolidations": "SELECT m.memory_id, c.kind, c.summariser, c.created_at, (SELECT json_group_array(json_array("
    "(SELECT memory_id FROM memories WHERE row_id = json_extract(p.value, '$[0]')), json_extract(p.value, '$[1]'))) "
    "FROM json_each(c.pieces) p) FROM consolidations c JOIN memories m USING (row_id)",
    "originals": "SELECT c.memory_id, m.memory_id, cm.before FROM consolidation_members cm "
    "JOIN memories c ON c.row_id = cm.row_id JOIN memories m ON m.row_id = cm.member_row_id",
    "undone": "SELECT m.memory_id, u.undone_at FROM consolidations_undone u JOIN memories m USING (row_id)",
}


def everything(database: Path) -> dict[str, list[tuple[object, ...]]]:
    """All that a store keeps of memories, by the ids that agents know; derived things and row ids left out."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        return {name: sorted(db.execute(sql).fetchall(), key=repr) for name, sql in _EVERYTHING.items()}

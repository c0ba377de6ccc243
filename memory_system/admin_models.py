"""Typed requests of the admin actions: upkeep of the store, asked for by the scheduler or by hand."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Raw

from memory_system import protocol as p
from memory_system.params import Count, Cursor, Id, Limit, Name, Params, Time


class Sweep(Params, frozen=True, kw_only=True):
    """Data of run_decay, run_consolidation and run_cleanup: which namespaces (absent: all), as of which instant."""

    namespaces: Annotated[list[Name], Meta(min_length=1, max_length=p.MAX_RESULTS)] | None = None
    as_of: Time | None = None
    dry_run: bool = False
    limit: Limit = 50


class UndoConsolidation(Params, frozen=True, kw_only=True):
    memory_id: Id
    dry_run: bool = False


class RunIntegrityCheck(Params, frozen=True, kw_only=True):
    full: bool = False
    limit: Limit = 50


class Reindex(Params, frozen=True, kw_only=True):
    keywords: bool = True
    vectors: bool = False


class ListRuns(Params, frozen=True, kw_only=True):
    job: Name | None = None
    run_state: Literal["running", "done", "failed", "interrupted"] | None = None
    run_id: Count | None = None
    limit: Limit = 20
    cursor: Cursor | None = None


class RunSnapshot(Params, frozen=True, kw_only=True):
    """No fields."""


class RunCheckpoint(Params, frozen=True, kw_only=True):
    """No fields."""


class TakeBackup(Params, frozen=True, kw_only=True):
    """Data of backup."""

    dry_run: bool = False


class ExportMemories(Params, frozen=True, kw_only=True):
    all_namespaces: bool = False
    vectors: bool = False
    limit: Limit = 500
    cursor: Cursor | None = None


class ImportMemories(Params, frozen=True, kw_only=True):
    records: Annotated[list[Raw], Meta(min_length=1, max_length=p.MAX_BATCH_ITEMS)]
    on_conflict: Literal["report", "overwrite"] = "report"
    dry_run: bool = False


ADMIN_PARAMS: dict[str, type[Params]] = {
    "run_decay": Sweep,
    "run_consolidation": Sweep,
    "undo_consolidation": UndoConsolidation,
    "run_cleanup": Sweep,
    "run_snapshot": RunSnapshot,
    "run_checkpoint": RunCheckpoint,
    "run_integrity_check": RunIntegrityCheck,
    "list_runs": ListRuns,
    "reindex": Reindex,
    "backup": TakeBackup,
    "export_memories": ExportMemories,
    "import_memories": ImportMemories,
}

"""Changed lifecycle settings: every memory is brought to one instant under the old ones, then ages under the new.

A stored importance is meant under the rates of its time. The store keeps the settings that its rows are meant under;
when others come, each row of a tier that they change gets its importance as of one instant under the old ones, and a
new `due_at`. The instant, both settings and how far it came stand in the database, in the transaction of each slice: a
rebase that is cut off goes on where it was, as of the same instant, before anything else is done.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec
from msgspec import Struct

from memory_system import lifecycle
from memory_system.errors import ShuttingDown, StorageFailed
from memory_system.lifecycle_settings import TIERS, LifecycleSettings, TierSettings
from memory_system.log import get_logger
from memory_system.storage import rows
from memory_system.storage.ageing import DueRow
from memory_system.storage.database import transaction

log = get_logger("storage.rebase")

T = TypeVar("T", bound=Struct)

SETTINGS_KEY: Final = "lifecycle"
REBASE_KEY: Final = "lifecycle_rebase"
SLICE_ROWS: Final = 10_000
_PROGRESS_S: Final = 2.0

_COLUMNS: Final = tuple(name for name in DueRow.__struct_fields__ if name != "due_at")
_SELECT: Final = (
    f"SELECT {', '.join(_COLUMNS)}, coalesce(due_at, 0.0) FROM memories "
    "WHERE row_id > ? AND memory_type <> 'session' AND memory_tier IN (SELECT value FROM json_each(?)) "
    "ORDER BY row_id LIMIT ?"
)
_UPDATE: Final = "UPDATE memories SET importance = ?, importance_at = ?, promote_at = ?, due_at = ? WHERE row_id = ?"


class Base(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of the lifecycle settings under which stored values are meant: by tier, and of the archive.

    A field that is added here needs a default, since stores without it are to be read: what held before.
    """

    short: TierSettings
    medium: TierSettings
    long: TierSettings
    delete_enabled: bool
    delete_after_days: float

    def settings(self) -> LifecycleSettings:
        return LifecycleSettings(**{name: getattr(self, name) for name in self.__struct_fields__})


class Rebase(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rebase under way: to which settings, as of which instant, and up to which row it came."""

    to: Base
    as_of: float
    row_id: int = 0


def base_of(settings: LifecycleSettings) -> Base:
    return Base(**{name: getattr(settings, name) for name in Base.__struct_fields__})


def bring_up(
    db: sqlite3.Connection,
    settings: LifecycleSettings,
    now_s: float,
    slice_rows: int = SLICE_ROWS,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Make the rows of the store meant under `settings`; how many were re-based. `db`: the writing connection.

    Raises StorageFailed when what the store says of its settings cannot be read, ShuttingDown once `stopped` says so:
    what is left is done at the next call.
    """
    wanted = base_of(settings)
    rebased = 0
    under_way = _read(db, REBASE_KEY, Rebase)
    if under_way is not None:
        rebased += _run(db, under_way, slice_rows, stopped)
    kept = _read(db, SETTINGS_KEY, Base)
    if kept is None:
        with transaction(db):
            _write(db, SETTINGS_KEY, wanted)
    elif kept != wanted:
        with transaction(db):
            _write(db, REBASE_KEY, begun := Rebase(to=wanted, as_of=now_s))
        rebased += _run(db, begun, slice_rows, stopped)
    return rebased


def _run(db: sqlite3.Connection, rebase: Rebase, slice_rows: int, stopped: Callable[[], bool]) -> int:
    """Finish a rebase, slice by slice; how many rows it had left."""
    old = _read(db, SETTINGS_KEY, Base)
    if old is None:
        raise StorageFailed("the store is being brought to other lifecycle settings, but its own are missing in meta")
    total: int = db.execute("SELECT coalesce(max(row_id), 0) FROM memories").fetchone()[0]
    log.info("lifecycle_rebase", as_of=rebase.as_of, row_id=rebase.row_id, last_row_id=total)
    before, after, tiers = old.settings(), rebase.to.settings(), _changed_tiers(old, rebase.to)
    done, told_s = 0, time.monotonic()
    while found := _slice(db, rebase.row_id, tiers, slice_rows):
        if stopped():
            raise ShuttingDown("stopped on the way to other lifecycle settings; the next start goes on with it")
        with transaction(db):
            db.executemany(_UPDATE, [_rebased(row, before, after, rebase.as_of) for row in found])
            rebase = msgspec.structs.replace(rebase, row_id=found[-1].row_id)
            _write(db, REBASE_KEY, rebase)
        done += len(found)
        if time.monotonic() - told_s > _PROGRESS_S:
            told_s = time.monotonic()
            log.info("lifecycle_rebase", rebased=done, row_id=rebase.row_id, last_row_id=total)
    with transaction(db):
        _write(db, SETTINGS_KEY, rebase.to)
        db.execute("DELETE FROM meta WHERE key = ?", (REBASE_KEY,))
    log.info("lifecycle_rebased", rebased=done)
    return done


def _changed_tiers(old: Base, new: Base) -> list[str]:
    """The tiers whose rows mean something else, or are due at another time, under the new settings."""
    if (old.delete_enabled, old.delete_after_days) != (new.delete_enabled, new.delete_after_days):
        return list(TIERS)
    return [tier for tier in TIERS if getattr(old, tier) != getattr(new, tier)]


def _slice(db: sqlite3.Connection, after: int, tiers: list[str], limit: int) -> list[DueRow]:
    names = DueRow.__struct_fields__
    found = db.execute(_SELECT, (after, rows.to_json(tiers), limit))
    return [DueRow(**dict(zip(names, row, strict=True))) for row in found]


def _rebased(
    row: DueRow, old: LifecycleSettings, new: LifecycleSettings, as_of_s: float
) -> tuple[float, float, float | None, float | None, int]:
    """The values of _UPDATE. A memory that was used after that instant (a clock set back) keeps its own."""
    promote_at = row.promote_at
    if promote_at is None and row.due_at <= as_of_s and lifecycle.promotion_due(old, row, as_of_s):
        promote_at = as_of_s
    importance = lifecycle.importance_now(old, row, as_of_s)
    since_s = max(as_of_s, row.importance_at)
    moved = msgspec.structs.replace(row, importance=importance, importance_at=since_s, promote_at=promote_at)
    return importance, since_s, promote_at, lifecycle.due_at(new, moved), row.row_id


def _read(db: sqlite3.Connection, key: str, kind: type[T]) -> T | None:
    found = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    try:
        return None if found is None else msgspec.json.decode(found[0], type=kind)
    except msgspec.MsgspecError as error:
        raise StorageFailed(f"the store's meta value {key} cannot be read: {error}") from error


def _write(db: sqlite3.Connection, key: str, value: Struct) -> None:
    db.execute(
        "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        (key, msgspec.json.encode(value).decode()),
    )

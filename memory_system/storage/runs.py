"""The rows of maintenance_runs: what was asked for, how it ended, what it did."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from memory_system.errors import IdempotencyMismatch
from memory_system.storage import rows
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.readers import Readers

State = Literal["running", "done", "failed", "interrupted"]


class NewRun(Struct, frozen=True, kw_only=True):
    """A run that is to begin. `asked`: the fields of its request; `request_id` None: nobody will ask for it again."""

    job: str
    request_id: str | None
    asked: dict[str, Any]
    asked_by: str
    as_of: float
    dry_run: bool


class StoredRun(Struct, frozen=True, kw_only=True):
    """A row, in the order of its columns. `result`: what its reply had; `error`: error_code and message."""

    run_id: int
    job: str
    request_id: str | None
    asked: dict[str, Any]
    asked_by: str
    as_of: float
    dry_run: bool
    started_at: float
    finished_at: float | None
    state: State
    result: dict[str, Any] | None
    error: dict[str, Any] | None


class Wanted(Struct, frozen=True, kw_only=True):
    """Which runs a list is about: those below `below`, newest first."""

    job: str | None = None
    state: State | None = None
    run_id: int | None = None
    below: int = 2**62


_FIELDS: Final = StoredRun.__struct_fields__
_COLUMNS: Final = ", ".join(_FIELDS)
_JSON: Final = ("asked", "result", "error")


def _stored(row: tuple[Any, ...]) -> StoredRun:
    values = dict(zip(_FIELDS, row, strict=True))
    for name in _JSON:
        values[name] = None if values[name] is None else msgspec.json.decode(values[name])
    return StoredRun(**{**values, "dry_run": bool(values["dry_run"])})


def check_same(known: StoredRun | NewRun, new: NewRun) -> None:
    """Raise IdempotencyMismatch when the request_id was used for another run."""
    if (known.job, known.asked) != (new.job, new.asked):
        raise IdempotencyMismatch(
            f"this request_id was used for another run, of {known.job}; make a new one for each run",
            request_id=new.request_id,
        )


def begin(context: WriteContext, new: NewRun) -> Reply:
    """Note that a run begins: its `run_id`, `as_of` and `started_at`.

    Under a request_id that is known, a run that did not get to its end is taken up again, as of its own instant, and
    one that did is given back as `done`. Raises IdempotencyMismatch.
    """
    known = _by_request_id(context, new.request_id)
    # One run of a job is under way at a time: the end of what stands as running could not be noted, on a full disk.
    context.db.execute(f"{_INTERRUPT} AND job = ?", (context.now_s, new.job))
    if known is None:
        run_id = context.db.execute(
            "INSERT INTO maintenance_runs (job, request_id, asked, asked_by, as_of, dry_run, started_at, state) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, 'running') RETURNING run_id",
            (
                *(new.job, new.request_id, rows.to_json(new.asked), new.asked_by),
                *(new.as_of, int(new.dry_run), context.now_s),
            ),
        ).fetchone()[0]
        return {"run_id": run_id, "as_of": new.as_of, "started_at": context.now_s}
    check_same(known, new)
    if known.state == "done":
        return {"done": known}
    context.db.execute(
        "UPDATE maintenance_runs SET state = 'running', started_at = ?, finished_at = NULL, error = NULL "
        "WHERE run_id = ?",
        (context.now_s, known.run_id),
    )
    return {"run_id": known.run_id, "as_of": known.as_of, "started_at": context.now_s}


def finish(
    context: WriteContext,
    run_id: int,
    state: State,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> Reply:
    """Note how a run ended, and when."""
    context.db.execute(
        "UPDATE maintenance_runs SET state = ?, finished_at = ?, result = ?, error = ? WHERE run_id = ?",
        (state, context.now_s, _json(result), _json(error), run_id),
    )
    return {"finished_at": context.now_s}


def interrupt(context: WriteContext) -> Reply:
    """What is still noted as running belongs to a process that is gone. To be called before the first run begins."""
    return {"interrupted": context.db.execute(_INTERRUPT, (context.now_s,)).rowcount}


def prune(context: WriteContext, before_s: float, limit: int = 200) -> Reply:
    """Drop at most `limit` runs that ended before `before_s`.

    The last run of each job that a caller had done stays, and the last dry run: the scheduler sees by its own whether
    it still has to ask for a run, however many others somebody asked for since.
    """
    cursor = context.db.execute(f"DELETE FROM maintenance_runs WHERE run_id IN ({_OLD} LIMIT ?)", (before_s, limit))
    return {"pruned": cursor.rowcount}


async def count_old(readers: Readers, before_s: float) -> int:
    """How many runs `prune` would drop."""
    return int((await readers.fetch(f"SELECT count(*) FROM ({_OLD})", (before_s,)))[0][0])


async def last_started_at(readers: Readers) -> float | None:
    """When the last run began: the store was at work then."""
    found = await readers.fetch("SELECT max(started_at) FROM maintenance_runs")
    return None if found[0][0] is None else float(found[0][0])


async def by_request_id(readers: Readers, request_id: str) -> StoredRun | None:
    found = await readers.fetch(f"SELECT {_COLUMNS} FROM maintenance_runs WHERE request_id = ?", (request_id,))
    return _stored(found[0]) if found else None


async def page(readers: Readers, wanted: Wanted, limit: int) -> list[StoredRun]:
    """Up to `limit` runs, newest first."""
    found = await readers.fetch(
        f"SELECT {_COLUMNS} FROM maintenance_runs WHERE run_id < ?1 AND (?2 IS NULL OR job = ?2) "
        "AND (?3 IS NULL OR state = ?3) AND (?4 IS NULL OR run_id = ?4) ORDER BY run_id DESC LIMIT ?5",
        (wanted.below, wanted.job, wanted.state, wanted.run_id, limit),
    )
    return [_stored(row) for row in found]


_INTERRUPT: Final = "UPDATE maintenance_runs SET state = 'interrupted', finished_at = ? WHERE state = 'running'"
_OLD: Final = (
    "SELECT run_id FROM maintenance_runs AS r WHERE state <> 'running' AND finished_at < ? "
    "AND EXISTS (SELECT 1 FROM maintenance_runs AS later WHERE later.job = r.job AND later.run_id > r.run_id "
    "AND later.asked_by = r.asked_by AND later.dry_run = r.dry_run)"
)


def _by_request_id(context: WriteContext, request_id: str | None) -> StoredRun | None:
    if request_id is None:
        return None
    row = context.db.execute(f"SELECT {_COLUMNS} FROM maintenance_runs WHERE request_id = ?", (request_id,)).fetchone()
    return None if row is None else _stored(row)


def _json(value: dict[str, Any] | None) -> str | None:
    return None if value is None else rows.to_json(value)

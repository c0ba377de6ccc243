"""Groups of requests: each is one transaction, run as one function."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from memory_system.errors import (
    DeadlineExceeded,
    InternalError,
    MemorySystemError,
    ShuttingDown,
    StorageFailed,
    StorageFull,
)
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.log import get_logger
from memory_system.settings import StorageSettings
from memory_system.storage import idempotency
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.jobs import WriteJob
from memory_system.storage.new_rows import NewRows
from memory_system.storage.rows import AT_ONCE, RecordView, to_json
from memory_system.storage.usage import Quota
from memory_system.turns import Lanes

log = get_logger("storage.group")

# A failed sync may have dropped dirty pages, and a later one can seem to succeed: only a restart tells the truth.
SYNC_ERRORS: Final = frozenset({sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC})

_LOG: Final = (
    "INSERT INTO index_log (row_id, op) "
    "SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(?) ORDER BY key"
)


@dataclass(slots=True)
class Outcome:
    job: WriteJob
    reply: Reply | None = None
    error: Exception | None = None
    context: WriteContext | None = None


@dataclass(slots=True)
class Group:
    """One transaction. `sequences`: commit_seq of the namespaces that it changed, and `sequences_before` it."""

    outcomes: list[Outcome] = field(default_factory=list)
    sequences_before: dict[str, int] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)
    logged: int = 0  # rows that it appended to index_log

    @property
    def counted(self) -> int:
        """By how much it raised the commit_seqs."""
        return sum(seq - self.sequences_before[name] for name, seq in self.sequences.items())

    def names(self) -> dict[str, list[str]]:
        """For a log line: the request_ids of the first of them."""
        named = [outcome.job.request_id for outcome in self.outcomes]
        return {"request_ids": [request_id for request_id in named if request_id is not None][:8]}


class GroupRunner:
    """Takes jobs from their lanes and commits them together. Used by the writer's thread alone.

    `sequences`: commit_seq by namespace, as it will be when the running group commits.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        settings: StorageSettings,
        lifecycle: LifecycleSettings,
        clock: Callable[[], float],
        quota: Quota | None = None,
    ) -> None:
        self._db = db
        self._settings = settings
        self._lifecycle = lifecycle
        self._view = RecordView(lifecycle)
        self._clock = clock
        self._quota = quota
        self._keys = idempotency.Keys(db)
        self._new_rows = NewRows(db)
        self._sequences: dict[str, int] = dict(db.execute("SELECT namespace, commit_seq FROM namespaces").fetchall())
        # The log's own count goes on from here: AUTOINCREMENT gives out no number twice, and a rollback returns them.
        found = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'index_log'").fetchone()
        self.first_log_seq: int = found[0] if found else 0
        self.ends_s = math.inf  # monotonic; what has not begun by then is refused

    @property
    def sequences(self) -> dict[str, int]:
        return dict(self._sequences)

    def run(self, waiting: Lanes[WriteJob]) -> Group:
        """Run and commit the next group; its outcomes tell what became of each request.

        Raises sqlite3.Error when it was the sync that failed: the group may be found committed after a restart, so its
        requests are to be left unanswered, and their callers ask again under the same request_id.
        """
        group = Group()
        try:
            self._begin(waits=True)
            if not (self._run_jobs(group, waiting) and self._write_rest()):
                self._run_again(group)
            logged = self._finish(group)
            if not self._db.in_transaction:
                raise sqlite3.OperationalError("the transaction was rolled back")
            self._db.execute("COMMIT")
            group.logged = logged
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) in SYNC_ERRORS:
                raise
            self._fail(group, waiting, error)
        return group

    def _begin(self, *, waits: bool) -> None:
        self._keys.begin()
        self._new_rows.begin(waits=waits)
        self._db.execute("BEGIN IMMEDIATE")

    def _run_jobs(self, group: Group, waiting: Lanes[WriteJob]) -> bool:
        """Run waiting jobs until the group is full in jobs, rows or time; what is left forms the next group.

        Without savepoints, which cost time for each request, and hardly any needs one. Returns False when a job failed
        after it had written, so that its part has to be taken back.
        """
        began = time.monotonic()
        rows = 0
        while waiting and len(group.outcomes) < self._settings.group_jobs:
            full = rows + waiting.first().rows > self._settings.group_rows
            if group.outcomes and (full or (time.monotonic() - began) * 1000.0 > self._settings.group_ms):
                break
            self._look_up(waiting)
            outcome = Outcome(waiting.pop())
            group.outcomes.append(outcome)
            before = self._written()
            self._run_job(outcome, group)
            if self._new_rows.failed or (outcome.error is not None and self._written() != before):
                return False
            rows += outcome.job.rows
        return True

    def _look_up(self, waiting: Lanes[WriteJob]) -> None:
        """Look up the key of the next job, if that was not done, together with those that are likely to follow."""
        identity = waiting.first().identity
        if identity is None or self._keys.knows(identity):
            return
        identities = dict.fromkeys(job.identity for job in waiting.soon(AT_ONCE) if job.identity is not None)
        try:
            self._keys.look_up([each for each in identities if not self._keys.knows(each)])
        except Exception as error:  # noqa: BLE001  each job asks for its own then, and has the error that its key causes
            self._raise_failure(error)

    def _written(self) -> tuple[int, int]:
        """What changes when a job writes, whoever's new rows are inserted meanwhile."""
        return self._db.total_changes - self._new_rows.changes, self._new_rows.given

    def _write_rest(self) -> bool:
        """Write what waits: new rows and keys. Returns False when something was refused: run again it is told whose
        it is."""
        try:
            self._new_rows.write()
            self._keys.write()
        except Exception as error:  # noqa: BLE001  whatever it is, the group is run again, or fails
            self._raise_failure(error)
            return False
        return True

    def _raise_failure(self, error: Exception) -> None:
        """Raise what ends the transaction for everybody in it."""
        if isinstance(error, sqlite3.Error) and (not self._db.in_transaction or _is_storage_failure(error)):
            raise error

    def _run_again(self, group: Group) -> None:
        """Begin the group anew, each job in a savepoint of its own."""
        self._db.execute("ROLLBACK")
        self._set_back(group.sequences_before)
        group.sequences_before.clear()
        self._begin(waits=False)
        for outcome in group.outcomes:
            outcome.reply, outcome.error, outcome.context = None, None, None
            self._db.execute("SAVEPOINT request")
            self._run_job(outcome, group)
            if outcome.error is not None:
                self._db.execute("ROLLBACK TO request")
                self._keys.begin()
                self._new_rows.begin(waits=False)
            self._db.execute("RELEASE request")

    def _finish(self, group: Group) -> int:
        """What the jobs have in common is written at once: the log of changes, and the namespaces' numbers.

        Returns how many changes were logged.
        """
        done = [outcome.context for outcome in group.outcomes if outcome.context is not None]
        entries = [entry for context in done for entry in context.log]
        # One statement for all, in their order: each step of a statement lets go of the interpreter and waits for it.
        self._db.execute(_LOG, (to_json(entries),))
        group.sequences = {name: self._sequences[name] for name in group.sequences_before}
        self._db.executemany(
            "INSERT INTO namespaces (namespace, commit_seq) VALUES (?, ?) "
            "ON CONFLICT (namespace) DO UPDATE SET commit_seq = excluded.commit_seq",
            group.sequences.items(),
        )
        return len(entries)

    def _run_job(self, outcome: Outcome, group: Group) -> None:
        job = outcome.job
        before = self._sequences.get(job.namespace, 0)
        try:
            outcome.reply, outcome.context = self._apply(job)
            if self._sequences.get(job.namespace, 0) != before:
                group.sequences_before.setdefault(job.namespace, before)
        except MemorySystemError as error:
            outcome.error = error
        except sqlite3.Error as error:
            if not self._db.in_transaction or _is_storage_failure(error):
                raise
            self._log("storage_error", job, error)
            outcome.error = StorageFailed(f"the database refused the write: {error}")
        except Exception as error:  # noqa: BLE001  a defect in one operation must not take the group, or the service
            self._log("internal_error", job, error)
            outcome.error = InternalError("the service failed at this request; its log has the details")
        if outcome.error is not None:
            self._set_back({job.namespace: before})

    def _log(self, event: str, job: WriteJob, error: Exception) -> None:
        if self._new_rows.failed and self._new_rows.waits:
            return  # it need not be of this job; when the group is run again it is known whose it is
        log.error(event, error=error_name(error), request_id=job.request_id, exc_info=error)

    def _set_back(self, before: dict[str, int]) -> None:
        """Of a namespace without a commit nothing is kept: anybody may name any in a write that fails."""
        for namespace, seq in before.items():
            if seq:
                self._sequences[namespace] = seq
            else:
                self._sequences.pop(namespace, None)

    def _apply(self, job: WriteJob) -> tuple[Reply, WriteContext]:
        context = WriteContext(self._db, self._clock(), job.namespace, self._lifecycle, self._view)
        context.owner, context.quota, context.new_rows = job.owner, self._quota, self._new_rows
        context.changes.caller = (job.namespace, job.caller)
        if job.key is not None:
            stored = self._keys.replay(job.namespace, job.key)
            if stored is not None:
                return stored, context
        now_s = time.monotonic()
        if now_s > self.ends_s:
            raise restarting()
        if job.deadline_s is not None and now_s > job.deadline_s:
            raise DeadlineExceeded("the deadline passed before the write began; nothing was done")
        reply = job.run(context)
        if job.counted:
            self._sequences[job.namespace] = self._sequences.get(job.namespace, 0) + 1
            reply["commit_seq"] = self._sequences[job.namespace]
        if job.key is not None:
            self._keys.keep(job.namespace, job.key, reply, context.now_s)
            if not self._new_rows.waits:
                self._keys.write()
        return reply, context

    def _fail(self, group: Group, waiting: Lanes[WriteJob], error: sqlite3.Error) -> None:
        """Nothing of the group was kept: every request of it gets the named error."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        if not group.outcomes:  # not even BEGIN went through; who waits is told, and can decide
            group.outcomes = [Outcome(job) for job in waiting.take_all()]
        self._set_back(group.sequences_before)
        named = _named(error)
        full = isinstance(named, StorageFull)
        log.error(
            named.code,
            reason=named.message if full else "the database failed; nothing of these requests was kept",
            error=error_name(error),
            requests=len(group.outcomes),
            **group.names(),
            exc_info=None if full else error,  # a full disk is no riddle, and comes with every write
        )
        for outcome in group.outcomes:
            outcome.reply, outcome.context = None, None
            outcome.error = outcome.error or named
        group.sequences = {}


def error_name(error: Exception) -> str:
    """What an error is, without what it says: SQLite's name for it, else its class."""
    return getattr(error, "sqlite_errorname", type(error).__name__)


def restarting() -> MemorySystemError:
    """For requests that never began: nothing was done, and the same call will do after the restart."""
    return ShuttingDown("the store takes no writes any more; the service restarts", retry_after_ms=500)


def _is_storage_failure(error: sqlite3.Error) -> bool:
    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return primary in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _named(error: sqlite3.Error) -> MemorySystemError:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return StorageFull("the disk of the store is full: nothing was written; reads go on")
    return StorageFailed(f"the database reported an error, nothing was written: {error}")

"""The one thread that writes: a whole group of requests is one transaction, run as one function.

Requests that wait while a group commits form the next group, so the cost of a sync is shared by all that are
waiting and nobody waits for a timer. One that fails takes nothing with it: when it had written already, the group is
run again with a savepoint for each request. Nothing is reported before COMMIT has returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.log import get_logger
from memory_system.settings import StorageSettings
from memory_system.storage.context import Changes, Reply, WriteContext
from memory_system.storage.database import BUSY_TIMEOUT_MS
from memory_system.storage.group import SYNC_ERRORS, Group, GroupRunner, Outcome, error_name, restarting
from memory_system.storage.idempotency import Identity
from memory_system.storage.jobs import WriteJob
from memory_system.storage.mark import Unmarked
from memory_system.storage.usage import Quota
from memory_system.turns import Lanes

log = get_logger("storage.writer")

_CHECKPOINT_IDLE_S: Final = 2.0


class Writer:
    """Owns the writing connection. `on_commit` runs on the event loop before the callers hear of their commit."""

    def __init__(
        self,
        db: sqlite3.Connection,
        settings: StorageSettings,
        lifecycle: LifecycleSettings,
        *,
        on_commit: Callable[[Changes], None],
        on_fatal: Callable[[Exception], None],
        clock: Callable[[], float] = time.time,
        mark: Unmarked | None = None,
        quota: Quota | None = None,
    ) -> None:
        self._db = db
        self._mark = mark or Unmarked()
        self._on_commit = on_commit
        self._on_fatal = on_fatal
        self._clock = clock
        self._queue: queue.SimpleQueue[WriteJob | None] = queue.SimpleQueue()
        self._waiting: Lanes[WriteJob] = Lanes()
        self._runner = GroupRunner(db, settings, lifecycle, clock, quota)
        self._committed = self._runner.sequences  # as the event loop and the callers know them
        self._under_way: set[Identity | None] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._checkpoints: deque[asyncio.Future[Reply]] = deque()  # who waits for one
        self._failed: Exception | None = None
        self._closed = False
        self.last_commit_at: float | None = None
        self.log_seq = self._runner.first_log_seq  # the end of index_log, as the event loop knows it

    def __repr__(self) -> str:
        state = "closed" if self._closed else "failed" if self._failed else "open"
        return f"Writer({state}, {self.depth} waiting)"

    @property
    def depth(self) -> int:
        """How many requests wait."""
        return self._queue.qsize() + len(self._waiting)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def commit_seq(self, namespace: str) -> int:
        """The number of the namespace's last committed change, 0 before the first."""
        return self._committed.get(namespace, 0)

    def submit(self, job: WriteJob) -> asyncio.Future[Reply]:
        """Queue a job; the future holds its reply once it is on disk, or the error of its own."""
        assert self._loop is not None, "start() comes first"
        job.future = self._loop.create_future()
        if self._failed is not None or self._closed:
            job.future.set_exception(restarting())
        else:
            self._under_way.add(job.identity)
            self._queue.put(job)
        return job.future

    def checkpoint(self) -> asyncio.Future[Reply]:
        """Have the log moved into the database, between two groups, as far as no reader needs it any more.

        The future holds log_frames (how many pages the log had) and moved_frames (how many of them were moved).
        """
        assert self._loop is not None, "start() comes first"
        wanted: asyncio.Future[Reply] = self._loop.create_future()
        self._checkpoints.append(wanted)
        self.submit(WriteJob(_nothing, "", counted=False)).add_done_callback(partial(_passed_on, wanted))
        return wanted

    def is_under_way(self, identity: Identity) -> bool:
        """Whether a write with this idempotency key waits or runs."""
        return identity in self._under_way

    def stop_after(self, seconds: float) -> None:
        """Refuse what has not begun by then: the program is to end, and its callers will ask again."""
        self._runner.ends_s = time.monotonic() + seconds

    async def close(self) -> None:
        """Run what was submitted, checkpoint, and close the connection."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while True:
            try:
                if not self._waiting:
                    job = self._next_or_checkpoint()
                    if job is None:
                        break
                    self._waiting.add(job)
                if not self._take_waiting():
                    self._queue.put(None)
                self._run_group()
                self._checkpoint_for_callers()
            except Exception as error:  # noqa: BLE001  a writer that dies silently would hang every caller
                self._fail(error)
                break
        self._finish()

    def _run_group(self) -> None:
        group = self._runner.run(self._waiting)
        self._mark.advance(group.counted, group.logged)
        self._deliver(group)
        self._mark.sync_when_due()

    def _next_or_checkpoint(self) -> WriteJob | None:
        try:
            return self._queue.get(timeout=_CHECKPOINT_IDLE_S)
        except queue.Empty:
            _checkpoint(self._db, "PASSIVE")
            self._mark.sync()
            return self._queue.get()

    def _take_waiting(self) -> bool:
        """Move what is queued into its lanes; False when the end was seen. Admission bounds how much that can be."""
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return True
            if job is None:
                return False
            self._waiting.add(job)

    def _checkpoint_for_callers(self) -> None:
        while self._checkpoints:
            wanted = self._checkpoints.popleft()
            _, pages, moved = _checkpoint(self._db, "PASSIVE")
            if pages == moved and pages > 0:  # so nobody has to be waited for, and the file gets small
                self._db.execute("PRAGMA busy_timeout = 0")
                _checkpoint(self._db, "TRUNCATE")
                self._db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
                assert self._loop is not None
                self._loop.call_soon_threadsafe(_settle, wanted, {"log_frames": pages, "moved_frames": moved})

    def _deliver(self, group: Group) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._finish_jobs, group)
        except RuntimeError:
            log.warning("replies_dropped", reason="the event loop is closed", **group.names())

    def _finish_jobs(self, group: Group) -> None:
        """On the event loop: first the caches follow, then the new numbers show, then the callers hear of it."""
        for outcome in group.outcomes:
            if outcome.context is not None:
                self._tell(outcome)
        self._committed.update(group.sequences)
        self.log_seq += group.logged
        self.last_commit_at = self._clock()
        for outcome in group.outcomes:
            self._under_way.discard(outcome.job.identity)
            future = outcome.job.future
            if future is None or future.done():
                continue
            if outcome.error is not None:
                future.set_exception(outcome.error)
            else:
                assert outcome.reply is not None
                future.set_result(outcome.reply)

    def _tell(self, outcome: Outcome) -> None:
        assert outcome.context is not None
        try:
            self._on_commit(outcome.context.changes)
        except Exception:  # the commit is a fact, whatever a cache makes of it, and is to be acknowledged
            log.exception("commit_listener_failed", request_id=outcome.job.request_id)

    def _fail(self, error: Exception) -> None:
        """Stop acknowledging: what waits is answered with the error, and the program is told to end."""
        self._failed = error
        reason = "the store takes no writes any more; the program ends, to be started anew"
        log.critical("writer_stopped", reason=reason, error=error_name(error), exc_info=error)
        self._take_waiting()
        self._deliver(Group([Outcome(job, error=restarting()) for job in self._waiting.take_all()]))
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_fatal, error)

    def _finish(self) -> None:
        try:
            if self._failed is None:
                _checkpoint(self._db, "TRUNCATE")
        except sqlite3.Error as error:
            log.error("checkpoint_failed", error=error_name(error), exc_info=error)
        finally:
            self._db.close()
            self._mark.close()


def _checkpoint(db: sqlite3.Connection, mode: str) -> tuple[int, int, int]:
    """Move the log into the database: (whether it was hindered, pages in the log, pages moved).

    (1, 0, 0) for a failure; nothing is lost then, unless it was the sync that failed.
    """
    try:
        found: tuple[int, int, int] = db.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) in SYNC_ERRORS:
            raise
        log.warning("checkpoint_failed", error=error_name(error), exc_info=error)
        return 1, 0, 0
    return found


def _nothing(context: WriteContext) -> Reply:
    """A job that wakes the writer."""
    return {}


def _settle(wanted: asyncio.Future[Reply], reply: Reply) -> None:
    if not wanted.done():
        wanted.set_result(reply)


def _passed_on(wanted: asyncio.Future[Reply], job: asyncio.Future[Reply]) -> None:
    """A writer that takes no jobs makes no checkpoint either."""
    error = None if job.cancelled() else job.exception()
    if error is not None and not wanted.done():
        wanted.set_exception(error)

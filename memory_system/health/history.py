"""The error history: one thread owns the database, and what waits while a group commits forms the next group.

Nothing is acknowledged before its commit; an event that comes again is known by its `event_id`, also after a restart.
Questions go before groups, so that they are answered in a storm. The manager must always start: a damaged file is set
aside and a new one begun, and while the disk is full the history refuses, tries again, and goes on by itself.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from memory_system.events import Event
from memory_system.health.history_file import HistoryFile
from memory_system.health.records import Committed, Errors, HistoryFailed, Query
from memory_system.health.store import Store
from memory_system.health_settings import ErrorBusSettings
from memory_system.log import get_logger

log = get_logger("health.history")

T = TypeVar("T")
Rows = list[tuple[int, Event]]

GROUP_EVENTS: Final = 1000
FULL_EVENTS: Final = 10_000
REFUSED_EVENTS: Final = 40_000

_LOOK_S: Final = 1.0
_SLICE_S: Final = 0.02
_RETAIN_S: Final = 30.0
_IDLE_S: Final = 2.0


@dataclass(slots=True)
class _Submission:
    events: Sequence[Event]
    may_return: bool
    future: asyncio.Future[Committed]


@dataclass(slots=True)
class _Question:
    run: Callable[[Store], Any]
    future: asyncio.Future[Any]


class History:
    """The error history of the manager, used from its event loop.

    `on_commit` hears on the loop of every commit, in order and before those who wait for it: (row id, event) of what
    was new. An event there may stand for several (`count`), and a shared row of a storm comes again as it grows.
    """

    def __init__(
        self,
        path: str | Path,
        settings: ErrorBusSettings,
        *,
        on_commit: Callable[[Rows], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.on_commit = on_commit
        self.last_seq = 0
        self._clock = clock
        self._file = HistoryFile(Path(path), settings, clock)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._submissions: deque[_Submission] = deque()
        self._questions: deque[_Question] = deque()
        self._wake = threading.Condition()
        self._waiting = 0
        self._closed = False
        self._used_at_s: float | None = None  # until the log has been moved into the database
        self._retain_at_s = self._looked_s = 0.0
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"failing: {self.failing}" if self.failing else "open"
        return f"History({state}, {self._waiting} waiting, last_seq {self.last_seq})"

    # -- on the event loop ------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """How many events wait to be committed."""
        return self._waiting

    @property
    def is_full(self) -> bool:
        """Whether nobody should read more events from a socket now."""
        return self._waiting >= FULL_EVENTS

    @property
    def failing(self) -> str | None:
        """Why the last use of the file failed; None when it did not, or something was written since."""
        return self._file.failing

    def figures(self) -> dict[str, int]:
        """`waiting` events, `failures` of the file so far, its `file_bytes`, and `last_seq`."""
        file = self._file
        return {
            "waiting": self._waiting,
            "failures": file.failures,
            "file_bytes": file.size_bytes,
            "last_seq": self.last_seq,
        }

    @property
    def previous(self) -> dict[str, str]:
        """What `set_meta` had kept when the history was opened."""
        return self._file.previous

    @property
    def was_clean(self) -> bool:
        """Whether the manager before this one closed the history; True for a new file."""
        return self.previous.get("clean_shutdown", "1") == "1"

    async def start(self) -> None:
        """Open the file.

        Raises CannotStart for a file of another kind or of a newer schema, one in use by another manager, and a
        folder that cannot be written. A damaged file is set aside, and with a full disk it starts refusing.
        """
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._file.start)
        self.last_seq = self._file.last_seq
        self._thread.start()

    def submit(self, events: Sequence[Event], *, may_return: bool = True) -> asyncio.Future[Committed]:
        """Commit events; the future has what became of them, or HistoryFailed, with which nothing was kept.

        `may_return`: whether the sender may send them again, so that their ids have to be remembered.
        """
        assert self._loop is not None, "start() comes first"
        future: asyncio.Future[Committed] = self._loop.create_future()
        if self._closed or self._waiting + len(events) > REFUSED_EVENTS:
            reason = "the history is closed" if self._closed else f"{self._waiting} events wait to be written"
            future.set_exception(HistoryFailed(reason))
            return future
        with self._wake:
            self._waiting += len(events)
            self._submissions.append(_Submission(events, may_return, future))
            self._wake.notify()
        return future

    async def get_errors(
        self,
        since_seq: int | None = None,
        since: float | None = None,
        agent: str | None = None,
        severity: str | None = None,
        error_type: str | None = None,
        limit: int = 100,
        newest: bool = False,
    ) -> Errors:
        """A page of the history; see `records`. Raises InvalidField and HistoryFailed."""
        query = Query(since_seq, since, agent, severity, error_type, limit, newest)
        query.check()
        return await self._ask(lambda store: store.errors(query))

    async def totals(self, window_s: float) -> dict[str, int]:
        """How many events by severity happened in the last `window_s`. Raises HistoryFailed."""
        return await self._ask(lambda store: store.totals(self._clock() - window_s))

    async def set_meta(self, key: str, value: str) -> None:
        """Keep a value for the next start. Raises HistoryFailed."""
        await self._ask(lambda store: self._put(store, key, value))

    async def close(self) -> None:
        """Commit what waits, note that the end was clean, and close the file. May be called at any time."""
        if not self._closed:
            self._closed = True
            with self._wake:
                self._wake.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._file.close()

    def _ask(self, run: Callable[[Store], T]) -> asyncio.Future[T]:
        assert self._loop is not None, "start() comes first"
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed:
            future.set_exception(HistoryFailed("the history is closed"))
            return future
        with self._wake:
            self._questions.append(_Question(run, future))
            self._wake.notify()
        return future

    # -- in the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            questions, group = self._next()
            for question in questions:
                self._answer(question)
            if group or self._file.owed:
                self._commit(group)
            if self._closed and not group and not questions:
                break
            self._keep_up(time.monotonic())

    def _next(self) -> tuple[list[_Question], list[_Submission]]:
        with self._wake:
            if not self._questions and not self._submissions and not self._closed:
                self._wake.wait(min(_LOOK_S, max(_SLICE_S, self._retain_at_s - time.monotonic())))
            questions = list(self._questions)
            self._questions.clear()
            group: list[_Submission] = []
            events = 0
            while self._submissions and (not group or events + len(self._submissions[0].events) <= GROUP_EVENTS):
                group.append(self._submissions.popleft())
                events += len(group[-1].events)
        return questions, group

    def _answer(self, question: _Question) -> None:
        try:
            result = question.run(self._file.opened())
        except Exception as error:  # noqa: BLE001  whoever asked has to hear of it, and the thread has to live on
            failure = self._file.failed(error)
            self._tell(lambda: _settle(question.future, None, failure))
        else:
            self._tell(lambda: _settle(question.future, result, None))

    def _put(self, store: Store, key: str, value: str) -> None:
        store.set_meta(key, value)
        self._file.wrote([])  # without this, a system that has nothing to report would stay degraded

    def _commit(self, group: list[_Submission]) -> None:
        owed = self._file.owed
        batches = [(each.events, each.may_return) for each in group]
        try:
            store = self._file.opened()
            done = store.write([(owed, True), *batches], self._clock(), time.monotonic())
        except Exception as error:  # noqa: BLE001  whoever waits has to hear of it, and the thread has to live on
            failure = self._file.failed(error)
            self._tell(lambda: self._refuse(group, failure))
            return
        self._file.wrote(owed)
        self._used_at_s = time.monotonic()
        self._tell(lambda: self._acknowledge(group, done, store.last_seq))

    def _keep_up(self, now_s: float) -> None:
        """Between groups: retention in slices, and the log moved into the database when nothing comes."""
        store = self._file.store
        if store is None:
            return
        try:
            if now_s >= self._looked_s + _LOOK_S:
                self._looked_s = now_s
                self._file.look()
                if self._file.store is None:
                    return
            if now_s >= self._retain_at_s:
                self._retain_at_s = now_s + (0.0 if store.retain(self._clock()) else _RETAIN_S)
                self._file.measure()
            if self._used_at_s is not None and now_s - self._used_at_s >= _IDLE_S:
                self._used_at_s = None
                store.checkpoint()
        except sqlite3.Error as error:
            self._retain_at_s = now_s + _RETAIN_S
            self._file.failed(error)

    def _tell(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            log.warning("replies_dropped", reason="the event loop is closed")

    # -- on the event loop again --------------------------------------------------------------------------------

    def _acknowledge(self, group: list[_Submission], done: list[Committed], last_seq: int) -> None:
        self.last_seq = last_seq
        rows = [row for committed in done for row in committed.rows]
        if self.on_commit is not None and rows:
            try:
                self.on_commit(rows)
            except Exception:  # the commit is a fact, whatever the broadcast makes of it, and is to be acknowledged
                log.exception("commit_listener_failed", rows=len(rows))
        for submission, committed in zip(group, done[1:], strict=True):
            self._waiting -= len(submission.events)
            _settle(submission.future, committed, None)

    def _refuse(self, group: list[_Submission], failure: HistoryFailed) -> None:
        for submission in group:
            self._waiting -= len(submission.events)
            _settle(submission.future, None, failure)


def _settle(future: asyncio.Future[Any], result: Any, failure: Exception | None) -> None:
    if future.done():
        return
    if failure is not None:
        future.set_exception(failure)
    else:
        future.set_result(result)

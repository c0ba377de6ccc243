"""The error bus inside the manager: what is committed to the history is folded and broadcast, in this order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Final

from memory_system.errors import InvalidField
from memory_system.events import MAX_NAME_CHARS, SEVERITIES, Event, make_event, severity_of
from memory_system.fields import Span
from memory_system.health.broadcast import MANAGER, Broadcaster
from memory_system.health.folding import Broadcast, BroadcastFolder
from memory_system.health.history import History, Rows
from memory_system.health.records import HistoryFailed
from memory_system.log import get_logger
from memory_system.security import Gate
from memory_system.settings import Settings

log = get_logger("health.bus")

Name = Annotated[str, Span(1, MAX_NAME_CHARS)]
_GRANTS_LOOK_S: Final = 1.0


class Bus:
    """The history, the folder and the broadcaster. Used on the event loop, but for `report`.

    `on_event` hears of each event that was committed. `gate`: whose keys may listen, where there are keys.
    """

    broadcaster: Broadcaster

    def __init__(
        self,
        settings: Settings,
        address: str,
        boot_id: str,
        *,
        on_event: Callable[[Event], None],
        gate: Gate | None = None,
    ) -> None:
        self.history = History(settings.error_bus.history_path, settings.error_bus, on_commit=self._committed)
        self._settings = settings
        self._address = address
        self._boot_id = boot_id
        self._on_event = on_event
        self._gate = gate
        self._timer: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        self.lost_reports = 0

    def __repr__(self) -> str:
        return f"Bus({self.history!r})"

    async def start(self) -> None:
        """Open the history and the port. Raises CannotStart."""
        self._loop = asyncio.get_running_loop()
        await self.history.start()
        last_seq = self.history.last_seq
        rules = self._settings.error_bus
        self._folder = BroadcastFolder(rules.fold_s, rules.broadcasts_per_s, last_seq)
        self.broadcaster = Broadcaster(
            self._address, self._settings, self._boot_id, last_error_seq=last_seq, gate=self._gate
        )
        self.broadcaster.bind()
        self.broadcaster.start(self._loop)
        if self._gate is not None:
            self._look_at_grants()

    def _look_at_grants(self) -> None:
        self._look = self._loop.call_later(_GRANTS_LOOK_S, self._look_at_grants)
        self.broadcaster.look()

    async def close(self) -> None:
        """Commit what waits, tell what was held back, close. May be called after a failed start, and twice."""
        for timer in (self._timer, self._look):
            if timer is not None:
                timer.cancel()
        self._timer = None
        await self.history.close()
        if hasattr(self, "broadcaster"):
            await asyncio.sleep(0)  # the last commit is told on the loop
            self._publish(self._folder.flush(time.monotonic()))
            self.broadcaster.close()

    def report(
        self,
        error_type: str,
        message: str,
        severity: str = "error",
        *,
        request_id: str | None = None,
        details: Mapping[str, Any] | None = None,
        agent: str | None = None,
    ) -> None:
        """An event of the manager's own, straight into the history. From any thread; never blocks or raises."""
        event = make_event(agent or MANAGER, error_type, message, severity, request_id=request_id, details=details)
        try:
            self._loop.call_soon_threadsafe(self._submit, event)
        except RuntimeError:
            self.lost_reports += 1  # the loop has ended; the log has the line

    async def get_errors(
        self,
        *,
        since_seq: Annotated[int, Span(0, 2**62)] | None = None,
        since: float | None = None,
        agent: Name | None = None,
        severity: Name | None = None,
        error_type: Name | None = None,
        limit: Annotated[int, Span(1, 1000)] = 100,
        newest: bool = False,
    ) -> dict[str, Any]:
        """The action get_errors: events of the history, oldest first; `newest` picks the last ones."""
        least = None if severity is None else severity_of(severity)
        if severity is not None and least is None:
            raise InvalidField("severity", f"severity: expected one of {', '.join(SEVERITIES)}")
        found = await self.history.get_errors(
            since_seq=since_seq,
            since=since,
            agent=agent,
            severity=least,
            error_type=error_type,
            limit=limit,
            newest=newest,
        )
        reply: dict[str, Any] = {
            "results": [each.fields() for each in found.results],
            "count": len(found.results),
            "total": found.total,
            "last_seq": found.last_seq,
            "oldest_seq": found.oldest_seq,
        }
        if found.next_since_seq is not None:
            reply["next_since_seq"] = found.next_since_seq
        return reply

    def figures(self) -> dict[str, Any]:
        return {
            "history": self.history.figures(),
            "broadcast": self.broadcaster.figures(),
            "last_error_seq": self.broadcaster.last_error_seq,
            "lost_reports": self.lost_reports,
        }

    def _submit(self, event: Event) -> None:
        self.history.submit([event], may_return=False).add_done_callback(self._submitted)

    def _submitted(self, done: asyncio.Future[Any]) -> None:
        if not done.cancelled() and isinstance(done.exception(), HistoryFailed):
            self.lost_reports += 1  # why, the history has logged

    def _committed(self, rows: Rows) -> None:
        now_s = time.monotonic()
        for seq, event in rows:
            self._on_event(event)
            self._publish(self._folder.admit(seq, event, now_s))
        self._arm()

    def _publish(self, messages: Iterable[Broadcast]) -> None:
        for message in messages:
            self.broadcaster.publish_error(message.fields())

    def _arm(self) -> None:
        """Look at the folder again when it may have something."""
        due_s = self._folder.next_due
        if due_s is None or (self._timer is not None and self._timer_s <= due_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = due_s
        self._timer = self._loop.call_later(max(0.0, due_s - time.monotonic()), self._due)

    def _due(self) -> None:
        self._timer = None
        self._publish(self._folder.due(time.monotonic()))
        self._arm()

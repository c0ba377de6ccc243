"""What a program does to be seen by the health manager: it reports its errors, and says every few seconds that it
lives."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from memory_system import bus_log
from memory_system.error_bus import ErrorReporter
from memory_system.heartbeat import Heartbeat
from memory_system.keys import KeyFile, key_for
from memory_system.log import get_logger
from memory_system.metrics import Family, counter
from memory_system.program import connect_address
from memory_system.settings import Settings

CLOSE_S: Final = 1.0
_MAX_TYPES: Final = 1_000
# What libraries of the worker print is kept in the log; that the worker ended is an event of its own.
_QUOTED: Final = frozenset({"memory_system.embedding.worker"})


def bus_endpoint(settings: Settings) -> str:
    """Where errors are reported to; empty when they are not."""
    if not settings.error_bus.enabled:
        return ""
    return settings.error_bus.address or connect_address(settings.network.bind, settings.health.report_port)


log = get_logger("reporting")


class CountingReporter(ErrorReporter):
    """A reporter that knows how many events of each type it was given, whatever became of the bus."""

    def __init__(self, endpoint: str, agent: str, *, queue_events: int, key: KeyFile | None = None) -> None:
        super().__init__(endpoint, agent, queue_events=queue_events, key=key)

    def _begin(self) -> None:
        """Also in a forked child, whose parent may have held the lock."""
        super()._begin()
        self._counts: Counter[tuple[str, str]] = Counter()
        # Reentrant, as a report may interrupt another one of its thread: from a signal handler.
        self._counting = threading.RLock()

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
        with self._counting:
            labels = (error_type, severity)
            known = labels in self._counts or len(self._counts) < _MAX_TYPES
            self._counts[labels if known else ("(various)", severity)] += 1
        super().report(error_type, message, severity, request_id=request_id, details=details, agent=agent)

    def counts(self) -> dict[tuple[str, str], int]:
        """Events by (error_type, severity) since the start."""
        with self._counting:
            return dict(self._counts)


class Reporting:
    """One program's part in the error bus. From construction its log's warnings and errors are reported, from `start`
    on it sends heartbeats and logs what nobody caught on the event loop; nothing here ever waits for the bus."""

    def __init__(self, settings: Settings, component: str) -> None:
        bus = settings.error_bus
        self.component = component
        key = key_for(component, settings)
        self.reporter = CountingReporter(bus_endpoint(settings), component, queue_events=bus.queue_events, key=key)
        self._interval_s = settings.health.heartbeat_s
        self._handler = bus_log.install(self.reporter)
        self._handler.addFilter(lambda record: record.name not in _QUOTED)
        self._heartbeat: Heartbeat | None = None
        self._lost: set[str] = set()

    def __repr__(self) -> str:
        return f"<Reporting {self.component} {self.reporter!r}>"

    def start(self, figures: Callable[[], dict[str, Any]]) -> None:
        """Begin the heartbeats, on the running event loop, unless they have begun. `figures()` has `state` and is asked
        every second."""
        if self._heartbeat is not None:
            return
        self._heartbeat = Heartbeat(self.reporter, self.component, figures, interval_s=self._interval_s)
        self._heartbeat.start()
        asyncio.get_running_loop().set_exception_handler(_unhandled)

    def part_changed(self, part: str, state: str) -> None:
        """A part of the program went away ("down", "unavailable") or is "ready". Its loss is a line of the log, which
        reports it; that it came back is an event <part>_ready."""
        if state in ("down", "unavailable"):
            self._lost.add(part)
        elif state == "ready" and part in self._lost:
            self._lost.remove(part)
            self.reporter.report(f"{part}_ready", f"the {part.replace('_', ' ')} answers again", "info")

    def families(self) -> list[Family]:
        """Events reported, by type, and what became of them."""
        stats = self.reporter.stats()
        fates: dict[tuple[str, ...], float] = {
            (fate,): stats[fate] for fate in ("acknowledged", "dropped", "discarded")
        }
        errors: dict[tuple[str, ...], float] = {labels: count for labels, count in self.reporter.counts().items()}
        return [
            counter("errors", "Events that this program reported.", ("error_type", "severity"), errors),
            counter("reports", "What became of them on the way to the error bus.", ("fate",), fates),
        ]

    async def close(self) -> None:
        """Stop the heartbeats and send what is left, for at most a second; at once when there is no bus."""
        if self._heartbeat is not None:
            self._heartbeat.close()
            self._heartbeat = None
            asyncio.get_running_loop().set_exception_handler(None)
        bus_log.remove(self._handler)
        await asyncio.to_thread(self.reporter.close, CLOSE_S)


def _unhandled(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception that no code of ours caught: the loop goes on without the callback or task that raised it."""
    error = context.get("exception")
    log.error("unhandled_exception", error=type(error).__name__, where=context.get("message"), exc_info=error)

"""Reporting errors to the health manager: events are kept until it acknowledges them, and nobody ever waits for it.

    reporter = ErrorReporter("tcp://127.0.0.1:7152", "planner")
    reporter.report("tool_failed", "the search tool gave up", details={"tool": "search", "attempts": 3})
    reporter.close()

What is reported is in memory alone: events that were not acknowledged end with their process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

from memory_system.bus_sender import Sender
from memory_system.events import make_event
from memory_system.keys import KeyFile
from memory_system.outbox import Outbox, encode_event, encode_heartbeat

REPORT_PORT: Final = 7152
ADDRESS_VARIABLE: Final = "MEMORY_ERROR_BUS_ADDR"

# Longest time that the end of a program is held up, by all its reporters together.
EXIT_S: Final = 0.3
# What `close` allows for beyond its time: a wait under way, and the socket's linger.
END_S: Final = 0.2


class ErrorReporter:
    """Reports of one agent. Every method but `close` returns within microseconds and never raises, from any thread,
    from signal and log handlers, whatever became of the bus. A forked child starts with nothing to tell.

    endpoint: of the health manager's report port; "": reports go nowhere.
    queue_events: unacknowledged events that are kept. More are counted, and the counts reported as one event
        `events_dropped` when there is room again.
    key: whose reports these are for a bus that takes none without keys.
    resend_s: an answer is waited for this long, then the connection is made anew and the events are sent again.
    """

    def __init__(
        self,
        endpoint: str,
        agent: str,
        *,
        queue_events: int = 10_000,
        resend_s: float = 2.0,
        key: KeyFile | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.agent = agent
        self._key = key
        self._queue_events = queue_events
        self._resend_s = resend_s
        self._closed = False
        self._begin()
        _at_exit_and_fork()
        with _registry_lock:
            _reporters.add(self)

    def _begin(self) -> None:
        self._lock = threading.RLock()  # a signal handler may report in the middle of a report
        self._outbox = Outbox(self.agent, self._queue_events, self._resend_s)
        self._starting = threading.Lock()
        self._sender = Sender(self.endpoint, self._outbox, self._lock, self._key)  # not started
        self._discarded = 0

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
        """Report an event: severity info, warning, error or critical; `details` has ids, codes and sizes only.

        agent: who it is about, where that is not the reporter's own.
        """
        if self._is_off:
            self._discard()
            return
        try:
            if self._outbox.is_full:
                self._outbox.drop(str(error_type), str(severity))
                return
            event = make_event(
                agent or self.agent, error_type, message, severity, request_id=request_id, details=details
            )
            encoded = encode_event(event)
        except Exception:  # noqa: BLE001 - what a caller passes may raise anything when it is read
            self._discard()
            return
        self._outbox.put(encoded, event.error_type, event.severity)
        self._rouse(Sender.event_waits)

    def heartbeat(self, fields: Mapping[str, Any]) -> None:
        """Say that a component lives: component, timestamp (epoch s), pid, state and figures. Only the latest is kept;
        nobody acknowledges it."""
        if self._is_off:
            return
        self._outbox.put_heartbeat(encode_heartbeat(fields), time.monotonic())
        self._rouse(Sender.ring)

    def stats(self) -> dict[str, int]:
        """reported = acknowledged + waiting + dropped (no room) + discarded (no bus, closed, no event); malformed:
        acknowledged ones that the bus could not read. Events that tell of dropped ones are not counted as reported."""
        outbox = self._outbox
        return {
            "reported": outbox.accepted + outbox.dropped + self._discarded,
            "waiting": outbox.waiting,
            "acknowledged": outbox.acknowledged,
            "malformed": outbox.malformed,
            "dropped": outbox.dropped,
            "discarded": self._discarded,
        }

    def close(self, timeout_s: float = 1.0) -> None:
        """Send what waits as long as the bus answers, at most `timeout_s`, and stop; later reports go nowhere.

        Without a bus it returns at once (a connection begun just now gets 0.2 s). Closing twice is fine.
        """
        self._finish(time.monotonic() + timeout_s).ended.wait(timeout_s + END_S)

    def _finish(self, deadline_s: float) -> Sender:
        with self._lock:
            self._closed = True
            self._sender.finish(deadline_s)
            return self._sender

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def _is_off(self) -> bool:
        return self._closed or not self.endpoint

    def _discard(self) -> None:
        with self._lock:
            self._discarded += 1

    def _rouse(self, tell: Callable[[Sender], None]) -> None:
        """Tell the thread that there is something to send; start one if there is none."""
        with self._lock:
            if self._closed:
                return
            # A report from a signal handler that interrupts this very start leaves it to the one that it interrupts.
            if not self._sender.is_alive and self._starting.acquire(blocking=False):
                try:
                    self._start()
                finally:
                    self._starting.release()
            tell(self._sender)

    def _start(self) -> None:
        if self._sender.is_alive:
            return
        sender = Sender(self.endpoint, self._outbox, self._lock, self._key)
        with contextlib.suppress(RuntimeError):  # no more threads; the next report tries again
            sender.start()
            self._sender = sender

    def _inherit(self) -> None:
        """In a forked child: the thread is not here, its socket pair is."""
        sender = self._sender
        self._begin()
        sender.close_bell()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"waiting={self._outbox.waiting}"
        return f"<ErrorReporter {self.endpoint or 'off'} agent={self.agent} {state}>"


def shared_reporter(endpoint: str, agent: str, key: KeyFile | None = None) -> ErrorReporter:
    """The one reporter of this process for this endpoint and key, a new one if it was closed; `agent` is whose it is
    then."""
    name = (endpoint, None if key is None else key.public)
    with _registry_lock:
        reporter = _shared.get(name)
        if reporter is None or reporter.is_closed:
            reporter = _shared[name] = ErrorReporter(endpoint, agent, key=key)
        return reporter


_registry_lock = threading.RLock()
_reporters: weakref.WeakSet[ErrorReporter] = weakref.WeakSet()
_shared: dict[tuple[str, bytes | None], ErrorReporter] = {}


@functools.cache
def _at_exit_and_fork() -> None:
    atexit.register(_close_all)
    os.register_at_fork(after_in_child=_begin_all)


def _close_all() -> None:
    deadline_s = time.monotonic() + EXIT_S
    with _registry_lock:
        reporters = list(_reporters)
    senders = [reporter._finish(deadline_s) for reporter in reporters]
    for sender in senders:
        sender.ended.wait(max(0.0, deadline_s - time.monotonic()))


def _begin_all() -> None:
    """In a forked child: locks may be held by threads that are not here, and what is kept is the parent's to send."""
    global _registry_lock
    _registry_lock = threading.RLock()
    for reporter in list(_reporters):
        reporter._inherit()

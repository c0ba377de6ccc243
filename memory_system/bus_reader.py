"""Reading the error bus: the history first, then what is broadcast, each event once, whatever was lost between.

    with BusReader("tcp://127.0.0.1:7150", "tcp://127.0.0.1:7121", since_s=time.time() - 600) as reader:
        for each in reader:
            ...

The broadcast is a hint and the history is the truth. A message whose `prev_seq` is above what this reader has seen, a
heartbeat of the manager with a higher `last_error_seq`, a new connection: each means that something may be missing,
and the reader asks `get_errors` for it before it goes on. When the history itself is another, because its file was lost
or an older one put in its place, only what happened since the last event is new. Needs pyzmq and the standard library.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import zmq

from memory_system.bus_link import Api, Subscription
from memory_system.bus_progress import VARIOUS_KIND, BusEvent, Had, Message, Progress, row_event
from memory_system.errors import ClientClosed, InvalidReply, MemorySystemError, Unreachable
from memory_system.events import (
    ERROR_TOPIC,
    HEARTBEAT_TOPIC,
    SEVERITIES,
    MalformedEvent,
    at_least,
    decode_message,
    kind_of,
)
from memory_system.keys import KeyFile

PAGE_ROWS: Final = 500
MAX_LAST: Final = 1000
_RETRY_S: Final = 0.5
_CONNECT_S: Final = 2.0
_READ_BATCH: Final = 100
# A signal between the interpreter's last look and the wait is seen only after it: Ctrl-C must not wait for a message.
_LONGEST_WAIT_S: Final = 1.0


class BusReader:
    """An iterator of the BusEvents that match the filters. Used by one thread.

    It begins with what happened since `since_s` (epoch seconds), else with the `last` newest events (at most
    1,000). `severity` is the least severe. `key`: whose role the manager asks for, where it lets in nobody without one
    (operator or admin). `on_state` gets a sentence when the manager cannot be reached, and None
    when it can again; the reader goes on trying. Raises zmq.ZMQError for an endpoint that is none, ValueError for an
    unknown severity, and while reading AccessDenied and any error reply that asking again would not change.
    """

    def __init__(
        self,
        publish: str,
        api: str,
        *,
        since_s: float | None = None,
        last: int = 0,
        severity: str = SEVERITIES[0],
        agent: str | None = None,
        error_type: str | None = None,
        key: KeyFile | None = None,
        on_state: Callable[[str | None], None] = lambda reason: None,
    ) -> None:
        filters = {"severity": severity, "agent": agent, "error_type": error_type}
        self._filters = {name: value for name, value in filters.items() if value is not None}
        self._severities = at_least(severity)
        self._first_question: dict[str, Any] | None = _first_question(since_s, last)
        self._wants_first_rows = since_s is not None or last > 0
        self._on_state = on_state
        self._progress = Progress()
        self._had = Had(time.time())
        self._is_other = False  # whether another history is read than the one before
        self._ready: deque[BusEvent] = deque()
        self._held: Message | None = None  # waits for what comes before it
        self._behind = True
        self._cursor = 0
        self._retry_at_s = 0.0
        self._connect_until_s = time.monotonic() + _CONNECT_S
        self._connections = 0
        self._problems: dict[str, str] = {}
        self._told_state: str | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._live = Subscription(self._context, publish, ERROR_TOPIC, HEARTBEAT_TOPIC, key=key)
            self._api = Api(self._context, api, key)
        except BaseException:  # whatever it was, the sockets must not outlive it
            self._context.destroy(0)
            raise

    def __repr__(self) -> str:
        return f"BusReader({self._live.endpoint}, {self._progress}, {'behind' if self._behind else 'live'})"

    def __enter__(self) -> BusReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[BusEvent]:
        while True:
            event = self.read()
            if event is not None:
                yield event

    def read(self, timeout_s: float | None = None) -> BusEvent | None:
        """The next event; None when there was none within `timeout_s`. Raises ClientClosed after `close`."""
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._ready:
            self._work(time.monotonic())
            if not self._ready:
                now_s = time.monotonic()
                if now_s >= until_s:
                    return None
                self._wait(min(until_s, self._next_s()) - now_s)
        event = self._ready.popleft()
        self._had.note(event)
        return event

    def history(self) -> Iterator[BusEvent]:
        """What the history has by now. Raises Unreachable when the manager does not answer."""
        while self._ready or self._behind:
            event = self.read(0.1)
            if event is not None:
                yield event
            elif "api" in self._problems:
                raise Unreachable(self._problems["api"])

    def close(self) -> None:
        """Closing again does nothing."""
        if not self._context.closed:
            self._live.close()
            self._context.destroy(0)

    # -- what there is to do ----------------------------------------------------------------------------------

    def _work(self, now_s: float) -> None:
        if self._context.closed:
            raise ClientClosed("the reader is closed")
        self._look_at_connection(now_s)
        if self._behind:
            self._fetch(now_s)
        for _ in range(_READ_BATCH):
            if self._behind or not self._hear_one():
                return

    def _next_s(self) -> float:
        """When there is something to do that no socket tells of."""
        if self._behind:
            return self._api.answer_until_s if self._api.waits else self._retry_at_s
        return self._connect_until_s

    def _wait(self, wait_s: float) -> None:
        poller = zmq.Poller()
        poller.register(self._live.monitor, zmq.POLLIN)
        if not self._behind:
            poller.register(self._live.socket, zmq.POLLIN)
        elif self._api.waits:
            poller.register(self._api.socket, zmq.POLLIN)
        poller.poll(max(0, math.ceil(min(wait_s, _LONGEST_WAIT_S) * 1000)))

    def _fall_behind(self) -> None:
        if not self._behind:
            self._behind = True
            self._cursor = self._progress.told_seq

    # -- the history ------------------------------------------------------------------------------------------

    def _fetch(self, now_s: float) -> None:
        if not self._api.waits:
            if now_s < self._retry_at_s:
                return
            question = dict(self._first_question or {"limit": PAGE_ROWS})
            if self._cursor or not self._first_question:
                question["since_seq"] = self._cursor
            self._api.ask({**question, **self._filters}, now_s)
        try:
            reply = self._api.answer(now_s)
        except MemorySystemError as error:
            if not error.retryable and not isinstance(error, InvalidReply):
                raise
            self._retry_at_s = now_s + _RETRY_S
            self._problem("api", error.message)
            return
        if reply is not None:
            self._problem("api", None)
            self._take(reply)

    def _take(self, reply: Mapping[str, Any]) -> None:
        rows = sorted(_rows(reply), key=lambda row: row.seq)
        more = reply.get("next_since_seq")
        if self._first_question and not self._wants_first_rows:
            rows = []
        admitted = (self._progress.admit_row(row) for row in rows)
        self._ready.extend(row for row in admitted if row is not None and not (self._is_other and row in self._had))
        if isinstance(more, int) and more > self._cursor:
            self._cursor = more
            return
        self._first_question = None
        last_seq = reply.get("last_seq")
        if not self._progress.history_read(last_seq if isinstance(last_seq, int) else self._progress.told_seq):
            self._cursor = 0
            self._first_question, self._wants_first_rows = {"since": self._had.since_s, "limit": PAGE_ROWS}, True
            self._is_other = True
            return
        self._is_other = False
        self._behind = False
        if self._held is not None:
            held, self._held = self._held, None
            self._admit(held)

    # -- the broadcast ----------------------------------------------------------------------------------------

    def _look_at_connection(self, now_s: float) -> None:
        for up in self._live.changes():
            if not up:
                hint = ": does its public key stand in the key file?" if self._live.is_broken_off else ""
                self._problem("publish", f"the connection to {self._live.endpoint} is lost{hint}")
                continue
            self._connect_until_s = math.inf
            self._problem("publish", None)
            self._connections += 1
            if self._connections > 1:
                self._fall_behind()  # for what was broadcast between the connections
        if now_s >= self._connect_until_s:
            self._connect_until_s = math.inf
            self._problem("publish", f"no connection to {self._live.endpoint}")

    def _hear_one(self) -> bool:
        frame = self._live.receive()
        if frame is None:
            return False
        with contextlib.suppress(MalformedEvent):
            self._hear(*decode_message(frame))
        return True

    def _hear(self, topic: str, fields: Mapping[str, Any]) -> None:
        if topic == ERROR_TOPIC:
            message = Message.parse(fields, time.time())
            if self._progress.is_behind(message.boot_id, message.prev_seq):
                self._held = message
                self._fall_behind()
            else:
                self._admit(message)
            return
        last_seq = fields.get("last_error_seq")  # only the manager's own heartbeat has it
        if isinstance(last_seq, int) and self._progress.is_behind(str(fields.get("boot_id")), last_seq):
            self._fall_behind()

    def _admit(self, message: Message) -> None:
        if kind_of(message.event.event) == VARIOUS_KIND and self._filters.keys() & {"agent", "error_type"}:
            self._fall_behind()  # only the history knows which of those that were summed up match
            return
        found = self._progress.admit_message(message)
        if found is not None and self._matches(found):
            self._ready.append(found)

    def _matches(self, found: BusEvent) -> bool:
        event, filters = found.event, self._filters
        return (
            event.severity in self._severities
            and filters.get("agent", event.agent) == event.agent
            and filters.get("error_type", event.error_type) == event.error_type
        )

    def _problem(self, where: str, reason: str | None) -> None:
        if reason is None:
            self._problems.pop(where, None)
        else:
            self._problems[where] = reason
        state = next(iter(self._problems.values()), None)
        if state != self._told_state:
            self._told_state = state
            self._on_state(state)


def _first_question(since_s: float | None, last: int) -> dict[str, Any]:
    if since_s is not None:
        return {"since": since_s, "limit": PAGE_ROWS}
    # Even of no event: the reply says how far the history is.
    return {"newest": True, "limit": min(max(last, 1), MAX_LAST)}


def _rows(reply: Mapping[str, Any]) -> Iterator[BusEvent]:
    results = reply.get("results")
    for row in results if isinstance(results, list) else ():
        with contextlib.suppress(MalformedEvent):
            yield row_event(row, time.time())

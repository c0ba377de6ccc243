"""What a reporter of the error bus keeps until it is acknowledged, and what it sends when. Without I/O.

Any thread puts in and drops; one thread sends and hears. The clock is passed in: times ending in `_s` are monotonic
seconds.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

import msgpack

from memory_system.events import Event, make_event

VERSION: Final = 1
MAX_BATCH_EVENTS: Final = 500
MAX_BATCH_BYTES: Final = 1024 * 1024
# Events are small, but may have 16 KiB each; whichever of the two limits comes first.
MAX_QUEUE_BYTES: Final = 16 * 1024 * 1024
MAX_RESEND_S: Final = 5.0
MIN_RETRY_S: Final = 0.01
MAX_RETRY_S: Final = 30.0
# A heartbeat says "I live now": one that could not be sent for so long is thrown away.
HEARTBEAT_KEPT_S: Final = 5.0
# Kinds of dropped events that are counted one by one, short enough for an event's details.
MAX_DROPPED_KINDS: Final = 16
MAX_KIND_CHARS: Final = 64
OTHER_KINDS: Final = "(other)"


def encode_event(event: Event) -> bytes:
    """The event as msgpack. Details that msgpack has no form for are left out."""
    fields = event.fields()
    details: dict[Any, Any] = fields["details"]
    try:
        if any(isinstance(value, (dict, list, tuple)) for value in details.values()):
            fields["details"] = json.loads(json.dumps(details))  # all keys are text then
        return _pack(fields)
    except (TypeError, ValueError, OverflowError, RecursionError):
        fields["details"] = {"unencodable": True}
        return _pack(fields)


class Outbox:
    """Encoded events in the order of their reports, at most `limit`; the first of them are the batch under way.

    One batch is under way at a time. It is sent again, the same in content and number, until it is acknowledged: after
    `resend_s` without an answer, twice that the next time, at most MAX_RESEND_S.

    A signal handler may report in the middle of a report, wherever something is called: hence a reentrant lock, and no
    call between the reading and the writing of a number.
    """

    def __init__(self, agent: str, limit: int, resend_s: float) -> None:
        self.accepted = 0
        self.acknowledged = 0
        self.malformed = 0
        self.dropped = 0
        self._agent = agent
        self._limit = limit
        self._resend_s = resend_s
        self._lock = threading.RLock()
        self._queue: deque[bytes] = deque()
        self._bytes = 0
        self._dropped: dict[str, int] = {}  # what no event has told of yet
        self._heartbeat: tuple[bytes, float] | None = None
        self._batch = 0
        self._body: bytes | None = None
        self._under_way = 0
        self._unanswered = 0
        self._send_at_s = 0.0
        self._answer_by_s: float | None = None

    def put(self, event: bytes, error_type: str, severity: str) -> None:
        """Keep an encoded event, or count it where there is no room."""
        size = len(event)
        with self._lock:
            if self.is_full or self._bytes + size > MAX_QUEUE_BYTES:
                self.drop(error_type, severity)
                return
            self.accepted += 1
            self._bytes += size
            self._queue.append(event)

    def drop(self, error_type: str, severity: str) -> None:
        """Count an event that is not kept."""
        kind = f"{error_type[:MAX_KIND_CHARS]}/{severity}"
        with self._lock:
            self.dropped += 1
            if kind not in self._dropped and len(self._dropped) >= MAX_DROPPED_KINDS:
                kind = OTHER_KINDS
            self._dropped.setdefault(kind, 0)
            self._dropped[kind] += 1

    def put_heartbeat(self, heartbeat: bytes, now_s: float) -> None:
        """Keep this one alone."""
        self._heartbeat = heartbeat, now_s

    @property
    def is_full(self) -> bool:
        return self.waiting >= self._limit

    @property
    def waiting(self) -> int:
        """Events that are not acknowledged."""
        return len(self._queue) + self._under_way

    @property
    def is_empty(self) -> bool:
        return not self._queue and self._body is None and not self._dropped

    @property
    def is_under_way(self) -> bool:
        return self._body is not None

    @property
    def is_unanswered(self) -> bool:
        """Whether the other side has been silent for at least one whole waiting time."""
        return self._unanswered > 0

    def heartbeat(self, now_s: float) -> bytes | None:
        """The heartbeat to send now; it stays until `heartbeat_sent`."""
        kept = self._heartbeat
        if kept is not None and now_s - kept[1] > HEARTBEAT_KEPT_S:
            kept = self._heartbeat = None
        return None if kept is None else kept[0]

    def heartbeat_sent(self, heartbeat: bytes) -> None:
        kept = self._heartbeat
        if kept is not None and kept[0] is heartbeat:
            self._heartbeat = None

    def batch(self, now_s: float) -> bytes | None:
        """The batch to send now; it stays until it is acknowledged."""
        if self._body is None and not self.is_empty:
            self._load(now_s)
        is_due = self._answer_by_s is None and now_s >= self._send_at_s
        return self._body if is_due else None

    def batch_sent(self, now_s: float) -> None:
        longest_s = max(self._resend_s, MAX_RESEND_S)
        self._answer_by_s = now_s + min(self._resend_s * 2.0 ** min(self._unanswered, 16), longest_s)

    def is_overdue(self, now_s: float) -> bool:
        """Whether the answer has not come in time: the connection is in doubt, and the batch is due again."""
        if self._answer_by_s is None or now_s < self._answer_by_s:
            return False
        self._unanswered += 1
        self._send_again_at(now_s)
        return True

    def heard(self, body: bytes, now_s: float) -> None:
        """An answer came. What is none, or belongs to another batch, changes nothing."""
        answer = _answer(body)
        if self._body is None or answer.get("batch") != self._batch:
            return
        if answer.get("kind") == "ack":
            self._finish(answer)
        elif answer.get("kind") == "retry":
            self._unanswered = 0
            asked_ms = answer.get("retry_after_ms")
            asked_s = asked_ms / 1000.0 if isinstance(asked_ms, (int, float)) else self._resend_s
            self._send_again_at(now_s + min(max(MIN_RETRY_S, asked_s), MAX_RETRY_S))

    def wait_s(self, now_s: float) -> float | None:
        """How long nothing has to be sent, if nothing comes in; None: for ever."""
        if self._body is not None:
            return max(0.0, (self._send_at_s if self._answer_by_s is None else self._answer_by_s) - now_s)
        return None if self.is_empty else 0.0

    def _send_again_at(self, time_s: float) -> None:
        self._answer_by_s = None
        self._send_at_s = time_s

    def _finish(self, answer: Mapping[str, Any]) -> None:
        malformed = answer.get("malformed")
        with self._lock:
            self.acknowledged += self._under_way
            self.malformed += malformed if isinstance(malformed, int) else 0
            self._under_way = self._unanswered = 0
            self._body = self._answer_by_s = None

    def _load(self, now_s: float) -> None:
        with self._lock:
            had_dropped = bool(self._dropped)
            events = [self._dropped_event()] if had_dropped else []
            size = sum(map(len, events))
            while self._queue and len(events) < MAX_BATCH_EVENTS and size + len(self._queue[0]) <= MAX_BATCH_BYTES:
                event = self._queue.popleft()
                events.append(event)
                size += len(event)
                self._bytes -= len(event)
            # The event about dropped ones is not counted: nobody reported it.
            self._under_way = len(events) - had_dropped
        self._batch += 1
        self._body = _pack_batch(self._batch, events)
        self._send_again_at(now_s)

    def _dropped_event(self) -> bytes:
        counts, self._dropped = self._dropped, {}
        total = sum(counts.values())
        event = make_event(
            self._agent,
            "events_dropped",
            f"{total} events were dropped: the bus did not take them and the queue was full",
            details={"total": total, "counts": counts},
            now_s=time.time(),
            count=total,
        )
        return encode_event(event)


def encode_heartbeat(fields: Mapping[str, Any]) -> bytes:
    """The heartbeat as msgpack. Figures that msgpack has no form for are left out: they must not make a program look
    dead."""
    whole = {"v": VERSION, "kind": "heartbeat", **fields}
    try:
        return _pack(whole)
    except (TypeError, ValueError, OverflowError):
        return _pack({name: value for name, value in whole.items() if _can_pack((name, value))})


def _can_pack(value: Any) -> bool:
    try:
        _pack(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def _pack_batch(number: int, events: list[bytes]) -> bytes:
    packer = msgpack.Packer(use_bin_type=True, autoreset=False)
    packer.pack_map_header(4)
    for part in ("v", VERSION, "kind", "events", "batch", number, "events"):
        packer.pack(part)
    packer.pack_array_header(len(events))
    return b"".join((packer.bytes(), *events))


def _answer(body: bytes) -> Mapping[Any, Any]:
    try:
        answer = msgpack.unpackb(body, raw=False, strict_map_key=False)
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException):
        return {}
    return answer if isinstance(answer, dict) else {}

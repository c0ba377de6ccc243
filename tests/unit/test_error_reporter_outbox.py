"""What a reporter keeps and sends, decided without a socket or a clock."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_system import bus_sender
from memory_system.events import Event, make_event, parse_event
from memory_system.outbox import (
    HEARTBEAT_KEPT_S,
    MAX_BATCH_BYTES,
    MAX_BATCH_EVENTS,
    MAX_QUEUE_BYTES,
    MAX_RESEND_S,
    Outbox,
    encode_event,
    encode_heartbeat,
)

RESEND_S = 2.0


def filled(count: int, limit: int = 10_000, message: str = "") -> Outbox:
    outbox = Outbox("tester", limit, RESEND_S)
    for number in range(count):
        put(outbox, f"e{number}", message)
    return outbox


def put(outbox: Outbox, error_type: str, message: str = "") -> None:
    outbox.put(encode_event(make_event("tester", error_type, message)), error_type, "error")


def batch(outbox: Outbox, now_s: float = 0.0) -> dict[str, Any]:
    body = outbox.batch(now_s)
    assert body is not None
    message: dict[str, Any] = msgpack.unpackb(body, strict_map_key=True)
    return message


def answer(outbox: Outbox, number: int, now_s: float = 0.0, kind: str = "ack", **fields: Any) -> None:
    outbox.heard(msgpack.packb({"kind": kind, "batch": number, **fields}), now_s)


def test_a_batch_is_as_the_bus_reads_it() -> None:
    outbox = Outbox("tester", 10, RESEND_S)
    event = make_event("planner", "tool_failed", "gave up", "warning", request_id="r", details={"n": 1}, now_s=5.0)
    outbox.put(encode_event(event), "tool_failed", "warning")
    message = batch(outbox)
    assert message == {"v": 1, "kind": "events", "batch": 1, "events": [event.fields()]}
    assert parse_event(message["events"][0], 9.0) == event


def test_nothing_to_send_is_no_batch() -> None:
    outbox = Outbox("tester", 10, RESEND_S)
    assert outbox.batch(0.0) is None
    assert outbox.is_empty
    assert outbox.wait_s(0.0) is None


def test_one_batch_is_under_way_until_it_is_acknowledged() -> None:
    outbox = filled(1)
    first = batch(outbox)
    outbox.batch_sent(0.0)
    put(outbox, "later")
    assert outbox.batch(1.0) is None
    answer(outbox, first["batch"])
    second = batch(outbox, 1.0)
    assert second["batch"] == 2
    assert [event["error_type"] for event in second["events"]] == ["later"]


def test_it_is_sent_again_unchanged_and_ever_later() -> None:
    outbox = filled(3)
    first, now_s, waits = outbox.batch(0.0), 0.0, []
    for _ in range(4):
        outbox.batch_sent(now_s)
        wait_s = outbox.wait_s(now_s)
        assert wait_s is not None
        waits.append(wait_s)
        assert not outbox.is_overdue(now_s + wait_s - 0.001)
        now_s += wait_s
        assert outbox.is_overdue(now_s)
        assert outbox.is_unanswered
        assert outbox.batch(now_s) == first
    assert waits == [RESEND_S, 2 * RESEND_S, MAX_RESEND_S, MAX_RESEND_S]
    answer(outbox, 1)
    assert not outbox.is_unanswered
    assert outbox.is_empty
    assert outbox.acknowledged == 3


def test_a_batch_that_was_not_sent_is_not_overdue() -> None:
    outbox = filled(1)
    assert outbox.batch(0.0) is not None
    assert not outbox.is_overdue(1e6)
    assert outbox.batch(1e6) is not None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgpack.packb([1]),
        msgpack.packb({"kind": "ack"}),
        msgpack.packb({"kind": "ack", "batch": 2}),
        msgpack.packb({"kind": "refused", "batch": 1}),
    ],
)
def test_an_answer_that_is_none_acknowledges_nothing(body: bytes) -> None:
    outbox = filled(1)
    outbox.batch(0.0)
    outbox.batch_sent(0.0)
    outbox.heard(body, 0.0)
    assert outbox.waiting == 1
    assert outbox.is_overdue(RESEND_S)


@pytest.mark.parametrize(
    ("asked", "wait_s"), [(700, 0.7), (0, 0.01), (-5, 0.01), (float("nan"), 0.01), (1e9, 30.0), (None, RESEND_S)]
)
def test_retry_waits_as_long_as_asked(asked: float | None, wait_s: float) -> None:
    outbox = filled(1)
    outbox.batch(0.0)
    outbox.batch_sent(0.0)
    answer(outbox, 1, 10.0, "retry", retry_after_ms=asked)
    assert outbox.wait_s(10.0) == pytest.approx(wait_s)
    assert outbox.batch(10.0 + wait_s - 0.001) is None
    assert not outbox.is_overdue(10.0 + wait_s)
    assert batch(outbox, 10.0 + wait_s)["batch"] == 1


def test_a_batch_has_so_many_events_and_bytes() -> None:
    outbox = filled(MAX_BATCH_EVENTS + 1)
    assert len(batch(outbox)["events"]) == MAX_BATCH_EVENTS
    answer(outbox, 1)
    assert len(batch(outbox)["events"]) == 1
    outbox = filled(400, message="ö" * 2000)
    body = outbox.batch(0.0)
    assert body is not None
    assert MAX_BATCH_BYTES * 0.9 < len(body) < MAX_BATCH_BYTES + 100


def test_what_finds_no_room_is_counted_and_told() -> None:
    outbox = filled(10, limit=10)
    assert outbox.is_full
    for _ in range(3):
        put(outbox, "much")
    outbox.drop("much", "warning")
    assert (outbox.waiting, outbox.accepted, outbox.dropped) == (10, 10, 4)
    told = batch(outbox)["events"][0]
    assert (told["agent"], told["error_type"], told["severity"], told["count"]) == (
        "tester",
        "events_dropped",
        "error",
        4,
    )
    assert told["details"] == {"total": 4, "counts": {"much/error": 3, "much/warning": 1}}
    assert outbox.is_full, "a batch under way still takes its place"
    answer(outbox, 1)
    assert (outbox.acknowledged, outbox.is_empty) == (10, True)


def test_drops_alone_are_told_too() -> None:
    outbox = Outbox("tester", 1, RESEND_S)
    outbox.drop("x", "error")
    assert not outbox.is_empty
    assert outbox.wait_s(0.0) == 0.0
    assert batch(outbox)["events"][0]["details"]["counts"] == {"x/error": 1}


def test_the_kinds_of_dropped_events_are_bounded() -> None:
    outbox = Outbox("tester", 1, RESEND_S)
    for number in range(1000):
        outbox.drop(f"type-{number}-{'x' * 200}", "critical")
    told = batch(outbox)["events"][0]
    assert told["count"] == sum(told["details"]["counts"].values()) == 1000
    assert told["details"]["counts"]["(other)"] == 1000 - 16


def test_large_events_are_bounded_in_bytes() -> None:
    outbox = filled(10_000, message="x" * 2000)
    assert outbox.dropped > 0
    assert outbox.waiting * 2000 < MAX_QUEUE_BYTES
    assert outbox.accepted + outbox.dropped == 10_000
    kept = outbox.accepted
    while not outbox.is_empty:
        answer(outbox, batch(outbox)["batch"])
    for _ in range(kept):
        put(outbox, "again", "x" * 2000)
    assert outbox.accepted == 2 * kept, "what was acknowledged takes no room"


@pytest.mark.parametrize(
    "details",
    [
        {"n": 2**70},
        {"text": "\ud800"},
        {"name": "a\ud800b"},
        {"deep": {1: {2: [3, {"ok": None}]}}},
        {"deep": json.loads("[" * 600 + "]" * 600)},
        {"any": object()},
        {3: 4},
        {"f": float("inf")},
    ],
)
def test_any_details_can_be_sent(details: dict[Any, Any]) -> None:
    fields = msgpack.unpackb(encode_event(make_event("a", "t", "m\ud800", details=details)), strict_map_key=True)
    assert parse_event(fields, 0.0).error_type == "t"


def test_only_the_latest_heartbeat_is_kept_and_not_for_long() -> None:
    outbox = Outbox("tester", 1, RESEND_S)
    for number in range(3):
        outbox.put_heartbeat(encode_heartbeat({"number": number}), 10.0)
    heartbeat = outbox.heartbeat(10.0 + HEARTBEAT_KEPT_S)
    assert heartbeat is not None
    assert msgpack.unpackb(heartbeat) == {"v": 1, "kind": "heartbeat", "number": 2}
    newer = encode_heartbeat({"number": 3})
    outbox.put_heartbeat(newer, 11.0)
    outbox.heartbeat_sent(heartbeat)  # what was sent is not the one that came meanwhile
    assert outbox.heartbeat(11.0) is newer
    outbox.heartbeat_sent(newer)
    assert outbox.heartbeat(11.0) is None
    outbox.put_heartbeat(newer, 20.0)
    assert outbox.heartbeat(20.0 + HEARTBEAT_KEPT_S + 0.1) is None


def test_a_heartbeat_leaves_out_what_cannot_be_sent() -> None:
    body = encode_heartbeat({"state": "healthy", "bad": object(), "huge": 2**70, "text": "\ud800", "pid": 7})
    assert msgpack.unpackb(body) == {"v": 1, "kind": "heartbeat", "state": "healthy", "pid": 7}


class Bus:
    """The other side of an outbox, on a way where every message may be lost or refused."""

    def __init__(self, limit: int) -> None:
        self.outbox = Outbox("tester", limit, RESEND_S)
        self.committed: list[str] = []
        self.reported = self.told_dropped = 0
        self.now_s = 0.0
        self.sent: dict[str, Any] | None = None

    def put(self) -> None:
        put(self.outbox, f"e{self.reported}")
        self.reported += 1

    def send(self) -> None:
        if (body := self.outbox.batch(self.now_s)) is not None:
            self.outbox.batch_sent(self.now_s)
            self.sent = msgpack.unpackb(body)

    def ack(self) -> None:
        message, self.sent = self.sent, None
        if message is None:
            return
        for event in message["events"]:
            if event["error_type"] == "events_dropped":
                self.told_dropped += event["details"]["total"]
            else:
                self.committed.append(event["error_type"])
        answer(self.outbox, message["batch"], self.now_s)

    def lose(self) -> None:
        if self.sent is not None:
            self.now_s += MAX_RESEND_S
            assert self.outbox.is_overdue(self.now_s)
            self.sent = None

    def retry(self) -> None:
        if self.sent is not None:
            answer(self.outbox, self.sent["batch"], self.now_s, "retry", retry_after_ms=10)
            self.now_s += 0.02
            self.sent = None

    def stray(self) -> None:
        answer(self.outbox, 999_999, self.now_s)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([Bus.put, Bus.send, Bus.ack, Bus.lose, Bus.retry, Bus.stray])), st.integers(1, 8))
def test_nothing_is_lost_whatever_happens_on_the_way(steps: list[Callable[[Bus], None]], limit: int) -> None:
    bus = Bus(limit)
    for step in steps:
        step(bus)
        assert bus.outbox.waiting <= limit
    for _ in steps:
        bus.send()
        bus.ack()
    assert bus.outbox.is_empty
    assert len(bus.committed) + bus.told_dropped == bus.reported
    assert len(bus.committed) == bus.outbox.accepted == bus.outbox.acknowledged
    numbers = [int(name[1:]) for name in bus.committed]
    assert numbers == sorted(set(numbers)), "each once, in the order of the reports"


def test_events_that_stand_for_many_keep_their_count() -> None:
    event = Event("id", 1.0, "a", "t", "m", count=7)
    assert msgpack.unpackb(encode_event(event))["count"] == 7


def test_an_event_that_comes_while_the_thread_decides_to_end_keeps_it() -> None:
    class Late(Outbox):
        """An event is put in between the first look and the one with the lock."""

        looks = 0

        @property
        def is_empty(self) -> bool:
            self.looks += 1
            return self.looks == 1

    sender = bus_sender.Sender("tcp://127.0.0.1:1", Late("tester", 10, 1.0), threading.RLock())
    sender.is_alive = True
    assert not sender._is_idle(time.monotonic() + bus_sender.IDLE_S)
    assert sender.is_alive

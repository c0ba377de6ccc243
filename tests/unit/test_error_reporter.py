"""The error reporter against a fake of the health manager: it never waits, and nothing is lost that it kept."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from memory_system import bus_sender
from memory_system.error_bus import ErrorReporter, shared_reporter
from tests.support.ingest import FakeIngest, acknowledged, numbers, report_numbers
from tests.support.process import wait_until

NOWHERE = "tcp://127.0.0.1:1"  # a reserved port that nothing listens on


@pytest.fixture
def ingest() -> Iterator[FakeIngest]:
    with FakeIngest() as fake:
        yield fake


def threads() -> int:
    """Of this process, those of libzmq too."""
    return len(os.listdir("/proc/self/task"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def check_that_it_never_blocks(reporter: ErrorReporter) -> None:
    """20,000 reports take seconds at the very worst; one that waited for a bus would take hours, or for ever."""
    started_s = time.monotonic()
    report_numbers(reporter, 20_000)
    assert time.monotonic() - started_s < 15.0
    assert reporter.stats() == {
        "reported": 20_000,
        "waiting": 500,
        "acknowledged": 0,
        "malformed": 0,
        "dropped": 19_500,
        "discarded": 0,
    }


def test_events_arrive_whole_and_in_order(ingest: FakeIngest) -> None:
    reporter = ErrorReporter(ingest.endpoint, "planner")
    before_s = time.time()
    reporter.report("tool_failed", "gave up", "warning", request_id="r-1", details={"attempts": 3})
    reporter.report("other", "of another", agent="helper")
    acknowledged(reporter, 2)
    first, second = ingest.events
    assert len(first.pop("event_id")) == 32
    assert before_s <= first.pop("timestamp") <= time.time()
    assert first == {
        "agent": "planner",
        "error_type": "tool_failed",
        "message": "gave up",
        "severity": "warning",
        "details": {"attempts": 3},
        "request_id": "r-1",
    }
    assert (second["agent"], second["error_type"], second["severity"]) == ("helper", "other", "error")
    report_numbers(reporter, 1000)
    acknowledged(reporter, 1002)
    assert ingest.kinds()[2:] == [f"e{number}" for number in range(1000)]
    reporter.close()


def test_a_bus_that_never_was_blocks_nobody() -> None:
    reporter = ErrorReporter(NOWHERE, "tester", queue_events=500, resend_s=60.0)
    check_that_it_never_blocks(reporter)
    started_s = time.monotonic()
    reporter.close(timeout_s=30.0)
    assert time.monotonic() - started_s < 10.0, "there is nothing to wait for"


def test_an_endpoint_that_is_none_blocks_nobody() -> None:
    reporter = ErrorReporter("nonsense", "tester", queue_events=500)
    check_that_it_never_blocks(reporter)
    reporter.close(timeout_s=30.0)


def test_a_silent_bus_blocks_nobody(ingest: FakeIngest) -> None:
    ingest.mode = "silent"
    reporter = ErrorReporter(ingest.endpoint, "tester", queue_events=500, resend_s=60.0)
    check_that_it_never_blocks(reporter)
    reporter.close(timeout_s=0.1)


def test_a_dead_bus_blocks_nobody(ingest: FakeIngest) -> None:
    reporter = ErrorReporter(ingest.endpoint, "tester", queue_events=500)
    reporter.heartbeat({"component": "tester"})
    wait_until(lambda: bool(ingest.heartbeats), "a connection")
    ingest.die()
    check_that_it_never_blocks(reporter)
    reporter.close()


def test_each_event_arrives_across_restarts_of_the_bus(ingest: FakeIngest) -> None:
    reporter = ErrorReporter(ingest.endpoint, "tester", resend_s=0.3)
    for turn in range(4):
        report_numbers(reporter, 250, first=turn * 500)
        ingest.acks_to_drop = 1
        ingest.keeps_unacknowledged = turn % 2 == 0
        ingest.die()
        report_numbers(reporter, 250, first=turn * 500 + 250)
        ingest.come_back()
    acknowledged(reporter, 2000)
    assert set(ingest.arrivals()) == numbers(2000)
    by_id = {event["event_id"]: event for event in ingest.events}
    assert len(by_id) == 2000, "an event that is sent again is the same event"
    assert reporter.stats()["dropped"] == 0
    reporter.close()


def test_lost_acknowledgements_lead_to_the_same_batch_again(ingest: FakeIngest) -> None:
    ingest.acks_to_drop, ingest.keeps_unacknowledged = 2, True
    reporter = ErrorReporter(ingest.endpoint, "tester", resend_s=0.1)
    reporter.report("once", "x")
    acknowledged(reporter, 1)
    assert ingest.batches[0] == ingest.batches[1] == ingest.batches[2]
    assert len(ingest.peers) == 3, "a connection that stayed silent is made anew"
    assert len({event["event_id"] for event in ingest.events}) == 1
    reporter.close()


def test_a_bus_that_asks_to_wait_gets_the_batch_again(ingest: FakeIngest) -> None:
    ingest.mode = "retry"
    reporter = ErrorReporter(ingest.endpoint, "tester", resend_s=60.0)
    reporter.report("once", "x")
    wait_until(lambda: len(ingest.batches) >= 3, "attempts")
    ingest.mode = "ack"
    acknowledged(reporter, 1)
    assert len(ingest.peers) == 1
    reporter.close()


def test_drops_are_told_once_there_is_room(ingest: FakeIngest) -> None:
    ingest.mode = "silent"
    reporter = ErrorReporter(ingest.endpoint, "tester", queue_events=100, resend_s=0.1)
    report_numbers(reporter, 100)
    for _ in range(70):
        reporter.report("storm", "again", "warning")
    ingest.mode = "ack"
    acknowledged(reporter, 100)
    wait_until(lambda: ingest.arrivals()["events_dropped"] == 1, "the event about drops")
    (told,) = (event for event in ingest.events if event["error_type"] == "events_dropped")
    assert told["details"] == {"total": 70, "counts": {"storm/warning": 70}}
    assert told["count"] == 70
    assert set(ingest.arrivals()) == {*numbers(100), "events_dropped"}
    reporter.close()


def test_many_threads_report_at_once(ingest: FakeIngest) -> None:
    reporter = ErrorReporter(ingest.endpoint, "tester", queue_events=100_000)
    ingest.mode = "silent"
    workers = [threading.Thread(target=report_numbers, args=(reporter, 500, turn * 500)) for turn in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert reporter.stats()["waiting"] == reporter.stats()["reported"] == 8000
    ingest.mode = "ack"
    acknowledged(reporter, 8000)
    assert ingest.arrivals() == dict.fromkeys(numbers(8000), 1)
    reporter.close()


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


@pytest.mark.parametrize(
    "arguments",
    [
        {"error_type": Unspeakable(), "message": "x"},
        {"error_type": "x", "message": Unspeakable()},
        {"error_type": "x", "message": "x", "details": {"x": Unspeakable()}},
        {"error_type": "x", "message": "x", "details": 7},
    ],
)
def test_a_report_never_raises(arguments: Any, ingest: FakeIngest) -> None:
    reporter = ErrorReporter(ingest.endpoint, "tester")
    reporter.report(**arguments)
    assert reporter.stats()["discarded"] == 1
    reporter.report(None, 7, "terrible", request_id=5, details=None)  # type: ignore[arg-type]
    acknowledged(reporter, 1)
    assert (ingest.events[0]["error_type"], ingest.events[0]["severity"]) == ("unknown", "error")
    reporter.close()


def test_a_signal_handler_reports_in_the_middle_of_reports(ingest: FakeIngest) -> None:
    current: list[ErrorReporter] = []
    counts = {"plain": 0, "signal": 0}

    def report(kind: str) -> None:
        for reporter in current:
            counts[kind] += 1
            reporter.report(kind, "in the middle")

    before = signal.signal(signal.SIGALRM, lambda *_: report("signal"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        for _ in range(40):  # reporters, because starting the thread is the most delicate part
            reporter = ErrorReporter(ingest.endpoint, "tester", resend_s=60.0)
            current.append(reporter)
            for _ in range(10):
                report("plain")
            current.clear()
            acknowledged(reporter, reporter.stats()["reported"])
            reporter.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert counts["signal"] > 0
    assert ingest.arrivals() == counts


def test_nothing_is_left_after_close(ingest: FakeIngest) -> None:
    before = threads(), descriptors()
    for endpoint in (ingest.endpoint, NOWHERE, "nonsense", ""):
        for _ in range(3):
            reporter = ErrorReporter(endpoint, "tester")
            report_numbers(reporter, 3)
            reporter.heartbeat({"component": "tester"})
            reporter.close()
            reporter.close()
    wait_until(lambda: (threads(), descriptors()) <= before, "threads and descriptors gone")
    assert ingest.arrivals() == dict.fromkeys(numbers(3), 3)


def test_after_close_reports_go_nowhere(ingest: FakeIngest) -> None:
    reporter = ErrorReporter(ingest.endpoint, "tester")
    reporter.report("before", "x")
    reporter.close()
    reporter.report("after", "x")
    reporter.heartbeat({"component": "tester"})
    assert reporter.stats()["discarded"] == 1
    assert ingest.kinds() == ["before"]
    assert "closed" in repr(reporter)


def test_without_an_endpoint_nothing_is_started() -> None:
    before = threads()
    reporter = ErrorReporter("", "tester")
    report_numbers(reporter, 10)
    reporter.heartbeat({"component": "tester"})
    assert threads() == before
    assert reporter.stats()["discarded"] == 10
    reporter.close()


def test_close_sends_what_waits(ingest: FakeIngest) -> None:
    reporter = ErrorReporter(ingest.endpoint, "tester")
    report_numbers(reporter, 5000)
    reporter.heartbeat({"component": "tester", "state": "stopping"})
    reporter.close(timeout_s=20.0)
    assert ingest.arrivals() == dict.fromkeys(numbers(5000), 1)
    wait_until(lambda: bool(ingest.heartbeats), "the last heartbeat")


def test_close_does_not_wait_for_a_silent_bus(ingest: FakeIngest) -> None:
    ingest.mode = "silent"
    reporter = ErrorReporter(ingest.endpoint, "tester", resend_s=0.1)
    reporter.report("x", "x")
    wait_until(lambda: len(ingest.batches) >= 2, "a second attempt")
    started_s = time.monotonic()
    reporter.close(timeout_s=30.0)
    assert time.monotonic() - started_s < 10.0


def test_without_anything_to_say_thread_and_connection_end(ingest: FakeIngest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_sender, "IDLE_S", 0.05)
    before = threads(), descriptors()
    reporter = ErrorReporter(ingest.endpoint, "tester")
    for turn in range(30):
        reporter.report(f"e{turn}", "x")
        if turn % 3 == 0:
            wait_until(lambda: (threads(), descriptors()) <= before, "the thread gone")
        else:
            time.sleep(0.002 * turn)  # around the moment at which it decides to end
    acknowledged(reporter, 30)
    assert ingest.arrivals() == dict.fromkeys(numbers(30), 1)
    wait_until(lambda: (threads(), descriptors()) <= before, "the thread gone")
    reporter.close()


def test_heartbeats_are_the_latest_and_go_without_events(ingest: FakeIngest) -> None:
    ingest.die()
    reporter = ErrorReporter(ingest.endpoint, "tester")
    for number in range(100):
        reporter.heartbeat({"component": "tester", "number": number})
    ingest.come_back()
    wait_until(lambda: bool(ingest.heartbeats), "a heartbeat")
    reporter.heartbeat({"component": "tester", "number": 100})
    wait_until(lambda: len(ingest.heartbeats) == 2, "the next")
    assert [(each["v"], each["kind"], each["number"]) for each in ingest.heartbeats] == [
        (1, "heartbeat", 99),
        (1, "heartbeat", 100),
    ]
    reporter.close()


def test_no_descriptors_left_costs_time_only(ingest: FakeIngest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_sender, "NO_SOCKET_S", 0.05)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    reporter = ErrorReporter(ingest.endpoint, "tester")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        report_numbers(reporter, 10)
        time.sleep(0.3)
        assert reporter.stats()["waiting"] == 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    acknowledged(reporter, 10)
    reporter.close()


def test_the_shared_reporter_is_one_for_each_endpoint(ingest: FakeIngest) -> None:
    shared = shared_reporter(ingest.endpoint, "first")
    assert shared_reporter(ingest.endpoint, "second") is shared
    assert shared_reporter(NOWHERE, "first") is not shared
    assert shared.agent == "first"
    shared.close()
    again = shared_reporter(ingest.endpoint, "third")
    again.report("x", "not lost in a closed one")
    acknowledged(again, 1)
    again.close()

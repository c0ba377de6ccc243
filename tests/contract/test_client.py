"""What comes of a call, whichever client makes it: every outcome, the retries, the breaker."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from memory_system import errors, protocol
from tests.contract.fake_orchestrator import (
    FakeOrchestrator,
    after_the_reset_timeout,
    busy,
    descriptors,
    drop,
    error,
    ok,
    raw,
    stale,
)

NOWHERE = "tcp://127.0.0.1:1"  # a reserved port that nothing listens on


def test_an_error_reply_is_returned_whole(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    server.default = error("memory_not_found", memory_id="m")
    client = make()
    reply = client.get_memory("m")
    assert reply == {
        "status": "error",
        "error_code": "memory_not_found",
        "message": "memory_not_found",
        "retryable": False,
        "details": {"memory_id": "m"},
        "request_id": server.requests[0]["request_id"],
        "outcome": "failed",
    }
    assert len(server.requests) == 1


def test_a_retryable_error_that_names_no_time_is_not_repeated(
    make: Callable[..., Any], server: FakeOrchestrator
) -> None:
    server.default = error("storage_full", retryable=True)
    assert make().add_memory("x")["outcome"] == "failed"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "refusal",
    [busy(), error("rate_limited"), error("shutting_down", retryable=True)],
    ids=["busy", "rate_limited", "shutting_down"],
)
def test_not_now_is_repeated_with_the_same_request_id(
    refusal: Any, make: Callable[..., Any], server: FakeOrchestrator
) -> None:
    server.script.extend([refusal, refusal, ok(mark=1)])
    assert make().add_memory("x")["mark"] == 1
    assert list(server.bodies_by_id.values()) == [3]
    deadlines = [request["deadline_ms"] for request in server.requests]
    assert deadlines == sorted(deadlines, reverse=True)


def test_busy_waits_as_long_as_asked(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    server.script.extend([busy(300.0), ok()])
    started_s = time.monotonic()
    make(timeout_ms=30_000).stats()
    assert 0.3 <= time.monotonic() - started_s < 10.0


def test_busy_to_the_end_is_the_answer_and_never_opens_the_breaker(
    make: Callable[..., Any], server: FakeOrchestrator
) -> None:
    # No attempt is made shortly before the end: its answer could come too late.
    server.default = busy(1000.0)
    client = make(timeout_ms=2000, failure_threshold=1)
    for _ in range(2):
        reply = client.add_memory("x")
        assert (reply["error_code"], reply["outcome"]) == ("busy", "failed")
    assert client.get_circuit_breaker_status()["failure_count"] == 0


def test_a_wait_beyond_the_deadline_is_not_waited_for(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    server.default = busy(60_000.0)
    started_s = time.monotonic()
    assert make(timeout_ms=50_000).stats()["error_code"] == "busy"
    assert time.monotonic() - started_s < 10.0


def test_a_lost_reply_is_asked_for_again_with_the_same_request_id(
    make: Callable[..., Any], server: FakeOrchestrator
) -> None:
    server.script.append(drop)
    server.default = ok(mark=1)
    assert make(timeout_ms=30_000, attempt_timeout_ms=200).add_memory("x")["mark"] == 1
    [arrived] = server.bodies_by_id.values()
    assert arrived >= 2


def test_by_default_a_silent_attempt_is_repeated_once(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    server.default = drop
    reply = make(timeout_ms=2000).add_memory("x")
    assert (reply["error_code"], reply["outcome"], reply["retryable"]) == ("timeout", "unknown", True)
    assert list(server.bodies_by_id.values()) == [2]


def test_the_deadline_holds(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    server.default = drop
    client = make(timeout_ms=300)
    started_s = time.monotonic()
    client.stats()
    client.call("stats", deadline_ms=100)
    assert 0.39 <= time.monotonic() - started_s < 4.0, "by default a call may take 5 s"


def test_a_slow_reply_within_the_attempt_is_not_asked_for_twice(
    make: Callable[..., Any], server: FakeOrchestrator
) -> None:
    server.default = ok(delay_s=0.5)
    assert make(timeout_ms=30_000).stats()["status"] == "success"
    assert len(server.requests) == 1


def test_no_server_is_unreachable_and_not_sent(make: Callable[..., Any]) -> None:
    reply = make(NOWHERE, timeout_ms=400).add_memory("x")
    assert (reply["error_code"], reply["outcome"]) == ("unreachable", "not_sent")


def test_an_endpoint_that_is_none_is_unreachable_at_once(make: Callable[..., Any]) -> None:
    started_s = time.monotonic()
    reply = make("nonsense", timeout_ms=50_000).stats()
    assert (reply["error_code"], reply["outcome"]) == ("unreachable", "not_sent")
    assert time.monotonic() - started_s < 10.0


@pytest.mark.parametrize("body", [b"", b"\xc1", b"hello", b"[]", b"{}", b'{"status": "fine"}', b"\x90"])
def test_garbage_is_an_invalid_reply(body: bytes, make: Callable[..., Any], server: FakeOrchestrator) -> None:
    server.script.append(raw(body))
    client = make()
    reply = client.add_memory("x")
    assert (reply["error_code"], reply["outcome"]) == ("invalid_reply", "unknown")
    assert client.stats()["status"] == "success"


def test_the_reply_to_another_request_is_dropped(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    server.script.append(stale)
    server.default = ok(mark="mine")
    assert make(timeout_ms=30_000, attempt_timeout_ms=200).stats()["mark"] == "mine"


def test_an_error_without_a_request_id_answers_the_only_call(
    make: Callable[..., Any], server: FakeOrchestrator
) -> None:
    server.script.append(error("invalid_request", with_id=False))
    assert make().stats()["error_code"] == "invalid_request"


def test_a_server_that_is_killed_and_restarted_costs_time_only(
    make: Callable[..., Any], server: FakeOrchestrator
) -> None:
    def restart() -> None:
        server.wait_for(1)
        server.die()
        time.sleep(0.4)
        server.come_back()

    server.script.extend([drop, ok(mark=1)])
    thread = threading.Thread(target=restart)
    thread.start()
    started_s = time.monotonic()
    reply = make(timeout_ms=50_000).add_memory("x")
    taken_s = time.monotonic() - started_s
    thread.join()
    assert reply["mark"] == 1
    assert list(server.bodies_by_id.values()) == [2]
    assert taken_s < 15.0, "a lost connection is noticed at once, not after half of the budget"


def test_too_large_is_not_sent(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    reply = make().add_memory("x" * (protocol.MAX_MESSAGE_BYTES + 1))
    assert (reply["error_code"], reply["outcome"]) == ("request_too_large", "not_sent")
    assert reply["details"]["limit"] == protocol.MAX_MESSAGE_BYTES
    assert server.requests == []


@pytest.mark.parametrize("value", [object(), 2**70, "\ud800", {1, 2}], ids=["object", "huge", "surrogate", "set"])
def test_what_cannot_be_encoded_is_not_sent(value: Any, make: Callable[..., Any], server: FakeOrchestrator) -> None:
    reply = make().add_memory("x", metadata={"a": value})
    assert (reply["error_code"], reply["outcome"]) == ("invalid_request", "not_sent")
    assert server.requests == []


@pytest.mark.parametrize("deadline_ms", [0, -1, float("nan"), float("inf")])
def test_a_deadline_that_is_none_is_refused(deadline_ms: float, make: Callable[..., Any]) -> None:
    reply = make().call("stats", deadline_ms=deadline_ms)
    assert (reply["error_code"], reply["details"]["field"]) == ("invalid_field", "deadline_ms")


def test_after_close_nothing_is_sent(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    client = make()
    client.stats()
    client.close()
    client.close()
    reply = client.add_memory("x")
    assert (reply["error_code"], reply["outcome"]) == ("client_closed", "not_sent")
    assert "closed" in repr(client.client)
    assert len(server.requests) == 1


def test_a_client_that_was_never_used_closes(make: Callable[..., Any]) -> None:
    make().close()


@pytest.mark.parametrize("options", [{"timeout_ms": 0}, {"failure_threshold": 0}, {"reset_timeout_s": 0}])
def test_nonsense_options_are_refused(options: dict[str, Any], make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError):
        make(**options)


def test_the_breaker_on_the_wire(
    make: Callable[..., Any], server: FakeOrchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.default = drop
    client = make(timeout_ms=600, failure_threshold=2, reset_timeout_s=60.0)
    assert client.get_circuit_breaker_status() == {
        "state": "closed",
        "failure_count": 0,
        "failure_threshold": 2,
        "last_failure_time": None,
        "reset_timeout_s": 60.0,
        "next_attempt_in_s": 0.0,
    }
    for _ in range(2):
        assert client.stats()["error_code"] == "timeout"
    status = client.get_circuit_breaker_status()
    assert (status["state"], status["failure_count"]) == ("open", 2)
    assert 0.0 < status["next_attempt_in_s"] <= 60.0
    assert abs(status["last_failure_time"] - time.time()) < 30.0
    sent = len(server.requests)
    reply = client.stats()
    assert (reply["error_code"], reply["outcome"]) == ("circuit_open", "not_sent")
    assert 0.0 < reply["details"]["retry_after_ms"] <= 60_000.0
    assert len(server.requests) == sent
    after_the_reset_timeout(monkeypatch, 60.0)
    assert client.stats()["error_code"] == "timeout"  # the probe
    assert client.get_circuit_breaker_status()["state"] == "open"
    server.default = ok()
    assert client.stats()["status"] == "success"
    assert client.get_circuit_breaker_status()["state"] == "closed"


def test_an_error_reply_closes_the_breaker(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    server.default = drop
    client = make(timeout_ms=20_000, failure_threshold=2)
    assert client.call("stats", deadline_ms=250)["status"] == "error"
    assert client.get_circuit_breaker_status()["failure_count"] == 1
    server.default = error("memory_not_found")
    assert client.stats()["error_code"] == "memory_not_found"
    assert client.get_circuit_breaker_status()["failure_count"] == 0


def test_an_open_breaker_fails_in_microseconds_and_can_be_reset(make: Callable[..., Any]) -> None:
    client = make(NOWHERE, timeout_ms=50, failure_threshold=1)
    client.stats()
    took_s = []
    for _ in range(100):
        started_s = time.monotonic()
        assert client.stats()["error_code"] == "circuit_open"
        took_s.append(time.monotonic() - started_s)
    assert statistics.median(took_s) < 0.005
    client.reset_circuit_breaker()
    assert client.get_circuit_breaker_status()["state"] == "closed"
    assert client.stats()["error_code"] == "unreachable"


def test_raise_on_error_raises_the_errors_class(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    server.script.extend([error("version_conflict", current={"version": 3}), ok(mark=1)])
    client = make(raise_on_error=True)
    with pytest.raises(errors.VersionConflict) as caught:
        client.update_memory("m", {"content": "x"}, expected_version=2)
    assert caught.value.details["current"] == {"version": 3}
    assert caught.value.details["outcome"] == "failed"
    assert caught.value.details["request_id"] == server.requests[0]["request_id"]
    assert client.stats()["mark"] == 1
    with pytest.raises(errors.RequestTooLarge):
        client.add_memory("x" * (protocol.MAX_MESSAGE_BYTES + 1))
    client.close()
    with pytest.raises(errors.ClientClosed):
        client.stats()


def test_two_hundred_timeouts_leak_no_descriptor(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    server.default = drop
    client = make(timeout_ms=10, attempt_timeout_ms=10, failure_threshold=1000)
    for _ in range(5):
        client.stats()
    before = descriptors()
    for _ in range(200):
        client.stats()
    end_s = time.monotonic() + 30.0  # libzmq closes sockets in a thread of its own
    while descriptors() > before + 5:
        assert time.monotonic() < end_s, (before, descriptors())
        time.sleep(0.01)

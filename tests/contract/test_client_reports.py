"""What both clients tell the error bus: failed calls, and the circuit breaker opening and closing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from memory_client import MemoryClient
from memory_system.breaker import CircuitBreaker
from memory_system.client_reports import INTERVAL_S, FailureLimit, bus_endpoint
from memory_system.error_bus import ADDRESS_VARIABLE, shared_reporter
from tests.contract.fake_orchestrator import FakeOrchestrator, after_the_reset_timeout, drop, error, ok, raw
from tests.support.ingest import FakeIngest
from tests.support.process import wait_until

NOWHERE = "tcp://127.0.0.1:1"


@pytest.fixture
def bus() -> Iterator[FakeIngest]:
    with FakeIngest() as fake:
        yield fake
        shared_reporter(fake.endpoint, "").close()


def arrived(bus: FakeIngest, *kinds: str) -> list[dict[str, Any]]:
    wait_until(lambda: len(bus.events) >= len(kinds), f"{kinds} on the bus")
    assert bus.kinds() == list(kinds)
    return bus.events


def test_the_breaker_opening_and_closing_is_told(
    make: Callable[..., Any], server: FakeOrchestrator, bus: FakeIngest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.default = drop
    client = make(error_bus=bus.endpoint, agent_id="planner", timeout_ms=600, failure_threshold=2, reset_timeout_s=60.0)
    first = client.stats()
    second = client.stats()
    assert client.stats()["error_code"] == "circuit_open"
    failed, opened = arrived(bus, "timeout", "circuit_opened")
    assert (failed["request_id"], opened["request_id"]) == (first["request_id"], second["request_id"])
    assert (opened["agent"], opened["severity"]) == ("planner", "error")
    assert opened["details"] == {"endpoint": server.endpoint, "failures": 2, "reset_timeout_s": 60.0}
    after_the_reset_timeout(monkeypatch, 60.0)
    assert client.stats()["error_code"] == "timeout"  # the probe; the breaker stays open
    server.default = ok()
    assert client.call("stats", deadline_ms=20_000)["status"] == "success"
    closed = arrived(bus, "timeout", "circuit_opened", "circuit_closed")[2]
    assert (closed["agent"], closed["severity"], closed["details"]) == (
        "planner",
        "info",
        {"endpoint": server.endpoint},
    )


def test_a_reset_closes_the_breaker_too(make: Callable[..., Any], bus: FakeIngest) -> None:
    client = make(NOWHERE, error_bus=bus.endpoint, timeout_ms=50, failure_threshold=1)
    client.reset_circuit_breaker()
    client.stats()
    client.reset_circuit_breaker()
    arrived(bus, "unreachable", "circuit_opened", "circuit_closed")


@pytest.mark.parametrize(
    ("answer", "code", "outcome"),
    [
        (drop, "timeout", "unknown"),
        (raw(b"\xc1"), "invalid_reply", "unknown"),
        (error("internal_error"), "internal_error", "failed"),
        (error("storage_full", retryable=True), "storage_full", "failed"),
        (error("storage_error", retryable=True), "storage_error", "failed"),
    ],
)
def test_failed_calls_are_told(
    answer: Any, code: str, outcome: str, make: Callable[..., Any], server: FakeOrchestrator, bus: FakeIngest
) -> None:
    server.default = answer
    client = make(error_bus=bus.endpoint, timeout_ms=600 if answer is drop else 20_000)
    reply = client.add_memory("a secret", metadata={"a": "secret"})
    assert reply["error_code"] == code
    (event,) = arrived(bus, code)
    assert (event["agent"], event["severity"], event["request_id"]) == ("memory_client", "error", reply["request_id"])
    assert event["details"] == {"endpoint": server.endpoint, "action": "add_memory", "outcome": outcome}
    assert event["message"] == f"add_memory at {server.endpoint} ended in {code}"
    assert "secret" not in repr(event)


@pytest.mark.parametrize("code", ["memory_not_found", "version_conflict", "busy", "access_denied", "shutting_down"])
def test_what_is_between_service_and_caller_is_not_told(
    code: str, make: Callable[..., Any], server: FakeOrchestrator, bus: FakeIngest
) -> None:
    retryable = code in ("busy", "shutting_down")
    # Asked to wait for longer than the call may take, the client makes one attempt and no more.
    server.default = error(code, retryable=True, retry_after_ms=3_600_000.0) if retryable else error(code)
    client = make(error_bus=bus.endpoint, timeout_ms=20_000)
    assert client.get_memory("m")["error_code"] == code
    assert client.call("stats", deadline_ms=0)["error_code"] == "invalid_field"
    client.close()
    assert client.stats()["error_code"] == "client_closed"
    shared_reporter(bus.endpoint, "").report("mark", "after all of them")
    arrived(bus, "mark")


def test_an_odd_error_code_is_no_problem(make: Callable[..., Any], server: FakeOrchestrator, bus: FakeIngest) -> None:
    def odd(request: Any) -> Any:
        ((delay_s, _),) = error("x")(request)
        return [(delay_s, b'{"status": "error", "error_code": ["timeout"], "message": "", "details": {}}')]

    server.default = odd
    assert make(error_bus=bus.endpoint).stats()["error_code"] == ["timeout"]


def test_repeats_are_held_back_and_counted(
    make: Callable[..., Any], server: FakeOrchestrator, bus: FakeIngest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.default = error("internal_error")
    client = make(error_bus=bus.endpoint)
    for _ in range(50):
        client.stats()
    server.script.append(error("storage_error"))
    client.stats()
    arrived(bus, "internal_error", "storage_error")
    admit = FailureLimit.admit
    monkeypatch.setattr(FailureLimit, "admit", lambda limit, kind, now_s: admit(limit, kind, now_s + INTERVAL_S))
    client.stats()
    event = arrived(bus, "internal_error", "storage_error", "internal_error")[2]
    assert event["details"]["held_back"] == 49
    assert "49 more" in event["message"]


def test_raised_errors_are_told_as_well(make: Callable[..., Any], server: FakeOrchestrator, bus: FakeIngest) -> None:
    server.default = error("internal_error")
    with pytest.raises(Exception, match="internal_error"):
        make(error_bus=bus.endpoint, raise_on_error=True).stats()
    arrived(bus, "internal_error")


def test_without_the_bus_calls_are_as_before(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    server.default = drop
    for error_bus in (NOWHERE, "nonsense", ""):
        client = make(error_bus=error_bus, timeout_ms=600, failure_threshold=1)
        started_s = time.monotonic()
        assert client.stats()["error_code"] == "timeout"
        assert client.stats()["error_code"] == "circuit_open"
        assert time.monotonic() - started_s < 20.0


def test_a_client_that_succeeds_starts_no_thread(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    client = make(error_bus=NOWHERE)
    client.stats()
    before = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        client.stats()
    assert len(os.listdir("/proc/self/task")) <= before


@pytest.mark.parametrize(
    ("given", "variable", "endpoint", "bus"),
    [
        (None, None, "tcp://10.0.0.1:7140", "tcp://10.0.0.1:7152"),
        (None, None, "tcp://[::1]:7140", "tcp://[::1]:7152"),
        (None, None, "tcp://10.0.0.1:7141", ""),
        (None, None, "ipc:///run/memory", ""),
        (None, None, "7140", ""),
        (None, "tcp://10.0.0.2:7152", "tcp://10.0.0.1:7140", "tcp://10.0.0.2:7152"),
        (None, "", "tcp://10.0.0.1:7140", ""),
        ("tcp://10.0.0.3:1", "tcp://10.0.0.2:7152", "tcp://10.0.0.1:7140", "tcp://10.0.0.3:1"),
        ("", "tcp://10.0.0.2:7152", "tcp://10.0.0.1:7140", ""),
    ],
)
def test_where_a_client_reports_to(
    given: str | None, variable: str | None, endpoint: str, bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(ADDRESS_VARIABLE, variable)
    assert bus_endpoint(given, endpoint) == bus


def test_clients_of_one_process_share_a_reporter(server: FakeOrchestrator, bus: FakeIngest) -> None:
    server.default = error("internal_error")
    for number in range(5):
        with MemoryClient(server.endpoint, error_bus=bus.endpoint, agent_id=f"agent{number}") as client:
            client.stats()
    arrived(bus, *["internal_error"] * 5)
    assert [event["agent"] for event in bus.events] == [f"agent{number}" for number in range(5)]
    assert len(bus.peers) == 1


def test_one_of_a_kind_goes_in_an_interval() -> None:
    limit = FailureLimit()
    assert limit.admit("timeout", 100.0) == 0
    assert limit.admit("timeout", 100.0 + INTERVAL_S - 0.001) is None
    assert limit.admit("unreachable", 101.0) == 0
    assert limit.admit("timeout", 100.0 + INTERVAL_S) == 1
    assert limit.admit("timeout", 101.0 + INTERVAL_S) is None
    assert limit.admit("timeout", 100.0 + 3 * INTERVAL_S) == 1
    assert limit.admit("timeout", 100.0 + 9 * INTERVAL_S) == 0


def test_the_breaker_says_what_a_verdict_changed() -> None:
    breaker = CircuitBreaker(2, 10.0)
    assert breaker.success(0.0) is None
    assert breaker.failure(0.0) is None
    assert breaker.failure(0.0) == "opened"
    assert breaker.failure(0.0) is None
    assert breaker.allow(10.0)
    assert breaker.failure(11.0) is None
    assert breaker.success(12.0) == "closed"
    assert breaker.success(12.0) is None
    assert breaker.reset() is None
    breaker.failure(13.0)
    assert breaker.failure(13.0) == "opened"
    assert breaker.reset() == "closed"

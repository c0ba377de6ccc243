"""A service that comes back is used at once, however long the circuit breaker would stay open."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.contract.fake_orchestrator import FakeOrchestrator, drop, ok


def opened(client: Any) -> None:
    """Call in vain until the breaker is open."""
    for _ in range(2):
        assert client.stats()["status"] == "error"
    assert client.get_circuit_breaker_status()["state"] == "open"
    assert client.stats()["error_code"] == "circuit_open"


def within(seconds: float, client: Any) -> str:
    """The first answer that is not circuit_open."""
    deadline_s = time.monotonic() + seconds
    while (reply := client.stats()).get("error_code") == "circuit_open" and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return str(reply.get("error_code", reply["status"]))


@pytest.fixture
def impatient(make: Callable[..., Any]) -> Any:
    return make(timeout_ms=600, failure_threshold=2, reset_timeout_s=60.0)


def test_the_breaker_closes_when_the_connection_is_there_again(impatient: Any, server: FakeOrchestrator) -> None:
    assert impatient.stats()["status"] == "success"
    server.die()
    opened(impatient)
    server.come_back()
    assert within(20.0, impatient) == "success"
    assert impatient.get_circuit_breaker_status()["state"] == "closed"


def test_a_connection_alone_closes_nothing(impatient: Any, server: FakeOrchestrator) -> None:
    """What is back and does not answer is left alone for the whole time, after one probe."""
    server.die()
    opened(impatient)
    server.default = drop
    server.come_back()
    assert within(20.0, impatient) == "timeout"
    arrived = len(server.requests)
    assert within(0.5, impatient) == "circuit_open"
    assert len(server.requests) == arrived


def test_silence_is_waited_out(impatient: Any, server: FakeOrchestrator) -> None:
    """The connection was never lost, so that it stands says nothing."""
    server.default = drop
    opened(impatient)
    server.default = ok()
    assert within(0.5, impatient) == "circuit_open"

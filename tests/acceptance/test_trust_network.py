"""A network that drops, delays, drips, resets and swallows replies: each write is done once, and nothing piles up."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import zmq

from memory_client import MemoryClient
from tests.support import bad_network, crash
from tests.support.bad_network import CLIENTS, DETECTED_S, HEARTBEAT_S, SLACK, wait_detected, write_through
from tests.support.crash import Findings
from tests.support.footprint import footprint, sockets_of
from tests.support.lossy_proxy import FAULTS, Fault, LossyProxy, schedule
from tests.support.process import running_orchestrator, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]


def seed_of_run() -> int:
    seed = int(os.environ.get("NETWORK_SEED") or random.SystemRandom().randrange(2**32))
    print(f"NETWORK_SEED={seed}")  # noqa: T201  pytest shows it when the test fails
    return seed


def test_writes_through_every_fault_are_done_once_and_leave_nothing_open(tmp_path: Path) -> None:
    seed = seed_of_run()
    faults = schedule(bad_network.chance_of(seed), 1, after_s=(0.3, 0.6), lasts_s=(0.8, 2.2))
    left = write_through(faults, tmp_path, seed)
    assert left.findings == Findings()
    assert left.acknowledged > 100
    assert {entry.kind for entry in left.entries if entry.outcome == "ok"} == set(crash.KINDS)
    assert left.left_open == ""
    assert left.most_sockets <= left.before.sockets + SLACK + 6 * CLIENTS


def test_without_idempotency_a_network_that_loses_replies_has_writes_done_twice(tmp_path: Path) -> None:
    """The negative control: were nothing found here, the test above would prove nothing."""
    seed = seed_of_run()
    left = write_through([Fault("mute", 0.3, 0.4)] * 4, tmp_path, seed, idempotency=False)
    assert left.findings.twice != []
    assert left.findings.damage == []


@pytest.mark.parametrize("kind", ["drop", "mute"])
def test_the_breaker_opens_in_a_silent_network_and_closes_afterwards(tmp_path: Path, kind: str) -> None:
    with (
        running_orchestrator(tmp_path, embedding__provider="off") as orchestrator,
        LossyProxy(orchestrator.port) as proxy,
        MemoryClient(proxy.endpoint, timeout_ms=600, failure_threshold=3, reset_timeout_s=3.0) as client,
    ):
        wait_until(lambda: client.stats()["status"] == "success", "the client is connected")
        open_before = footprint().sockets
        with proxy.faulty(kind):
            codes = [client.stats()["error_code"] for _ in range(3)]
            assert set(codes) <= {"timeout", "unreachable"}
            assert client.stats()["error_code"] == "circuit_open"
            wait_until(lambda: failed_probe(client), "a probe has failed")
            assert client.get_circuit_breaker_status()["state"] == "open"
        wait_until(lambda: client.stats()["status"] == "success", "the service is found again")
        assert client.get_circuit_breaker_status()["state"] == "closed"
        wait_until(lambda: footprint().sockets <= open_before + SLACK, "no socket is left")


def failed_probe(client: MemoryClient) -> bool:
    return client.stats()["error_code"] in ("timeout", "unreachable")


def test_peers_that_fall_silent_are_noticed_within_the_heartbeat_budget(tmp_path: Path) -> None:
    peers = 20
    with (
        running_orchestrator(tmp_path, network__heartbeat_s=HEARTBEAT_S) as orchestrator,
        LossyProxy(orchestrator.port) as proxy,
        zmq.Context() as context,
    ):
        before = sockets_of(orchestrator.pid)
        sockets = [context.socket(zmq.DEALER) for _ in range(peers)]
        try:
            for socket in sockets:
                socket.linger = 0
                socket.connect(proxy.endpoint)
            wait_until(lambda: len(sockets_of(orchestrator.pid) - before) >= peers, "all are connected")
            time.sleep(2 * DETECTED_S)
            connected = sockets_of(orchestrator.pid) - before
            assert len(connected) >= peers  # idle peers that answer are left alone
            with proxy.faulty("drop"):
                # A look at the timers may be late on a busy machine.
                assert wait_detected(orchestrator.pid, connected, DETECTED_S + 15.0) >= HEARTBEAT_S
        finally:
            for socket in sockets:
                socket.close()


def test_the_proxy_does_what_it_is_told(tmp_path: Path) -> None:
    """The tool itself is tested: calls meet each fault, and get through when it is over."""
    with (
        running_orchestrator(tmp_path, embedding__provider="off") as orchestrator,
        LossyProxy(orchestrator.port, seed=3) as proxy,
        MemoryClient(proxy.endpoint, timeout_ms=600, attempt_timeout_ms=550, failure_threshold=1000) as client,
    ):
        for kind in FAULTS:
            wait_until(lambda: client.stats()["status"] == "success", "all is well")
            accepted = proxy.accepted
            with proxy.faulty(kind):
                replies = [client.stats() for _ in range(2)]
            met = proxy.accepted > accepted or any(reply["status"] == "error" for reply in replies)
            assert met, (kind, replies)
            wait_until(lambda: client.stats()["status"] == "success", f"all is well after {kind}")
        assert proxy.open_connections <= 3

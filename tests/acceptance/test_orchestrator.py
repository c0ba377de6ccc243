"""The real process over tcp: framing, encodings and admission."""

from __future__ import annotations

import contextlib
import json
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from memory_system import protocol
from tests.support.process import Orchestrator, running_orchestrator, wait_until
from tests.support.wire import ENCODINGS, check_shape, decode, encode, envelope

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[Orchestrator]:
    with running_orchestrator(tmp_path) as running:
        yield running


def raw_exchange(orchestrator: Orchestrator, frames: list[bytes]) -> list[bytes]:
    with orchestrator.peer(dealer=True) as peer:
        peer.socket.send_multipart(frames)
        assert peer.socket.poll(10_000), f"no reply to {[frame[:20] for frame in frames]}"
        return peer.socket.recv_multipart()


# -- requests ---------------------------------------------------------------------------------------------------


def test_one_socket_may_change_its_encoding(orchestrator: Orchestrator) -> None:
    with orchestrator.peer() as peer:
        for encoding in (*ENCODINGS, *ENCODINGS):
            assert peer.ask("stats", encoding=encoding)["namespace"] == "default"
        peer.send(b'  \r\n{"action": "health_check"}')
        assert json.loads(peer.receive())["pid"] == orchestrator.pid


def test_plain_send_json_and_recv_json(orchestrator: Orchestrator) -> None:
    with orchestrator.peer() as peer:
        peer.socket.send_json({"action": "add_memory", "data": {"content": "as the older agents do"}})
        assert peer.socket.poll(10_000)
        reply = peer.socket.recv_json()
        assert reply["status"] == "success"
        peer.socket.send_json({"action": "get_memory", "data": {"memory_id": reply["memory_id"]}})
        assert peer.socket.recv_json()["memory"]["content"] == "as the older agents do"


def test_many_clients_each_get_their_own_reply(orchestrator: Orchestrator) -> None:
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(orchestrator.peer()) for _ in range(60)]
        added = []
        for number, peer in enumerate(peers):
            peer.send(encode(envelope("add_memory", {"content": f"of {number}"}), ENCODINGS[number % 2]))
        for number, peer in enumerate(peers):
            added.append(decode(peer.receive(), ENCODINGS[number % 2])["memory_id"])
        assert len(set(added)) == len(peers)
        for number, peer in enumerate(peers):
            peer.send(encode(envelope("get_memory", {"memory_id": added[number]}), "msgpack"))
        for number, peer in enumerate(peers):
            assert decode(peer.receive(), "msgpack")["memory"]["content"] == f"of {number}"


def test_a_pipelining_client_gets_one_reply_for_each_request(orchestrator: Orchestrator) -> None:
    with orchestrator.peer(dealer=True) as peer:
        ids = [f"{number:016d}" for number in range(50)]
        for request_id in ids:
            peer.send(encode(envelope("stats", {}, request_id=request_id), "msgpack"))
        replies = [decode(peer.receive(), "msgpack") for _ in ids]
        assert sorted(reply["request_id"] for reply in replies) == ids
        assert not peer.socket.poll(200)


def test_malformed_framing_gets_an_error_reply(orchestrator: Orchestrator) -> None:
    body = encode({"action": "stats"}, "msgpack")
    for frames in ([body], [b"", body, body], [b"", b"", body], [body, body], [b"x", b"", body, body], [b""], [b"x"]):
        reply = msgpack.unpackb(raw_exchange(orchestrator, frames)[-1])
        check_shape(reply)
        assert reply["error_code"] == "invalid_request", frames
    assert raw_exchange(orchestrator, [body])[:-1] == []
    assert raw_exchange(orchestrator, [b"", body, body])[:-1] == [b""]


def test_frames_before_the_delimiter_come_back(orchestrator: Orchestrator) -> None:
    """As a request takes through a queue of ROUTER and DEALER."""
    body = encode({"action": "stats"}, "json")
    *route, reply = raw_exchange(orchestrator, [b"hop one", b"hop two", b"", body])
    assert route == [b"hop one", b"hop two", b""]
    assert json.loads(reply)["status"] == "success"


def test_a_request_over_the_limit_is_answered_and_the_connection_lives(orchestrator: Orchestrator) -> None:
    with orchestrator.peer() as peer:
        for encoding in ENCODINGS:
            request = envelope("add_memory", {"content": "x" * (9 * 2**20)})
            peer.send(encode(request, encoding))
            reply = decode(peer.receive(), encoding)
            assert (reply["error_code"], reply["request_id"]) == ("request_too_large", request["request_id"])
            assert reply["details"]["limit"] == protocol.MAX_MESSAGE_BYTES
            assert peer.ask("stats", encoding=encoding)["memories"] == 0


def test_a_message_over_the_sockets_limit_closes_that_connection_alone(orchestrator: Orchestrator) -> None:
    with orchestrator.peer() as other, orchestrator.peer() as peer:
        other.ask("stats")
        peer.send(b"x" * (protocol.SOCKET_MAX_MESSAGE_BYTES + 1))
        with pytest.raises(TimeoutError):
            peer.receive(0.5)
        assert other.ask("stats")["status"] == "success"
        assert orchestrator.ask("health_check")["pid"] == orchestrator.pid


def test_bytes_that_are_no_zmtp(orchestrator: Orchestrator) -> None:
    for garbage in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\xff" * 1000, b"\x00", b""):
        with socket.create_connection(("127.0.0.1", orchestrator.port), timeout=5) as connection:
            connection.sendall(garbage)
            assert orchestrator.ask("stats")["status"] == "success"


# -- admission --------------------------------------------------------------------------------------------------


def test_a_flooding_client_is_told_to_wait_while_others_are_served(tmp_path: Path) -> None:
    limits = {"limits__max_in_flight_per_client": 8, "limits__busy_retry_after_ms": 25}
    with running_orchestrator(tmp_path, storage__synchronous="full", **limits) as orchestrator:
        count = 3000
        with orchestrator.peer(dealer=True, SNDHWM=0, RCVHWM=0) as flood, orchestrator.peer() as polite:
            for number in range(count):
                flood.send(encode(envelope("add_memory", {"content": f"flood {number}"}), "msgpack"))
            for _ in range(20):
                assert polite.ask("add_memory", content="polite")["status"] == "success"
            outcomes: Counter[str] = Counter()
            while flood.socket.poll(2000):
                reply = decode(flood.receive(), "msgpack")
                outcomes[reply.get("error_code", "success")] += 1
                if reply["status"] == "error":
                    assert reply["retryable"] is True
                    assert reply["details"]["retry_after_ms"] == 25
        assert set(outcomes) == {"success", "busy"}, outcomes
        health = orchestrator.ask("health_check")
        # Beyond queue_per_client unread replies are dropped, and counted.
        lost = health["dropped_replies"]
        assert outcomes.total() + lost == count
        assert outcomes["busy"] <= health["busy_replies"] <= outcomes["busy"] + lost
        assert health["in_flight"] == 0
        assert orchestrator.ask("stats")["memories"] == count - health["busy_replies"] + 20


def test_a_client_that_never_reads_blocks_nobody(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path, network__queue_per_client=8) as orchestrator:
        memory_id = orchestrator.ask("add_memory", content="x" * 60_000)["memory_id"]
        with orchestrator.peer(dealer=True, SNDHWM=0, RCVHWM=1, RCVBUF=4096) as deaf, orchestrator.peer() as polite:
            for _ in range(2000):
                deaf.send(encode(envelope("get_memory", {"memory_id": memory_id}), "msgpack"))
            for _ in range(20):
                assert polite.ask("get_memory", memory_id=memory_id)["status"] == "success"
            wait_until(lambda: orchestrator.ask("health_check")["dropped_replies"] > 0, "a reply that nobody takes")
            assert orchestrator.resident_mb() < 600
        assert orchestrator.ask("add_memory", content="after")["status"] == "success"


def test_clients_that_vanish_with_requests_in_flight(orchestrator: Orchestrator) -> None:
    for _ in range(10):
        with orchestrator.peer(dealer=True) as peer:
            for _ in range(20):
                peer.send(encode(envelope("add_memory", {"content": "and gone"}), "msgpack"))
            assert peer.socket.poll(10_000)
    wait_until(lambda: orchestrator.ask("health_check")["in_flight"] == 0, "nothing in flight")

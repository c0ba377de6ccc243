"""The guard of connections: who is closed, who is not, and what the kernel says of a connection."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import zmq

from memory_system import connection_guard, connections
from memory_system.connection_guard import (
    FORGIVEN_BYTES,
    PATIENT_S,
    SETTLED_S,
    STALLED_S,
    Finding,
    Judge,
    guarding,
)
from memory_system.connections import CURVE_BYTES, Connection, Ledger
from memory_system.router import Incoming

LIMIT = 64 * 2**20
MIB = 2**20


def connection(fd: int, received: int = 0, *, acknowledged: int = 0, unsent: int = 0) -> Connection:
    return Connection(fd, f"127.0.0.1:{40_000 + fd}", received, acknowledged, unsent)


class Stern(Judge):
    """Memory has grown beyond the limit."""

    def look(self, found: list[Connection], now_s: float, grown_bytes: int = LIMIT + 1) -> Finding:
        return super().look(found, now_s, grown_bytes)


def judge() -> Stern:
    return Stern(LIMIT, lambda each: each.received)


# -- who is closed ----------------------------------------------------------------------------------------------------


def test_those_who_hold_half_of_it_are_closed_and_no_more() -> None:
    found = [connection(1, 100), connection(2, 30 * MIB), connection(3, 20 * MIB), connection(4, 5 * MIB)]
    assert [each.fd for each in judge().look(found, 0.0).offenders] == [2]
    found[1] = connection(2, 22 * MIB)
    assert [each.fd for each in judge().look(found, 0.0).offenders] == [2, 3]


def test_growth_that_no_connection_explains_is_the_programs_own() -> None:
    finding = judge().look([connection(fd, 8000) for fd in range(20)], 0.0)
    assert (finding.offenders, finding.is_settled) == ([], True)


def test_small_parts_count_for_what_they_become_in_memory() -> None:
    assert judge().look([connection(1, 2 * MIB)], 0.0).offenders


def test_who_does_not_read_is_closed_once_that_is_certain() -> None:
    ours = judge()
    stalled, slow = connection(1, acknowledged=5, unsent=10), connection(2, acknowledged=5, unsent=10)
    first = ours.look([stalled, slow], 0.0)
    assert (first.offenders, first.is_settled) == ([], False)
    slow = connection(2, acknowledged=6, unsent=10)
    second = ours.look([stalled, slow], STALLED_S)
    assert ([each.fd for each in second.offenders], second.is_settled) == ([1], False)


def test_that_some_bytes_always_wait_for_those_who_read_settles_it_all_the_same() -> None:
    """Else a busy program that has grown for good would look at each of its connections ten times a second."""
    ours, acknowledged = judge(), 0
    for tick in range(round(SETTLED_S / 0.1)):
        acknowledged += 100
        finding = ours.look([connection(1, acknowledged=acknowledged, unsent=10)], tick * 0.1)
        assert (finding.offenders, finding.is_settled) == ([], False)
    acknowledged += 100
    assert ours.look([connection(1, acknowledged=acknowledged, unsent=10)], SETTLED_S).is_settled


def test_attackers_who_come_back_again_and_again_never_settle_it() -> None:
    ours = judge()
    for tick in range(100):
        life = tick // 6  # each time under another address
        attacker = Connection(1, f"10.0.0.{life}:1", 0, 5, 10)
        finding = ours.look([attacker], tick * 0.1)
        assert not finding.is_settled
        assert bool(finding.offenders) == (tick % 6 == 5)


def test_a_crowd_that_only_says_that_it_lives_is_not_why_memory_has_grown() -> None:
    """Ten thousand encrypted connections, each with a handshake of 600 bytes and a minute of heartbeats (750)."""
    ours = judge()
    finding = ours.look([connection(fd, 1350) for fd in range(10_000)], 0.0)
    assert (finding.offenders, finding.is_settled) == ([], True)


def test_a_large_request_on_its_way_is_no_message_without_an_end() -> None:
    """The program grows under load, and whenever it is looked some of its clients have just sent a large request."""
    taken = 0
    now_s = 0.0
    ours = Judge(LIMIT, lambda each: each.received - taken, lambda: now_s)
    for tick in range(40):
        if tick % 9 == 8:  # the next request of both
            taken += 2 * MIB
        now_s = tick * 0.1
        finding = ours.look([connection(fd, taken + 2 * MIB) for fd in (1, 2)], now_s, LIMIT)
        assert (finding.offenders, finding.is_settled) == ([], now_s >= SETTLED_S)


def test_a_program_that_is_behind_suspects_nobody_and_settles_nothing() -> None:
    """It has requests before it that are whole; beyond the limit it does not matter."""
    left_s = 0.5
    ours = Judge(LIMIT, lambda each: each.received, lambda: left_s)
    for tick in range(50):
        finding = ours.look([connection(1, 2 * MIB)], tick * 0.1, LIMIT)
        assert (finding.offenders, finding.is_settled) == ([], False)
    assert ours.look([connection(1, 2 * MIB)], 5.0, LIMIT + 1).offenders
    left_s = 5.1
    assert ours.look([connection(1, 2 * MIB)], 5.1, LIMIT).offenders


def test_one_who_does_not_go_on_is_closed_below_the_limit_too() -> None:
    """Else it would be taken for what the program itself has grown by, and begin anew."""
    now_s = 0.0
    ours = Judge(LIMIT, lambda each: each.received - 5000, lambda: now_s)
    for tick in range(10):
        now_s = tick * 0.1
        finding = ours.look([connection(1, (2 + tick) * MIB)], now_s, LIMIT)
        assert (finding.offenders, finding.is_settled) == ([], False)
    now_s = PATIENT_S
    assert [each.fd for each in ours.look([connection(1, 12 * MIB)], now_s, LIMIT).offenders] == [1]


def test_beyond_the_limit_nobody_has_patience() -> None:
    ours = Judge(LIMIT, lambda each: each.received - 5000, lambda: 0.0)
    assert not ours.look([connection(1, 2 * MIB)], 0.0, LIMIT).offenders
    assert ours.look([connection(1, 2 * MIB)], 0.1, LIMIT + 1).offenders


def test_without_proc_a_program_runs_unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> int:
        raise FileNotFoundError(2, "No such file or directory", "/proc/self/statm")

    ran = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fails)
        with guarding(512.0):
            ran.append(True)
    assert ran


def test_a_trifle_that_was_there_before_does_not_count() -> None:
    """Heartbeats are received and never taken: 2 KiB in a minute are forgotten, a message's beginning is not."""
    ours = Stern(MIB, lambda each: each.received)
    for minute in range(20):
        ours.forgive([connection(1, FORGIVEN_BYTES * (minute + 1)), connection(2, 50_000 * (minute + 1))])
    assert [each.fd for each in ours.look([connection(1, 80_000), connection(2, 10**6)], 0.0).offenders] == [2]


def test_where_files_run_out_it_does_little_else_than_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look through thousands of connections with each tick would take half of the program's time."""
    looks: list[float] = []

    def look(_refused: bool) -> None:
        looks.append(time.monotonic())
        time.sleep(0.02)

    monkeypatch.setattr(connection_guard, "open_files", lambda: 95)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    monkeypatch.setattr(connections, "accepted", list)
    monkeypatch.setattr(connections, "refuse_new", look)
    with guarding(1_000_000.0):
        time.sleep(1.0)
    assert len(looks) >= 2
    assert min(later - earlier for earlier, later in pairwise(looks)) >= 0.02 / connection_guard.FILES_LOOKING


# -- what was taken ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def router() -> Iterator[tuple[zmq.Socket[bytes], zmq.Context[zmq.Socket[bytes]], int]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    bound = context.socket(zmq.ROUTER)
    bound.linger = 0
    port = bound.bind_to_random_port("tcp://127.0.0.1")
    try:
        yield bound, context, port
    finally:
        context.destroy(linger=0)


def read_all(bound: zmq.Socket[bytes], count: int, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory_system.router.LEDGER", ledger)
    incoming = Incoming(bound, own=1)
    while count:
        assert bound.poll(5000)
        count -= incoming.read() is not None


@pytest.mark.skipif(not connections.IS_KNOWN, reason="only Linux tells")
def test_what_was_taken_is_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, but for the handshake: so a busy client never looks like one with a message without an end."""
    ledger, rng = Ledger(), random.Random(1)
    with router() as (bound, context, port):
        client = context.socket(zmq.DEALER)
        client.connect(f"tcp://127.0.0.1:{port}")
        for size in [0, 1, 255, 256, 70_000] + [rng.randrange(2000) for _ in range(300)]:
            client.send_multipart([b"", b"x" * size])
        client.send_multipart([b"part"] * 40)  # more than any of ours has
        read_all(bound, 306, ledger, monkeypatch)
        (ours,) = [each for each in connections.accepted() if each.peer and each.received > 70_000]
        assert 0 <= ledger.held(ours) < 300
        client.send_multipart([b"", b"x" * 10_000])
        deadline_s = time.monotonic() + 5
        while ledger.held(connections.accepted()[0]) < 10_000:
            assert time.monotonic() < deadline_s


def test_each_part_of_an_encrypted_message_has_more_on_the_wire() -> None:
    class Frame:
        def get(self, _option: int) -> int:
            return 7

    plain, curve = Ledger(), Ledger()
    curve.more_bytes = CURVE_BYTES
    for ledger in (plain, curve):
        ledger.note(Frame(), [b"", b"x" * 300])  # type: ignore[arg-type]
    assert plain.held(connection(7, 311 + 50)) == 50
    assert curve.held(connection(7, 311 + 2 * CURVE_BYTES + 50)) == 50


def test_what_an_earlier_connection_brought_is_not_this_ones() -> None:
    class Frame:
        def get(self, _option: int) -> int:
            return 7

    ledger = Ledger()
    ledger.note(Frame(), [b"x" * 1000])  # type: ignore[arg-type]
    assert ledger.held(connection(7, 500)) == 500


@pytest.mark.skipif(not connections.IS_KNOWN, reason="only Linux tells")
def test_a_busy_client_that_connects_again_is_not_taken_for_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection has the descriptor of the one before, and with it what was taken of that."""
    ledger = Ledger()
    fds = []
    with router() as (bound, context, port):
        for size in (1_000_000, 50_000):
            with context.socket(zmq.DEALER) as client:
                client.linger = 0
                client.connect(f"tcp://127.0.0.1:{port}")
                client.send_multipart([b"", b"x" * size])
                read_all(bound, 1, ledger, monkeypatch)
                (ours,) = connections.accepted()
                fds.append(ours.fd)
                assert ledger.held(ours) < 300
            deadline_s = time.monotonic() + 5
            while connections.accepted():
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
    assert fds[0] == fds[1]


# -- the kernel's side ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not connections.IS_KNOWN, reason="only Linux tells")
def test_connections_that_came_are_seen_and_can_be_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        side, _ = server.accept()
        with side:
            client.sendall(b"x" * 100)
            assert side.recv(1000) == b"x" * 100
            ours = [each for each in connections.accepted() if each.fd == side.fileno()]
            assert [(each.received, each.unsent) for each in ours] == [(100, 0)]
            assert client.fileno() not in [each.fd for each in connections.accepted()]
            assert not connections.cut(Connection(side.fileno(), "127.0.0.1:1", 0, 0, 0))
            assert connections.cut(ours[0])
            assert client.recv(10) == b""


@pytest.mark.skipif(not connections.IS_KNOWN, reason="only Linux tells")
def test_new_connections_can_be_kept_out_for_a_while() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections.refuse_new(True)
        with pytest.raises(TimeoutError), socket.create_connection(server.getsockname(), timeout=0.3):
            pass
        connections.refuse_new(False)
        with socket.create_connection(server.getsockname(), timeout=5):
            pass


@pytest.mark.skipif(not connections.IS_KNOWN, reason="only Linux tells")
def test_other_descriptors_are_left_alone() -> None:
    ours = socket.socketpair()
    read, write = os.pipe()
    connections.accepted()
    connections.refuse_new(False)
    ours[0].sendall(b"a")
    assert ours[1].recv(1) == b"a"
    os.write(write, b"b")
    assert os.read(read, 1) == b"b"
    for fd in (read, write):
        os.close(fd)
    for sock in ours:
        sock.close()

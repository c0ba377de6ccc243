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
from memory_system.connection_guard import guarding
from memory_system.connection_judge import (
    BEGUN_S,
    BEYOND_S,
    FORGIVEN_BYTES,
    MOST_HELD_BYTES,
    PATIENT_S,
    SETTLED_S,
    SHORT_S,
    Finding,
    Judge,
)
from memory_system.connections import CURVE_BYTES, Connection, Ledger
from memory_system.router import Incoming

MIB = 2**20
LIMIT = 64 * MIB
IN_ORDER, SHORT, BEYOND = LIMIT * 5 // 8, LIMIT * 7 // 8, LIMIT + 1
TICK_S = 0.02


def connection(fd: int, received: int = 0, *, acknowledged: int = 0, unsent: int = 0) -> Connection:
    return Connection(fd, f"127.0.0.1:{40_000 + fd}", received, acknowledged, unsent)


class Scene:
    """A judge, and what it sees: `held` and `taken` bytes of clients, unread replies, memory that has grown by so much.
    The program takes what there is to take at once, unless it is `behind`."""

    def __init__(self, grown_bytes: int) -> None:
        self.grown_bytes = grown_bytes
        self.now_s = 0.0
        self.held: dict[int, int] = {}
        self.taken: dict[int, int] = {}
        self.unread: dict[int, int] = {}  # what was read of what waits
        self.left_s = 0.0
        self.behind = False
        self.judge = Judge(LIMIT, lambda each: self.held.get(each.fd, 0), lambda: self.left_s)

    def look(self) -> Finding:
        if not self.behind:
            self.left_s = self.now_s
        fds = self.held.keys() | self.unread.keys()
        found = [
            connection(
                fd,
                self.held.get(fd, 0) + self.taken.get(fd, 0),
                acknowledged=self.unread.get(fd, 0),
                unsent=10 * (fd in self.unread),
            )
            for fd in sorted(fds)
        ]
        return self.judge.look(found, self.now_s, self.grown_bytes)

    def until(self, seconds_s: float, **each: int) -> Finding:
        """Look until then, or until somebody is closed or it is settled; `each` names a client, as `c1`, and what more
        it sends with each tick."""
        while True:
            finding = self.look()
            if finding.offenders or finding.is_settled or self.now_s >= seconds_s:
                return finding
            self.now_s += TICK_S
            for name, count in each.items():
                self.held[int(name[1:])] += count

    def send(self, fd: int, count: int) -> None:
        """A message of so many bytes comes and is taken."""
        self.taken[fd] = self.taken.get(fd, 0) + count


def fds(finding: Finding) -> list[int]:
    return [each.fd for each in finding.offenders]


# -- who is closed ----------------------------------------------------------------------------------------------------


def test_who_took_the_longest_over_a_message_goes_and_not_who_holds_the_most() -> None:
    """Parts of two bytes become twenty times as many: those who send them hold less than an honest large request."""
    scene = Scene(IN_ORDER)
    scene.held = {1: 400_000, 2: 500_000}
    assert not scene.until(0.3, c1=1000, c2=1000).offenders
    scene.held[3] = 7 * MIB
    scene.until(0.4, c1=1000, c2=1000)
    scene.grown_bytes = SHORT
    assert fds(scene.look()) == [1, 2]


def test_whoever_holds_more_than_a_message_may_have_goes_at_once_and_nobody_else() -> None:
    scene = Scene(SHORT)
    scene.held = {1: 8 * MIB, 2: MOST_HELD_BYTES + 1, 3: 2 * MOST_HELD_BYTES, 4: 15 * MIB}
    assert fds(scene.look()) == [2, 3]


def test_with_the_one_who_took_the_longest_go_those_who_took_nearly_as_long() -> None:
    scene = Scene(IN_ORDER)
    for fd, begun_s in ((1, 0.0), (2, 0.2), (3, 0.6)):
        scene.until(begun_s)
        scene.held[fd] = 3 * MIB
    scene.until(1.0)
    scene.grown_bytes = SHORT
    assert fds(scene.look()) == [1, 2]


def test_who_has_only_begun_is_waited_for_until_the_limit_is_passed() -> None:
    scene = Scene(SHORT)
    scene.held[1] = 3 * MIB
    assert not scene.look().offenders
    scene.grown_bytes = BEYOND
    assert fds(scene.look()) == [1]
    scene = Scene(SHORT)
    scene.held[1] = 3 * MIB
    assert fds(scene.until(1.0)) == [1]
    assert scene.now_s == pytest.approx(BEGUN_S, abs=TICK_S)


def test_bulk_clients_whose_messages_end_are_never_closed_whatever_others_do() -> None:
    """Each has a large request on its way at every look; attackers with far fewer bytes come back again and again."""
    scene, closed = Scene(IN_ORDER), 0
    scene.held = dict.fromkeys((1, 2, 3), MIB)
    for fd in scene.held:
        scene.send(fd, 7 * MIB)
    life, begun_s = 100, 0.0
    for tick in range(500):
        scene.now_s = tick * TICK_S
        for fd in (1, 2, 3):
            scene.held[fd] += 2 * MIB if tick % 4 else 0
            if (tick + fd) % 4 == 0:
                scene.send(fd, scene.held[fd])
                scene.held[fd] = MIB
        scene.held[life] = scene.held.get(life, 850_000) + 1000
        scene.grown_bytes = SHORT if scene.now_s - begun_s > 0.3 else IN_ORDER
        if offenders := fds(scene.look()):
            assert offenders == [life]
            closed += 1
            del scene.held[life]
            life, begun_s = life + 1, scene.now_s
    assert closed > 10


def test_who_has_sent_messages_that_ended_is_judged_after_strangers() -> None:
    scene = Scene(SHORT)
    scene.held = {1: 3 * MIB, 2: 2 * MIB, 3: MIB}
    scene.send(1, 3 * MIB)
    scene.send(3, 1000)  # a trifle proves nothing
    scene.until(0.2)
    assert fds(scene.until(1.0)) == [2, 3]
    del scene.held[2], scene.held[3]
    assert not scene.until(PATIENT_S - 0.1).offenders
    scene.grown_bytes = BEYOND
    assert fds(scene.look()) == [1]


def test_while_what_was_cut_is_not_free_yet_those_alone_go_who_hold_more_than_a_message_may_have() -> None:
    found = [connection(1, 8 * MIB), connection(2, 2 * MOST_HELD_BYTES)]
    ours = Judge(LIMIT, lambda each: each.received, lambda: 60.0)
    assert not ours.look(found, 0.0, SHORT, some_are_leaving=True).offenders
    assert not ours.look(found[:1], 60.0, 2 * LIMIT, some_are_leaving=True).offenders
    assert fds(ours.look(found, 60.0, BEYOND, some_are_leaving=True)) == [2]


def test_far_beyond_the_limit_nobody_is_waited_for() -> None:
    scene = Scene(BEYOND)
    scene.held[1] = 3 * MIB
    scene.send(1, 3 * MIB)
    assert not scene.until(0.1).offenders
    scene.grown_bytes = 2 * LIMIT
    assert fds(scene.look()) == [1]


def test_a_request_that_was_sent_and_is_not_taken_yet_grows_no_older_by_that() -> None:
    """A program that is behind knows of nobody's message whether it has ended; but who has sent it sends no more."""
    scene = Scene(IN_ORDER)
    scene.behind = True
    scene.held = {1: 8 * MIB, 2: 100_000}
    scene.until(0.1, c1=10_000, c2=10_000)
    scene.until(1.0, c2=10_000)
    scene.grown_bytes = SHORT
    assert fds(scene.look()) == [2]


def test_a_large_request_over_a_slow_line_is_waited_for_while_memory_is_not_short() -> None:
    """The program grows by what it stores: nobody has to go for that."""
    scene = Scene(IN_ORDER)
    scene.held[1] = MIB
    finding = scene.until(PATIENT_S - 0.1, c1=20_000)
    assert (finding.offenders, finding.is_settled) == ([], False)
    scene.send(1, scene.held.pop(1))
    assert scene.until(PATIENT_S + 0.1).is_settled


def test_one_who_does_not_go_on_is_closed_below_the_limit_too() -> None:
    """Else it would be taken for what the program itself has grown by, and begin anew."""
    scene = Scene(IN_ORDER)
    scene.held[1] = 2 * MIB
    assert fds(scene.until(60.0)) == [1]
    assert scene.now_s == pytest.approx(PATIENT_S, abs=TICK_S)


def test_growth_that_no_connection_explains_is_the_programs_own() -> None:
    scene = Scene(BEYOND)
    scene.held = dict.fromkeys(range(20), 8000)
    finding = scene.look()
    assert (finding.offenders, finding.is_settled) == ([], True)


@pytest.mark.parametrize(("grown", "after_s"), [(IN_ORDER, PATIENT_S), (SHORT, SHORT_S), (BEYOND, BEYOND_S)])
def test_who_does_not_read_is_closed_once_that_is_certain(grown: int, after_s: float) -> None:
    scene = Scene(grown)
    scene.unread = {1: 5, 2: 5}
    while not (finding := scene.look()).offenders:
        assert not finding.is_settled
        scene.now_s += TICK_S
        scene.unread[2] += 1
    assert fds(finding) == [1]
    assert scene.now_s == pytest.approx(after_s, abs=TICK_S)


def test_that_some_bytes_always_wait_for_those_who_read_settles_it_all_the_same() -> None:
    """Else a busy program that has grown for good would look at each of its connections again and again."""
    scene = Scene(BEYOND)
    scene.unread[1] = 0
    while not (finding := scene.look()).is_settled:
        assert not finding.offenders
        scene.now_s += TICK_S
        scene.unread[1] += 1
    assert scene.now_s == pytest.approx(SETTLED_S, abs=TICK_S)


def test_that_large_requests_are_always_on_their_way_settles_it_all_the_same() -> None:
    scene = Scene(IN_ORDER)
    for tick in range(200):
        scene.now_s = tick * TICK_S
        for fd in (1, 2):
            if tick % 9 == 8:
                scene.send(fd, 2 * MIB)
            scene.held[fd] = 2 * MIB
        finding = scene.look()
        assert not finding.offenders
        if finding.is_settled:
            break
    assert scene.now_s == pytest.approx(SETTLED_S, abs=TICK_S)


def test_attackers_who_come_back_again_and_again_never_settle_it() -> None:
    scene = Scene(BEYOND)
    closed = 0
    for tick in range(500):
        scene.now_s = tick * TICK_S
        scene.unread = {tick // 26: 5}  # each time another
        finding = scene.look()
        assert not finding.is_settled
        closed += len(finding.offenders)
    assert closed > 15


def test_a_crowd_that_only_says_that_it_lives_is_not_why_memory_has_grown() -> None:
    """Ten thousand encrypted connections, each with a handshake of 600 bytes and a minute of heartbeats (750)."""
    scene = Scene(BEYOND)
    scene.held = dict.fromkeys(range(10_000), 1350)
    finding = scene.look()
    assert (finding.offenders, finding.is_settled) == ([], True)


def test_a_program_that_is_behind_settles_nothing() -> None:
    """It has requests before it that are whole, and cannot tell them from others."""
    scene = Scene(IN_ORDER)
    scene.behind = True
    scene.held[1] = 2 * MIB
    finding = scene.until(2 * PATIENT_S)
    assert (finding.offenders, finding.is_settled) == ([], False)
    scene.behind = False
    assert fds(scene.look()) == [1]


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
    ours = Judge(MIB, lambda each: each.received)
    for minute in range(20):
        ours.forgive([connection(1, FORGIVEN_BYTES * (minute + 1)), connection(2, 50_000 * (minute + 1))])
    found = [connection(1, 80_000), connection(2, 10**6)]
    assert fds(ours.look([each for each in found if each.fd == 1], 0.0, MIB + 1)) == [1]
    ours.calm()
    assert fds(ours.look([connection(1, FORGIVEN_BYTES * 20), found[1]], 0.0, MIB + 1)) == [2]


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
            assert connections.is_open(ours[0])
            assert connections.cut(ours[0])
            assert client.recv(10) == b""
            assert connections.is_open(ours[0])
        assert not connections.is_open(ours[0])


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

"""Whatever arrives at the ports of the error bus becomes an event or is counted; the manager lives on."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from memory_system.events import ERROR_TOPIC
from tests.support.bus import Row
from tests.support.mesh import Mesh, running_mesh, tell
from tests.support.process import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

SEED = int(os.environ.get("FUZZ_SEED", "20240607"))
MESSAGES = 3000
DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with running_mesh(tmp_path_factory.mktemp("mesh"), health__heartbeat_s=1) as running:
        yield running


@pytest.fixture(autouse=True)
def alive(mesh: Mesh) -> Iterator[None]:
    """The same process answers after each test, and what is reported arrives."""
    pid, since_seq = mesh.pid("health_manager"), mesh.last_seq()
    yield
    mesh.reporter("probe").report("still_alive", "reporting works")
    wait_until(lambda: bool(mesh.history(since_seq, error_type="still_alive")), "an event is written")
    assert mesh.answers("health_manager", timeout_s=30.0) == mesh.pid("health_manager") == pid


def malformed(mesh: Mesh, since_seq: int, **filters: Any) -> list[Row]:
    return mesh.history(since_seq, error_type="malformed_event", **filters)


def connected_publisher(mesh: Mesh, **options: int) -> zmq.Socket[bytes]:
    """A PUB socket whose events arrive."""
    sock = mesh.socket(zmq.PUB, "mesh", **options)
    mark = f"connected_{time.monotonic_ns()}"

    def arrives() -> bool:
        sock.send_string("ERROR:" + json.dumps({"agent": "mesh", "error_type": mark}))
        return bool(mesh.history(error_type=mark))

    wait_until(arrives, "events of the publisher arrive")
    return sock


FOREIGN = [
    {"agent": "translator", "error_type": "timeout", "message": "no reply", "severity": "error"},
    {
        "agent_id": "translator",
        "type": "timeout",
        "error": "no reply",
        "level": "WARN",
        "timestamp": "2024-05-01T10:00:00",
    },
    {"component": "translator", "error_code": 504, "msg": "no reply", "time": time.time()},
    {"source": "translator", "message": "no reply", "details": ["a", "list"]},
]


@pytest.mark.parametrize("event", FOREIGN)
def test_events_in_the_manner_of_the_mesh_arrive(mesh: Mesh, event: dict[str, Any]) -> None:
    since_seq = mesh.last_seq()
    publisher = connected_publisher(mesh)
    publisher.send_string("ERROR:" + json.dumps(event))
    wait_until(lambda: bool(mesh.history(since_seq, agent="translator")), "the event is written")
    (row,) = mesh.history(since_seq, agent="translator")
    assert row["message"] == "no reply"
    assert row["severity"] in {"error", "warning"}


# What is wrong with the events of a sender whose name can be read.
WRONG = {
    "silent": b"",
    "wordless": b', "message": ["m"]',
}
# What is unusable beside what was said: (the field, what stands in it).
UNUSABLE = {
    "severe": (b'"severity": 7', "severity_sent"),
    "timeless": (b'"timestamp": "soon"', "timestamp_sent"),
    "eternal": (b'"timestamp": 1e999', "timestamp_sent"),
    "aeonic": (b'"timestamp": ' + b"9" * 400, "timestamp_sent"),
}
# Nobody can tell whose these are.
UNREADABLE = [
    b"ERROR:what",
    b"ERROR:",
    b"ERROR:[]",
    b"ERROR:7",
    b'ERROR:{"error_type": "x"}',
    b'ERROR:{"agent": {"name": "x"}, "error_type": "x"}',
    b'ERROR:{"agent": "x", "message": "m", "details": ' + DEEP[:50_000],
    b'ERROR:{"agent": "x", "message": "m", "details": ' + DEEP,
    b'ERROR:{"agent": "x", "message": "' + b"x" * 200_000 + b'"}',
    b'ERROR:{"agent": "x", "message": "\xff"}',
    b'ERROR:{"agent": "x", "message": ' + b"9" * 10_000 + b"}",
]


@pytest.mark.parametrize("agent", WRONG)
def test_a_malformed_event_of_a_publisher_is_an_event_about_its_sender(mesh: Mesh, agent: str) -> None:
    publisher, since_seq = connected_publisher(mesh), mesh.last_seq()
    frame = b'ERROR:{"agent": "' + agent.encode() + b'"' + WRONG[agent] + b"}"
    publisher.send(frame)
    wait_until(lambda: bool(malformed(mesh, since_seq, agent=agent)), "an event about the sender")
    (row,) = malformed(mesh, since_seq, agent=agent)
    assert row["severity"] == "warning"
    assert row["details"]["peer"], "where it came from"
    assert row["details"]["size"] == len(frame)
    assert len(json.dumps(row)) < 1000, "an event about an event does not quote it"


@pytest.mark.parametrize("agent", UNUSABLE)
def test_an_unusable_severity_or_time_does_not_lose_the_event(mesh: Mesh, agent: str) -> None:
    publisher, since_seq = connected_publisher(mesh), mesh.last_seq()
    field, sent = UNUSABLE[agent]
    publisher.send(b'ERROR:{"message": "m", "agent": "' + agent.encode() + b'", ' + field + b"}")
    wait_until(lambda: bool(mesh.history(since_seq, agent=agent)), "the event")
    (row,) = mesh.history(since_seq, agent=agent)
    assert (row["error_type"], row["message"], row["severity"]) == ("unknown", "m", "error")
    assert abs(row["timestamp"] - row["received_at"]) < 60.0
    assert len(str(row["details"][sent])) <= 64
    assert not malformed(mesh, since_seq, agent=agent)


def test_events_that_cannot_be_read_are_counted(mesh: Mesh) -> None:
    publisher, since_seq = connected_publisher(mesh), mesh.last_seq()
    for frame in UNREADABLE:
        publisher.send(frame)

    def told() -> int:
        return sum(row.get("count", 1) for row in malformed(mesh, since_seq, agent="unknown"))

    wait_until(lambda: told() >= len(UNREADABLE), "all are told of", 40.0)
    assert len(malformed(mesh, since_seq, agent="unknown")) <= len(UNREADABLE), "one row for each flaw at most"


def test_what_nobody_subscribed_to_and_what_is_too_large_to_read(mesh: Mesh) -> None:
    """The first is never seen, the second costs the publisher its connection; it connects again and is heard."""
    publisher, since_seq = connected_publisher(mesh), mesh.last_seq()
    for frame in (b"", b"\xff\xfe\x00", b"ERRO", b"HEALTH:{}", b"ERROR:" + b"x" * 20_000_000):
        publisher.send(frame)

    def arrives() -> bool:
        publisher.send_string("ERROR:" + json.dumps({"agent": "mesh", "error_type": "again"}))
        return bool(mesh.history(since_seq, error_type="again"))

    wait_until(arrives, "events of the publisher arrive again")


def batch(*events: object, **around: object) -> bytes:
    body: bytes = msgpack.packb({"v": 1, "kind": "events", "batch": 1, "events": list(events), **around})
    return body


def test_a_bad_event_of_a_reporter_does_not_hold_up_the_good_ones(mesh: Mesh) -> None:
    """A sender that resends what was not acknowledged would otherwise send it for ever."""
    since_seq = mesh.last_seq()
    dealer = mesh.socket(zmq.DEALER, "report")
    good = {"event_id": "g" * 32, "agent": "mixed", "error_type": "good", "message": "m"}
    bad: list[Any] = [
        7,
        None,
        [],
        {},
        {"agent": "mixed"},
        {"agent": "mixed", "message": {}},
        "x" * 70_000,
    ]
    dealer.send_multipart([b"", batch(good, *bad)])
    assert dealer.poll(5000)
    reply = msgpack.unpackb(dealer.recv_multipart()[-1])
    assert (reply["kind"], reply["batch"], reply["accepted"], reply["malformed"]) == ("ack", 1, 1, len(bad))
    assert [row["event_id"] for row in mesh.history(since_seq, error_type="good")] == ["g" * 32]
    wait_until(lambda: bool(malformed(mesh, since_seq)), "events about the sender")

    dealer.send_multipart([b"", batch(good)])
    assert dealer.poll(5000)
    again = msgpack.unpackb(dealer.recv_multipart()[-1])
    assert (again["accepted"], again["known"]) == (0, 1)
    assert len(mesh.history(since_seq, error_type="good")) == 1


BODIES = [
    b"",
    b"\xc1",
    b"{",
    msgpack.packb(7),
    msgpack.packb({"v": 2, "kind": "events"}),
    msgpack.packb({"v": 1}),
    msgpack.packb({"v": 1, "kind": "surprise", "batch": 1}),
    batch(batch=None),
    batch(batch="first"),
    batch(batch=2**63),
    batch(events=7),
    batch(events={"a": 1}),
    b"\xdd\xff\xff\xff\xff",
    b"\x91" * 1000 + b"\xc0",
    b"\x91" * 100_000 + b"\xc0",
    b"\xdc\xff\xff" + b"\x80" * 65_535,
    b"\xc4" * 3_000_000,
    msgpack.packb({"v": 1, "kind": "heartbeat"}),
    msgpack.packb({"v": 1, "kind": "heartbeat", "component": 7, "state": []}),
    msgpack.packb({"v": 1, "kind": "heartbeat", "component": "x" * 10_000, "timestamp": "now", "pid": -1}),
]


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_a_malformed_body_at_the_reporters_port(mesh: Mesh, number: int) -> None:
    dealer = mesh.socket(zmq.DEALER, "report")
    dealer.send_multipart([b"", BODIES[number]])
    dealer.send_multipart([BODIES[number]])
    dealer.send_multipart([b"", b"", BODIES[number], b"more"])
    dealer.send_multipart([b"", batch({"agent": "patient", "message": "after it"}, batch=77)])
    replies: list[dict[str, Any]] = []
    while not replies or replies[-1].get("batch") != 77:
        assert dealer.poll(5000), replies
        replies.append(decode_reply(dealer.recv_multipart()[-1]))
    assert replies[-1]["accepted"] == 1


def decode_reply(body: bytes) -> dict[str, Any]:
    """In the encoding of the request: what begins with `{` was taken for JSON."""
    reply: dict[str, Any] = json.loads(body) if body[:1] == b"{" else msgpack.unpackb(body)
    return reply


# -- fuzz -------------------------------------------------------------------------------------------------------

GOOD = {
    "event_id": "0" * 32,
    "agent": "fuzz",
    "error_type": "fuzz",
    "message": "m",
    "severity": "info",
    "timestamp": 1.7e9,
}
ODD: list[Any] = [
    None,
    True,
    -1,
    2**63,
    1e308,
    float("nan"),
    "",
    "\ud800",
    "x" * 5000,
    [],
    {},
    {"a": {"b": []}},
    [[[]]],
]


def mutated(dice: random.Random, encode: Callable[[Any], bytes]) -> bytes:
    """An event with some fields replaced by odd values, and then perhaps some bytes."""
    event: dict[str, Any] = {**GOOD, "event_id": f"{dice.getrandbits(128):032x}", "details": {"number": dice.random()}}
    for _ in range(dice.randrange(3)):
        event[dice.choice([*event, "odd"])] = dice.choice(ODD)
    try:
        body = bytearray(encode(event))
    except (UnicodeEncodeError, OverflowError):
        body = bytearray(dice.randbytes(dice.randrange(300)))
    for _ in range(dice.choice([0, 0, 1, 8]) if body else 0):
        body[dice.randrange(len(body))] = dice.randrange(256)
    return bytes(body[: dice.randrange(len(body) + 1)] if dice.random() < 0.1 else body)


def test_fuzz_of_a_publisher_and_a_reporter(tmp_path: Path) -> None:
    with running_mesh(tmp_path, health__heartbeat_s=1, error_bus__fold_s=1) as mesh:
        pid, bus = mesh.pid("health_manager"), mesh.subscriber((ERROR_TOPIC,))
        throw(mesh, random.Random(SEED))
        mesh.reporter("probe").report("fuzz_end", "all is thrown")
        bus.wait(ERROR_TOPIC, 60.0, error_type="fuzz_end")

        def counted() -> Row:
            health = mesh.succeed("health_manager", "health_check")
            assert (health["lost_reports"], health["refused_heartbeats"]) == (0, 0)
            figures: Row = health["ingest"]
            return figures

        wait_until(lambda: counted()["received"] + counted()["malformed"] > 1.8 * MESSAGES, "all are read", 60.0)
        rows, counts = mesh.history(), counted()
        tell(f"FUZZ_SEED={SEED}: {2 * MESSAGES} messages, {len(rows)} rows, {counts}")
        assert counts["received"] > MESSAGES / 4
        assert counts["malformed"] > MESSAGES / 10
        assert len(rows) > 100
        assert mesh.answers("health_manager", timeout_s=30.0) == mesh.pid("health_manager") == pid
        mesh.wait_state("health_manager", "healthy")


def throw(mesh: Mesh, dice: random.Random) -> None:
    """Send mutated events to both ports, and read what is answered."""
    publisher = connected_publisher(mesh, SNDHWM=0)
    dealer = mesh.socket(zmq.DEALER, "report", SNDHWM=0)
    for _ in range(MESSAGES):
        publisher.send(b"ERROR:" + mutated(dice, lambda event: json.dumps(event).encode()))
        frames = [b"", mutated(dice, lambda event: batch(event, batch=dice.choice([1, 2, "x"])))]
        dealer.send_multipart(frames if dice.random() < 0.9 else frames[dice.randrange(2) :] * dice.randrange(1, 4))
        while dealer.poll(0):
            decode_reply(dealer.recv_multipart()[-1])

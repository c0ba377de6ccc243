"""Taking in errors and heartbeats over real sockets: acknowledged after the commit, and nothing sent can break it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from memory_system.errors import CannotStart
from memory_system.events import Event, MalformedEvent, make_event
from memory_system.health import mesh, reports
from memory_system.health.history import History
from memory_system.health.history_file import MANAGER
from memory_system.health.ingest import Ingest
from memory_system.health.records import HistoryFailed
from memory_system.health.store import Store
from memory_system.health_settings import ErrorBusSettings, HealthSettings
from memory_system.settings import NetworkSettings, SecuritySettings, Settings
from tests.support.process import free_port


@dataclasses.dataclass
class Bus:
    """A history and its ingest on free ports, with sockets that report to it."""

    settings: Settings
    history: History
    ingest: Ingest
    heartbeats: list[tuple[Mapping[str, Any], str]]
    context: zmq.Context[Any]

    def reporter(self) -> Reporter:
        return Reporter(self.context, self.settings.health.report_port)

    async def publisher(self) -> zmq.Socket[bytes]:
        """A PUB of the mesh; connections and subscriptions take their time, as everywhere in the mesh."""
        publisher: zmq.Socket[bytes] = self.context.socket(zmq.XPUB)
        publisher.setsockopt(zmq.SNDHWM, 0)
        publisher.connect(f"tcp://127.0.0.1:{self.settings.health.mesh_port}")
        assert await until(lambda: bool(publisher.poll(0))), "no subscription came"
        assert publisher.recv() == b"\x01ERROR:"
        return publisher

    async def stored(self, number: int) -> list[Event]:
        """The events of the history, once they stand for this many."""
        end_s = time.monotonic() + 20.0
        while True:
            page = await self.history.get_errors(limit=1000)
            if page.total >= number:
                assert page.total == number
                return [stored.event for stored in page.results]
            assert time.monotonic() < end_s, f"{page.total} of {number}"
            await asyncio.sleep(0.01)


class Reporter:
    """A DEALER as programs report with."""

    def __init__(self, context: zmq.Context[Any], port: int) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.connect(f"tcp://127.0.0.1:{port}")

    def send(self, body: bytes) -> None:
        self.socket.send_multipart([b"", body])

    async def hear(self, as_json: bool = False) -> dict[str, Any]:
        assert await until(lambda: bool(self.socket.poll(0))), "no answer"
        empty, body = self.socket.recv_multipart()
        assert empty == b""
        return json.loads(body) if as_json else msgpack.unpackb(body)  # type: ignore[no-any-return]

    async def ask(self, number: int, events: list[Any], **around: Any) -> dict[str, Any]:
        self.send(msgpack.packb({"v": 1, "kind": "events", "batch": number, "events": events, **around}))
        return await self.hear()


async def until(condition: Callable[[], bool], timeout_s: float = 45.0) -> bool:
    end_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        await asyncio.sleep(0.005)
    return True


@contextlib.asynccontextmanager
async def running(folder: Path, bind: str = "127.0.0.1", **options: Any) -> AsyncIterator[Bus]:
    settings = Settings(
        network=NetworkSettings(bind=bind),
        security=SecuritySettings(allow_insecure=bind != "127.0.0.1", insecure_peers=options.pop("peers", ())),
        health=HealthSettings(report_port=free_port(), mesh_port=free_port()),
        error_bus=ErrorBusSettings(**options),
    )
    history = History(folder / "health.db", settings.error_bus)
    heartbeats: list[tuple[Mapping[str, Any], str]] = []
    ingest = Ingest(settings, history, on_heartbeat=lambda fields, address: heartbeats.append((fields, address)))
    context: zmq.Context[Any] = zmq.Context()
    try:
        ingest.bind()
        await history.start()
        ingest.start()
        yield Bus(settings, history, ingest, heartbeats, context)
    finally:
        await ingest.close()
        await history.close()
        context.destroy(linger=0)


def fields(number: int, **more: Any) -> list[dict[str, Any]]:
    return [make_event("agent", "t", f"message {each}", **more).fields() for each in range(number)]


# -- reporters --------------------------------------------------------------------------------------------------------


def test_a_batch_is_acknowledged_and_known_when_it_comes_again(tmp_path: Path) -> None:
    async def use() -> None:
        async with running(tmp_path) as bus:
            reporter = bus.reporter()
            batch = [*fields(3, request_id="r-1", details={"n": 1}), {"agent": "x"}]
            answer = {"v": 1, "kind": "ack", "batch": 7, "accepted": 3, "known": 0, "malformed": 1}
            assert await reporter.ask(7, batch) == answer
            assert await reporter.ask(8, batch) == answer | {"batch": 8, "accepted": 0, "known": 3}
            stored = [event.fields() for event in await bus.stored(4)]
            assert [event for event in stored if event["error_type"] == "t"] == batch[:3]
            assert bus.ingest.figures()["received"] == 6
            assert bus.ingest.figures()["known"] == 3
            assert bus.ingest.figures()["malformed"] == 2

    asyncio.run(use())


def test_an_acknowledgement_comes_after_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    write = Store.write

    def slow_write(self: Store, *arguments: Any) -> Any:
        done = write(self, *arguments)
        assert gate.wait(20)
        return done

    monkeypatch.setattr(Store, "write", slow_write)

    async def use() -> None:
        async with running(tmp_path) as bus:
            reporter = bus.reporter()
            asking = asyncio.ensure_future(reporter.ask(1, fields(2)))
            await asyncio.sleep(0.3)
            assert not asking.done()
            gate.set()
            assert (await asking)["accepted"] == 2

    asyncio.run(use())


def test_json_is_answered_in_json(tmp_path: Path) -> None:
    async def use() -> None:
        async with running(tmp_path) as bus:
            reporter = bus.reporter()
            reporter.send(json.dumps({"v": 1, "kind": "events", "batch": 1, "events": fields(2)}).encode())
            assert (await reporter.hear(as_json=True))["accepted"] == 2
            assert len(await bus.stored(2)) == 2

    asyncio.run(use())


def test_heartbeats_are_handed_on_bounded(tmp_path: Path) -> None:
    async def use() -> None:
        async with running(tmp_path) as bus:
            reporter = bus.reporter()
            beat = {"v": 1, "kind": "heartbeat", "component": "planner", "timestamp": 5.5, "pid": 1, "state": "healthy"}
            reporter.send(msgpack.packb(beat))
            reporter.send(msgpack.packb({**beat, "timestamp": "soon", "query": "secret", 5: b"x"}))
            figures = {f"figure_{number}": number for number in range(1000)}
            reporter.send(msgpack.packb({**beat, **figures, "state": "stopping"}))
            reporter.send(msgpack.packb({**beat, "component": ""}))
            assert (await reporter.hear())["kind"] == "refused"
            assert (await reporter.ask(1, []))["kind"] == "ack"
            (first, address), (second, _), (third, _) = bus.heartbeats
            assert (third["pid"], third["state"], third["truncated"]) == (1, "stopping", True)
            assert len(third) < 10
            assert first == {"component": "planner", "timestamp": 5.5, "pid": 1, "state": "healthy"}
            assert address == ""
            assert abs(second["timestamp"] - time.time()) < 10
            assert "secret" not in json.dumps(second)
            assert bus.ingest.figures()["heartbeats"] == 3
            assert [event.error_type for event in await bus.stored(1)] == ["malformed_event"]

    asyncio.run(use())


def test_while_the_history_fails_reporters_are_told_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [True]
    write = Store.write

    def failing_write(self: Store, *arguments: Any) -> Any:
        if failing[0]:
            raise OSError(28, "No space left on device")
        return write(self, *arguments)

    monkeypatch.setattr(Store, "write", failing_write)

    async def use() -> None:
        async with running(tmp_path) as bus:
            reporter, publisher = bus.reporter(), await bus.publisher()
            batch = fields(5)
            answer = await reporter.ask(3, batch)
            assert (answer["kind"], answer["batch"]) == ("retry", 3)
            assert answer["retry_after_ms"] > 0
            assert "No space left" in answer["message"]
            for _ in range(4):
                publisher.send(b"ERROR:" + json.dumps({"agent": "mesh", "error": "lost"}).encode())
            assert await until(lambda: bus.ingest.figures()["dropped"] == 4)
            with pytest.raises(HistoryFailed):
                await bus.history.submit([])
            failing[0] = False
            assert (await reporter.ask(3, batch))["accepted"] == 5
            stored = await bus.stored(10)
            others = [(event.error_type, event.count) for event in stored if event.agent == MANAGER]
            assert others == [("history_failed", 1), ("events_dropped", 4)]
            assert bus.ingest.figures()["retries"] == 1

    asyncio.run(use())


def test_closing_acknowledges_what_is_being_committed(tmp_path: Path) -> None:
    async def use() -> None:
        async with running(tmp_path) as bus:
            reporters = [bus.reporter() for _ in range(5)]
            hearing = [asyncio.ensure_future(each.ask(1, fields(200))) for each in reporters]
            assert await until(lambda: bus.ingest.figures()["received"] == 1000)
            await bus.ingest.close()
            assert [answer["accepted"] for answer in await asyncio.gather(*hearing)] == [200] * 5
            await bus.ingest.close()

    asyncio.run(use())


# -- what is no report --------------------------------------------------------------------------------------------


BROKEN = [
    b"",
    b"\x00",
    b"hello",
    b"{",
    b"[]",
    b"{}",
    b"\xc1" * 50,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\x91" * 100_000,
    b"\x80" * 3_000_000,
    b"\xdd\xff\xff\xff\xff",
    b"\x81\x90\x01",
    msgpack.packb({"v": 2, "kind": "events", "batch": 1, "events": []}),
    msgpack.packb({"v": 1, "kind": "events", "batch": "1", "events": []}),
    msgpack.packb({"v": 1, "kind": "events", "batch": 1, "events": {}}),
    msgpack.packb({"v": 1, "kind": "events", "batch": 2**64 - 1, "events": []}),
    msgpack.packb({"v": 1, "kind": "events", "batch": 1, "events": [1] * 3000}),
    msgpack.packb({"v": 1, "kind": "other"}),
    msgpack.packb({"v": 1, "kind": "heartbeat"}),
    msgpack.packb([{}] * 1000),
    b"\x80" + b"x" * 2_500_000,
]


@pytest.mark.parametrize(
    ("report", "batch", "message"),
    [
        ({"v": 2, "kind": "events", "batch": 3, "events": []}, 3, "v names an unknown version; known is 1"),
        ({"kind": "events", "batch": 3, "events": []}, 3, "v is missing; the version is 1"),
        ({"v": 1, "kind": "events", "events": []}, None, "batch is missing: a number of the sender"),
        ({"v": 1, "kind": "events", "batch": "x", "events": []}, None, "batch is no integer from 0"),
        ({"v": 1, "kind": "events", "batch": 3}, 3, "events is missing"),
        ({"v": 1, "kind": "events", "batch": 3, "events": {}}, 3, "events is no list"),
        ({"v": 1, "kind": "event", "batch": 3}, 3, "kind is unknown; known are events and heartbeat"),
        ({"v": 1, "batch": 3}, 3, "kind is missing; known are events and heartbeat"),
    ],
)
def test_a_refusal_says_what_is_wrong_and_with_which_batch(
    report: dict[str, Any], batch: int | None, message: str
) -> None:
    with pytest.raises(reports.NoReport) as caught:
        reports.read_report(json.dumps(report).encode(), time.time())
    answer = json.loads(reports.refusal(b"{", caught.value.reason, caught.value.batch))
    assert (answer["kind"], answer.get("batch"), answer["message"]) == ("refused", batch, message)


def test_what_is_no_report_is_refused_and_told_of(tmp_path: Path) -> None:
    async def use() -> None:
        async with running(tmp_path) as bus:
            reporter = bus.reporter()
            for body in BROKEN:
                reporter.send(body)
                answer = await reporter.hear(as_json=body.startswith(b"{"))
                assert answer["kind"] == "refused", (body[:40], answer)
            for frames in ([b""], [b"x", b"y"], [b"", b"x", b"y"], [b"x"]):
                reporter.socket.send_multipart(frames)
            assert (await reporter.ask(1, fields(1)))["accepted"] == 1
            assert bus.ingest.figures()["malformed"] == len(BROKEN) + 4
            page = await bus.history.get_errors(error_type="malformed_event")
            assert {stored.event.agent for stored in page.results} == {"unknown"}
            flaws = [stored.event.message for stored in page.results]
            assert len(set(flaws)) == len(flaws) > 5, "each flaw is told of once"
            assert page.results[0].event.details["peer"] == "loopback"
            # The rest is summed up.
            await bus.ingest.close()
            page = await bus.history.get_errors()
            assert page.total == len(BROKEN) + 5

    asyncio.run(use())


@given(st.binary(max_size=300))
def test_no_bytes_get_anything_but_malformed_out_of_the_reader(body: bytes) -> None:
    for read in (lambda: reports.read_report(body, 5.0), lambda: reports.read_mesh([b"ERROR:" + body], 5.0)):
        with contextlib.suppress(MalformedEvent):
            read()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
NAMES = ("agent", "agent_id", "error_type", "error", "message", "severity", "timestamp", "details", "event_id", "count")


@given(st.dictionaries(st.sampled_from(NAMES), VALUES))
def test_an_event_of_any_values_is_an_event_or_malformed(value: dict[str, Any]) -> None:
    try:
        event = reports.read_event(value, 5.0)
    except MalformedEvent:
        return
    json.dumps(event.fields(), allow_nan=False)
    assert 1 <= event.count <= 1_000_000_000


@pytest.mark.parametrize("timestamp", [10**400, float("nan"), float("inf"), -1, "yesterday", [], {}])
def test_a_wrong_time_becomes_the_time_of_receipt(timestamp: Any) -> None:
    event = reports.read_event({"agent": "a", "error": "e", "timestamp": timestamp}, 5.0)
    assert event.timestamp == 5.0
    assert "timestamp_sent" in event.details


# -- the mesh ---------------------------------------------------------------------------------------------------------


def test_messages_of_the_mesh_are_taken_as_they_come(tmp_path: Path) -> None:
    async def use() -> None:
        async with running(tmp_path) as bus:
            publisher = await bus.publisher()
            body = {"agent_id": "planner", "level": "WARN", "error_code": "E7", "msg": "late", "timestamp": 5}
            publisher.send(b"ERROR:" + json.dumps(body).encode())
            publisher.send_multipart([b"ERROR:", json.dumps(body).encode()])
            publisher.send(b"ERROR: " + json.dumps(body).encode())
            publisher.send(b"HEARTBEAT:{}")
            stored = await bus.stored(3)
            assert {(each.agent, each.severity, each.error_type, each.message, each.timestamp) for each in stored} == {
                ("planner", "warning", "E7", "late", 5.0)
            }

    asyncio.run(use())


def test_malformed_messages_of_the_mesh_are_told_of(tmp_path: Path) -> None:
    async def use() -> None:
        async with running(tmp_path) as bus:
            publisher = await bus.publisher()
            for body in (b"ERROR:", b"ERROR:nonsense", b"ERROR:[]", b'ERROR:{"agent":"me"}', b"ERROR:" + b"[" * 60_000):
                publisher.send(body)
            publisher.send_multipart([b"ERROR:", b"{}", b"{}"])
            publisher.send(b'ERROR:{"agent":"me","error":"' + b"x" * 70_000 + b'"}')
            publisher.send(b'ERROR:{"agent":"me","error":"fine"}')
            assert await until(lambda: bus.ingest.figures()["malformed"] == 7)
            found = {(event.agent, event.error_type) for event in await bus.stored(6)}
            assert found == {("unknown", "malformed_event"), ("me", "malformed_event"), ("me", "unknown")}

    asyncio.run(use())


def test_a_frame_that_is_far_too_large_cuts_only_its_own_connection(tmp_path: Path) -> None:
    async def use() -> None:
        async with running(tmp_path) as bus:
            large, other = await bus.publisher(), await bus.publisher()
            large.send(b"ERROR:" + b"x" * (2 * mesh.MAX_FRAME_BYTES))
            other.send(b'ERROR:{"agent":"me","error":"fine"}')
            assert [event.agent for event in await bus.stored(1)] == ["me"]

    asyncio.run(use())


def test_a_storm_of_the_mesh_is_counted_and_questions_are_answered_meanwhile(tmp_path: Path) -> None:
    number = 20_000

    async def use() -> None:
        # However long the storm takes here, most of it has no row of its own.
        async with running(tmp_path, rows_per_s=100) as bus:
            publisher = await bus.publisher()
            body = b"ERROR:" + json.dumps({"agent": "mesh", "error_type": "storm", "message": "again"}).encode()
            for _ in range(number):
                publisher.send(body)
            slowest_s, total = 0.0, 0
            while total < number:
                began_s = time.monotonic()
                total = (await bus.history.get_errors(limit=10, newest=True)).total
                slowest_s = max(slowest_s, time.monotonic() - began_s)
                await asyncio.sleep(0.01)
            assert slowest_s < 5.0
            page = await bus.history.get_errors(limit=1000)
            assert (page.total, page.last_seq < number / 2) == (number, True)

    asyncio.run(use())


def test_while_the_history_is_full_nothing_is_read_and_nothing_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    write = Store.write

    def slow_write(self: Store, *arguments: Any) -> Any:
        assert gate.wait(30)
        return write(self, *arguments)

    monkeypatch.setattr(Store, "write", slow_write)
    number = 15_000

    async def use() -> None:
        async with running(tmp_path) as bus:
            publisher, reporter = await bus.publisher(), bus.reporter()
            for _ in range(number):
                publisher.send(b'ERROR:{"agent":"me","error":"again"}')
            assert await until(lambda: bus.history.is_full)
            asking = asyncio.ensure_future(reporter.ask(1, fields(10)))
            await asyncio.sleep(0.3)
            assert bus.history.depth < 10_000 + mesh.BATCH
            # A publisher that comes now hears at once what is wanted of it.
            late = await bus.publisher()
            late.send(b'ERROR:{"agent":"late","error":"hello"}')
            gate.set()
            assert (await asking)["accepted"] == 10
            await bus.stored(number + 11)

    asyncio.run(use())


# -- addresses --------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    async def use() -> None:
        async with running(tmp_path) as bus:
            for name in ("report_port", "mesh_port"):
                health = dataclasses.replace(bus.settings.health, report_port=free_port(), mesh_port=free_port())
                taken = {name: getattr(bus.settings.health, name)}
                settings = dataclasses.replace(bus.settings, health=dataclasses.replace(health, **taken))
                other = Ingest(settings, bus.history, on_heartbeat=lambda *_: None)
                with pytest.raises(CannotStart, match=rf"health\.{name}"):
                    other.bind()
                await other.close()

    asyncio.run(use())


def test_an_address_that_others_reach_takes_loopback(tmp_path: Path) -> None:
    async def use() -> None:
        async with running(tmp_path, bind="0.0.0.0", peers=("192.0.2.0/24",)) as bus:
            publisher, reporter = await bus.publisher(), bus.reporter()
            publisher.send(b'ERROR:{"agent":"me","error":"fine"}')
            reporter.send(b"nonsense")
            assert (await reporter.hear())["kind"] == "refused"
            assert (await reporter.ask(1, fields(1)))["accepted"] == 1
            stored = await bus.stored(3)
            assert {event.details.get("peer") for event in stored} == {None, "127.0.0.1"}

    asyncio.run(use())


def test_who_is_not_let_in_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memory_system import security

    monkeypatch.setattr(security.PeerPolicy, "_allows", lambda self, address: False)

    async def use() -> None:
        async with running(tmp_path, bind="0.0.0.0", peers=("192.0.2.0/24",)) as bus:
            publisher, reporter = await bus.publisher(), bus.reporter()
            answer = await reporter.ask(1, fields(1))
            assert answer["kind"] == "refused"
            assert "security.insecure_peers" in answer["message"]
            publisher.send(b'ERROR:{"agent":"me","error":"fine"}')
            assert await until(lambda: bus.ingest.figures()["denied"] == 2)
            stored = await bus.stored(1)
            assert [(event.error_type, event.details["peer"]) for event in stored] == [("peer_denied", "127.0.0.1")]

    asyncio.run(use())

"""The broadcast as plain SUB sockets of the mesh hear it, and BusReader, which closes what they lose."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from memory_system import bus_link
from memory_system.bus_progress import BusEvent
from memory_system.bus_reader import BusReader
from memory_system.errors import CannotStart, ClientClosed, InvalidField, Unreachable
from memory_system.health import broadcast
from memory_system.health.broadcast import BURST_S, MAX_COMPONENTS, Broadcaster, LastValues, accept_filters
from memory_system.settings import SecuritySettings, Settings
from tests.support.fake_manager import FakeManager
from tests.support.process import free_port, wait_until

TOPICS = ("ERROR:", "HEARTBEAT:", "HEALTH:")


class Sockets:
    """Sockets of one test, closed together at its end."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.opened: list[zmq.Socket[bytes]] = []

    def open(self, kind: int) -> zmq.Socket[bytes]:
        self.opened.append(self.context.socket(kind))
        self.opened[-1].setsockopt(zmq.LINGER, 0)
        return self.opened[-1]


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    made = Sockets()
    yield made
    for each in made.opened:
        each.close()
    made.context.term()


@pytest.fixture
def manager() -> Iterator[FakeManager]:
    with FakeManager() as made:
        yield made


class Subscriber:
    """A plain SUB socket, as the agents of the mesh have it."""

    def __init__(self, sockets: Sockets, address: str, *prefixes: str, **options: int) -> None:
        self.socket = sockets.open(zmq.SUB)
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        for prefix in prefixes:
            self.socket.setsockopt_string(zmq.SUBSCRIBE, prefix)
        self.socket.connect(address)

    def next(self, timeout_s: float = 30.0) -> tuple[str, dict[str, Any]]:
        assert self.socket.poll(int(timeout_s * 1000)), f"nothing within {timeout_s} s"
        (frame,) = self.socket.recv_multipart()
        topic, _, body = frame.partition(b":")
        return f"{topic.decode()}:", json.loads(body)

    def until(self, topic: str, **wanted: Any) -> list[tuple[str, dict[str, Any]]]:
        """All messages up to the one with this topic and these fields."""
        found = [self.next()]
        while found[-1][0] != topic or any(found[-1][1].get(name) != value for name, value in wanted.items()):
            found.append(self.next())
        return found


def wait_for_subscriptions(manager: FakeManager, number: int) -> None:
    wait_until(lambda: manager.broadcaster.subscriptions >= number, f"{number} subscriptions")


def take(reader: BusReader, number: int, timeout_s: float = 45.0) -> list[BusEvent]:
    found = []
    deadline_s = time.monotonic() + timeout_s
    while len(found) < number:
        event = reader.read(max(0.0, deadline_s - time.monotonic()))
        assert event is not None, f"{len(found)} of {number} events within {timeout_s} s: {reader}"
        found.append(event)
    return found


def messages(found: list[BusEvent]) -> list[str]:
    return [each.event.message for each in found]


def open_reader(manager: FakeManager, **options: Any) -> BusReader:
    return BusReader(manager.publish, manager.api, **options)


def go_live(reader: BusReader) -> None:
    """Return when it has read the history and is subscribed; there must be no event meanwhile."""
    wait_until(lambda: reader.read(0.01) is None and repr(reader).endswith("live)"), "the history is read")


def connect(manager: FakeManager, *readers: BusReader) -> None:
    for reader in readers:
        go_live(reader)
    wait_for_subscriptions(manager, 2 * len(readers))


# -- what subscribers hear --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [*TOPICS, ""])
def test_a_prefix_selects_messages_of_one_frame(manager: FakeManager, sockets: Sockets, prefix: str) -> None:
    subscriber = Subscriber(sockets, manager.publish, prefix)
    wait_for_subscriptions(manager, 1)
    manager.report("planner", "timeout", "no answer", severity="warning", details={"after_s": 5})
    manager.heartbeat("orchestrator", pid=7)
    manager.health("orchestrator", state="down", reason="it died")
    manager.do(manager.broadcaster.publish_error, {"seq": 2, "message": "end"})
    manager.heartbeat("end")
    manager.health("end")
    wanted = TOPICS if prefix == "" else (prefix,)
    found = [subscriber.next() for _ in range(2 * len(wanted))]
    assert {topic for topic, _ in found} == set(wanted)
    first = {topic: fields for topic, fields in reversed(found)}
    assert all(fields["boot_id"] == "boot-1" and fields["seq"] == 1 for fields in first.values())
    if "ERROR:" in first:
        assert first["ERROR:"]["severity"] == "warning"
        assert first["ERROR:"]["details"] == {"after_s": 5}
    if "HEARTBEAT:" in first:
        assert first["HEARTBEAT:"]["component"] == "orchestrator"
        assert first["HEARTBEAT:"]["pid"] == 7
    if "HEALTH:" in first:
        assert first["HEALTH:"]["reason"] == "it died"
        assert abs(first["HEALTH:"]["timestamp"] - time.time()) < 60


def test_errors_say_what_came_before_them(sockets: Sockets) -> None:
    with FakeManager(rows=[{"seq": 1}, {"seq": 2}]) as manager:
        subscriber = Subscriber(sockets, manager.publish, "ERROR:")
        wait_for_subscriptions(manager, 1)
        for seq in (3, 7, 7, 8):
            manager.do(manager.broadcaster.publish_error, {"seq": seq})
        found = [subscriber.next()[1] for _ in range(4)]
        assert [(each["prev_seq"], each["seq"]) for each in found] == [(2, 3), (3, 7), (7, 7), (7, 8)]


def test_only_the_managers_heartbeat_says_how_far_the_errors_are(manager: FakeManager, sockets: Sockets) -> None:
    manager.report()
    manager.heartbeat("health_manager")
    manager.heartbeat("orchestrator", last_error_seq=99, seq=99, boot_id="another", component="another")
    subscriber = Subscriber(sockets, manager.publish, "HEARTBEAT:")
    found = {fields["component"]: fields for _, fields in (subscriber.next(), subscriber.next())}
    assert found["health_manager"]["last_error_seq"] == 1
    assert "last_error_seq" not in found["orchestrator"]
    assert (found["orchestrator"]["seq"], found["orchestrator"]["boot_id"]) == (2, "boot-1")


def test_what_is_too_large_to_broadcast_leaves_a_gap(manager: FakeManager, sockets: Sockets) -> None:
    subscriber = Subscriber(sockets, manager.publish, "ERROR:")
    wait_for_subscriptions(manager, 1)
    for fields in ({"seq": 1}, {"seq": 2, "details": "x" * 100_000}, {"seq": 3}):
        manager.do(manager.broadcaster.publish_error, fields)
    assert subscriber.next()[1]["seq"] == 1
    assert subscriber.next()[1] == {"seq": 3, "prev_seq": 2, "boot_id": "boot-1"}
    assert manager.broadcaster.figures()["unpublishable"] == 1


# -- last values ------------------------------------------------------------------------------------------------------


def test_a_new_subscriber_has_the_last_values_at_once_and_as_they_were(manager: FakeManager, sockets: Sockets) -> None:
    for beat in range(3):
        for component in ("orchestrator", "planner"):
            manager.heartbeat(component, beat=beat)
    manager.health("planner", state="down")
    manager.report()
    subscriber = Subscriber(sockets, manager.publish, "HEALTH:", "HEARTBEAT:")
    found = [subscriber.next() for _ in range(3)]
    assert sorted((topic, each["component"], each["seq"]) for topic, each in found) == [
        ("HEALTH:", "planner", 1),
        ("HEARTBEAT:", "orchestrator", 5),
        ("HEARTBEAT:", "planner", 6),
    ]
    assert all(each["beat"] == 2 for topic, each in found if topic == "HEARTBEAT:")


def test_last_values_go_by_the_prefix(manager: FakeManager, sockets: Sockets) -> None:
    manager.heartbeat("orchestrator")
    manager.health("orchestrator", state="healthy")
    errors = Subscriber(sockets, manager.publish, "ERROR:")
    health = Subscriber(sockets, manager.publish, "HEALTH:")
    wait_for_subscriptions(manager, 2)
    assert health.next()[0] == "HEALTH:"
    manager.report()
    assert errors.next()[0] == "ERROR:", "errors are never sent again"
    everything = Subscriber(sockets, manager.publish, "")
    assert {everything.next()[0], everything.next()[0]} == {"HEALTH:", "HEARTBEAT:"}


def test_who_subscribed_before_sees_the_same_message_again(manager: FakeManager, sockets: Sockets) -> None:
    first = Subscriber(sockets, manager.publish, "HEALTH:")
    wait_for_subscriptions(manager, 1)
    manager.health("orchestrator", state="down")
    message = first.next()
    Subscriber(sockets, manager.publish, "HEALTH:")
    assert first.next() == message


def test_many_subscribers_at_once_are_served_together(manager: FakeManager, sockets: Sockets) -> None:
    manager.heartbeat("orchestrator")
    before_s = time.monotonic()
    subscribers = [Subscriber(sockets, manager.publish, "HEARTBEAT:") for _ in range(50)]
    for each in subscribers:
        assert each.next()[1]["component"] == "orchestrator"
    bursts = manager.broadcaster.figures()["published"] - 1
    assert bursts <= (time.monotonic() - before_s) / BURST_S + 1


def test_last_values_of_many_components_all_arrive(manager: FakeManager, sockets: Sockets) -> None:
    for number in range(MAX_COMPONENTS + 5):
        manager.do(manager.broadcaster.publish_heartbeat, f"agent-{number}", {})
        manager.do(manager.broadcaster.publish_health, f"agent-{number}", {})
    subscriber = Subscriber(sockets, manager.publish, "", RCVHWM=0)
    found = Counter(subscriber.next()[0] for _ in range(2 * MAX_COMPONENTS))
    assert found == {"HEARTBEAT:": MAX_COMPONENTS, "HEALTH:": MAX_COMPONENTS}
    assert manager.broadcaster.figures()["components"] == MAX_COMPONENTS


def test_of_too_many_the_component_longest_silent_is_forgotten() -> None:
    values = LastValues(limit=2)
    for component in ("a", "b", "a", "c"):
        values.keep("HEALTH:", component, b"HEALTH:" + component.encode())
    assert values.matching([b"HEALTH:"]) == [("HEALTH:", "a"), ("HEALTH:", "c")]


def test_a_forgotten_component_is_not_sent_again(manager: FakeManager, sockets: Sockets) -> None:
    for component in ("gone", "orchestrator"):
        manager.heartbeat(component)
        manager.health(component)
    manager.do(manager.broadcaster.forget, "gone")
    subscriber = Subscriber(sockets, manager.publish, "")
    manager.heartbeat("end")
    assert {each["component"] for _, each in subscriber.until("HEARTBEAT:", component="end")} <= {"orchestrator", "end"}


# -- subscribers that misbehave ---------------------------------------------------------------------------------------


def test_a_stalled_subscriber_loses_only_its_own_messages(sockets: Sockets) -> None:
    total, step = 4000, 100
    with FakeManager(queue_per_subscriber=2 * step) as manager:
        stalled = Subscriber(sockets, manager.publish, "ERROR:", RCVHWM=1, RCVBUF=4096)
        reading = Subscriber(sockets, manager.publish, "ERROR:", RCVHWM=0)
        wait_for_subscriptions(manager, 2)
        padding = "x" * 2000
        for end in range(step, total + 1, step):
            for seq in range(end - step + 1, end + 1):
                manager.report(message=padding, details={"a": padding, "n": seq})
            assert [reading.next()[1]["seq"] for _ in range(step)] == list(range(end - step + 1, end + 1))
        seen = []
        while stalled.socket.poll(500):
            seen.append(stalled.next()[1]["seq"])
        assert 0 < len(seen) < total, "it lost some"
        manager.report(message="after")
        late = stalled.next()[1]
        assert late["prev_seq"] > seen[-1], "the gap shows"
        missed = manager.get_errors(since_seq=seen[-1], limit=total)["results"]
        assert [*seen, *(row["seq"] for row in missed)][-1] == total + 1


@pytest.mark.parametrize(
    "garbage", [[b"nonsense"], [b""], [b"\x02ERROR:"], [b"\x01HEALTH:", b"more"], [b"x" * 2_000_000]]
)
def test_garbage_from_a_subscriber_harms_nobody(manager: FakeManager, sockets: Sockets, garbage: list[bytes]) -> None:
    subscriber = Subscriber(sockets, manager.publish, "ERROR:")
    wait_for_subscriptions(manager, 1)
    rude = sockets.open(zmq.XSUB)
    rude.connect(manager.publish)
    for _ in range(100):
        rude.send_multipart(garbage)
    rude.send(b"\x01ERROR:")
    with socket.create_connection(("127.0.0.1", manager.ports[0])) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)))
    manager.report(message="still here")
    assert subscriber.next()[1]["message"] == "still here"
    if garbage[0] == b"nonsense":
        wait_until(lambda: manager.broadcaster.figures()["ignored_frames"] >= 100, "all of it was read")


def test_subscriptions_are_counted(manager: FakeManager, sockets: Sockets) -> None:
    both = Subscriber(sockets, manager.publish, "ERROR:", "HEALTH:")
    one = Subscriber(sockets, manager.publish, "ERROR:")
    wait_until(lambda: manager.broadcaster.subscriptions == 3, "three subscriptions")
    one.socket.close()
    wait_until(lambda: manager.broadcaster.subscriptions == 2, "one has gone")
    both.socket.setsockopt_string(zmq.UNSUBSCRIBE, "HEALTH:")
    wait_until(lambda: manager.broadcaster.figures()["subscriptions"] == 1, "one prefix has gone")


# -- the socket -------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_named(manager: FakeManager) -> None:
    second = Broadcaster(manager.publish, Settings(), "boot-2")
    with pytest.raises(CannotStart, match=r"another health manager.*health\.publish_port"):
        second.bind()
    second.close()


def test_closing_lets_go_of_the_port_and_later_messages() -> None:
    async def scenario() -> None:
        address = f"tcp://127.0.0.1:{free_port()}"
        for boot_id in ("boot-1", "boot-2"):
            broadcaster = Broadcaster(address, Settings(), boot_id)
            broadcaster.bind()
            broadcaster.start(asyncio.get_running_loop())
            broadcaster.publish_heartbeat("orchestrator", {})
            broadcaster.close()
            broadcaster.close()
            broadcaster.publish_error({"seq": 1})
            await asyncio.sleep(0)

    asyncio.run(scenario())


SECURITY = SecuritySettings(allow_insecure=True, insecure_peers=("10.1.0.0/16", "fd00::/8"))


@pytest.mark.parametrize(
    ("bind", "security", "wanted"),
    [
        ("127.0.0.1", SECURITY, []),
        ("localhost", SECURITY, []),
        ("0.0.0.0", SECURITY, ["127.0.0.0/8", "10.1.0.0/16"]),
        ("0.0.0.0", SecuritySettings(insecure_peers=("10.1.0.0/16",)), ["127.0.0.0/8"]),
        ("192.0.2.2", SECURITY, ["127.0.0.0/8", "192.0.2.2/32", "10.1.0.0/16"]),
        ("::", SECURITY, ["::ffff:127.0.0.0/104", "::1/128", "::ffff:10.1.0.0/112", "fd00::/8"]),
    ],
)
def test_other_hosts_come_in_from_the_named_networks_alone(
    bind: str, security: SecuritySettings, wanted: list[str]
) -> None:
    assert accept_filters(bind, security) == wanted


def test_connections_from_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch, sockets: Sockets) -> None:
    monkeypatch.setattr(broadcast, "accept_filters", lambda bind, security: ["10.1.0.0/16", "127.0.0.2/32"])
    with FakeManager() as manager:
        port = manager.ports[0]
        allowed = Subscriber(sockets, f"tcp://127.0.0.2:0;127.0.0.1:{port}", "")
        refused = Subscriber(sockets, f"tcp://127.0.0.1:{port}", "")
        wait_for_subscriptions(manager, 1)
        for number in range(20):
            manager.report(message=str(number))
            assert allowed.next()[1]["message"] == str(number)
        assert not refused.socket.poll(100)
        assert manager.broadcaster.subscriptions == 1


# -- BusReader --------------------------------------------------------------------------------------------------------


def test_history_and_live_meet_without_loss_or_repetition(manager: FakeManager) -> None:
    total = 1500
    for number in range(700):
        manager.report(message=str(number))

    def go_on() -> None:
        for number in range(700, total):
            manager.report(message=str(number))

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        with open_reader(manager, since_s=0.0) as reader:
            found = take(reader, total)
            assert messages(found) == [str(number) for number in range(total)]
            assert reader.read(0.1) is None
            assert not found[0].live
            assert sum(question.get("since_seq", 0) > 0 for question in manager.questions) >= 1, "in several pages"
    finally:
        thread.join()


def test_a_lost_message_is_fetched_before_the_next_is_given(manager: FakeManager) -> None:
    with open_reader(manager) as reader:
        connect(manager, reader)
        manager.report(message="1")
        manager.report(message="2", lost=True)
        manager.report(message="3", lost=True)
        manager.report(message="4")
        manager.report(message="5")
        found = take(reader, 5)
        assert messages(found) == ["1", "2", "3", "4", "5"]
        assert [each.seq for each in found] == [1, 2, 3, 4, 5]
        assert reader.read(0.1) is None


def test_a_heartbeat_tells_of_a_loss_that_no_error_follows(manager: FakeManager) -> None:
    with open_reader(manager) as reader:
        connect(manager, reader)
        manager.report(message="lost", lost=True)
        assert reader.read(0.2) is None
        manager.heartbeat("health_manager")
        assert messages(take(reader, 1)) == ["lost"]
        manager.heartbeat("health_manager")
        assert reader.read(0.1) is None


def test_a_reader_that_stalled_has_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    total = 6000
    monkeypatch.setattr(bus_link, "_QUEUED", 10)
    with FakeManager(queue_per_subscriber=10) as manager, open_reader(manager) as reader:
        connect(manager, reader)
        asked = len(manager.questions)
        padding = "x" * 2000
        for number in range(total):
            manager.report(message=str(number), details={"a": padding, "b": padding})
        assert len(manager.questions) == asked
        manager.heartbeat("health_manager")
        found = [take(reader, 1)[0]]
        while found[-1].seq < total:
            event = reader.read(1.0)
            if event is None:
                manager.heartbeat("health_manager")
            else:
                found.append(event)
        assert messages(found) == [str(number) for number in range(total)]
        assert len(manager.questions) > asked, "something had been lost"


def test_errors_of_a_restart_arrive_once_and_in_order() -> None:
    states: list[str | None] = []
    with FakeManager() as manager:
        rows, ports = manager.rows, manager.ports
        reader = open_reader(manager, on_state=states.append)
        connect(manager, reader)
        manager.report(message="before")
        assert messages(take(reader, 1)) == ["before"]
    with reader:
        wait_until(lambda: reader.read(0.01) is None and states != [], "the end is noticed")
        assert states == [f"the connection to tcp://127.0.0.1:{ports[0]} is lost"]
        with FakeManager(rows=rows, ports=ports, boot_id="boot-2") as manager:
            manager.report(message="while nobody heard", lost=True)
            manager.report(message="again")
            assert messages(take(reader, 2)) == ["while nobody heard", "again"]
            wait_for_subscriptions(manager, 2)  # what is published before is not heard
            manager.report(message="live")
            assert messages(take(reader, 1)) == ["live"]
            assert reader.read(0.1) is None
            assert states[-1] is None


def test_repeats_that_went_down_with_the_manager_are_fetched() -> None:
    with FakeManager(fold_s=60.0) as manager:
        rows, ports = manager.rows, manager.ports
        reader = open_reader(manager)
        connect(manager, reader)
        for number in range(3):
            manager.report(message=f"repeat {number}")
        manager.report("archiver", message="another")
        assert messages(take(reader, 2)) == ["repeat 0", "another"]
    with reader, FakeManager(rows=rows, ports=ports, boot_id="boot-2") as manager:
        assert messages(take(reader, 2)) == ["repeat 1", "repeat 2"]
        wait_for_subscriptions(manager, 2)  # what is published before is not heard
        manager.heartbeat("health_manager")
        manager.report(message="new")
        assert messages(take(reader, 1)) == ["new"]
        assert reader.read(0.1) is None


def test_another_history_is_read_from_its_beginning() -> None:
    with FakeManager() as manager:
        ports = manager.ports
        for number in range(10):
            manager.report(message=str(number))
        reader = open_reader(manager, since_s=0.0)
        assert len(take(reader, 10)) == 10
    with reader, FakeManager(ports=ports, boot_id="boot-2") as manager:
        manager.report(message="the first of a new file")
        assert messages(take(reader, 1)) == ["the first of a new file"]
        wait_for_subscriptions(manager, 2)  # what is published before is not heard
        manager.report(message="the second")
        assert messages(take(reader, 1)) == ["the second"]


def test_of_another_history_only_what_is_new_is_told() -> None:
    with FakeManager() as manager:
        ports = manager.ports
        for number in range(10):
            manager.report(message=f"old {number}", now_s=time.time() - 3600.0)
        for number in range(5):
            manager.report(message=str(number))
        older = manager.rows[:12]
        reader = open_reader(manager, last=3)
        assert messages(take(reader, 3)) == ["2", "3", "4"]
    with reader, FakeManager(ports=ports, boot_id="boot-2", rows=older) as manager:
        manager.report(message="new")
        assert messages(take(reader, 3)) == ["0", "1", "new"], "of the last minute, nothing of an hour ago"
        wait_for_subscriptions(manager, 2)  # what is published before is not heard
        manager.report(message="newer")
        assert messages(take(reader, 1)) == ["newer"]


def test_what_was_read_of_the_history_before_is_not_told_again() -> None:
    with FakeManager() as manager:
        ports, rows = manager.ports, manager.rows
        for number in range(5):
            manager.report(message=str(number))
        reader = open_reader(manager, since_s=0.0)
        assert len(take(reader, 5)) == 5
    with reader, FakeManager(ports=ports, boot_id="boot-2", rows=rows[:3]) as manager:
        manager.report(message="new")
        assert messages(take(reader, 1)) == ["new"]


def test_repeats_are_counted_once_though_the_history_had_some_of_them() -> None:
    with FakeManager(fold_s=10.0) as manager:
        for _ in range(5):
            manager.report()
        with open_reader(manager, since_s=0.0) as reader:
            assert len(take(reader, 5)) == 5
            wait_for_subscriptions(manager, 2)
            for _ in range(7):
                manager.report(severity="error")
            assert reader.read(0.1) is None, "held back"
            manager.later(11.0)
            (rest,) = take(reader, 1)
            assert rest.event.count == 7
            assert rest.live
            assert rest.fields()["count"] == 7
            assert reader.read(0.1) is None


def test_filters_hold_for_history_and_live(manager: FakeManager) -> None:
    def report_all(when: str) -> None:
        for agent in ("planner", "archiver"):
            for severity in ("info", "warning", "critical"):
                for error_type in ("timeout", "full"):
                    manager.report(agent, error_type, f"{when} {agent} {severity} {error_type}", severity=severity)

    report_all("early")
    filters: dict[str, Any] = {"agent": "archiver", "severity": "warning", "error_type": "full"}
    with open_reader(manager, since_s=0.0, **filters) as reader:
        early = take(reader, 2)
        wait_for_subscriptions(manager, 2)
        report_all("late")
        assert messages(early + take(reader, 2)) == [
            f"{when} archiver {severity} full" for when in ("early", "late") for severity in ("warning", "critical")
        ]
        assert reader.read(0.1) is None


def test_a_sum_of_several_kinds_is_taken_apart_for_who_wants_one_of_them() -> None:
    with (
        FakeManager(fold_s=10.0, broadcasts_per_s=1) as manager,
        open_reader(manager) as everything,
        open_reader(manager, agent="agent-3") as one,
    ):
        connect(manager, everything, one)
        for number in range(5):
            manager.report(f"agent-{number}", message=str(number))
        manager.later(1.1)
        counts = [take(everything, 1)[0].event.count]
        while sum(counts) < 5:  # on a slow machine the five may be of two seconds
            counts += [take(everything, 1)[0].event.count]
        assert (counts[0], sum(counts)) == (1, 5)
        assert messages(take(one, 1)) == ["3"]
        assert one.read(0.1) is None


@pytest.mark.parametrize(("options", "wanted"), [({"last": 3}, [7, 8, 9]), ({"last": 50}, range(10)), ({}, [])])
def test_without_a_time_it_begins_with_the_newest(
    manager: FakeManager, options: dict[str, Any], wanted: list[int]
) -> None:
    for number in range(10):
        manager.report(message=str(number))
    with open_reader(manager, **options) as reader:
        assert messages(take(reader, len(wanted))) == [str(number) for number in wanted]
        go_live(reader)
        manager.report(message="live", lost=True)
        manager.heartbeat("health_manager")
        assert messages(take(reader, 1)) == ["live"]


def test_a_time_is_that_of_the_events(manager: FakeManager) -> None:
    for timestamp in (100.0, 200.0, 300.0):
        manager.report(message=str(timestamp), now_s=timestamp)
    with open_reader(manager, since_s=200.0) as reader:
        assert messages(list(reader.history())) == ["200.0", "300.0"]


def test_a_history_that_does_not_answer_is_asked_again(manager: FakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_link, "ASK_S", 0.3)
    states: list[str | None] = []
    manager.report(message="1")
    manager.deaf = True
    with open_reader(manager, since_s=0.0, on_state=states.append) as reader:
        assert reader.read(1.0) is None
        assert states == [f"no answer from {manager.api}"]
        manager.report(message="2")
        manager.deaf = False
        assert messages(take(reader, 2)) == ["1", "2"]
        assert states[1:] == [None]
        assert reader.read(0.1) is None


def test_history_alone_says_that_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus_link, "ASK_S", 0.3)
    address = f"tcp://127.0.0.1:{free_port()}"
    with BusReader(address, address) as reader, pytest.raises(Unreachable, match=address):
        list(reader.history())


def test_a_refusal_of_the_api_is_raised(manager: FakeManager) -> None:
    manager.refusal = {"status": "error", "error_code": "invalid_field", "message": "no such agent", "details": {}}
    with open_reader(manager) as reader, pytest.raises(InvalidField, match="no such agent"):
        reader.read(5.0)


def test_a_busy_manager_is_asked_again(manager: FakeManager) -> None:
    manager.refusal = {"status": "error", "error_code": "busy", "message": "too many", "details": {}}
    manager.report(message="1")
    with open_reader(manager, since_s=0.0) as reader:
        assert reader.read(0.3) is None
        manager.refusal = None
        assert messages(take(reader, 1)) == ["1"]


def test_messages_that_are_none_are_passed_over(sockets: Sockets) -> None:
    publisher = sockets.open(zmq.XPUB)
    port = publisher.bind_to_random_port("tcp://127.0.0.1")
    with FakeManager() as manager, BusReader(f"tcp://127.0.0.1:{port}", manager.api) as reader:
        assert reader.read(0.2) is None
        assert publisher.poll(5000)
        for body in (b"", b"nonsense", b"[1]", b'{"seq": "x"}', b'{"seq": 1}', b"\xff", b"[" * 100_000):
            publisher.send(b"ERROR:" + body)
            publisher.send(b"HEARTBEAT:" + body)
        event = {"seq": 1, "prev_seq": 0, "boot_id": "b", "agent": "planner", "message": "real"}
        publisher.send(b"ERROR:" + json.dumps(event).encode())
        assert messages(take(reader, 1)) == ["real"]


def test_a_closed_reader_says_so(manager: FakeManager) -> None:
    reader = open_reader(manager)
    reader.close()
    reader.close()
    with pytest.raises(ClientClosed):
        reader.read(1.0)


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://", "tcp://127.0.0.1:notaport"])
def test_an_endpoint_that_is_none_is_refused(manager: FakeManager, endpoint: str) -> None:
    with pytest.raises(zmq.ZMQError):
        BusReader(endpoint, manager.api)
    with pytest.raises(zmq.ZMQError):
        BusReader(manager.publish, endpoint)

"""What subscribers and askers of the health manager see: single frames, last values, sequences, queries, reasons."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from memory_client import MemoryClient
from memory_system.events import ERROR_TOPIC, HEALTH_TOPIC, HEARTBEAT_TOPIC
from tests.support.bus import TOPICS, Message, Row, Subscriber
from tests.support.mesh import PROGRAMS, Mesh, running_mesh, tell
from tests.support.process import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

LAST_VALUES_S = 0.1
STATES = {"starting", "healthy", "degraded", "down", "flapping"}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with running_mesh(tmp_path_factory.mktemp("mesh"), health__heartbeat_s=1, error_bus__fold_s=2) as running:
        yield running


# -- messages ---------------------------------------------------------------------------------------------------


def test_messages_are_single_frames_of_a_prefix_and_json(mesh: Mesh) -> None:
    """What a SUB socket of any language gets, byte by byte."""
    sock = mesh.socket(zmq.SUB, "publish")
    sock.subscribe(b"")
    reporter = mesh.reporter("probe")
    seen: set[bytes] = set()
    for number in range(200):
        reporter.report(f"plain_{number}", "something went wrong")
        assert sock.poll(20_000)
        frames = sock.recv_multipart()
        assert len(frames) == 1
        topic, brace, _ = frames[0].partition(b"{")
        assert brace
        assert frames[0].endswith(b"}")
        seen.add(topic)
        if seen == {each.encode() for each in TOPICS}:
            return
    raise AssertionError(f"only {seen} came")


@pytest.mark.parametrize("topic", TOPICS)
def test_a_prefix_selects_a_topic(mesh: Mesh, topic: str) -> None:
    chosen, everything = mesh.subscriber((topic,)), mesh.subscriber()
    reporter = mesh.reporter("probe")
    for each in TOPICS:
        reporter.report(f"select_{topic}_{each}", "to be selected")
        everything.wait(each, 30.0)
    chosen.wait(topic, 30.0)
    assert {message.topic for message in chosen.messages()} == {topic}


def test_an_error_is_on_the_bus_as_it_was_reported(mesh: Mesh) -> None:
    bus, before_s = mesh.subscriber(), time.time()
    details = {"port": 7140, "path": "data/memory.db", "content": "what somebody said"}
    mesh.reporter("planner").report("disk_slow", "it takes long", "warning", request_id="r" * 20, details=details)
    fields = bus.wait(ERROR_TOPIC, 20.0, error_type="disk_slow").fields
    expected = {"agent": "planner", "message": "it takes long", "severity": "warning", "request_id": "r" * 20}
    assert {name: fields[name] for name in expected} == expected
    assert before_s <= fields["timestamp"] <= time.time()
    assert fields["details"]["port"] == 7140
    assert "somebody" not in str(fields)
    (row,) = mesh.history(error_type="disk_slow")
    assert (row["seq"], row["event_id"]) == (fields["seq"], fields["event_id"])


def test_repeats_are_folded_on_the_bus_and_kept_in_the_history(mesh: Mesh) -> None:
    bus, reporter = mesh.subscriber(), mesh.reporter("probe")
    for number in range(300):
        reporter.report("again", "and again", details={"number": number})
    wait_until(lambda: len(mesh.history(error_type="again")) == 300, "all are kept")

    def told() -> list[int]:
        return [message.fields.get("repeats", 1) for message in bus.messages(ERROR_TOPIC, error_type="again")]

    wait_until(lambda: sum(told()) == 300, "all are told of")
    assert told()[0] == 1
    # One summary, unless they came so slowly that there were several times to fold.
    assert 2 <= len(told()) <= 10


def test_a_new_subscriber_has_the_last_values_within_100_ms(mesh: Mesh) -> None:
    waits_s = []
    for _ in range(20):
        with Subscriber(mesh.endpoints["publish"], (HEALTH_TOPIC, HEARTBEAT_TOPIC)) as bus:
            came = [
                bus.wait(topic, 30.0, component=program).at_s
                for topic in (HEALTH_TOPIC, HEARTBEAT_TOPIC)
                for program in PROGRAMS
            ]
            waits_s.append(max(came) - bus.began_s)
    tell(f"last values: median {statistics.median(waits_s) * 1000:.0f} ms, slowest {max(waits_s) * 1000:.0f} ms")
    assert min(waits_s) < LAST_VALUES_S
    # The median of a busy machine is another; the next heartbeat would come after a second.
    assert statistics.median(waits_s) < 5 * LAST_VALUES_S


def test_each_topic_counts_its_messages_under_one_boot_id(mesh: Mesh) -> None:
    bus, reporter = mesh.subscriber(), mesh.reporter("probe")
    for number in range(20):
        reporter.report(f"counted_{number}", "each of its own kind")
    bus.wait(ERROR_TOPIC, 30.0, error_type="counted_19")
    # The first ones may be last values, of which a newer one of the same program has taken the place.
    wait_until(lambda: len(bus.messages(HEARTBEAT_TOPIC)) >= 2 * len(PROGRAMS), "some heartbeats")
    assert len({message.fields["boot_id"] for message in bus.messages()}) == 1
    check_seqs(bus.messages(HEARTBEAT_TOPIC))
    errors = bus.messages(ERROR_TOPIC)
    for before, after in itertools.pairwise(message.fields for message in errors):
        assert after["prev_seq"] == before["seq"] <= after["seq"]
    last_seq = errors[-1].fields["seq"]
    bus.wait(
        HEARTBEAT_TOPIC, 20.0, component="health_manager", where=lambda fields: fields["last_error_seq"] >= last_seq
    )


def check_seqs(messages: list[Message]) -> None:
    """One number after the other; last values that are sent again keep theirs."""
    seqs = sorted({message.fields["seq"] for message in messages})
    live = [message.fields["seq"] for message in messages][-4:]
    assert live == list(range(live[0], live[0] + 4)), seqs


def test_a_restart_of_the_manager_shows_as_a_new_boot_id_and_keeps_the_rows(mesh: Mesh) -> None:
    bus, reporter = mesh.subscriber(), mesh.reporter("probe")
    reporter.report("before_restart", "in the first life")
    first = bus.wait(ERROR_TOPIC, 30.0, error_type="before_restart").fields
    killed_s = mesh.kill9("health_manager")
    bus.wait(HEALTH_TOPIC, 30.0, after_s=killed_s, where=lambda fields: fields["boot_id"] != first["boot_id"])
    reporter.report("after_restart", "in the second life")
    second = bus.wait(ERROR_TOPIC, 30.0, error_type="after_restart").fields
    assert second["boot_id"] != first["boot_id"]
    assert second["seq"] > second["prev_seq"] >= first["seq"]
    health = bus.wait(HEALTH_TOPIC, 30.0, after_s=killed_s, component="health_manager", state="healthy")
    assert health.fields["boot_id"] == second["boot_id"]
    assert [row["seq"] for row in mesh.history(first["seq"] - 1, error_type="before_restart")] == [first["seq"]]
    mesh.wait_state("orchestrator", "healthy")


def test_the_circuit_breaker_of_a_client_is_seen_on_the_bus(mesh: Mesh) -> None:
    bus = mesh.subscriber()
    with MemoryClient(
        mesh.endpoints["orchestrator"],
        agent_id="planner",
        timeout_ms=600,
        failure_threshold=2,
        reset_timeout_s=5.0,
        error_bus=mesh.endpoints["report"],
    ) as memory:
        wait_until(lambda: memory.health_check()["status"] == "success", "the client is connected")
        mesh.sigstop("orchestrator")
        try:
            codes = [memory.get_memory("mem-none")["error_code"] for _ in range(3)]
            opened = bus.wait(ERROR_TOPIC, 20.0, error_type="circuit_opened", agent="planner")
        finally:
            mesh.sigcont("orchestrator")
        assert codes == ["timeout", "unreachable", "circuit_open"]
        wait_until(lambda: memory.health_check()["status"] == "success", "the breaker closes")
        closed = bus.wait(ERROR_TOPIC, 20.0, error_type="circuit_closed", agent="planner")
    assert (opened.fields["severity"], closed.fields["severity"]) == ("error", "info")
    assert opened.at_s < closed.at_s


# -- get_errors -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(mesh: Mesh) -> list[Row]:
    """Some events of known kinds."""
    since_seq = mesh.last_seq()
    for agent in ("reader", "writer"):
        reporter = mesh.reporter(agent)
        for severity in ("info", "warning", "error", "critical"):
            for kind in ("disk", "network"):
                reporter.report(f"known_{kind}", f"{kind} of {agent}", severity)
    mine = {"known_disk", "known_network"}

    def found() -> list[Row]:
        return [row for row in mesh.history(since_seq) if row["error_type"] in mine]

    wait_until(lambda: len(found()) == 16, "the events are written")
    return found()


@pytest.mark.parametrize(
    ("filters", "number"),
    [
        ({"error_type": "known_disk"}, 8),
        ({"error_type": "known_disk", "agent": "reader"}, 4),
        ({"error_type": "known_disk", "agent": "nobody"}, 0),
        ({"error_type": "known_network", "severity": "info"}, 8),
        ({"error_type": "known_network", "severity": "error"}, 4),
        ({"error_type": "known_network", "severity": "critical", "agent": "writer"}, 1),
    ],
)
def test_get_errors_filters(mesh: Mesh, rows: list[Row], filters: dict[str, Any], number: int) -> None:
    first_seq = rows[0]["seq"] - 1
    found = mesh.succeed("health_manager", "get_errors", since_seq=first_seq, **filters)
    assert found["count"] == len(found["results"]) == number
    assert found["total"] == number
    assert all(row[name] == value for row in found["results"] for name, value in filters.items() if name != "severity")


def test_get_errors_pages_and_times(mesh: Mesh, rows: list[Row]) -> None:
    first = mesh.succeed("health_manager", "get_errors", since_seq=rows[0]["seq"] - 1, limit=5, agent="reader")
    second = mesh.succeed("health_manager", "get_errors", since_seq=first["next_since_seq"], limit=5, agent="reader")
    pages = [row["seq"] for page in (first, second) for row in page["results"]]
    assert pages == [row["seq"] for row in rows if row["agent"] == "reader"]
    assert second.get("next_since_seq") is None
    assert first["last_seq"] >= rows[-1]["seq"]
    assert first["oldest_seq"] <= rows[0]["seq"]
    first_at = min(row["timestamp"] for row in rows)
    recent = mesh.succeed("health_manager", "get_errors", since=first_at, error_type="known_disk")
    assert recent["count"] == 8
    later = mesh.succeed("health_manager", "get_errors", since=time.time() + 60.0)
    assert later["results"] == []


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"limit": True}, "limit"),
        ({"since_seq": -1}, "since_seq"),
        ({"since_seq": 2**70}, "since_seq"),
        ({"since_seq": [1]}, "since_seq"),
        ({"since": "yesterday"}, "since"),
        ({"since": [1]}, "since"),
        ({"severity": "terrible"}, "severity"),
        ({"agent": 7}, "agent"),
        ({"agent": {"or": "1=1"}}, "agent"),
        ({"error_type": None, "sevrity": "error"}, "sevrity"),
    ],
)
def test_get_errors_names_a_bad_argument(mesh: Mesh, data: dict[str, Any], named: str) -> None:
    reply = mesh.ask("health_manager", "get_errors", **data)
    assert reply["status"] == "error"
    assert reply["error_code"] in {"invalid_field", "invalid_request", "unknown_field"}
    assert named in reply["message"] + str(reply["details"])
    assert reply["retryable"] is False


def test_unknown_actions_and_bodies_get_an_error_reply(mesh: Mesh) -> None:
    reply = mesh.ask("health_manager", "get_eror")
    assert reply["error_code"] == "unknown_action"
    assert "get_errors" in reply["message"] + str(reply["details"])
    for body in ({}, {"action": 7}, {"action": ["get_errors"]}, {"action": "get_errors", "data": 7}):
        assert mesh.ask_raw("health_manager", body)["status"] == "error"
    legacy = mesh.ask_raw("health_manager", {"action": "get_errors", "data": {"limit": 1, "colour": "red"}})
    assert legacy["status"] == "success"


# -- get_health -------------------------------------------------------------------------------------------------


def test_get_health_gives_the_reason_of_each_state(mesh: Mesh) -> None:
    reply = mesh.succeed("health_manager", "get_health")
    components = {each["component"]: each for each in reply["results"]}
    assert reply["count"] == len(components)
    assert components.keys() >= set(PROGRAMS)
    for each in components.values():
        assert each["state"] in STATES
        assert each["reason"], each
        assert 0 < each["since"] <= time.time()
    for program in PROGRAMS:
        assert components[program]["pid"] == mesh.pid(program)
        assert components[program]["address"] == mesh.endpoints[program]
    assert components["orchestrator"]["last_reply_at"] > time.time() - 30
    assert components["orchestrator"]["latency_ms"] >= 0


def test_a_dead_program_is_down_in_get_health_with_the_reason(mesh: Mesh) -> None:
    """Its end is told of while it is away, and counted afterwards."""
    bus = mesh.subscriber((HEALTH_TOPIC,))
    deaths = mesh.wait_state("orchestrator", "healthy")["deaths"]
    killed_s = mesh.kill9("orchestrator")
    reasons = [
        bus.wait(HEALTH_TOPIC, 30.0, after_s=killed_s, component="orchestrator", state=state).fields["reason"]
        for state in ("down", "healthy")
    ]
    assert "ended" in reasons[0]
    assert reasons[0] != reasons[1]
    assert mesh.component("orchestrator")["deaths"] == deaths + 1
    mesh.wait_answer("orchestrator")

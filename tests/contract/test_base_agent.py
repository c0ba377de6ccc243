"""What every agent has from its base, with a real agent process and a real orchestrator."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from memory_system.protocol import encode_request
from tests.contract.fake_orchestrator import FakeOrchestrator, ok
from tests.programs.probe_agent import ProbeAgent
from tests.support.agents import Agent, running_agent
from tests.support.ingest import FakeIngest
from tests.support.process import Orchestrator, free_port, running_orchestrator, wait_until
from tests.support.wire import ENCODINGS, decode_reply, encode, envelope, request_id

PROBE = Path(inspect.getfile(ProbeAgent))
pytestmark = pytest.mark.timeout(240)


@contextlib.contextmanager
def probing(folder: Path, orchestrator: str, **overrides: Any) -> Iterator[Agent]:
    port = free_port()
    with running_agent(folder, PROBE, orchestrator, port=port, start=False, **overrides) as agent:
        agent.environ["PROBE_PORT"] = str(port)
        agent.start()
        yield agent


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestrator]:
    with running_orchestrator(tmp_path_factory.mktemp("service")) as orchestrator:
        yield orchestrator


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, service: Orchestrator) -> Iterator[Agent]:
    with probing(tmp_path_factory.mktemp("agent"), service.address) as agent:
        agent.wait_state()
        yield agent


def stored(service: Orchestrator, namespace: str) -> list[str]:
    reply = service.ask("list_memories", {"namespace": namespace}, limit=1000)
    return [memory["content"] for memory in reply["results"]]


# -- forms of a request -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("version", [{}, {"v": 1}], ids=["legacy", "v1"])
def test_data_and_flat_form_mean_the_same(agent: Agent, encoding: str, version: dict[str, Any]) -> None:
    fields = {"text": "tea", "limit": 3}
    expected = {"status": "success", "text": "tea", "limit": 3, "kind": "fast", "session": None}
    assert agent.ask_raw({**version, "action": "echo", "data": fields}, encoding) == expected
    assert agent.ask_raw({**version, "action": "echo", **fields}, encoding) == expected
    mixed = {**version, "action": "echo", "data": {"text": "tea"}, "limit": 3}
    assert agent.ask_raw(mixed, encoding) == expected
    assert agent.ask_raw({**version, "action": "plain"}, encoding) == {"status": "success"}


def test_a_field_given_twice_is_named(agent: Agent) -> None:
    for version in ({}, {"v": 1}):
        reply = agent.ask_raw({**version, "action": "echo", "text": "a", "data": {"text": "a"}})
        assert (reply["error_code"], reply["details"]["field"]) == ("invalid_field", "text")


def test_unknown_fields_are_refused_with_v_1_and_ignored_without(agent: Agent) -> None:
    for form in ({"text": "a", "limt": 3}, {"data": {"text": "a", "limt": 3}}):
        assert agent.ask_raw({"action": "echo", **form})["limit"] == 10
        reply = agent.ask_raw({"v": 1, "action": "echo", **form})
        assert reply["details"] == {"field": "limt", "suggestion": "limit"}, reply
    reply = agent.ask_raw({"v": 1, "action": "echo", "text": "a", "namespce": "x"})
    assert reply["details"] == {"field": "namespce", "suggestion": "namespace"}


def test_the_session_beside_the_action_is_the_field_of_a_flat_request(agent: Agent) -> None:
    assert agent.ask_raw({"action": "echo", "text": "a", "session_id": "s"})["session"] == "s"
    assert agent.ask_raw({"v": 1, "action": "echo", "session_id": "s", "data": {"text": "a"}})["session"] is None


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "text"),
        ({"text": 1}, "text"),
        ({"text": ""}, "text"),
        ({"text": "a", "limit": "3"}, "limit"),
        ({"text": "a", "limit": 101}, "limit"),
        ({"text": "a", "kind": "quick"}, "kind"),
    ],
)
def test_bad_input_names_the_field(agent: Agent, encoding: str, fields: dict[str, Any], named: str) -> None:
    for request in ({"v": 1, "action": "echo", "data": fields}, {"action": "echo", **fields}):
        reply = agent.ask_raw(request, encoding)
        assert (reply["error_code"], reply["details"]["field"]) == ("invalid_field", named)


def test_garbage_is_answered(agent: Agent) -> None:
    with agent.peer() as peer:
        for body in (b"", b"\xc1", b"[]", b"{", b"\x80"):
            peer.send(body)
            encoding = "json" if body.startswith(b"{") else "msgpack"
            assert decode_reply(peer.receive(), encoding)["status"] == "error"


# -- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("action", "code", "details"),
    [
        ("missing", "memory_not_found", {"memory_id": "mem-nowhere"}),
        ("own_error", "memory_not_found", {"topic": "none"}),
        ("defect", "internal_error", {}),
        ("ech", "unknown_action", {"suggestion": "echo"}),
    ],
)
def test_errors_have_the_one_form(agent: Agent, encoding: str, action: str, code: str, details: Any) -> None:
    asked = request_id()
    reply = agent.ask_raw({"v": 1, "action": action, "request_id": asked}, encoding)
    assert (reply["error_code"], reply["details"], reply["request_id"]) == (code, details, asked)
    assert "secret" not in str(reply)


# -- who calls --------------------------------------------------------------------------------------------------


def test_the_caller_is_passed_on(agent: Agent, service: Orchestrator) -> None:
    who = agent.succeed("who", {"namespace": "n", "agent_id": "ada", "session_id": "s"})
    assert (who["namespace"], who["agent"], who["session"], who["legacy"]) == ("n", "ada", "s", False)
    assert agent.ask_raw({"action": "who", "request_id": "x"})["id"] is None

    namespace = {"namespace": "passed-on"}
    session = service.ask("create_session", namespace, user_id="ada")["session_id"]
    theirs = agent.succeed("add", {**namespace, "agent_id": "ada", "session_id": session}, text="tea")["memory_id"]
    memory = agent.succeed("read", namespace, memory_id=theirs)["memory"]
    assert (memory["created_by"], memory["parent_id"]) == ("ada", session)
    own = agent.succeed("add", namespace, text="coffee")["memory_id"]
    memory = agent.succeed("read", namespace, memory_id=own)["memory"]
    assert (memory["created_by"], memory["parent_id"]) == ("probe_agent", None)


def test_namespaces_are_kept_apart(agent: Agent, service: Orchestrator) -> None:
    memory_id = agent.succeed("add", {"namespace": "apart-1"}, text="mine")["memory_id"]
    assert agent.refused("read", {"namespace": "apart-2"}, memory_id=memory_id)["error_code"] == "memory_not_found"
    agent.succeed("elsewhere", {"namespace": "apart-1", "agent_id": "ada"}, text="over there")
    assert stored(service, "apart-1") == ["mine"]
    assert stored(service, "elsewhere") == ["over there"]


def test_a_deadline_that_passes_is_no_verdict_about_the_service(agent: Agent) -> None:
    for _ in range(20):
        around = {"deadline_ms": 0.5}
        assert agent.ask("add", around, text="late").get("error_code", "deadline_exceeded") in {
            "deadline_exceeded",
            "unavailable",
        }
    assert agent.succeed("add", text="in time")["memory_id"]


# -- once -------------------------------------------------------------------------------------------------------


def test_a_repeated_request_has_its_effect_once(agent: Agent, service: Orchestrator) -> None:
    around = {"namespace": "once", "agent_id": "ada"}
    request = envelope("add", {"text": "tea"}, **around)
    first, again = agent.ask_raw(request), agent.ask_raw(request)
    assert first["memory_id"] == again["memory_id"]
    assert stored(service, "once") == ["tea"]
    # Another caller's key, and no key at all: requests of their own.
    agent.ask_raw({**request, "agent_id": "bob"})
    agent.ask_raw({**request, "request_id": request_id()})
    legacy = {name: value for name, value in request.items() if name != "v"}
    agent.ask_raw(legacy)
    agent.ask_raw(legacy)
    assert stored(service, "once") == ["tea"] * 5


def test_a_repeated_request_finds_what_it_did_after_a_restart(tmp_path: Path, service: Orchestrator) -> None:
    request = envelope("count_up", {"name": "visits"}, namespace="restarted", agent_id="ada")
    with probing(tmp_path, service.address) as agent:
        agent.wait_state()
        assert agent.ask_raw(request)["value"] == 1
        agent.restart()
        assert agent.ask_raw(request)["value"] == 1
        assert agent.ask_raw({**request, "request_id": request_id()})["value"] == 2


def test_copies_of_a_request_under_way_wait_for_it(agent: Agent, service: Orchestrator) -> None:
    """Without that, each would find nothing done and write something else under the same key."""
    request = envelope("stamp", {}, namespace="copies", agent_id="ada")
    with agent.peer(dealer=True) as peer:
        for _ in range(10):
            peer.send(encode_request(request))
        replies = [decode_reply(peer.receive(), "msgpack") for _ in range(10)]
    assert [reply["status"] for reply in replies] == ["success"] * 10, replies
    assert len({reply["memory_id"] for reply in replies}) == 1
    assert len(stored(service, "copies")) == 1


def test_a_repeated_request_waits_for_what_is_still_being_written(tmp_path: Path) -> None:
    """The agent that sent the write was killed, and the service has not done with it."""
    states = iter(["in_progress", "in_progress", "committed"])

    def answer(request: dict[str, Any]) -> list[tuple[float, bytes]]:
        if request["action"] != "get_request_status":
            return ok()(request)
        return ok(state=next(states), reply={"memory_id": "mem-1"})(request)

    with FakeOrchestrator() as service, probing(tmp_path, service.endpoint) as agent:
        service.default = answer
        agent.wait_state()
        assert agent.succeed("stamp")["memory_id"] == "mem-1"
        assert "add_memory" not in {each["action"] for each in service.requests}


def test_fifty_callers_at_once(agent: Agent, service: Orchestrator) -> None:
    """Each looks up and then writes: without the lock two would find the same number."""

    def ask(number: int) -> int:
        around = {"namespace": "fifty", "agent_id": f"caller-{number}"}
        return int(agent.succeed("count_up", around, name="all")["value"])

    with ThreadPoolExecutor(50) as pool:
        assert sorted(pool.map(ask, range(50))) == list(range(1, 51))
    assert len(stored(service, "fifty")) == 50


# -- without the service ----------------------------------------------------------------------------------------


def test_unavailable_at_once_and_back_by_itself(tmp_path: Path) -> None:
    quick = {"agents__call_s": 20.0, "agents__reset_timeout_s": 0.3}
    with running_orchestrator(tmp_path) as service, probing(tmp_path, service.address, **quick) as agent:
        agent.wait_state()
        request = envelope("add", {"text": "tea"}, namespace="back")
        service.kill()
        agent.wait_state("degraded")
        wait_until(lambda: agent.ask("health_check")["breaker"] != "closed", "the breaker is open")
        with agent.peer() as peer:
            for encoding in ENCODINGS:
                began_s = time.monotonic()
                peer.send(encode(request, encoding))
                reply = decode_reply(peer.receive(), encoding)
                # Far less than a call may take: nothing was tried.
                assert time.monotonic() - began_s < 10.0
                assert (reply["error_code"], reply["retryable"]) == ("unavailable", True)
                assert 0 < reply["details"]["retry_after_ms"] <= 1100
        assert agent.ask_raw({"action": "echo", "text": "I am well"})["status"] == "success"
        service.restart()
        agent.wait_state("healthy")
        assert agent.ask_raw(request)["memory_id"] == agent.ask_raw(request)["memory_id"]
        assert stored(service, "back") == ["tea"]


def test_nobody_waits_out_a_call_that_nobody_will_answer(tmp_path: Path) -> None:
    """The breaker is far from opening, and a call may take a minute: it is the lost connection that is told."""
    patient = {"agents__call_s": 60.0, "agents__look_s": 60.0, "agents__failure_threshold": 1000}
    with running_orchestrator(tmp_path) as service, probing(tmp_path, service.address, **patient) as agent:
        agent.wait_state()
        service.kill()
        # The first is what makes the agent look; it is answered when the look has failed, not when its time is up.
        assert agent.ask("add", text="tea", timeout_s=40.0)["error_code"] == "unavailable"
        assert agent.ask("health_check")["state"] == "degraded"
        began_s = time.monotonic()
        for _ in range(20):
            reply = agent.ask("add", text="tea")
            assert (reply["error_code"], reply["details"]["retry_after_ms"]) == ("unavailable", 500.0)
        assert time.monotonic() - began_s < 30.0
        assert agent.ask("health_check")["breaker"] == "closed"
        service.restart()
        agent.wait_state("healthy")
        assert agent.succeed("add", text="tea")["memory_id"]


def test_a_slow_service_is_waited_for(tmp_path: Path) -> None:
    """Looks without an answer are not enough while there is a connection and the breaker is closed."""
    with FakeOrchestrator() as slow, probing(tmp_path, slow.endpoint, agents__failure_threshold=1000) as agent:
        agent.wait_state()
        answer = ok(1.8, memory_id="mem-1")
        slow.default = lambda request: [] if request["action"] == "get_commit_seq" else answer(request)
        assert agent.succeed("add", text="tea")["memory_id"] == "mem-1"
        assert agent.ask("health_check")["breaker"] == "closed"


def test_an_agent_that_starts_first_waits_for_the_service(tmp_path: Path) -> None:
    port = free_port()
    with probing(tmp_path, f"tcp://127.0.0.1:{port}") as agent:
        agent.wait_state("starting")
        assert agent.ask("health_check")["readiness"] == {"memory_service": "loading"}
        with running_orchestrator(tmp_path, network__port=port):
            agent.wait_state("healthy")
            assert agent.succeed("add", text="tea")["memory_id"]


def test_a_service_that_hangs_is_unavailable(tmp_path: Path) -> None:
    """No answer, while the connection lives: two looks end a call that may take a minute."""
    patient = {"agents__call_s": 60.0, "agents__failure_threshold": 2}
    with FakeOrchestrator() as silent, probing(tmp_path, silent.endpoint, **patient) as agent:
        agent.wait_state()
        silent.default = lambda request: []
        assert agent.refused("missing")["error_code"] == "unavailable"
        assert agent.ask("health_check")["breaker"] != "closed"


def test_what_goes_wrong_is_on_the_error_bus(tmp_path: Path) -> None:
    with FakeIngest() as bus, running_orchestrator(tmp_path) as service:
        reporting = {"error_bus__enabled": True, "error_bus__address": bus.endpoint, "health__heartbeat_s": 0.2}
        with probing(tmp_path, service.address, **reporting) as agent:
            agent.wait_state()
            asked = request_id()
            assert agent.ask("defect", {"request_id": asked})["error_code"] == "internal_error"
            service.kill()
            agent.wait_state("degraded")
            service.restart()
            agent.wait_state()
            expected = ["internal_error", "memory_service_unavailable", "memory_service_ready"]
            wait_until(lambda: set(expected) <= set(bus.kinds()), "all of it was reported")
            assert [kind for kind in bus.kinds() if kind in expected] == expected
            (defect,) = [event for event in bus.events if event["error_type"] == "internal_error"]
            assert (defect["agent"], defect["request_id"]) == ("probe_agent", asked)
            assert "secret" not in str(bus.events)
            wait_until(lambda: any(beat["component"] == "probe_agent" for beat in bus.heartbeats), "a heartbeat")


# -- the program ------------------------------------------------------------------------------------------------


def test_describe_and_health_check(agent: Agent) -> None:
    described = agent.succeed("describe")
    assert (described["name"], described["about"].splitlines()[0]) == ("probe_agent", "Answers what tests ask.")
    actions = {each["action"]: each for each in described["actions"]}
    assert set(actions) == {name for name, each in vars(ProbeAgent).items() if hasattr(each, "_is_action")}
    assert actions["echo"]["about"] == "Say it again."
    assert actions["echo"]["fields"][:2] == [
        {"name": "text", "takes": "text of 1 to 20 characters", "required": True},
        {"name": "limit", "takes": "an integer from 1 to 100", "required": False, "default": 10},
    ]
    assert actions["who"]["fields"] == []
    health = agent.succeed("health_check")
    assert (health["state"], health["pid"], health["probes"]) == ("healthy", agent.pid, 1)
    assert (health["readiness"], health["breaker"]) == ({"memory_service": "ready"}, "closed")


def test_shutdown_answers_what_was_accepted(tmp_path: Path, service: Orchestrator) -> None:
    with probing(tmp_path, service.address) as agent:
        agent.wait_state()
        with agent.peer(dealer=True) as peer:
            for seconds in (1.0, 50.0):
                peer.send(encode_request(envelope("slow", {"seconds": seconds})))
            wait_until(lambda: agent.ask("health_check")["in_flight"] >= 2, "both are being worked on")
            assert agent.terminate() == 0
            replies = [decode_reply(peer.receive(), "msgpack") for _ in range(2)]
        assert [reply.get("slept", reply.get("error_code")) for reply in replies] == [1.0, "shutting_down"]
        log = (tmp_path / "logs" / "probe_agent.log").read_text()
        assert log.index("probe_started") < log.index("stopping") < log.index("probe_stopped") < log.index('"stopped"')


def test_a_defect_beside_the_requests_ends_the_agent(tmp_path: Path, service: Orchestrator) -> None:
    with probing(tmp_path, service.address) as agent:
        agent.wait_state()
        agent.ask_raw({"action": "crash"})
        assert agent.process is not None
        assert agent.process.wait(30) == 1
        assert "agent_crashed" in (tmp_path / "logs" / "probe_agent.log").read_text()


def test_a_taken_port_is_named(tmp_path: Path, agent: Agent, service: Orchestrator) -> None:
    with probing(tmp_path, service.address) as other:
        other.kill()
        other.environ["PROBE_PORT"] = str(agent.port)
        other.start()
        assert other.process is not None
        assert other.process.wait(20) == 1
        assert "ProbeAgent.port" in other.output().splitlines()[-1]

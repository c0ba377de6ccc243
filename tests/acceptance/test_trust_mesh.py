"""The whole mesh under keys: who gets in where, for whom the agents work, and what a caller never sees of another."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from memory_client import MemoryClient
from memory_system.error_bus import ErrorReporter
from memory_system.events import ERROR_TOPIC, HEARTBEAT_TOPIC
from memory_system.keys import KeyFile, apply_client, key_text, new_key, write_private
from tests.support.agents import Agent, running_agent
from tests.support.bus import Subscriber
from tests.support.mesh import PROGRAMS, Mesh, running_mesh
from tests.support.process import PROJECT, wait_until
from tests.support.wire import request_id

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

SECRET = "the safe opens with 4711"
# Every socket that a program binds, and the kind of the one that connects to it.
SOCKETS = {**dict.fromkeys(PROGRAMS, zmq.REQ), "publish": zmq.SUB, "mesh": zmq.PUB, "report": zmq.DEALER}
AGENTS = ("knowledge_base_agent", "session_memory_agent", "context_manager_agent")
REFUSED = {"HANDSHAKE_FAILED_AUTH", "HANDSHAKE_FAILED_PROTOCOL", "HANDSHAKE_FAILED_NO_DETAIL"}
HANDSHAKE_S = 5.0

Reply = dict[str, Any]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("mesh")
    with running_mesh(folder, keys=True, health__heal="false", agents__look_s=0.2, agents__call_s=1.0) as running:
        running.make_key("planner", "writer", "home")
        running.make_key("rival", "writer", "work")
        running.make_key("guest", "reader", "home")
        running.make_key("watcher", "operator")
        yield running


def handshake(mesh: Mesh, endpoint: str, key: KeyFile | None) -> str:
    """How the first connection to a socket ends, as libzmq tells it."""
    with zmq.Context() as context, context.socket(SOCKETS[endpoint]) as sock:
        sock.linger = 0
        apply_client(sock, key)
        with sock.get_monitor_socket(zmq.EVENT_ALL) as monitor:
            sock.connect(mesh.endpoints[endpoint])
            deadline_s = time.monotonic() + HANDSHAKE_S
            while time.monotonic() < deadline_s:
                if not monitor.poll(100):
                    continue
                name = zmq.Event(recv_monitor_message(monitor)["event"]).name
                if name in REFUSED or name == "HANDSHAKE_SUCCEEDED":
                    sock.disable_monitor()
                    return name
            sock.disable_monitor()
    return "nothing"


def denied(reply: Reply) -> bool:
    return reply["status"] == "error" and reply["error_code"] == "access_denied"


def succeeded(reply: Reply) -> Reply:
    assert reply["status"] == "success", reply
    return reply


# -- who gets in --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", SOCKETS)
def test_nobody_gets_in_without_a_key_that_is_known(mesh: Mesh, endpoint: str) -> None:
    stranger = new_key("planner", mesh.ring.server)
    impostor = KeyFile("operator", mesh.ring.keys["planner"].public, new_key("x").secret, mesh.ring.server)
    assert handshake(mesh, endpoint, stranger) == "HANDSHAKE_FAILED_AUTH"
    assert handshake(mesh, endpoint, None) in REFUSED
    assert handshake(mesh, endpoint, impostor) in REFUSED
    # What the refusals above are worth: the same socket lets in who belongs.
    assert handshake(mesh, endpoint, mesh.key) == "HANDSHAKE_SUCCEEDED"


@pytest.mark.parametrize("endpoint", SOCKETS)
def test_a_client_is_not_fooled_by_another_service(mesh: Mesh, endpoint: str) -> None:
    known = mesh.ring.keys["operator"]
    assert handshake(mesh, endpoint, KeyFile(known.name, known.public, known.secret, new_key("x").public)) in REFUSED


def test_the_bus_is_for_operators(mesh: Mesh) -> None:
    for name in ("planner", "guest", "knowledge_base_agent"):
        assert handshake(mesh, "publish", mesh.ring.keys[name]) == "HANDSHAKE_FAILED_AUTH", name
    for name in ("watcher", "operator", "health_manager"):
        assert handshake(mesh, "publish", mesh.ring.keys[name]) == "HANDSHAKE_SUCCEEDED", name
    for name, may in (("guest", False), ("planner", False), ("watcher", True), ("operator", True)):
        key = mesh.ring.keys[name]
        for program, action in (
            ("health_manager", "get_errors"),
            ("health_manager", "get_health"),
            ("memory_scheduler", "list_jobs"),
        ):
            reply = mesh.ask_as(key, program, action)
            assert denied(reply) is not may, (name, action, reply)
    assert denied(mesh.ask_as(mesh.ring.keys["watcher"], "memory_scheduler", "run_job", name="decay"))
    assert denied(mesh.ask_as(mesh.ring.keys["planner"], "memory_scheduler", "run_job", name="decay"))
    succeeded(mesh.ask("memory_scheduler", "run_job", name="decay", dry_run=True))


@pytest.mark.parametrize("program", PROGRAMS)
def test_whoever_has_a_key_may_ask_how_a_program_is(mesh: Mesh, program: str) -> None:
    told = succeeded(mesh.ask_as(mesh.ring.keys["guest"], program, "health_check"))
    assert told["state"] == "healthy"
    assert not told.keys() & {"requests", "memory_bytes", "context_cache", "jobs", "security"}
    seen = succeeded(mesh.ask_as(mesh.ring.keys["watcher"], program, "health_check"))
    assert "requests" in seen
    assert seen["security"]["state"] == "ready"


def test_a_revoked_key_is_out_at_once(mesh: Mesh) -> None:
    key = mesh.make_key("leaver", "writer", "home")
    endless = mesh.socket(zmq.DEALER, "session_memory_agent", key)
    body = json.dumps({"v": 1, "action": "list_sessions", "namespace": "home", "request_id": "r" * 20}).encode()

    def asked() -> Reply:
        endless.send_multipart([b"", body])
        assert endless.poll(5000)
        reply: Reply = json.loads(endless.recv_multipart()[-1])
        return reply

    succeeded(asked())
    mesh.ring.revoke("leaver")
    wait_until(lambda: denied(asked()), "its connection is refused", 5.0)
    for endpoint in SOCKETS:
        wait_until(
            lambda at=endpoint: handshake(mesh, at, key) == "HANDSHAKE_FAILED_AUTH",  # type: ignore[misc]
            f"{endpoint} does not let it in any more",
        )


def test_who_listens_and_is_revoked_hears_no_more(mesh: Mesh) -> None:
    key = mesh.make_key("eavesdropper", "operator")
    reporter = mesh.reporter("operator")
    numbers = itertools.count()

    def neighbour_hears() -> str:
        """Have something told, again if need be: the neighbour is cut off too, and comes back. The error's name."""
        while True:
            name = f"told_{next(numbers)}"
            reporter.report(name, "for those who may listen")
            with contextlib.suppress(AssertionError):
                other.wait(ERROR_TOPIC, 2.0, error_type=name)
                return name

    def hears() -> bool:
        """Whether it hears one of three errors that its neighbour heard before a fourth."""
        told = [neighbour_hears() for _ in range(4)]
        return any(bus.messages(ERROR_TOPIC, error_type=name) for name in told[:-1])

    with Subscriber(mesh.endpoints["publish"], key=key) as bus, mesh.subscriber() as other:
        wait_until(hears, "it hears the bus")
        mesh.ring.revoke("eavesdropper")
        wait_until(lambda: not hears(), "it is cut off")
        heard = len(bus.messages())
        assert not hears()
        assert len(bus.messages()) == heard
        assert handshake(mesh, "publish", key) == "HANDSHAKE_FAILED_AUTH"


# -- what the operator uses ---------------------------------------------------------------------------------------


def script(mesh: Mesh, name: str, *options: str, key: str = "") -> subprocess.CompletedProcess[str]:
    environ = {**mesh.environ, **({"MEMORY_KEY_FILE": str(mesh.ring.folder / f"{key}.key")} if key else {})}
    command = [sys.executable, str(PROJECT / "scripts" / name), *options]
    return subprocess.run(command, env=environ, cwd=mesh.folder, capture_output=True, text=True, timeout=60)


def test_the_table_of_the_operator(mesh: Mesh) -> None:
    done = mesh.pc2("status")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "does not answer" not in done.stderr
    assert sum("healthy" in line for line in done.stdout.splitlines()) >= len(PROGRAMS)
    again = mesh.pc2("start")
    assert again.returncode == 0, (again.stdout, again.stderr)


def test_the_scripts_show_the_operators_key(mesh: Mesh) -> None:
    mesh.reporter("operator").report("for_the_tail", "seen by the tail")
    wait_until(lambda: bool(mesh.history(error_type="for_the_tail")), "the event is in the history")
    tail = script(mesh, "tail_error_bus.py", "--no-follow")
    assert (tail.returncode, "for_the_tail" in tail.stdout) == (0, True), (tail.stdout, tail.stderr)
    jobs = script(mesh, "jobs.py", "list")
    assert (jobs.returncode, "decay" in jobs.stdout) == (0, True), (jobs.stdout, jobs.stderr)
    refused = script(mesh, "tail_error_bus.py", "--no-follow", key="guest")
    assert refused.returncode == 1
    assert "operator or admin" in refused.stderr
    assert SECRET not in refused.stderr + refused.stdout
    assert script(mesh, "jobs.py", "list", key="planner").returncode == 1


# -- the agents and their callers ---------------------------------------------------------------------------------


def tell_secret(mesh: Mesh, key: KeyFile, namespace: str) -> tuple[str, str]:
    """A session with a turn, a fact and something pinned, all of which tell the secret; ids of session and fact."""
    around = {"namespace": namespace}
    sessions, facts, contexts = AGENTS[1], AGENTS[0], AGENTS[2]
    session_id = succeeded(mesh.ask_as(key, sessions, "create_session", around, user_id="ada"))["session_id"]
    said = {"session_id": session_id, "role": "user", "content": f"Please remember that {SECRET}."}
    succeeded(mesh.ask_as(key, sessions, "add_interaction", around, **said))
    fact = succeeded(mesh.ask_as(key, facts, "add_fact", around, topic="safe", content=f"It is said that {SECRET}."))
    kept = succeeded(mesh.ask_as(key, contexts, "add_to_context", around, text=f"Note: {SECRET}.", user_id="ada"))
    succeeded(mesh.ask_as(key, contexts, "pin_context", around, memory_id=kept["memory_id"]))
    return session_id, fact["fact_id"]


READS = (
    ("session_memory_agent", "list_sessions", {"user_id": "ada"}),
    ("session_memory_agent", "search_interactions", {"query": "safe", "user_id": "ada"}),
    ("knowledge_base_agent", "get_fact", {"topic": "safe"}),
    ("knowledge_base_agent", "search_facts", {"query": "How does the safe open?", "min_similarity": -1}),
    ("knowledge_base_agent", "list_topics", {}),
    ("context_manager_agent", "get_context", {"query": "safe", "user_id": "ada"}),
    ("context_manager_agent", "get_context_text", {"user_id": "ada"}),
    ("context_manager_agent", "summarize_context", {"user_id": "ada"}),
)


def test_an_agent_works_for_a_caller_within_its_grant(mesh: Mesh) -> None:
    planner, guest = mesh.ring.keys["planner"], mesh.ring.keys["guest"]
    session_id, fact_id = tell_secret(mesh, planner, "home")
    for agent, action, data in READS:
        for key in (planner, guest):
            reply = succeeded(mesh.ask_as(key, agent, action, {"namespace": "home"}, **data))
            assert "safe" in json.dumps(reply) or action == "list_sessions", (action, reply)
    turns = mesh.ask_as(guest, "session_memory_agent", "get_context", {"namespace": "home"}, session_id=session_id)
    assert SECRET in json.dumps(succeeded(turns))
    # A reader reads through an agent that may write, and writes nothing.
    for agent, action, data in (
        ("session_memory_agent", "create_session", {"user_id": "ada"}),
        ("session_memory_agent", "delete_session", {"session_id": session_id}),
        ("knowledge_base_agent", "add_fact", {"topic": "safe", "content": "It is empty."}),
        ("knowledge_base_agent", "delete_fact", {"fact_id": fact_id}),
        ("context_manager_agent", "add_to_context", {"text": "x"}),
        ("context_manager_agent", "clear_context", {"user_id": "ada", "include_pinned": True}),
    ):
        assert denied(mesh.ask_as(guest, agent, action, {"namespace": "home"}, **data)), action
    # An operator sees how programs are, and no memory.
    for agent, action, data in READS:
        assert denied(mesh.ask_as(mesh.ring.keys["watcher"], agent, action, {"namespace": "home"}, **data)), action


def test_a_caller_sees_nothing_of_a_namespace_that_is_not_granted(mesh: Mesh) -> None:
    planner, rival = mesh.ring.keys["planner"], mesh.ring.keys["rival"]
    around, key_of_retry = {"namespace": "home"}, request_id()
    session_id, fact_id = tell_secret(mesh, planner, "home")
    added = {"topic": "retries", "content": f"Once more: {SECRET}."}
    first = mesh.ask_as(planner, AGENTS[0], "add_fact", {**around, "request_id": key_of_retry}, **added)
    by_id = (
        (AGENTS[1], "get_session", {"session_id": session_id}),
        (AGENTS[1], "get_context", {"session_id": session_id}),
        (AGENTS[1], "add_interaction", {"session_id": session_id, "role": "user", "content": "x"}),
        (AGENTS[0], "get_fact", {"fact_id": fact_id}),
        (AGENTS[0], "update_fact", {"fact_id": fact_id, "confidence": 0.1}),
        (AGENTS[2], "get_context", {"session_id": session_id}),
        (AGENTS[2], "pin_context", {"memory_id": fact_id}),
    )
    for agent, action, data in (*READS, *by_id):
        reply = mesh.ask_as(rival, agent, action, around, **data)
        assert denied(reply), (action, reply)
        # The same in its own namespace finds nothing, whatever ids and sessions it names.
        own = mesh.ask_as(rival, agent, action, {"namespace": "work"}, **data)
        assert SECRET not in json.dumps([reply, own]), action
    # The request_id of another caller is another request.
    again = mesh.ask_as(rival, AGENTS[0], "add_fact", {"namespace": "work", "request_id": key_of_retry}, **added)
    assert succeeded(again)["fact_id"] != succeeded(first)["fact_id"]


def test_what_an_agent_keeps_is_not_given_to_others_while_the_service_is_away(mesh: Mesh) -> None:
    planner, rival = mesh.ring.keys["planner"], mesh.ring.keys["rival"]
    tell_secret(mesh, planner, "home")
    asked = (AGENTS[2], "get_context_text", {"namespace": "home"})
    wait_until(lambda: not mesh.ask_as(planner, *asked, user_id="ada")["pending"], "every memory has its vector")
    assert SECRET in succeeded(mesh.ask_as(planner, *asked, user_id="ada"))["text"]
    mesh.sigstop("orchestrator")
    try:
        wait_until(
            lambda: mesh.ask_as(planner, *asked, user_id="ada").get("stale") is True, "the agent gives what it has"
        )
        assert SECRET in mesh.ask_as(planner, *asked, user_id="ada")["text"]
        assert denied(mesh.ask_as(rival, *asked, user_id="ada"))
        assert denied(mesh.ask_as(mesh.ring.keys["watcher"], *asked, user_id="ada"))
    finally:
        mesh.sigcont("orchestrator")
    wait_until(lambda: mesh.ask_as(planner, *asked, user_id="ada").get("stale") is False, "the service is back")


def test_on_behalf_of_is_the_intersection_of_both(mesh: Mesh) -> None:
    helper = mesh.make_key("helper", "writer", "home", "office", act_for=["planner", "guest", "both"])
    mesh.make_key("both", "writer", "home", "work")
    data = {"topic": "trains", "content": "They run on rails."}

    def added(on_behalf_of: str, namespace: str, key: KeyFile = helper) -> Reply:
        around = {"on_behalf_of": on_behalf_of, "namespace": namespace}
        direct = mesh.ask_as(key, "orchestrator", "add_memory", around, content="They run on rails.")
        through = mesh.ask_as(key, "knowledge_base_agent", "add_fact", around, **data)
        assert denied(direct) == denied(through), (direct, through)
        return direct

    succeeded(added("both", "home"))
    assert denied(added("both", "work"))  # granted to both, not to the helper
    assert denied(added("planner", "office"))  # granted to the helper, not to planner
    assert denied(added("guest", "home"))  # a reader
    assert denied(added("rival", "work"))  # not in its act_for
    assert denied(added("nobody", "home"))
    assert denied(added("guest", "home", mesh.ring.keys["planner"]))  # acts for nobody


# -- reporting ----------------------------------------------------------------------------------------------------


def test_a_component_beats_in_its_own_name_alone(mesh: Mesh) -> None:
    planner = mesh.ring.keys["planner"]
    link = mesh.socket(zmq.DEALER, "report", planner)

    def beat(component: str) -> None:
        fields = {"component": component, "timestamp": time.time(), "pid": os.getpid(), "state": "healthy"}
        link.send_multipart([b"", msgpack.packb({"v": 1, "kind": "heartbeat", **fields})])

    with mesh.subscriber() as bus:
        for component in ("orchestrator", "session_memory_agent", "rival", "made_up"):
            beat(component)
        beat("planner")
        assert bus.wait(HEARTBEAT_TOPIC, 10.0, component="planner").fields["pid"] == os.getpid()
        assert not bus.messages(HEARTBEAT_TOPIC, pid=os.getpid(), component="made_up")
        assert not bus.messages(HEARTBEAT_TOPIC, pid=os.getpid(), component="orchestrator")
        bus.wait(ERROR_TOPIC, 10.0, agent="planner", error_type="peer_denied")
    known = {each["component"] for each in mesh.succeed("health_manager", "get_health")["results"]}
    assert "planner" in known
    assert not known & {"rival", "made_up"}


def test_an_error_carries_the_name_of_the_key(mesh: Mesh) -> None:
    planner = mesh.ring.keys["planner"]
    with mesh.subscriber() as bus:
        mesh.reporter("orchestrator", key=planner).report("signed_report", "in another name", details={"legs": 3})
        told = bus.wait(ERROR_TOPIC, 10.0, error_type="signed_report").fields
        assert (told["agent"], told["details"]) == ("planner", {"legs": 3, "agent_sent": "orchestrator"})
        publisher = mesh.socket(zmq.PUB, "mesh", planner)
        event = {"agent": "planner", "error_type": "signed_publication", "message": "by a PUB socket"}

        def arrived() -> bool:
            publisher.send(b"ERROR:" + json.dumps(event).encode())
            return bool(bus.messages(ERROR_TOPIC, error_type="signed_publication", agent="planner"))

        wait_until(arrived, "the publication is on the bus")


def test_a_key_that_is_granted_later_gets_through_by_itself(mesh: Mesh) -> None:
    key = new_key("latecomer", mesh.ring.server)
    reporter: ErrorReporter = mesh.reporter("latecomer", key=key)
    reporter.report("said_early", "before its key was known")
    time.sleep(1.0)
    assert reporter.stats()["acknowledged"] == 0
    mesh.ring.adopt(key, roles=["reader"])
    wait_until(lambda: reporter.stats()["acknowledged"] == 1, "it is acknowledged", 15.0)
    assert [row["agent"] for row in mesh.history(error_type="said_early")] == ["latecomer"]


def test_the_client_reports_with_its_own_key(mesh: Mesh, tmp_path: Path) -> None:
    path = mesh.ring.folder / "planner.key"
    with MemoryClient(
        mesh.endpoints["orchestrator"],
        agent_id="label",
        namespace="home",
        key_file=path,
        error_bus=mesh.endpoints["report"],
    ) as client:
        succeeded(client.add_memory("Ada drinks tea."))
        assert client.list_memories()["status"] == "success"


# -- an agent of another host -------------------------------------------------------------------------------------


def test_an_agent_with_nothing_but_a_key_file(mesh: Mesh, tmp_path: Path) -> None:
    """It has no folder of keys, as on another host; and it begins before anybody has granted its key anything."""
    key = new_key("far_agent", mesh.ring.server)
    path = tmp_path / "far_agent.key"
    write_private(path, key_text(key, "carried here"))
    where = (tmp_path, "knowledge_base", mesh.endpoints["orchestrator"])
    with running_agent(*where, start=False, security__keys_dir=tmp_path / "none") as agent:
        agent.environ["MEMORY_KEY_FILE"] = str(path)
        agent.start()
        wait_until(lambda: agent_answers(agent), "the agent answers")
        fact = {"topic": "far", "content": "It is far away."}
        assert agent.refused("add_fact", {"namespace": "home"}, **fact)["error_code"] == "unavailable"
        mesh.ring.adopt(key, roles=["writer"], namespaces=["home"])
        agent.wait_state("healthy")
        agent.succeed("add_fact", {"namespace": "home"}, **fact)
        assert denied(agent.ask("add_fact", {"namespace": "work"}, **fact))
        assert str(key.secret.decode()) not in agent.output()


def agent_answers(agent: Agent) -> bool:
    with contextlib.suppress(TimeoutError):
        return bool(agent.ask("health_check", timeout_s=0.5)["status"] == "success")
    return False


# -- what remains in files ----------------------------------------------------------------------------------------


def test_no_log_has_a_secret_and_denials_are_in_the_audit_log(mesh: Mesh) -> None:
    prowler = mesh.make_key("prowler", "writer", "work")  # one whose denials nobody has left out yet
    assert denied(mesh.ask_as(prowler, "session_memory_agent", "list_sessions", {"namespace": "home"}))
    logs = {path.name: path.read_text(errors="replace") for path in (mesh.folder / "logs").glob("*.log")}
    for secret in mesh.ring.secrets():
        assert not [name for name, text in logs.items() if secret in text]
    lines = [json.loads(line) for line in logs["session_memory_agent.audit.log"].splitlines()]
    refused = [line for line in lines if line["outcome"] != "left_out"]
    assert any(line["name"] == "prowler" and line["action"] == "list_sessions" for line in refused), lines

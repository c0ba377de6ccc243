"""Keys with a real orchestrator: who gets in and who does not, and what changes while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from memory_client import AsyncMemoryClient, MemoryClient
from memory_system.keys import KEY_FILE_VARIABLE, KeyFile, new_key
from tests.support.handshakes import CLOSED, IN, OTHER_MECHANISM, REFUSED, knock
from tests.support.keyring import KeyRing
from tests.support.process import PROJECT, Orchestrator, Peer, free_port, running_orchestrator, wait_until

pytestmark = pytest.mark.acceptance

Reply = dict[str, Any]
# (endpoint, key, action, data, options) -> the reply of a new client
Ask = Callable[..., Reply]


def ask_with_threads(endpoint: str, key: KeyFile | Path | None, action: str = "add_memory", /, **data: Any) -> Reply:
    with MemoryClient(endpoint, timeout_ms=3000, error_bus="", key_file=key) as client:
        return client.call(action, data)


def ask_with_asyncio(endpoint: str, key: KeyFile | Path | None, action: str = "add_memory", /, **data: Any) -> Reply:
    async def ask() -> Reply:
        async with AsyncMemoryClient(endpoint, timeout_ms=3000, error_bus="", key_file=key) as client:
            return await client.call(action, data)

    return asyncio.run(ask())


@pytest.fixture(params=[ask_with_threads, ask_with_asyncio], ids=["threads", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Ask:
    chosen: Ask = request.param
    return chosen


@contextlib.contextmanager
def running(tmp_path: Path, ring: KeyRing, *, program: str = "", **overrides: Any) -> Iterator[Orchestrator]:
    """An orchestrator whose callers need keys, once it answers the observer."""
    with running_orchestrator(tmp_path, start=False, **{**ring.settings(), **overrides}) as orchestrator:
        if program:
            orchestrator.command = [sys.executable, str(PROJECT / "tests" / "programs" / program)]
        orchestrator.start(wait=False)
        with MemoryClient(orchestrator.address, error_bus="", key_file=ring.keys["observer"]) as observer:
            wait_until(lambda: answers(observer, orchestrator), "the orchestrator answers", 60.0)
        yield orchestrator


def answers(client: MemoryClient, orchestrator: Orchestrator) -> bool:
    assert orchestrator.alive, orchestrator.errors()
    client.reset_circuit_breaker()
    return client.health_check()["status"] == "success"


def contents(orchestrator: Orchestrator) -> list[str]:
    """What the database holds, by a connection of its own."""
    with contextlib.closing(sqlite3.connect(f"file:{orchestrator.database}?mode=ro", uri=True)) as db:
        return sorted(content for (content,) in db.execute("SELECT content FROM memories"))


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return ring_of(tmp_path)


def ring_of(folder: Path) -> KeyRing:
    made = KeyRing(folder / "keys")
    made.add("planner", roles=["writer"], namespaces=["default"])
    return made


@dataclass(frozen=True)
class Service:
    """One orchestrator for all tests that want no other: each adds the keys that it changes, and its own contents."""

    orchestrator: Orchestrator
    ring: KeyRing

    @property
    def endpoint(self) -> str:
        return self.orchestrator.address


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    ring = ring_of(folder)
    with running(folder, ring) as orchestrator:
        yield Service(orchestrator, ring)


def test_only_a_known_key_is_served_and_nothing_of_others_is_stored(service: Service, ask: Ask) -> None:
    ring, content = service.ring, f"of the planner, by {ask.__name__}"
    planner = ring.keys["planner"]
    before = contents(service.orchestrator)
    assert ask(service.endpoint, ring.folder / "planner.key", content=content)["status"] == "success"
    for key in (new_key("planner", ring.server), None, replace(planner, server=planner.public)):
        reply = ask(service.endpoint, key, content="of a stranger")
        assert reply["status"] == "error", key
        assert reply["outcome"] == "not_sent", key
    assert contents(service.orchestrator) == sorted([*before, content])


def test_a_key_that_is_not_known_is_told_so_at_once(service: Service, ask: Ask) -> None:
    started_s = time.monotonic()
    reply = ask(service.endpoint, new_key("planner", service.ring.server), content="x")
    assert reply["error_code"] == "access_denied", reply
    assert "does not take the key of planner" in reply["message"]
    assert time.monotonic() - started_s < 2.5, "not after the time of the call"


def test_without_a_key_it_is_told_that_one_is_needed(service: Service, ask: Ask) -> None:
    """As `unreachable` where the service closes the connection before its greeting was read: it may be busy then."""
    reply = ask(service.endpoint, None, content="x")
    assert reply["error_code"] in ("access_denied", "unreachable"), reply
    assert KEY_FILE_VARIABLE in reply["message"]


def test_with_the_key_of_another_service_it_is_told_what_may_be_wrong(service: Service, ask: Ask) -> None:
    planner = service.ring.keys["planner"]
    reply = ask(service.endpoint, replace(planner, server=planner.public), content="x")
    assert reply["error_code"] == "unreachable", "a service that hangs up may be another one, or too busy"
    assert "its line `server`" in reply["message"]


def test_the_handshake_tells_who_gets_in(service: Service) -> None:
    ring, planner = service.ring, service.ring.keys["planner"]
    assert knock(service.endpoint, planner) == IN
    assert knock(service.endpoint, new_key("planner", ring.server)) == REFUSED
    assert knock(service.endpoint, None) in (OTHER_MECHANISM, CLOSED)
    assert knock(service.endpoint, replace(planner, server=planner.public)) == CLOSED


def test_the_environment_names_the_key(service: Service, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(service.ring.folder / "planner.key"))
    assert ask(service.endpoint, None, "get_commit_seq")["status"] == "success"


def test_with_a_key_nothing_is_sent_to_a_service_without(tmp_path: Path, ring: KeyRing) -> None:
    with running_orchestrator(tmp_path, security__curve="off") as orchestrator:
        for ask in (ask_with_threads, ask_with_asyncio):
            reply = ask(orchestrator.address, ring.keys["planner"], content="x")
            assert reply["error_code"] == "access_denied"
            assert "speaks without keys" in reply["message"]
        assert ask_with_threads(orchestrator.address, None, content="y")["status"] == "success"
        assert contents(orchestrator) == ["y"]


def test_a_revoked_key_is_refused_within_seconds_on_the_connection_it_has(service: Service) -> None:
    ring, orchestrator = service.ring, service.orchestrator
    for name in ("leaver", "stayer"):
        ring.add(name, roles=["writer"], namespaces=["default"])
    with ring.peer(orchestrator, "leaver") as leaver, ring.peer(orchestrator, "stayer") as stayer:
        assert leaver.ask("add_memory", content="of the leaver, before")["status"] == "success"
        ring.revoke("leaver")
        revoked_s = time.monotonic()
        wait_until(lambda: is_denied(leaver), "it is refused")
        assert time.monotonic() - revoked_s < 15.0
        assert leaver.ask("add_memory", content="of the leaver, after")["error_code"] == "access_denied"
        assert leaver.ask("health_check")["error_code"] == "access_denied"
        assert stayer.ask("add_memory", content="of the stayer")["status"] == "success"
    assert knock(service.endpoint, ring.keys["leaver"]) == REFUSED
    assert "of the leaver, after" not in contents(orchestrator)


def is_denied(peer: Peer) -> bool:
    return peer.ask("get_commit_seq").get("error_code") == "access_denied"


def test_a_key_is_added_without_a_restart(service: Service, ask: Ask) -> None:
    name = f"late-{ask.__name__}"
    service.ring.add(name, roles=["writer"], namespaces=["default"])
    assert ask(service.endpoint, service.ring.keys[name], content="late")["status"] == "success"


def test_a_client_that_was_refused_gets_in_once_its_key_is_granted(service: Service) -> None:
    late = new_key("late", service.ring.server)
    with MemoryClient(service.endpoint, error_bus="", key_file=late) as client:
        assert client.add_memory("too early")["error_code"] == "access_denied"
        service.ring.adopt(late, roles=["writer"], namespaces=["default"])
        assert client.add_memory("in time")["status"] == "success"
        assert client.get_circuit_breaker_status()["failure_count"] == 0, "a refusal says nothing of the service"


def test_a_key_of_the_same_name_is_another_one(service: Service) -> None:
    """A connection of the old key is not taken for one of the new."""
    ring = service.ring
    ring.add("renewed", roles=["writer"], namespaces=["default"])
    with ring.peer(service.orchestrator, "renewed") as before:
        assert not is_denied(before)
        ring._grants = [grant for grant in ring._grants if grant["name"] != "renewed"]
        ring.adopt(new_key("renewed", ring.server), roles=["writer"], namespaces=["default"])
        wait_until(lambda: is_denied(before), "it is refused", 10.0)
        with ring.peer(service.orchestrator, "renewed") as after:
            assert not is_denied(after)


def test_two_keys_do_not_share_a_request_id(service: Service) -> None:
    """Whatever they call themselves: what one did is not told to the other as its own."""
    ring = service.ring
    around = {"request_id": "r" * 32, "agent_id": "the same name"}
    for name in ("one", "two"):
        ring.add(name, roles=["writer"], namespaces=["default"])
    with ring.peer(service.orchestrator, "one") as one, ring.peer(service.orchestrator, "two") as two:
        mine = one.ask("add_memory", around, content="twins")
        again = one.ask("add_memory", around, content="twins")
        theirs = two.ask("add_memory", around, content="twins")
    assert again["replayed"]
    assert again["memory_id"] == mine["memory_id"]
    assert "replayed" not in theirs
    assert theirs["memory_id"] != mine["memory_id"]
    assert contents(service.orchestrator).count("twins") == 2


# -- the start --------------------------------------------------------------------------------------------------------


def refused_start(tmp_path: Path, **overrides: Any) -> str:
    """The one line with which an orchestrator refuses to start, as a bad configuration."""
    with running_orchestrator(tmp_path, start=False, **overrides) as orchestrator:
        orchestrator.start(wait=False)
        assert orchestrator.process is not None
        assert orchestrator.process.wait(20) == 2
        lines = orchestrator.errors().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(("name", "mode"), [("service.key", 0o640), ("grants.yaml", 0o666)])
def test_loose_permissions_are_refused(tmp_path: Path, ring: KeyRing, name: str, mode: int) -> None:
    (ring.folder / name).chmod(mode)
    line = refused_start(tmp_path, **ring.settings())
    assert name in line
    assert "chmod" in line


def test_other_hosts_need_keys(tmp_path: Path) -> None:
    assert "make keys" in refused_start(tmp_path, network__bind="0.0.0.0")


def test_with_keys_other_hosts_may_come(tmp_path: Path, ring: KeyRing) -> None:
    with running(tmp_path, ring, network__bind="0.0.0.0") as orchestrator:
        assert ask_with_threads(orchestrator.address, ring.keys["planner"], content="x")["status"] == "success"
        assert knock(orchestrator.address, None) in (OTHER_MECHANISM, CLOSED)


# -- the authenticator ------------------------------------------------------------------------------------------------


def test_an_authenticator_that_dies_is_noticed(tmp_path: Path, ring: KeyRing) -> None:
    flag = tmp_path / "flag"
    os.environ["MORTAL_FLAG"] = str(flag)
    try:
        with (
            running(tmp_path, ring, program="mortal_orchestrator.py") as orchestrator,
            ring.peer(orchestrator, "observer") as observer,
        ):
            assert security(observer)["restarts"] == 0
            flag.touch()
            assert knock(orchestrator.address, ring.keys["planner"], timeout_s=0.5) != IN
            wait_until(lambda: observer.ask("health_check")["state"] == "degraded", "it is noticed", 10.0)
            health = observer.ask("health_check")
            assert health["readiness"]["authenticator"] == "unavailable", "who is connected is still served"
            assert knock(orchestrator.address, ring.keys["planner"], timeout_s=0.5) != IN, "and nobody new gets in"
            flag.unlink()
            wait_until(lambda: security(observer)["state"] == "ready", "it is started again", 10.0)
            assert security(observer)["restarts"] > 0
            assert knock(orchestrator.address, ring.keys["planner"]) == IN
            assert knock(orchestrator.address, new_key("x", ring.server)) == REFUSED
        log = (tmp_path / "logs" / "orchestrator.log").read_text()
        assert "authenticator_died" in log
        assert "authenticator_ended" in log
    finally:
        del os.environ["MORTAL_FLAG"]


def security(observer: Peer) -> dict[str, Any]:
    found: dict[str, Any] = observer.ask("health_check")["security"]
    return found


def test_no_secret_is_written_anywhere(tmp_path: Path, ring: KeyRing) -> None:
    with running(tmp_path, ring, log__level="debug") as orchestrator:
        assert ask_with_threads(orchestrator.address, ring.keys["planner"], content="x")["status"] == "success"
        assert knock(orchestrator.address, new_key("x", ring.server)) == REFUSED
        assert orchestrator.terminate() == 0
        said = orchestrator.errors()
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.parent != ring.folder:
            said += path.read_bytes().decode("utf-8", "replace")
    for secret in ring.secrets():
        assert secret not in said


# -- negative controls: what the tests above see when there is no gate ------------------------------------------------


def test_without_keys_strangers_are_served(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path) as orchestrator:
        assert knock(orchestrator.address, None) == IN
        assert ask_with_threads(orchestrator.address, None, content="of a stranger")["status"] == "success"
        assert contents(orchestrator) == ["of a stranger"]


def test_a_bare_curve_socket_lets_strangers_in() -> None:
    service = new_key("service")
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        socket.curve_server = True
        socket.curve_secretkey = service.secret
        socket.bind(endpoint)
        assert knock(endpoint, new_key("stranger", service.public)) == IN

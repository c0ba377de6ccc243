"""How the real process starts, what stops it from starting, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from memory_system.errors import Busy, MemorySystemError, ShuttingDown
from memory_system.request_server import Admission, Load
from memory_system.router import Sender
from memory_system.security.guard import Guard
from memory_system.settings import NetworkSettings, SecuritySettings, Settings
from orchestrator import Orchestrator as Service
from tests.support.process import Orchestrator, free_port, running_orchestrator, wait_until
from tests.support.wire import decode, encode, envelope

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[Orchestrator]:
    with running_orchestrator(tmp_path) as running:
        yield running


# -- stopping ---------------------------------------------------------------------------------------------------


def stopped_in_time(orchestrator: Orchestrator) -> None:
    began_s = time.monotonic()
    assert orchestrator.terminate() == 0
    assert time.monotonic() - began_s < 15.0


def test_what_was_accepted_is_answered_on_sigterm(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path, storage__synchronous="full") as orchestrator:
        assert orchestrator.process is not None
        replies: list[dict[str, Any]] = []
        with orchestrator.peer(dealer=True) as peer:
            for number in range(60):
                batch = [{"content": f"{number} {item}"} for item in range(50)]
                peer.send(encode(envelope("batch_add_memories", {"memories": batch}), "msgpack"))
            replies.append(decode(peer.receive(), "msgpack"))
            stopped_in_time(orchestrator)
            while peer.socket.poll(300):
                replies.append(decode(peer.receive(), "msgpack"))
        assert {reply.get("error_code", "success") for reply in replies} <= {"success", "shutting_down", "busy"}
        acknowledged = [memory_id for reply in replies for memory_id in reply.get("memory_ids", ())]
        assert len(acknowledged) >= 50
        orchestrator.restart()
        for start in range(0, len(acknowledged), 1000):
            found = orchestrator.ask("batch_get_memories", memory_ids=acknowledged[start : start + 1000])
            assert found["missing"] == []


def test_more_work_than_time_does_not_delay_the_end(tmp_path: Path) -> None:
    """What could not be done in `shutdown_s` is given up: its callers know nothing of it and ask again."""
    with running_orchestrator(tmp_path, limits__shutdown_s=0.2) as orchestrator:
        batch = [{"content": f"words of memory {item} " * 20} for item in range(1000)]
        with orchestrator.peer(dealer=True, SNDHWM=0) as peer:
            for _ in range(60):
                peer.send(encode(envelope("batch_add_memories", {"memories": batch}), "msgpack"))
            peer.receive()
            stopped_in_time(orchestrator)


def test_while_it_stops_requests_are_refused_or_the_connection_is_gone(orchestrator: Orchestrator) -> None:
    stopping = threading.Event()
    outcomes: Counter[str] = Counter()

    def ask_on() -> None:
        with orchestrator.peer() as peer, contextlib.suppress(TimeoutError):
            while True:
                peer.send(encode(envelope("add_memory", {"content": "x"}), "msgpack"))
                reply = decode(peer.receive(5.0), "msgpack")
                outcomes[reply.get("error_code", "success")] += 1
                if outcomes["success"] == 20:
                    stopping.set()

    caller = threading.Thread(target=ask_on)
    caller.start()
    assert stopping.wait(45)
    assert orchestrator.terminate() == 0
    caller.join(20)
    assert set(outcomes) <= {"success", "shutting_down"}


@pytest.mark.parametrize("times", [1, 3])
def test_an_idle_orchestrator_stops_at_once_and_keeps_its_store(tmp_path: Path, times: int) -> None:
    with running_orchestrator(tmp_path) as orchestrator:
        memory_id = orchestrator.ask("add_memory", content="kept")["memory_id"]
        assert orchestrator.process is not None
        for _ in range(times - 1):
            orchestrator.process.terminate()
        stopped_in_time(orchestrator)
        assert "Traceback" not in orchestrator.errors()
        orchestrator.restart()
        assert orchestrator.ask("get_memory", memory_id=memory_id)["memory"]["content"] == "kept"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_start_that_has_only_just_begun_can_be_ended(tmp_path: Path, sent: signal.Signals) -> None:
    with running_orchestrator(tmp_path, start=False) as orchestrator:
        process = orchestrator.process = orchestrator.launch()
        wait_until(lambda: can_connect(orchestrator.port), "it has its port, and imports what it needs")
        process.send_signal(sent)
        assert process.wait(30.0) == 0
        assert "Traceback" not in orchestrator.errors()
        orchestrator.restart()


def can_connect(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_a_killed_orchestrator_starts_again_with_what_it_acknowledged(orchestrator: Orchestrator) -> None:
    ids = [orchestrator.ask("add_memory", content=f"{number}")["memory_id"] for number in range(20)]
    sequence = orchestrator.ask("get_commit_seq")["commit_seq"]
    orchestrator.kill()
    orchestrator.restart()
    assert orchestrator.ask("batch_get_memories", memory_ids=ids)["missing"] == []
    assert orchestrator.ask("get_commit_seq")["commit_seq"] == sequence
    assert orchestrator.ask("search_memory", query="7")["count"] == 1


# -- starting ---------------------------------------------------------------------------------------------------


def ended(process: subprocess.Popen[str], timeout_s: float = 45.0) -> tuple[int, str]:
    """The exit status and the one line that it left on stderr."""
    try:
        _, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    return process.returncode, lines[0]


def test_a_second_instance_on_the_same_port_names_the_port(orchestrator: Orchestrator, tmp_path: Path) -> None:
    orchestrator.environ["MEMORY__STORAGE__PATH"] = str(tmp_path / "other.db")
    status, line = ended(orchestrator.launch())
    assert status == 1
    assert f":{orchestrator.port}" in line
    assert "network.port" in line
    assert list(tmp_path.glob("other.db*")) == []
    assert orchestrator.ask("health_check")["pid"] == orchestrator.pid


def test_a_second_instance_on_the_same_store_names_the_lock(orchestrator: Orchestrator) -> None:
    orchestrator.environ["MEMORY__NETWORK__PORT"] = str(free_port())
    status, line = ended(orchestrator.launch())
    assert status == 1
    assert str(orchestrator.database) in line
    assert f"pid {orchestrator.pid}" in line
    assert orchestrator.ask("add_memory", content="the first goes on")["status"] == "success"


@pytest.mark.parametrize(
    ("overrides", "status", "parts"),
    [
        ({"network__prot": "1"}, 2, ["NETWORK__PROT", "NETWORK__PORT"]),
        ({"network__port": "x"}, 2, ["network.port"]),
        ({"network__port": "70000"}, 2, ["network.port"]),
        ({"embedding__provider": "none"}, 2, ["embedding.provider", "stub"]),
        ({"limits__max_in_flight": "1", "limits__max_in_flight_per_client": "2"}, 2, ["max_in_flight_per_client"]),
        ({"network__bind": "0.0.0.0"}, 2, ["network.bind", "security.allow_insecure"]),
        ({"network__bind": "0.0.0.0", "security__allow_insecure": "true"}, 2, ["security.insecure_peers"]),
        ({"network__bind": "192.0.2.1", "security__allow_insecure": "true", "security__insecure_peers": "[10.0.0.0/8]"},
         1, ["192.0.2.1"]),
        ({"security__insecure_peers": "[10.0.0.1/8]"}, 2, ["security.insecure_peers"]),
    ],
)  # fmt: skip
def test_what_it_cannot_start_with_is_one_line(
    tmp_path: Path, overrides: dict[str, str], status: int, parts: list[str]
) -> None:
    values = {"network__port": free_port(), **overrides}
    port = values["network__port"]
    with running_orchestrator(tmp_path, start=False) as orchestrator:
        orchestrator.environ |= {f"MEMORY__{name.upper()}": str(value) for name, value in values.items()}
        code, line = ended(orchestrator.launch())
    assert (code, [part for part in parts if part not in line]) == (status, []), (port, line)


def test_stores_that_cannot_be_opened_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "garbage.db").write_bytes(b"no database " * 1000)
    (tmp_path / "folder.db").mkdir()
    for path in (
        tmp_path / "file" / "memory.db",
        tmp_path / "garbage.db",
        tmp_path / "folder.db",
        Path("/proc/x/memory.db"),
    ):
        with running_orchestrator(tmp_path, start=False, storage__path=path) as orchestrator:
            status, line = ended(orchestrator.launch())
            assert status == 1
            assert str(path.parent) in line, line


def test_a_newer_store_is_refused(orchestrator: Orchestrator, tmp_path: Path) -> None:
    assert orchestrator.terminate() == 0
    with contextlib.closing(sqlite3.connect(orchestrator.database)) as db:
        db.execute("PRAGMA user_version = 999")
    before = shutil.copy(orchestrator.database, tmp_path / "before.db")
    status, line = ended(orchestrator.launch())
    assert status == 1
    assert "999" in line
    assert orchestrator.database.read_bytes() == Path(before).read_bytes()


def test_named_peers_may_come_in_when_it_binds_to_all_addresses(tmp_path: Path) -> None:
    security = {"security__allow_insecure": "true", "security__insecure_peers": "[10.99.0.0/16]"}
    with running_orchestrator(tmp_path, network__bind="0.0.0.0", **security) as orchestrator:
        for _ in range(3):
            assert orchestrator.ask("add_memory", content="from loopback")["status"] == "success"


def test_peers_that_are_not_named_are_refused_in_words() -> None:
    """The decision alone: the tests send nothing to other addresses than loopback."""

    class Outcomes(list[str | None]):
        def handle(self, body: bytes, reply: object, peer: bytes, sender: Sender) -> None:
            self.append(sender.address)

        def refuse(self, body: bytes, error: MemorySystemError) -> bytes:
            self.append(error.message)
            return b""

    async def objections() -> list[str | None]:
        security = SecuritySettings(allow_insecure=True, insecure_peers=("198.51.100.0/24",))
        service = Service(replace(Settings(), network=NetworkSettings(bind="0.0.0.0"), security=security))
        outcomes = service.server._answerer = Outcomes()
        service.runtime = SimpleNamespace(guard=Guard())
        try:
            for address in ("127.0.0.1", "198.51.100.7", "203.0.113.9"):
                service.server.router._deliver([b"peer", b"", b"body"], Sender(address, None))
            return outcomes
        finally:
            service.server.close()

    loopback, named, stranger = asyncio.run(objections())
    assert (loopback, named) == ("127.0.0.1", "198.51.100.7")
    assert stranger is not None and "203.0.113.9" in stranger and "security.insecure_peers" in stranger


def test_requests_in_flight_are_bounded_in_number_and_bytes() -> None:
    limits = Settings().limits
    admission = Admission(limits)
    for requests, mb in ((limits.max_in_flight_per_client, 0.0), (1, limits.max_in_flight_mb_per_client)):
        load = admission.by_peer[b"a"] = Load()
        load.requests, load.size = requests, int(mb * 2**20)
        assert isinstance(admission.objection(b"a"), Busy)
        assert admission.objection(b"b") is None
    for requests, mb in ((limits.max_in_flight, 0.0), (1, limits.max_in_flight_mb)):
        assert not admission.is_full()
        admission.total.requests, admission.total.size = requests, int(mb * 2**20)
        assert admission.is_full()
        admission.total = Load()
    admission.draining = True
    assert isinstance(admission.objection(b"b"), ShuttingDown)


def test_the_socket_has_the_options_that_a_hostile_network_needs() -> None:
    async def options() -> dict[str, int]:
        service = Service(replace(Settings(), network=NetworkSettings(port=free_port())))
        try:
            service.server.bind()
            return {name: service.server.router._socket.getsockopt(getattr(zmq, name)) for name in expected}
        finally:
            service.server.close()

    expected = {
        "MAXMSGSIZE": 16 * 2**20,
        "RCVHWM": 128,
        "SNDHWM": 128,
        "HANDSHAKE_IVL": 3000,
        "HEARTBEAT_IVL": 10_000,
        "HEARTBEAT_TIMEOUT": 20_000,
        "HEARTBEAT_TTL": 30_000,
        "TCP_KEEPALIVE": 1,
        "TCP_KEEPALIVE_IDLE": 60,
        "TCP_KEEPALIVE_INTVL": 15,
        "TCP_KEEPALIVE_CNT": 4,
        "BACKLOG": 1024,
        "LINGER": 500,
    }
    assert asyncio.run(options()) == expected


def test_it_serves_before_its_model_is_loaded(tmp_path: Path) -> None:
    model = {"embedding__provider": "sentence-transformers", "embedding__threads": 1}
    with running_orchestrator(tmp_path, start=False, **model) as orchestrator:
        orchestrator.start(wait=False)
        worker = embedding_worker(orchestrator)
        os.kill(worker, signal.SIGSTOP)  # it loads the model when all else has been looked at
        orchestrator.wait_ready()
        health = orchestrator.ask("health_check")
        assert (health["state"], health["readiness"]["embedding"]) == ("starting", "loading")
        memory_id = orchestrator.ask("add_memory", content="Ada went to a painting class")["memory_id"]
        assert orchestrator.ask("get_memory", memory_id=memory_id)["memory"]["version"] == 1
        assert orchestrator.ask("search_memory", query="painting")["count"] == 1
        early = orchestrator.ask("semantic_search", query="painting")
        assert (early["degraded"], early["results"][0]["memory_id"]) == (True, memory_id)
        os.kill(worker, signal.SIGCONT)
        wait_until(lambda: orchestrator.ask("health_check")["state"] == "healthy", "the model", 90.0)
        wait_until(lambda: orchestrator.ask("stats")["pending"] == 0, "the vector")
        late = orchestrator.ask("semantic_search", query="an art lesson", mode="dense")
        assert (late["degraded"], late["results"][0]["memory_id"]) == (False, memory_id)
        assert late["results"][0]["similarity"] > 0.3
        assert orchestrator.terminate() == 0


def test_no_process_is_left_when_it_is_killed(tmp_path: Path) -> None:
    model = {"embedding__provider": "sentence-transformers", "embedding__threads": 1}
    with running_orchestrator(tmp_path, start=False, **model) as orchestrator:
        orchestrator.start()
        worker = embedding_worker(orchestrator)
        orchestrator.kill()
        wait_until(lambda: not running(worker), "the end of the worker")


def embedding_worker(orchestrator: Orchestrator) -> int:
    """Its pid, as soon as it is a program of its own: stopped before its exec, it would hold the service up as well."""
    children = Path(f"/proc/{orchestrator.pid}/task/{orchestrator.pid}/children")

    def executed() -> list[int]:
        # Empty for a moment after its own exec, and then that of a child that is still the same program would differ.
        service = Path(f"/proc/{orchestrator.pid}/cmdline").read_bytes()
        pids = [int(pid) for pid in children.read_text().split()]
        return [pid for pid in pids if service and Path(f"/proc/{pid}/cmdline").read_bytes() not in {service, b""}]

    wait_until(lambda: bool(executed()), "the embedding worker")
    return executed()[0]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

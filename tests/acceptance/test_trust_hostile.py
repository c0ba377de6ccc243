"""Peers that mean harm, against the real programs: each lives, keeps its memory, and serves whoever is polite.

`make torture` has the long versions (tests/torture/hostile.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zmq

from memory_client import MemoryClient
from tests.support import hostile
from tests.support.agents import Agent, running_agent
from tests.support.bulk import BulkClient, bulk_clients
from tests.support.flood import flood
from tests.support.mesh import tell
from tests.support.mutations import Mutations, described_requests, send_all
from tests.support.polite import Polite
from tests.support.process import PROJECT, do_wrong, free_port, running_orchestrator, wait_until
from tests.support.wire import encode, envelope

SEED = random.SystemRandom().randrange(1, 2**32)
MUTATED = 600
AGENTS = ("knowledge_base", "session_memory", "context_manager")
BOUND_MB = 64.0
# Beside the bound: what one tick of the guard lets through, and what the program itself takes at work.
OVER_MB = 250.0
# Honest clients whose requests have more bytes than attackers need; with room for what the program takes to do them.
BULK_CLIENTS = 3
BULK_MIB = 6.0
BULK_BOUND_MB = 384.0

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]


def logged(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for file in folder.glob("logs/*.log") for line in file.read_text().splitlines()]
    return [line for line in lines if line.get("event") == event]


# -- mutated requests and bytes ---------------------------------------------------------------------------------------


def test_the_agents_answer_each_mutated_request_once_and_survive_garbage(tmp_path: Path) -> None:
    tell(f"seed {SEED}")
    with running_orchestrator(tmp_path) as orchestrator, contextlib.ExitStack() as stack:
        session_id = orchestrator.ask("create_session", user_id="ada")["session_id"]
        memory_id = orchestrator.ask("add_memory", content="of the store")["memory_id"]
        ids = {"session_id": session_id, "memory_id": memory_id, "fact_id": memory_id, "related_id": memory_id}
        for name in AGENTS:
            agent = stack.enter_context(running_agent(tmp_path, name, orchestrator.address))
            survives(agent, described_requests(agent.ask("describe")["actions"], **ids))


def test_the_health_manager_answers_each_mutated_request_once_and_survives_garbage(tmp_path: Path) -> None:
    tell(f"seed {SEED}")
    ports = {f"health__{name}port": free_port() for name in ("", "publish_", "mesh_", "report_")}
    settings = {**ports, "error_bus__enabled": True, "error_bus__history_path": tmp_path / "health.db"}
    around = {"v": 1, "request_id": "0123456789abcdef", "agent_id": "fuzz"}
    questions: list[tuple[str, dict[str, Any]]] = [
        ("get_health", {}),
        ("health_check", {}),
        ("get_errors", {"limit": 5, "since_seq": 1, "severity": "error", "agent": "a", "since": 1.7e9}),
    ]
    corpus = [{**around, "action": action, "data": data} for action, data in questions]
    with running_agent(
        tmp_path, PROJECT / "system_health_manager.py", "tcp://127.0.0.1:1", port=ports["health__port"], **settings
    ) as manager:
        survives(manager, corpus)
        for port in ports.values():
            hostile.throw(port, random.Random(SEED), 40)
        send_reports(ports["health__report_port"], MUTATED)
        assert manager.ask("health_check")["pid"] == manager.pid


def survives(program: Agent, corpus: list[dict[str, Any]]) -> None:
    pid = program.pid
    before_mb = resident_mb(pid)
    with program.peer(dealer=True) as peer:
        outcomes = send_all(peer.socket, iter(Mutations(SEED, corpus)), MUTATED, SEED)
    hostile.throw(program.port, random.Random(SEED), 40)
    assert outcomes["internal_error"] == 0, (SEED, program.output())
    assert outcomes["success"] > 8, (SEED, outcomes)
    assert program.ask("health_check")["pid"] == pid
    assert resident_mb(pid) - before_mb < 100


def send_reports(port: int, count: int) -> None:
    """Mutated batches of events to the reporters' port: each gets one answer, and one that is right an acknowledgement.

    Heartbeats have no answer and are not among them.
    """
    event = {"error_type": "disk", "message": "full", "severity": "error", "timestamp": 1.7e9, "details": {"a": 1}}
    batch = {"v": 1, "kind": "events", "batch": 7, "component": "fuzz", "events": [{**event, "event_id": "e" * 32}]}
    messages = iter(Mutations(SEED, [batch]))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"tcp://127.0.0.1:{port}")
        sent = received = 0
        while received < count:
            while sent < count and sent - received < 32:
                frames = next(messages)
                if len(frames) == 2 and not frames[0]:
                    socket.send_multipart(frames)
                    sent += 1
            assert socket.poll(20_000), f"seed {SEED}: {sent - received} of {sent} reports unanswered"
            socket.recv_multipart()
            received += 1
        assert not socket.poll(300), f"seed {SEED}: more answers than reports"
    context.destroy(linger=0)


def test_garbage_of_every_kind_leaves_the_service_unharmed(tmp_path: Path) -> None:
    tell(f"seed {SEED}")
    rng = random.Random(SEED)
    with running_orchestrator(tmp_path) as orchestrator, Polite(orchestrator) as polite:
        before_mb = orchestrator.resident_mb()
        for _ in range(5):
            hostile.throw(orchestrator.port, rng, 60)
            polite.round()
        assert orchestrator.resident_mb() - before_mb < 50
        wait_until(lambda: orchestrator.ask("health_check")["open_files"] < 80, "all are gone", 20)


def test_a_frame_that_announces_gigabytes_gets_no_memory(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path) as orchestrator, Polite(orchestrator) as polite:
        before_kb = virtual_kb(orchestrator.pid)
        for announced in (8 * 2**30, 2**63 - 1, 2**64 - 1):
            with hostile.shake_hands(orchestrator.port) as sock:
                sock.sendall(hostile.frame(b"", hostile.MORE) + hostile.frame(b"x" * 1000, announced=announced))
                assert closed_within(sock, 10.0)
                assert virtual_kb(orchestrator.pid) - before_kb < 2 * 2**20
        polite.round()


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def virtual_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmSize:")[2].split()[0])


def closed_within(sock: Any, timeout_s: float) -> bool:
    """Whether the other side closes."""
    sock.settimeout(timeout_s)
    try:
        while sock.recv(65_536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


# -- the honest -------------------------------------------------------------------------------------------------------


def test_busy_clients_are_not_cut_while_the_service_grows(tmp_path: Path) -> None:
    """Now and then each has a large request on its way; and what they store makes memory grow until the guard looks."""
    bound_mb = 32.0
    settings = {"limits__connection_memory_mb": bound_mb, "embedding__provider": "off"}
    with running_orchestrator(tmp_path, **settings) as orchestrator:
        before_mb = orchestrator.resident_mb()
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(bulk_load, orchestrator.address, number) for number in range(4)]:
                done.result()
        assert orchestrator.resident_mb() - before_mb > bound_mb / 2, "the guard had nothing to look at"
        assert not logged(tmp_path, "connections_cut")


def bulk_load(address: str, number: int) -> None:
    with MemoryClient(address, namespace=f"home/{number}", timeout_ms=90_000, raise_on_error=True) as client:
        for batch in range(6):
            text = " ".join(f"word{number}x{batch}x{each}" for each in range(200))
            client.batch_add_memories([{"content": f"{each} {text}"} for each in range(300)])
            time.sleep(0.2)


@pytest.mark.parametrize("part", [b"", b"x" * 1_000_000], ids=["empty parts", "1 MB"])
def test_bulk_clients_are_not_cut_beside_messages_without_an_end(tmp_path: Path, part: bytes) -> None:
    with beside_attackers(tmp_path, part) as (clients, attackers):
        wait_until(lambda: attackers.cut >= 8 or any(each.cut for each in clients), "attackers are cut off", 60)
        done = [each.done for each in clients]
        wait_until(
            lambda: all(each.done > before + 1 or each.cut for each, before in zip(clients, done, strict=True)),
            "they go on",
            60,
        )
    assert [each.cut for each in clients] == [0] * BULK_CLIENTS
    assert logged(tmp_path, "connections_cut")


def test_bulk_clients_are_cut_by_a_guard_that_goes_by_bytes(tmp_path: Path) -> None:
    """The control: what they have on its way is more than attackers need."""
    with beside_attackers(tmp_path, b"", wrong="largest_first") as (clients, _):
        wait_until(lambda: any(each.cut for each in clients), "an honest one is cut", 90)


@contextlib.contextmanager
def beside_attackers(
    folder: Path, part: bytes, wrong: str = ""
) -> Iterator[tuple[list[BulkClient], hostile.Attackers]]:
    """Clients with large requests, and peers that each send a message without an end."""
    settings = {"limits__connection_memory_mb": BULK_BOUND_MB, "embedding__provider": "off"}
    with running_orchestrator(folder, start=False, **settings) as orchestrator:
        if wrong:
            do_wrong(orchestrator, wrong)
        orchestrator.start()
        with bulk_clients(orchestrator, BULK_CLIENTS, BULK_MIB) as clients:
            wait_until(lambda: all(each.done for each in clients), "each has sent a request that ended", 60)
            with hostile.Attackers(orchestrator.port, part, 4) as attackers:
                yield clients, attackers


# -- messages without an end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [b"", b"x" * 1_000_000], ids=["empty parts", "1 MB"])
def test_messages_without_an_end_are_cut_off(tmp_path: Path, part: bytes) -> None:
    with (
        running_orchestrator(tmp_path, limits__connection_memory_mb=BOUND_MB) as orchestrator,
        Polite(orchestrator) as polite,
    ):
        before_mb = largest_mb = orchestrator.resident_mb()
        with hostile.Attackers(orchestrator.port, part, 4) as attackers:
            deadline_s = time.monotonic() + 60
            while attackers.cut < 6:
                polite.round()
                largest_mb = max(largest_mb, orchestrator.resident_mb())
                assert time.monotonic() < deadline_s, f"{attackers.cut} were cut off"
        assert largest_mb - before_mb < BOUND_MB + OVER_MB
        assert logged(tmp_path, "connections_cut")
        wait_until(lambda: orchestrator.resident_mb() - before_mb < BOUND_MB, "the memory is given back", 20)
        polite.round()


def test_without_the_guard_such_messages_take_all_memory(tmp_path: Path) -> None:
    """The control: what the guard prevents does happen."""
    with running_orchestrator(tmp_path, limits__connection_memory_mb=0) as orchestrator:
        before_mb = orchestrator.resident_mb()
        with hostile.Attackers(orchestrator.port, b"x" * 1000, 4) as attackers:
            wait_until(lambda: orchestrator.resident_mb() - before_mb > BOUND_MB + OVER_MB, "memory is taken", 60)
        assert attackers.cut == 0


def test_a_message_of_a_million_parts_is_answered_once_and_holds_nobody_up(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path) as orchestrator, Polite(orchestrator) as polite:
        with hostile.shake_hands(orchestrator.port) as sock:
            sock.settimeout(60)
            sock.sendall(hostile.frame(b"", hostile.MORE) * 1_000_000 + hostile.frame(b"the last"))
            polite.round()
            got = b""
            while b"invalid_request" not in got:
                got += sock.recv(4096)
        assert got.count(b"invalid_request") == 1
        polite.round()


def test_a_client_that_does_not_read_large_replies_is_cut_off(tmp_path: Path) -> None:
    with (
        running_orchestrator(tmp_path, limits__connection_memory_mb=BOUND_MB) as orchestrator,
        Polite(orchestrator) as polite,
    ):
        polite.client.batch_add_memories([{"content": f"{number} " + "x" * 30_000} for number in range(200)])
        before_mb = largest_mb = orchestrator.resident_mb()
        with orchestrator.peer(dealer=True, RCVHWM=1, RCVBUF=4096) as deaf:
            deadline_s = time.monotonic() + 60
            while not logged(tmp_path, "connections_cut"):
                assert time.monotonic() < deadline_s, "it was not cut off"
                for body in large_reads():
                    deaf.socket.send_multipart([b"", body])
                    polite.round()
                largest_mb = max(largest_mb, orchestrator.resident_mb())
        assert largest_mb - before_mb < BOUND_MB + OVER_MB


def large_reads() -> list[bytes]:
    request = envelope("list_memories", {"limit": 200}, namespace="polite")
    return [encode(request, "msgpack")] * 4


# -- floods -----------------------------------------------------------------------------------------------------------


def test_a_flood_by_clients_that_do_not_read_starves_nobody(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path) as orchestrator, Polite(orchestrator) as polite:
        before_mb = orchestrator.resident_mb()
        with flood(orchestrator.address):
            wait_until(lambda: orchestrator.ask("health_check", timeout_s=20)["busy_replies"] > 0, "busy is said", 30)
            for _ in range(20):
                polite.round()
            health = orchestrator.ask("health_check", timeout_s=20)
        assert health["busy_replies"] > 0
        assert orchestrator.resident_mb() - before_mb < 512
        wait_until(lambda: orchestrator.ask("health_check")["in_flight"] == 0, "what was accepted is done", 30)
        polite.round()


def test_silent_connections_are_closed_and_cost_nobody_anything(tmp_path: Path) -> None:
    with (
        running_orchestrator(tmp_path, network__handshake_s=1.0) as orchestrator,
        Polite(orchestrator) as polite,
        hostile.silent(orchestrator.port, 300) as socks,
    ):
        assert len(socks) == 300
        polite.round()
        assert orchestrator.ask("health_check")["open_files"] > 0
        assert all(closed_within(sock, 15.0) for sock in socks)
        wait_until(lambda: orchestrator.ask("health_check")["open_files"] < 80, "their files are closed", 15)
        polite.round()


def test_at_the_limit_of_files_those_who_are_in_are_served(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path, start=False, network__handshake_s=1.0) as orchestrator:
        orchestrator.files = 200
        orchestrator.start()
        assert logged(tmp_path, "few_files"), "no warning at the start"
        with Polite(orchestrator) as polite:
            crowd = [hostile.shake_hands(orchestrator.port) for _ in range(100)]
            with contextlib.ExitStack() as stack, hostile.silent(orchestrator.port, 300):
                for sock in crowd:
                    stack.enter_context(sock)
                wait_until(lambda: bool(logged(tmp_path, "few_files_left")), "a warning before the last file", 15)
                for _ in range(10):
                    polite.round()
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: orchestrator.ask("health_check", timeout_s=2)["open_files"] < 100, "recovery", 20)
            assert orchestrator.ask("health_check")["open_files"] < 100
            polite.round()

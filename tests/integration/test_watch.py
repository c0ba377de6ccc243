"""The watch over a real supervisord that runs small programs, which die, hang, are slow and stop as they are told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from memory_system.deployment import Address
from memory_system.health.memory import Memory, decode, encode
from memory_system.health.states import State
from memory_system.health.supervisor import Supervisor, SupervisorUnavailable
from memory_system.health.watch import Watch
from memory_system.health_settings import HealthSettings
from tests.support.process import free_port, wait_until

# What takes 10 s and more with the settings that the programs come with.
QUICK = HealthSettings(check_s=0.5, supervisor_s=0.2, hang_s=3.0, slow_ms=600.0, steady_s=1.0, heal_backoff_s=2.0)
# What a machine with too much to do turns to slow, or to hang, is neither.
PATIENT = replace(QUICK, hang_s=60.0, slow_ms=30_000.0)
OWN = "health_manager"

PROGRAM = """
import json, os, sys, time, zmq

port, mode_file, started = int(sys.argv[1]), sys.argv[2], time.monotonic()
router = zmq.Context().socket(zmq.ROUTER)
router.bind(f"tcp://127.0.0.1:{port}")
asked = 0

def mode():
    try:
        return open(mode_file).read().split()
    except FileNotFoundError:
        return ["serve"]

while True:
    if mode()[0] == "die":
        sys.exit(3)
    if not router.poll(20):
        continue
    *route, body = router.recv_multipart()
    asked += 1
    while mode()[0] == "hang":
        time.sleep(0.02)
    how, *rest = mode()
    if how == "slow":
        time.sleep(float(rest[0]))
    state = {"drain": "stopping", "degraded": "degraded"}.get(how, "healthy")
    reply = {"status": "success", "state": state, "pid": os.getpid(), "asked": asked,
             "uptime_s": time.monotonic() - started, "readiness": {"store": "ready"}}
    import msgpack
    reply["request_id"] = msgpack.unpackb(body)["request_id"]
    router.send_multipart([*route, msgpack.packb(reply)])
    while mode()[0] == "drain":
        time.sleep(0.02)  # busy with its end, and answers nobody
"""

SUPERVISORD = """
[supervisord]
nodaemon=true
directory={folder}
logfile={folder}/supervisord.log
pidfile={folder}/supervisord.pid
[unix_http_server]
file={socket}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""

ONE = """
[program:{name}]
command="{python}" {folder}/program.py {port} {folder}/{name}.mode
autorestart=unexpected
exitcodes=2
startsecs=0
stopwaitsecs=1
stdout_logfile={folder}/{name}.log
redirect_stderr=true
"""


class Host:
    """A supervisord with some of these programs."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        self.addresses = {name: Address("network", "127.0.0.1", free_port()) for name in names}
        self.socket = folder / "s.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        (self.folder / "program.py").write_text(PROGRAM)
        config = SUPERVISORD.format(folder=self.folder, socket=self.socket)
        for name, address in self.addresses.items():
            config += ONE.format(name=name, python=sys.executable, folder=self.folder, port=address.port)
        path = self.folder / "supervisord.conf"
        path.write_text(config)
        user = ["-u", "root"] if os.getuid() == 0 else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(path), *user],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._listens, "supervisord listens")

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.connect(str(self.socket))
            return True
        return False

    def tell(self, name: str, mode: str) -> None:
        path = self.folder / f"{name}.mode"
        path.with_suffix(".new").write_text(mode)
        path.with_suffix(".new").rename(path)

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGSTOP)  # so that it starts none anew
        parent = self.process.pid
        for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        self.process.kill()
        self.process.wait(30)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path, "alpha", "beta")
    host.start()
    yield host
    host.stop()


@dataclass
class Watching:
    """A watch that runs, and what it told."""

    watch: Watch
    told: list[tuple[float, str, State, dict[str, Any]]] = field(default_factory=list)
    reports: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def entry(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self.watch.picture() if entry["component"] == name)

    def states(self, name: str, since_s: float = 0.0) -> list[str]:
        return [state.state for at_s, who, state, _ in self.told if who == name and at_s >= since_s]

    async def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 45.0) -> float:
        """Wait for the condition; returns the seconds that it took."""
        start_s = time.monotonic()
        while not condition():
            assert time.monotonic() < start_s + timeout_s, (
                f"not within {timeout_s} s: {what}; {self.watch}, {self.told}"
            )
            await asyncio.sleep(0.02)
        return time.monotonic() - start_s

    async def until_state(self, name: str, state: str, timeout_s: float = 45.0) -> float:
        return await self.until(lambda: self.entry(name)["state"] == state, f"{name} is {state}", timeout_s)

    async def until_told(self, name: str, state: str, since_s: float, timeout_s: float = 45.0) -> float:
        return await self.until(lambda: state in self.states(name, since_s), f"{name} told {state}", timeout_s)


@contextlib.asynccontextmanager
async def watching(
    addresses: Mapping[str, Address],
    supervisor: Supervisor | None,
    rules: HealthSettings = QUICK,
    memories: Mapping[str, Memory] | None = None,
) -> AsyncIterator[Watching]:
    def on_change(name: str, state: State, entry: dict[str, Any]) -> None:
        seen.told.append((time.monotonic(), name, state, entry))

    def report(error_type: str, message: str, severity: str, details: Mapping[str, Any]) -> None:
        seen.reports.append((error_type, severity, dict(details)))

    own = (OWN, lambda: {"state": "healthy", "events": 7})
    forgotten: list[str] = []
    watch = Watch(rules, addresses, supervisor, own=own, on_change=on_change, report=report, on_forget=forgotten.append)
    seen = Watching(watch, forgotten=forgotten)
    watch.start(memories)
    try:
        yield seen
    finally:
        await watch.close()


@contextlib.asynccontextmanager
async def watched(
    host: Host, rules: HealthSettings = QUICK, memories: Mapping[str, Memory] | None = None
) -> AsyncIterator[Watching]:
    """Both programs of the host are healthy, and watched."""
    async with watching(host.addresses, Supervisor(str(host.socket)), rules, memories) as seen:
        for name in host.addresses:
            await seen.until_state(name, "healthy")
        await seen.until(lambda: seen.entry("alpha")["uptime_s"] is not None, "supervisor has told of it")
        yield seen


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_a_healthy_host(host: Host) -> None:
    async def scenario() -> None:
        async with watched(host) as seen:
            assert [entry["component"] for entry in seen.watch.picture()] == ["alpha", "beta", OWN, "supervisor"]
            assert {entry["state"] for entry in seen.watch.picture()} == {"healthy"}
            assert seen.states("alpha") == ["starting", "healthy"]
            entry = seen.entry("alpha")
            assert entry["address"] == host.addresses["alpha"].shown
            assert entry["readiness"] == {"store": "ready"}
            assert 0.0 <= entry["latency_ms"] < 10_000.0
            assert abs(entry["since"] - time.time()) < 30.0
            assert (entry["deaths"], entry["kills"], entry["left_alone"]) == (0, 0, False)
            assert seen.entry(OWN)["figures"] == {"events": 7}
            assert seen.entry(OWN)["pid"] == os.getpid()

    run(scenario())


def test_a_restart_of_the_manager_is_no_change_of_what_it_watches(host: Host) -> None:
    """Of what lived on, the same `since`; what was started again meanwhile came into its state later."""
    beat = {"component": "agent_7", "state": "healthy", "pid": 4}
    names = ("alpha", "beta", "supervisor", "agent_7")

    async def scenario() -> None:
        async with watched(host, PATIENT) as seen:
            seen.watch.heartbeat(beat, "")
            await seen.until_state("supervisor", "healthy")
            first = {name: seen.entry(name) for name in names}
            memories = decode(encode(seen.watch.memories(), time.time()), time.time())
        os.kill(first["beta"]["pid"], signal.SIGKILL)
        between_at = time.time()
        async with watched(host, PATIENT, memories) as seen:
            seen.watch.heartbeat(beat, "")
            await seen.until_state("supervisor", "healthy")
            again = {name: seen.entry(name) for name in names}
            assert {entry["state"] for entry in again.values()} == {"healthy"}
            assert again["beta"]["since"] >= between_at > first["beta"]["since"]
            kept = [name for name in names if again[name]["since"] == first[name]["since"]]
            assert kept == ["alpha", "supervisor", "agent_7"]

    run(scenario())


def test_a_change_after_the_restart_of_the_manager_is_one(host: Host) -> None:
    async def scenario() -> None:
        async with watched(host, PATIENT) as seen:
            memories = seen.watch.memories()
        async with watched(host, PATIENT, memories) as seen:
            before = seen.entry("alpha")
            began_at = time.time()
            os.kill(before["pid"], signal.SIGKILL)
            await seen.until(lambda: seen.entry("alpha")["deaths"] == 1, "alpha died")
            await seen.until_state("alpha", "healthy")
            assert seen.entry("alpha")["since"] >= began_at > before["since"]

    run(scenario())


def test_a_killed_program_is_told_as_down_within_3_s_though_it_is_back_at_once(host: Host) -> None:
    async def scenario() -> None:
        async with watched(host, HealthSettings()) as seen:
            took_s = []
            for _ in range(3):
                pid, since_s = seen.entry("alpha")["pid"], time.monotonic()
                os.kill(pid, signal.SIGKILL)
                took_s.append(await seen.until_told("alpha", "down", since_s))
                await seen.until_told("alpha", "healthy", since_s)
                assert seen.states("alpha", since_s) == ["down", "starting", "healthy"]
                assert seen.entry("alpha")["pid"] not in (None, pid)
            assert sorted(took_s)[1] < 3.0, "other work on the machine may hold up one of them"
            assert seen.entry("alpha")["deaths"] == 3
            assert seen.states("beta") == ["starting", "healthy"]
            assert seen.reports == []

    run(scenario())


@pytest.mark.slow
def test_a_stopped_process_is_noticed_within_15_s_and_healed_within_30(host: Host) -> None:
    async def scenario() -> None:
        async with watched(host, HealthSettings()) as seen:
            pid, since_s = seen.entry("alpha")["pid"], time.monotonic()
            os.kill(pid, signal.SIGSTOP)
            assert await seen.until_told("alpha", "down", since_s, 15.0) < 15.0
            await seen.until_told("alpha", "healthy", since_s, 30.0 - (time.monotonic() - since_s))
            assert seen.entry("alpha")["pid"] != pid
            details = {"component": "alpha", "pid": pid, "kills": 1}
            assert seen.reports == [("component_killed", "error", details)]
            assert seen.entry("alpha")["kills"] == 1
            assert seen.states("beta") == ["starting", "healthy"]

    run(scenario())


def test_a_hang_that_was_there_before_the_watch_is_healed_too(host: Host) -> None:
    async def scenario() -> None:
        await asyncio.sleep(2.0)
        pid = (await Supervisor(str(host.socket)).processes())["alpha"].pid
        os.kill(pid, signal.SIGSTOP)
        rules = HealthSettings(check_s=0.5, supervisor_s=0.2, hang_s=3.0, start_s=6.0)
        async with watching(host.addresses, Supervisor(str(host.socket)), rules) as seen:
            await seen.until_state("alpha", "healthy")
            assert seen.states("alpha") == ["starting", "down", "down", "starting", "healthy"]
            assert seen.entry("alpha")["kills"] == 1

    run(scenario())


def test_with_healing_off_a_hang_is_told_and_nothing_is_done(host: Host) -> None:
    async def scenario() -> None:
        rules = HealthSettings(check_s=0.5, supervisor_s=0.2, hang_s=2.0, heal=False)
        async with watched(host, rules) as seen:
            pid = seen.entry("alpha")["pid"]
            os.kill(pid, signal.SIGSTOP)
            await seen.until_state("alpha", "down")
            assert seen.entry("alpha")["cause"] == "hang"
            await asyncio.sleep(3.0)
            assert (seen.entry("alpha")["state"], seen.entry("alpha")["pid"]) == ("down", pid)
            assert seen.reports == []
            os.kill(pid, signal.SIGCONT)
            await seen.until_state("alpha", "healthy")
            assert seen.entry("alpha")["deaths"] == 0

    run(scenario())


def test_a_program_that_hangs_again_and_again_is_left_alone(host: Host) -> None:
    async def scenario() -> None:
        rules = HealthSettings(
            check_s=0.3, supervisor_s=0.2, hang_s=2.0, start_s=4.0, heal_limit=2, heal_backoff_s=0.5, flap_deaths=50
        )
        async with watched(host, rules) as seen:
            host.tell("alpha", "hang")
            await seen.until(lambda: seen.entry("alpha")["left_alone"], "it is left alone", 60.0)
            assert [report[:2] for report in seen.reports] == [
                ("component_killed", "error"),
                ("component_killed", "error"),
                ("component_left_alone", "critical"),
            ]
            assert seen.entry("alpha")["reason"].endswith("; left alone after 2 kills")
            await asyncio.sleep(2.0)
            assert seen.entry("alpha")["kills"] == 2
            host.tell("alpha", "serve")
            await seen.until_state("alpha", "healthy")
            assert not seen.entry("alpha")["left_alone"]

    run(scenario())


def test_a_slow_program_is_degraded_and_never_killed(host: Host) -> None:
    async def scenario() -> None:
        async with watched(host) as seen:
            pid = seen.entry("alpha")["pid"]
            host.tell("alpha", "slow 1.2")
            await seen.until_state("alpha", "degraded")
            await asyncio.sleep(3 * QUICK.hang_s)
            entry = seen.entry("alpha")
            assert (entry["state"], entry["cause"], entry["pid"]) == ("degraded", "slow", pid)
            assert 1000.0 < entry["latency_ms"] < 5000.0, "no queue of questions was built up"
            host.tell("alpha", "serve")
            await seen.until_state("alpha", "healthy")
            assert "down" not in seen.states("alpha")
            assert seen.reports == []

    run(scenario())


def test_a_program_that_stops_is_given_its_time(host: Host) -> None:
    async def scenario() -> None:
        async with watched(host) as seen:
            pid = seen.entry("alpha")["pid"]
            host.tell("alpha", "drain")
            await seen.until_state("alpha", "degraded")
            await asyncio.sleep(2 * QUICK.hang_s)
            assert (seen.entry("alpha")["cause"], seen.entry("alpha")["pid"]) == ("stopping", pid)
            host.tell("alpha", "serve")
            os.kill(pid, signal.SIGTERM)
            await seen.until_told("alpha", "down", 0.0)
            await seen.until_state("alpha", "healthy")
            assert (seen.entry("alpha")["deaths"], seen.reports) == (0, [])

    run(scenario())


def test_a_program_that_cannot_stay_up_is_flapping_and_left_to_supervisor(host: Host) -> None:
    async def scenario() -> None:
        rules = HealthSettings(check_s=0.3, supervisor_s=0.2, hang_s=2.0, flap_deaths=4, flap_quiet_s=2.0)
        async with watched(host, rules) as seen:
            host.tell("alpha", "die")
            await seen.until_state("alpha", "flapping")
            host.tell("alpha", "serve")
            await seen.until_state("alpha", "healthy")
            assert seen.states("alpha").count("down") == 3
            assert seen.reports == []

    run(scenario())


def test_the_end_of_supervisord_is_told_and_its_programs_are_watched_on(host: Host) -> None:
    async def scenario() -> None:
        async with watched(host) as seen:
            assert host.process is not None
            pids = [seen.entry(name)["pid"] for name in host.addresses]
            try:
                host.process.kill()
                host.process.wait(30)
                await seen.until_state("supervisor", "down")
                assert seen.entry("supervisor")["reason"] == "supervisord is gone: Connection refused"
                os.kill(pids[0], signal.SIGSTOP)
                await seen.until_state("alpha", "down")
                assert seen.entry("beta")["state"] == "healthy"
                assert seen.reports == [], "there is nobody who would start it again"
                os.kill(pids[0], signal.SIGCONT)
                await seen.until_state("alpha", "healthy")
                os.kill(pids[1], signal.SIGKILL)
                await seen.until_state("beta", "down")
            finally:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    run(scenario())


def test_a_stopped_supervisord_is_told_too(host: Host) -> None:
    async def scenario() -> None:
        async with watched(host) as seen:
            assert host.process is not None
            host.process.send_signal(signal.SIGSTOP)
            try:
                await seen.until_state("supervisor", "down")
                assert seen.entry("alpha")["state"] == "healthy"
            finally:
                host.process.send_signal(signal.SIGCONT)
            await seen.until_state("supervisor", "healthy")
            assert "down" not in seen.states("alpha")

    run(scenario())


def test_a_loop_that_was_held_up_blames_nobody(host: Host) -> None:
    async def scenario() -> None:
        async with watched(host) as seen:
            time.sleep(3 * QUICK.hang_s)  # noqa: ASYNC251
            await asyncio.sleep(0.5)
            assert seen.states("alpha") == ["starting", "healthy"]
            assert seen.reports == []

    run(scenario())


def test_without_supervisor_the_programs_are_asked_all_the_same() -> None:
    async def scenario() -> None:
        address = Address("network", "127.0.0.1", free_port())
        async with watching({"alpha": address}, None) as seen:
            await seen.until_state("alpha", "down")
            assert "supervisor" not in [entry["component"] for entry in seen.watch.picture()]
            with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
                router.bind(address.shown)
                reply = b'{"status": "error", "error_code": "busy"}'
                found = []
                while not found:
                    await asyncio.sleep(0.05)
                    if router.poll(0):
                        *route, _ = router.recv_multipart()
                        router.send_multipart([*route, reply])
                    found = [entry for entry in seen.watch.picture() if entry["state"] == "degraded"]
                assert found[0]["reason"] == "it says degraded: health_check busy"

    run(scenario())


def test_heartbeats_from_elsewhere_make_components(host: Host) -> None:
    async def scenario() -> None:
        async with watched(host) as seen:
            beat = {
                "component": "agent_7",
                "state": "healthy",
                "pid": 4,
                "interval_s": 0.3,
                "queue": 3,
                "data": [1] * 999,
            }
            assert seen.watch.heartbeat(beat, "10.0.0.7")
            entry = seen.entry("agent_7")
            assert (entry["state"], entry["address"], entry["figures"]) == ("healthy", "10.0.0.7", {"queue": 3})
            await seen.until_state("agent_7", "down")
            assert seen.entry("agent_7")["cause"] == "silent"
            for fields in ({}, {"component": 7}, {"component": "x" * 999}, {"component": "supervisor"}):
                assert not seen.watch.heartbeat(fields, "10.0.0.7")
            assert seen.watch.refused_heartbeats == 4

    run(scenario())


def test_who_is_silent_for_long_is_forgotten_and_that_is_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory_system.health.states.FORGET_S", 1.0)

    async def scenario() -> None:
        async with watched(host) as seen:
            assert seen.watch.heartbeat({"component": "agent_7", "state": "healthy", "interval_s": 0.2}, "10.0.0.7")
            await seen.until_state("agent_7", "down")
            await seen.until(lambda: seen.forgotten == ["agent_7"], "agent_7 is forgotten")
            assert "agent_7" not in [entry["component"] for entry in seen.watch.picture()]

    run(scenario())


def test_nobody_else_keeps_a_program_alive_that_hangs(host: Host) -> None:
    async def scenario() -> None:
        rules = HealthSettings(check_s=0.3, supervisor_s=0.2, hang_s=2.0, heal=False)
        async with watched(host, rules) as seen:
            pid = seen.entry("alpha")["pid"]
            os.kill(pid, signal.SIGSTOP)
            deadline_s = time.monotonic() + 15.0
            while seen.entry("alpha")["state"] != "down" and time.monotonic() < deadline_s:
                seen.watch.heartbeat({"component": "alpha", "state": "healthy", "pid": pid}, "10.0.0.7")
                seen.watch.heartbeat({"component": "alpha", "state": "healthy", "pid": pid + 1}, "127.0.0.1")
                seen.watch.heartbeat({"component": "alpha", "state": "healthy"}, "")
                await asyncio.sleep(0.1)
            assert seen.entry("alpha")["state"] == "down"
            seen.watch.heartbeat({"component": "alpha", "state": "healthy", "pid": pid}, "::ffff:127.0.0.1")
            assert seen.entry("alpha")["state"] == "degraded", "it lives, and does not answer"

    run(scenario())


def test_calls_to_supervisord(host: Host, tmp_path: Path) -> None:
    async def scenario() -> None:
        supervisor = Supervisor(str(host.socket))
        pid = (await supervisor.processes())["alpha"].pid
        assert not await supervisor.kill("alpha", pid + 1), "it is another process by now"
        assert await supervisor.kill("alpha", pid)
        with pytest.raises(SupervisorUnavailable, match="BAD_NAME"):
            await supervisor.kill("nobody", 1)
        with pytest.raises(SupervisorUnavailable) as caught:
            await Supervisor(str(tmp_path / "none.sock")).processes()
        assert caught.value.is_gone
        assert Supervisor.of_this_process({}) is None
        for name, value in (("SUPERVISOR_SERVER_URL", "unix:///a/s.sock"), ("MEMORY_SOCKET", "/a/s.sock")):
            found = Supervisor.of_this_process({name: value})
            assert found is not None
            assert found.path == "/a/s.sock"

    run(scenario())


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.0 200 OK\r\n\r\n<nonsense", b"x" * 2**21])
def test_what_is_not_supervisord_is_unavailable(tmp_path: Path, reply: bytes) -> None:
    async def scenario() -> None:
        async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                writer.write(reply)
                await writer.drain()
                writer.close()
                await writer.wait_closed()

        path = tmp_path / "s.sock"
        async with await asyncio.start_unix_server(answer, path):
            with pytest.raises(SupervisorUnavailable):
                await Supervisor(str(path), 1.0).processes()

    run(scenario())

"""The programs of host PC2 as an operator runs them: the real supervisord, orchestrator, scheduler, health
manager and agents.

with running_mesh(tmp_path) as mesh, mesh.subscriber() as bus:
    killed_s = mesh.kill9("orchestrator")
    bus.wait("HEALTH:", 3.0, component="orchestrator", state="down", after_s=killed_s)

`running_mesh(tmp_path, keys=True)` makes keys first: then everything here shows that of the operator, unless told
otherwise, and `mesh.make_key("planner", "writer", "home")` is the key of an agent.

`running_mesh(tmp_path, supervised=False)` runs the programs as processes of the test, so that a killed one stays
dead until the test starts it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import zmq
from supervision import RunDir

from memory_system.error_bus import ErrorReporter
from memory_system.events import ERROR_TOPIC
from memory_system.keys import KeyFile, apply_client
from memory_system.scheduler_settings import JobsSettings
from tests.support.bus import TOPICS, Row, Subscriber
from tests.support.keyring import KeyRing
from tests.support.process import PROJECT, free_port, wait_until
from tests.support.wire import environment

PROGRAMS = {
    "health_manager": "system_health_manager.py",
    "orchestrator": "orchestrator.py",
    "memory_scheduler": "memory_scheduler.py",
    "knowledge_base_agent": "agents/knowledge_base_agent.py",
    "session_memory_agent": "agents/session_memory_agent.py",
    "context_manager_agent": "agents/context_manager_agent.py",
}
JOBS = [name for name, _ in JobsSettings().items()]
PORTS = {
    "network__port": "orchestrator",
    "health__port": "health_manager",
    "scheduler__port": "memory_scheduler",
    "agents__knowledge_base__port": "knowledge_base_agent",
    "agents__session_memory__port": "session_memory_agent",
    "agents__context_manager__port": "context_manager_agent",
    "health__publish_port": "publish",
    "health__mesh_port": "mesh",
    "health__report_port": "report",
}
STOP_S = 40.0

Reply = dict[str, Any]


def tell(text: str) -> None:
    """A figure that was measured; pytest shows it with -rP."""
    print(f"measured: {text}")  # noqa: T201


class Mesh:
    """One deployment in a folder of its own. `supervised` or not, processes are found by their MEMORY_RUN_DIR."""

    def __init__(self, folder: Path, *, supervised: bool, keys: bool, overrides: dict[str, Any]) -> None:
        self.folder = folder
        self.supervised = supervised
        ports = {name: int(overrides.get(name, free_port())) for name in PORTS}
        self.endpoints = {PORTS[name]: f"tcp://127.0.0.1:{port}" for name, port in ports.items()}
        self.run_folder = folder / "run"
        self._ring = KeyRing(folder / "keys") if keys else None
        self.key = None if self._ring is None else self.make_key("operator", "admin", "*")
        bus = {"error_bus__enabled": True, "error_bus__history_path": folder / "health.db"}
        # A test of maintenance switches on the jobs that it wants.
        quiet = {f"scheduler__jobs__{job}__enabled": False for job in JOBS}
        settings = {**bus, **quiet, **overrides, **ports}
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")},
            **environment(folder, settings),
            "MEMORY_CONFIG": os.devnull,
            "MEMORY_RUN_DIR": str(self.run_folder),
        }
        self._run = RunDir(self.environ)
        self._context: zmq.Context[Any] = zmq.Context()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._owned = contextlib.ExitStack()

    def __repr__(self) -> str:
        return f"Mesh({self.folder}, {self.endpoints})"

    # -- processes ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything and return when each program answers and the health manager calls it healthy."""
        if self.supervised:
            done = self.pc2("start")
            assert done.returncode == 0, (done.stdout, done.stderr)
        else:
            for program in PROGRAMS:
                self.start_program(program)
        for program in PROGRAMS:
            self.wait_answer(program)
            self.wait_state(program, "healthy")

    def pc2(self, command: str) -> subprocess.CompletedProcess[str]:
        script = str(PROJECT / "scripts" / "pc2.py")
        return subprocess.run(
            [sys.executable, script, command],
            env=self.environ,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=180,
        )

    def start_program(self, program: str) -> None:
        """Without supervisor: start this program, which does not run."""
        assert not self.supervised
        with (self.folder / f"{program}.output").open("ab") as output:
            self._children[program] = subprocess.Popen(
                [sys.executable, str(PROJECT / PROGRAMS[program])],
                env=self.environ,
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def pid(self, program: str) -> int:
        """The pid of the program's process, also of "supervisor"; 0 when it does not run."""
        if program == "supervisor":
            return self._run.supervisor_pid() or 0
        if self.supervised:
            return int(self._run.processes().get(program, {}).get("pid", 0))
        child = self._children.get(program)
        return child.pid if child is not None and child.poll() is None else 0

    def send_signal(self, program: str, number: signal.Signals) -> float:
        """Send a signal to the program; returns the monotonic time of it."""
        pid = self.pid(program)
        assert pid, f"{program} does not run"
        sent_s = time.monotonic()
        os.kill(pid, number)
        return sent_s

    def kill9(self, program: str) -> float:
        """Kill the program; without supervisor, return when its process is gone."""
        killed_s = self.send_signal(program, signal.SIGKILL)
        if not self.supervised:
            self._children[program].wait(30)
        return killed_s

    def sigstop(self, program: str) -> float:
        return self.send_signal(program, signal.SIGSTOP)

    def sigcont(self, program: str) -> float:
        return self.send_signal(program, signal.SIGCONT)

    # -- keys -----------------------------------------------------------------------------------------------------

    @property
    def ring(self) -> KeyRing:
        assert self._ring is not None, "this mesh has no keys"
        return self._ring

    def make_key(self, name: str, role: str, *namespaces: str, act_for: Sequence[str] = ()) -> KeyFile:
        """A new key with this grant; the running programs know it at once."""
        self.ring.add(name, roles=[role], namespaces=namespaces, act_for=act_for)
        return self.ring.keys[name]

    # -- questions ----------------------------------------------------------------------------------------------

    def ask(self, program: str, action: str, /, *, timeout_s: float = 30.0, **data: Any) -> Reply:
        """One request over a REQ socket of its own, as JSON. Raises TimeoutError."""
        return self.ask_raw(program, {"v": 1, "action": action, "data": data}, timeout_s=timeout_s)

    def ask_as(self, key: KeyFile, program: str, action: str, /, around: Reply | None = None, **data: Any) -> Reply:
        """The same with another key; `around` stands beside the data."""
        return self.ask_raw(program, {"v": 1, "action": action, "data": data, **(around or {})}, key=key)

    def ask_raw(self, program: str, request: Any, *, timeout_s: float = 30.0, key: KeyFile | None = None) -> Reply:
        with self._context.socket(zmq.REQ) as sock:
            sock.linger = 0
            apply_client(sock, key or self.key)
            sock.connect(self.endpoints[program])
            sock.send(json.dumps(request).encode())
            if not sock.poll(int(timeout_s * 1000)):
                raise TimeoutError(f"{program} has not answered within {timeout_s:g} s")
            reply: Reply = json.loads(sock.recv())
            return reply

    def succeed(self, program: str, action: str, /, **data: Any) -> Reply:
        reply = self.ask(program, action, **data)
        assert reply["status"] == "success", reply
        return reply

    def answers(self, program: str, timeout_s: float = 0.25) -> int:
        """The pid of the process that answers health_check; 0 when none does in time."""
        with contextlib.suppress(TimeoutError):
            return int(self.ask(program, "health_check", timeout_s=timeout_s)["pid"])
        return 0

    def wait_answer(self, program: str, *, besides: int = 0, timeout_s: float = 60.0) -> float:
        """Wait until a process other than `besides` answers; returns the monotonic time at which it did."""
        wait_until(lambda: self.answers(program) not in (0, besides), f"{program} answers", timeout_s)
        return time.monotonic()

    def component(self, name: str) -> Row:
        """What get_health says of one component; empty when it is not known."""
        picture = self.succeed("health_manager", "get_health")["results"]
        return next((each for each in picture if each["component"] == name), {})

    def wait_state(self, name: str, state: str, timeout_s: float = 60.0) -> Row:
        """Wait until get_health gives the component this state; returns what it says of it."""
        seen: list[Row] = [{}]

        def reached() -> bool:
            with contextlib.suppress(TimeoutError):
                seen[0] = self.component(name)
            return seen[0].get("state") == state

        deadline_s = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < deadline_s, f"{name} is not {state} within {timeout_s:g} s: {seen[0]}"
            time.sleep(0.05)
        return seen[0]

    def history(self, since_seq: int = 0, **filters: Any) -> list[Row]:
        """All rows of the error history after `since_seq`, oldest first."""
        rows: list[Row] = []
        while True:
            page = self.succeed("health_manager", "get_errors", since_seq=since_seq, limit=1000, **filters)
            rows += page["results"]
            if page.get("next_since_seq") is None:
                return rows
            since_seq = page["next_since_seq"]

    def last_seq(self) -> int:
        """The row id of the newest event."""
        return int(self.succeed("health_manager", "get_errors", limit=1)["last_seq"])

    # -- what reports and hears ---------------------------------------------------------------------------------

    def subscriber(self, prefixes: Sequence[str] = TOPICS, **options: int) -> Subscriber:
        """A subscriber that is connected: it has the last value of a topic that has one, ERROR: has none."""
        bus = self._owned.enter_context(Subscriber(self.endpoints["publish"], prefixes, self.key, **options))
        if set(prefixes) != {ERROR_TOPIC}:
            wait_until(lambda: bool(bus.messages()), "the subscriber is connected")
        return bus

    def reporter(self, agent: str, kind: type[ErrorReporter] = ErrorReporter, **options: Any) -> ErrorReporter:
        reporter = kind(self.endpoints["report"], agent, **{"key": self.key, **options})
        self._owned.callback(reporter.close, 0.0)
        return reporter

    def socket(self, kind: int, endpoint: str, key: KeyFile | None = None, **options: int) -> zmq.Socket[bytes]:
        """A socket connected to one of the endpoints."""
        sock: zmq.Socket[bytes] = self._owned.enter_context(self._context.socket(kind))
        for name, value in {"LINGER": 0, **options}.items():
            sock.setsockopt(getattr(zmq, name), value)
        apply_client(sock, key or self.key)
        sock.connect(self.endpoints[endpoint])
        return sock

    # -- the end ------------------------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """Pids of all processes of this mesh: those with its run folder in their environment, however they came."""
        mark = f"MEMORY_RUN_DIR={self.run_folder}".encode()
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in file.read_bytes().split(b"\0"):
                    found.append(int(file.parent.name))
        return found

    def close(self) -> None:
        """Stop everything, also what is stopped by a signal or was left without supervisor; fails if that is needed
        for a mesh that should have ended by itself."""
        self._owned.close()
        self._context.destroy(linger=0)
        self._signal_all(signal.SIGCONT)
        try:
            self._stop()
        finally:
            self._signal_all(signal.SIGKILL)
            for child in self._children.values():
                child.wait(30)
            wait_until(lambda: not self.processes(), "no process of the mesh is left")

    def _stop(self) -> None:
        if self.supervised:
            if self._run.supervisor_pid() is not None:
                done = self.pc2("stop")
                assert done.returncode == 0, (done.stdout, done.stderr)
            return
        for child in self._children.values():
            child.terminate()
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(30)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def running_mesh(
    tmp_path: Path, supervised: bool = True, *, start: bool = True, keys: bool = False, **overrides: Any
) -> Iterator[Mesh]:
    """The programs on free ports, gone at the end; settings are given as section__key=value."""
    mesh = Mesh(tmp_path, supervised=supervised, keys=keys, overrides=overrides)
    try:
        if start:
            mesh.start()
        yield mesh
    finally:
        mesh.close()

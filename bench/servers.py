"""The servers under measurement: started on random ports over a data folder of their own, stopped for certain."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import msgpack
import zmq
from clients import REPLY_S, checked, connect, receive
from corpus import Corpus
from workloads import Request, request

PROJECT: Final = Path(__file__).resolve().parent.parent
START_S: Final = 20.0
STOP_S: Final = 10.0
FILL_S: Final = 120.0
_FILL_BATCH: Final = 500
_POLL_S: Final = 0.05


class ServerFailure(Exception):
    """A server did not start, or did not become ready."""


class Server:
    """A process with an endpoint. Use as a context manager: it ends with the block."""

    def __init__(self, name: str, command: list[str], folder: Path, environ: dict[str, str] | None = None) -> None:
        self.name = name
        self.endpoint = ""
        self._log = folder / f"{name}.log"
        # A session of its own: an interrupt at the terminal reaches this program alone, which then stops them all.
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environ,
                cwd=PROJECT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        process = self._process
        if process.poll() is None:
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        if process.poll() is None:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def read_port(self) -> None:
        """The first line that an echo or a reference prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip():
            raise ServerFailure(f"{self.name} did not start: {self.last_words()}")
        self.endpoint = f"tcp://127.0.0.1:{int(line)}"

    def check_alive(self) -> None:
        if self._process.poll() is not None:
            raise ServerFailure(f"{self.name} ended with status {self._process.returncode}: {self.last_words()}")

    def last_words(self) -> str:
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"

    def cpu_s(self) -> float | None:
        """Processor time of all its threads so far, without its children; None where there is no /proc."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_echo(folder: Path) -> Server:
    server = Server("echo", ["bench/echo.py"], folder)
    return _ready(server, server.read_port)


def start_reference(folder: Path, number: int) -> Server:
    server = Server("reference", ["bench/reference.py", str(folder / f"reference-{number}.db")], folder)
    return _ready(server, server.read_port)


def start_service(
    folder: Path,
    name: str,
    provider: str,
    profiles: Path | None = None,
    settings: Mapping[str, str] | None = None,
    program: Sequence[str] = ("orchestrator.py",),
) -> Server:
    """An orchestrator with the built-in settings but for its port, its data and where its vectors come from.

    `profiles`: run it under cProfile, which writes NAME.prof there when it stops. `settings`: others, as section.key.
    `program`: another one that stands for it.
    """
    port = _free_port()
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MEMORY")}
    environ["MEMORY__NETWORK__PORT"] = str(port)
    environ["MEMORY__ERROR_BUS__ENABLED"] = "false"
    environ["MEMORY__STORAGE__PATH"] = str(folder / name / "memory.db")
    environ["MEMORY__LOG__DIR"] = str(folder / name / "logs")
    environ["MEMORY__EMBEDDING__PROVIDER"] = provider
    for key, value in (settings or {}).items():
        environ[f"MEMORY__{key.upper().replace('.', '__')}"] = value
    profiled = [] if profiles is None else ["-m", "cProfile", "-o", str(profiles.resolve() / f"{name}.prof")]
    server = Server(name, [*profiled, *program], folder, environ)
    server.endpoint = f"tcp://127.0.0.1:{port}"
    return _ready(server, lambda: _wait_answer(server))


def start_agent(folder: Path, agent: str, service: Server, settings: Mapping[str, str] | None = None) -> Server:
    """The agent of this name (`session_memory`) with the built-in settings but for its port and where its service is.

    `settings`: others of its section, by key.
    """
    port = _free_port()
    section = f"MEMORY__AGENTS__{agent.upper()}__"
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MEMORY")}
    environ["MEMORY__AGENTS__ORCHESTRATOR"] = service.endpoint
    environ["MEMORY__ERROR_BUS__ENABLED"] = "false"
    environ["MEMORY__LOG__DIR"] = str(folder / agent / "logs")
    for key, value in {"port": str(port), **(settings or {})}.items():
        environ[section + key.upper()] = value
    server = Server(agent, [f"agents/{agent}_agent.py"], folder, environ)
    server.endpoint = f"tcp://127.0.0.1:{port}"
    return _ready(server, lambda: _wait_answer(server))


def _ready(server: Server, wait: Any) -> Server:
    try:
        wait()
    except BaseException:  # also an interrupt: what was started is stopped
        server.stop()
        raise
    return server


def _wait_answer(server: Server) -> None:
    end_s = time.monotonic() + START_S
    with Asker(server.endpoint) as asker:
        while not asker.poll_health():
            server.check_alive()
            if time.monotonic() > end_s:
                raise ServerFailure(f"{server.name} does not answer: {server.last_words()}")


class Asker:
    """One bare REQ client for what surrounds the measurements; `reply_s`: how long it waits for a reply."""

    def __init__(self, endpoint: str, reply_s: float = REPLY_S) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = connect(self._context, endpoint, reply_s)
        self._asked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close(0)
        self._context.term()

    def poll_health(self) -> bool:
        """Ask once, and look for the answer for a moment."""
        if not self._asked:
            self._socket.send(msgpack.packb(request("health_check", {})))
            self._asked = True
        if not self._socket.poll(100):
            return False
        self._socket.recv()
        return True

    def ask(self, action: str, data: Request, **around: Any) -> Request:
        """The reply; `around` replaces what stands beside the data, such as the namespace."""
        self._socket.send(msgpack.packb(request(action, data) | around))
        return checked(receive(self._socket))


def wait_for_embedder(server: Server) -> None:
    """Until the model is loaded. Raises ServerFailure when there is none."""
    end_s = time.monotonic() + FILL_S
    with Asker(server.endpoint) as asker:
        while (state := asker.ask("health_check", {})["readiness"]["embedding"]) != "ready":
            if time.monotonic() > end_s or state in ("off", "unavailable"):
                raise ServerFailure(f"the embedding model is {state}")
            time.sleep(_POLL_S)


def fill(server: Server, memories: int, seed: int) -> list[str]:
    """Store memories, wait until each has its vector and searches find them; their ids."""
    corpus, ids = Corpus(seed), list[str]()
    with Asker(server.endpoint) as asker:
        while len(ids) < memories:
            count = min(_FILL_BATCH, memories - len(ids))
            batch = {"memories": [corpus.memory() for _ in range(count)]}
            ids += asker.ask("batch_add_memories", batch)["memory_ids"]
        end_s = time.monotonic() + FILL_S
        while asker.ask("stats", {})["pending"]:
            if time.monotonic() > end_s:
                raise ServerFailure(f"{server.name}: vectors are still missing after {FILL_S:.0f} s")
            time.sleep(_POLL_S)
        for action in ("search_memory", "semantic_search"):
            reply = asker.ask(action, {"query": corpus.query()})
            if not reply["count"] or reply["degraded"]:
                raise ServerFailure(f"{action} over {memories} memories found {reply['count']}, or is degraded")
    return ids


def file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`, "unknown" where there is no /proc."""
    best, kind = "", "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, point, type_, *_ = line.split()
            if len(point) > len(best) and folder.resolve().is_relative_to(point):
                best, kind = point, type_
    return kind


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def data_folder() -> Iterator[Path]:
    """A folder under data/ of the project, removed at the end: on a disk, where the service keeps its own."""
    (PROJECT / "data").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=PROJECT / "data"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

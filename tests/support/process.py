"""A real orchestrator process on a free port, and sockets that call it.

with running_orchestrator(tmp_path) as orchestrator:
    orchestrator.ask("health_check")
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import SystemRandom
from typing import Any, Final

import zmq

from tests.support.wire import Reply, decode, encode, envelope, environment

PROJECT = Path(__file__).resolve().parents[2]


# Below the ports that connections are given, and a range for each worker of the test run, so that nobody takes a port
# between its being found free and its program binding it.
_PORTS: Final = 5_500
_FIRST_PORT: Final = 10_000 + _PORTS * (int("0" + os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")) % 4)
_drawn = itertools.count(SystemRandom().randrange(_PORTS))


def free_port() -> int:
    while True:
        port = _FIRST_PORT + next(_drawn) % _PORTS
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 45.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


class Peer:
    """A socket of a caller; replies are awaited with a deadline. `dealer=True`: requests are pipelined."""

    def __init__(self, context: zmq.Context[Any], address: str, *, dealer: bool = False, **options: int) -> None:
        self.socket = context.socket(zmq.DEALER if dealer else zmq.REQ)
        self.socket.setsockopt(zmq.LINGER, 0)
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.dealer = dealer
        self.socket.connect(address)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, body: bytes) -> None:
        self.socket.send_multipart([b"", body] if self.dealer else [body])

    def receive(self, timeout_s: float = 30.0) -> bytes:
        if not self.socket.poll(int(timeout_s * 1000)):
            raise TimeoutError(f"no reply within {timeout_s} s")
        frames = self.socket.recv_multipart()
        assert frames[:-1] == ([b""] if self.dealer else [])
        return frames[-1]

    def ask(
        self, action: str, around: dict[str, Any] | None = None, /, *, encoding: str = "msgpack", **data: Any
    ) -> Reply:
        self.send(encode(envelope(action, data, **(around or {})), encoding))
        return decode(self.receive(), encoding)


class Orchestrator:
    """A real orchestrator process over a store in `folder`. `ask` uses a connection of its own for each call."""

    def __init__(self, folder: Path, port: int, environ: dict[str, str]) -> None:
        self.folder = folder
        self.port = port
        self.environ = environ
        self.address = f"tcp://127.0.0.1:{port}"
        self.database = Path(environ["MEMORY__STORAGE__PATH"])
        self.command = [sys.executable, str(PROJECT / "orchestrator.py")]  # a test may have it started otherwise
        self.context: zmq.Context[Any] = zmq.Context()
        self.process: subprocess.Popen[str] | None = None
        self.files: int | None = None  # how many it may open, if that is not what this process may

    def __repr__(self) -> str:
        return f"Orchestrator({self.address}, pid {self.pid if self.process else None})"

    @property
    def pid(self) -> int:
        assert self.process is not None, "not started"
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def launch(self) -> subprocess.Popen[str]:
        """One more process with this configuration; the caller waits for it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
        return subprocess.Popen(
            self.command,
            env={**kept, "MEMORY_CONFIG": os.devnull, **self.environ},
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=None if self.files is None else self._limit_files,
        )

    def _limit_files(self) -> None:
        assert self.files is not None
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.files, self.files))

    def start(self, *, wait: bool = True) -> None:
        self.process = self.launch()
        if wait:
            self.wait_ready()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when this very process answers."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            assert self.alive, f"the orchestrator ended: {self.errors()}"
            with contextlib.suppress(TimeoutError):
                if self.ask("health_check", timeout_s=2.0)["pid"] == self.pid:
                    return
        raise AssertionError("the orchestrator does not answer")

    def ask(
        self, action: str, around: dict[str, Any] | None = None, /, *, timeout_s: float = 30.0, **data: Any
    ) -> Reply:
        with self.peer() as peer:
            peer.send(encode(envelope(action, data, **(around or {})), "msgpack"))
            return decode(peer.receive(timeout_s), "msgpack")

    def peer(self, *, dealer: bool = False, **options: int) -> Peer:
        return Peer(self.context, self.address, dealer=dealer, **options)

    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def terminate(self, timeout_s: float = 30.0) -> int:
        """Send SIGTERM and return the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)
        self._forget()

    def restart(self) -> None:
        """Start anew on the same port and store, after `kill` if it still runs."""
        if self.alive:
            self.kill()
        self._forget()
        self.start()

    def errors(self) -> str:
        """What an ended process wrote to stderr."""
        assert self.process is not None
        return self.process.communicate(timeout=30)[1]

    def close(self) -> None:
        if self.process is not None:
            if self.alive:
                self.process.kill()
            self.process.wait(30)
            self._forget()
        self.context.destroy(linger=0)

    def _forget(self) -> None:
        if self.process is not None and self.process.stderr is not None:
            self.process.stderr.close()
            self.process.stderr = None


def do_wrong(orchestrator: Orchestrator, wrong: str) -> None:
    """Have it break a promise from its next start on, see programs/failing_orchestrator.py."""
    orchestrator.command = [sys.executable, str(PROJECT / "tests" / "programs" / "failing_orchestrator.py")]
    orchestrator.environ["WRONG"] = wrong


@contextlib.contextmanager
def running_orchestrator(tmp_path: Path, *, start: bool = True, **overrides: Any) -> Iterator[Orchestrator]:
    """An orchestrator process on a free port, stopped at the end; settings are given as section__key=value."""
    port = int(overrides.setdefault("network__port", free_port()))
    orchestrator = Orchestrator(tmp_path, port, environment(tmp_path, overrides))
    try:
        if start:
            orchestrator.start()
        yield orchestrator
    finally:
        orchestrator.close()

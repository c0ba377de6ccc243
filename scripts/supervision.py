"""What scripts/pc2.py knows of the machine: addresses, the folder of run-time files, and supervisord behind it."""

from __future__ import annotations

import configparser
import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import os
import socket
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import zmq
from supervisor.xmlrpc import SupervisorTransport

PROJECT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from memory_system.settings import Settings  # noqa: E402

SUPERVISOR_CONFIG: Final = PROJECT / "config" / "supervisord.conf"
STOP_S: Final = 30.0
POLL_S: Final = 0.1
HEALTH_MS: Final = 1000
SOCKET_PATH_BYTES: Final = 90  # sun_path holds 104 to 108, and supervisor appends its pid while it binds


class Failure(Exception):
    """What was asked for did not happen; the message is the one line that the operator sees."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a program listens, and the settings section that says so."""

    section: str
    bind: str
    port: int

    @property
    def shown(self) -> str:
        return f"tcp://{self._bracketed(self.bind)}:{self.port}"

    @property
    def endpoint(self) -> str:
        """What a caller on this host connects to."""
        host = {"0.0.0.0": "127.0.0.1", "localhost": "127.0.0.1", "::": "::1"}.get(self.bind, self.bind)
        return f"tcp://{self._bracketed(host)}:{self.port}"

    @staticmethod
    def _bracketed(host: str) -> str:
        return f"[{host}]" if ":" in host else host


@dataclass(frozen=True, slots=True)
class Deployment:
    """One running (or starting) set of programs: what was started, from which configuration, logging where."""

    addresses: dict[str, Address]
    log_dir: str
    config: str

    @classmethod
    def planned(cls, settings: Settings, config: Path | None) -> Deployment:
        parser = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"))
        parser.read(SUPERVISOR_CONFIG, encoding="utf-8")
        addresses = {}
        for section in parser.sections():
            if section.startswith("program:"):
                where = parser.get(section, "address")
                values = getattr(settings, where)
                addresses[section.removeprefix("program:")] = Address(where, values.bind, values.port)
        return cls(addresses, settings.log.dir, str(config) if config else "built-in defaults")

    @classmethod
    def stored(cls, path: Path) -> Deployment:
        """What the running supervisord was started with; raises Failure when that is not known."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            addresses = {name: Address(**address) for name, address in raw["addresses"].items()}
            return cls(addresses, raw["log_dir"], raw["config"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Failure(f"supervisord runs but {path} is not readable: stop it with 'make stop-pc2'") from error

    def store(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def console_log(self, program: str) -> Path:
        return Path(self.log_dir) / f"{program}.console.log"

    def console_sizes(self) -> dict[str, int]:
        """How long, in bytes, the console log of each program is now."""
        logs = {name: self.console_log(name) for name in self.addresses}
        return {name: path.stat().st_size if path.exists() else 0 for name, path in logs.items()}


class RunDir:
    """The folder of the run-time files, and supervisord behind the socket in it."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.path = Path(environ.get("MEMORY_RUN_DIR") or PROJECT / "data" / "run").absolute()
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.deployment = self.path / "deployment.json"
        self.socket = self._socket_path()

    def _socket_path(self) -> Path:
        path = self.path / "supervisor.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES:
            return path
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"memory-{os.getuid()}-{digest}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise Failure(f"{folder} is not a private folder of this user: remove it or set MEMORY_RUN_DIR")
        path = folder / "supervisor.sock"
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
            raise Failure(f"{path} is too long for a socket: set MEMORY_RUN_DIR to a shorter folder")
        return path

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One start or stop at a time; a second one waits for the first."""
        with open(self.path / "pc2.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def call(self, method: str, *arguments: Any) -> Any:
        """Ask supervisord; raises OSError when there is none, xmlrpc.client.Fault when it refuses."""
        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        try:
            proxy = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=cast(xmlrpc.client.Transport, transport))
            return getattr(proxy.supervisor, method)(*arguments)
        except http.client.HTTPException as error:
            raise ConnectionError(f"supervisord broke off: {error}") from error
        finally:
            transport.close()

    def supervisor_pid(self) -> int | None:
        try:
            return int(self.call("getPID"))
        except (OSError, xmlrpc.client.Error):
            return None

    def processes(self) -> dict[str, dict[str, Any]]:
        """supervisord's view of each program by name; empty when it does not answer."""
        try:
            return {info["name"]: info for info in self.call("getAllProcessInfo")}
        except (OSError, xmlrpc.client.Error):
            return {}


def ask_health(address: Address, timeout_ms: int = HEALTH_MS) -> dict[str, Any] | None:
    """The reply of a program to health_check, or None when none comes in time."""
    with zmq.Context() as context, context.socket(zmq.REQ) as sock:
        sock.linger = 0
        sock.ipv6 = ":" in address.bind
        sock.connect(address.endpoint)
        sock.send_json({"action": "health_check"})
        if not sock.poll(timeout_ms):
            return None
        try:
            reply = sock.recv_json()
        except ValueError:
            return None
    return reply if isinstance(reply, dict) else None


def check_port(address: Address) -> None:
    """Raise Failure when a program could not listen there."""
    family = socket.AF_INET6 if ":" in address.bind else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.bind, address.port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                text = f"cannot listen on {address.shown}: {error.strerror}"
                raise Failure(f"{text} ({address.section}.bind, {address.section}.port)") from error
        else:
            return
    pid = (ask_health(address) or {}).get("pid")
    who = f"a program of this kind that was started elsewhere (pid {pid})" if pid else "another program"
    advice = f"stop it, or set {address.section}.port to a free one"
    raise Failure(f"port {address.port} on {address.bind} is in use by {who}: {advice}")


def is_healthy(reply: Mapping[str, Any] | None, pid: int) -> bool:
    """Whether the program that supervisord runs as `pid` itself has answered, and can work."""
    return reply is not None and reply.get("state", "down") != "down" and reply.get("pid", pid) == pid


def last_words(path: Path, seen_bytes: int) -> str:
    """The last line that a program printed since its file was `seen_bytes` long."""
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    fresh = data[seen_bytes:] if len(data) >= seen_bytes else data
    lines = fresh.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else f"it printed nothing; see {path.parent}"


def shut_down(run: RunDir, pid: int) -> None:
    """Stop supervisord and its programs, and wait until they are gone; raises Failure at the deadline."""
    # Already on its way down: waiting is all that is left to do.
    with contextlib.suppress(OSError, xmlrpc.client.Error):
        run.call("shutdown")
    deadline = time.monotonic() + STOP_S
    while is_alive(pid):
        if time.monotonic() > deadline:
            raise Failure(f"supervisord (pid {pid}) has not stopped after {STOP_S:g} s")
        time.sleep(POLL_S)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has exited and waits for its parent does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # no /proc on this system
        return True

"""What scripts/pc2.py knows of the machine: addresses, the folder of run-time files, and supervisord behind it."""

from __future__ import annotations

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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, cast

import zmq
from supervisor.xmlrpc import SupervisorTransport

PROJECT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from operator_key import operator_key_file  # noqa: E402

from memory_system.deployment import Address, longest_stop_s, program_addresses, settings_section  # noqa: E402
from memory_system.errors import ConfigError  # noqa: E402
from memory_system.keys import KeyFile, apply_client, load_key_file  # noqa: E402
from memory_system.settings import Settings  # noqa: E402

# Beyond what supervisord gives its programs.
STOP_MARGIN_S: Final = 6.0
POLL_S: Final = 0.1
HEALTH_MS: Final = 1000
SOCKET_NAME: Final = "supervisor.sock"
SOCKET_PATH_BYTES: Final = 90  # sun_path holds 104 to 108, and supervisor appends its pid while it binds


class Failure(Exception):
    """What was asked for did not happen; the message is the one line that the operator sees."""


@dataclass(frozen=True, slots=True)
class Port:
    """A port that a program binds on this host, and the settings key that says so."""

    address: Address
    number: int
    key: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """One running (or starting) set of programs: what was started, from which configuration, logging where, and the
    file of the key that they take from the operator (empty: they have no keys)."""

    addresses: dict[str, Address]
    log_dir: str
    config: str
    key_file: str = ""

    @classmethod
    def planned(cls, settings: Settings, config: Path | None) -> Deployment:
        """What would be started with these settings; raises ConfigError when supervisord.conf does not fit them."""
        shown = str(config) if config else "built-in defaults"
        return cls(program_addresses(settings), settings.log.dir, shown, operator_key_file(settings) or "")

    @classmethod
    def stored(cls, path: Path) -> Deployment:
        """What the running supervisord was started with; raises Failure when that is not known."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            addresses = {name: Address(**address) for name, address in raw["addresses"].items()}
            return cls(addresses, raw["log_dir"], raw["config"], raw.get("key_file", ""))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Failure(f"supervisord runs but {path} is not readable: stop it with 'make stop-pc2'") from error

    def store(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def key(self) -> KeyFile | None:
        """The key to ask the programs with. Raises Failure for a file that cannot be used."""
        try:
            return load_key_file(self.key_file) if self.key_file else None
        except ConfigError as error:
            raise Failure(error.message) from None

    def console_log(self, program: str) -> Path:
        return Path(self.log_dir) / f"{program}.console.log"

    def console_sizes(self) -> dict[str, int]:
        """How long, in bytes, the console log of each program is now."""
        logs = {name: self.console_log(name) for name in self.addresses}
        return {name: path.stat().st_size if path.exists() else 0 for name, path in logs.items()}


def run_folder(environ: Mapping[str, str]) -> Path:
    """Where the run-time files live; it need not exist yet."""
    return Path(environ.get("MEMORY_RUN_DIR") or PROJECT / "data" / "run").absolute()


def socket_fits(folder: Path) -> bool:
    """Whether supervisord's socket can be in this folder; otherwise it is in one of the temporary folder."""
    return len(os.fsencode(folder / SOCKET_NAME)) <= SOCKET_PATH_BYTES


class RunDir:
    """The folder of the run-time files, and supervisord behind the socket in it."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.path = run_folder(environ)
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.deployment = self.path / "deployment.json"
        self.socket = self._socket_path()

    def _socket_path(self) -> Path:
        if socket_fits(self.path):
            return self.path / SOCKET_NAME
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"memory-{os.getuid()}-{digest}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise Failure(f"{folder} is not a private folder of this user: remove it or set MEMORY_RUN_DIR")
        if not socket_fits(folder):
            raise Failure(f"{folder / SOCKET_NAME} is too long for a socket: set MEMORY_RUN_DIR to a shorter folder")
        return folder / SOCKET_NAME

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


def ask(
    address: Address, action: str, timeout_ms: int = HEALTH_MS, key: KeyFile | None = None
) -> dict[str, Any] | None:
    """The reply of a program to a request without data, or None when none comes in time."""
    with zmq.Context() as context, context.socket(zmq.REQ) as sock:
        sock.linger = 0
        sock.ipv6 = address.is_ipv6
        apply_client(sock, key)
        sock.connect(address.endpoint)
        sock.send_json({"action": action})
        if not sock.poll(timeout_ms):
            return None
        try:
            reply = sock.recv_json()
        except ValueError:
            return None
    return reply if isinstance(reply, dict) else None


def ask_health(address: Address, timeout_ms: int = HEALTH_MS, key: KeyFile | None = None) -> dict[str, Any] | None:
    return ask(address, "health_check", timeout_ms, key)


def ports(settings: Settings, addresses: Mapping[str, Address]) -> Iterator[Port]:
    """Every port that the programs will bind: those of their settings sections, and of their metrics."""
    for program, address in addresses.items():
        if not address.section:
            yield Port(address, address.port, address.port_key)
            continue
        section = settings_section(settings, address.section)
        for name in (field.name for field in fields(section)):
            if name == "port" or name.endswith("_port"):
                yield Port(address, getattr(section, name), f"{address.section}.{name}")
        metrics = getattr(settings.metrics, f"{program}_port", 0)
        if metrics:
            yield Port(address, metrics, f"metrics.{program}_port")


def check_ports(wanted: Iterable[Port], key: KeyFile | None = None) -> None:
    """Raise Failure when a program could not listen on one of them."""
    keys: dict[int, str] = {}
    for port in wanted:
        if port.number in keys:
            raise Failure(f"{keys[port.number]} and {port.key} are both {port.number}: set one to a free port")
        keys[port.number] = port.key
        _check_port(port, key)


def _check_port(port: Port, key: KeyFile | None) -> None:
    bind = port.address.bind
    with socket.socket(socket.AF_INET6 if port.address.is_ipv6 else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port.number))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                shown = replace(port.address, port=port.number).shown
                text = f"cannot listen on {shown}: {error.strerror}"
                raise Failure(f"{text} ({port.address.bind_key}, {port.key})") from error
        else:
            return
    # Only the port of the requests says who it is.
    pid = (ask_health(port.address, key=key) or {}).get("pid") if port.number == port.address.port else None
    who = f"a program of this kind that was started elsewhere (pid {pid})" if pid else "another program"
    raise Failure(f"port {port.number} on {bind} is in use by {who}: stop it, or set {port.key} to a free one")


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


def did_not_start(deployment: Deployment, info: Mapping[str, Any], seen_bytes: int) -> Failure:
    """What to tell of a program that supervisord saw end. Its exit status is not known once it is started again."""
    name, status = info["name"], info.get("exitstatus")
    words = last_words(deployment.console_log(name), seen_bytes)
    return Failure(f"{name} did not start{f' (exit status {status})' if status else ''}: {words}")


def shut_down(run: RunDir, pid: int) -> None:
    """Stop supervisord and its programs, and wait until they are gone; raises Failure at the deadline."""
    # Already on its way down: waiting is all that is left to do.
    with contextlib.suppress(OSError, xmlrpc.client.Error):
        run.call("shutdown")
    limit_s = longest_stop_s() + STOP_MARGIN_S
    deadline = time.monotonic() + limit_s
    while is_alive(pid):
        if time.monotonic() > deadline:
            raise Failure(f"supervisord (pid {pid}) has not stopped after {limit_s:g} s")
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

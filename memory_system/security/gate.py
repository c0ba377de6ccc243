"""The gate of a program whose callers have keys: one for all its sockets, and their one ZeroMQ context.

gate = Gate.of(settings)                       # None: callers have no keys
gate.open()
socket = gate.context.socket(zmq.ROUTER)
gate.protect(socket, "memory")
socket.bind(address)
gate.verify(socket)                            # a stranger is refused, or CannotStart
identity = gate.identity(frame.get("User-Id"))
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import zmq

from memory_system import keys
from memory_system.connections import CURVE_BYTES, IO_THREADS, LEDGER
from memory_system.errors import CannotStart, ConfigError
from memory_system.grants import DOMAINS, Grants, Identity
from memory_system.log import get_logger
from memory_system.rates import Rates
from memory_system.security.authenticator import Authenticator
from memory_system.security.registry import Registry
from memory_system.security.self_test import check_refused, endpoint
from memory_system.settings import Settings

log = get_logger("security")

# Whoever reaches the port can be refused as often as it likes: lines of that must not push out those of the service.
_LINES_PER_S: Final = 1.0
_LINES_BURST: Final = 100

# (domain, IP address, name of the key or "")
OnRefused = Callable[[str, str, str], None]


class Gate:
    """Keys, grants and authenticator. Sockets are made and closed by their owners, and closed before the gate is.

    `on_refused` hears of connections that are refused; it may be set at any time, is called in the authenticator's
    thread, and must neither wait nor raise. What an operator should know is a line of the log.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError for keys and grants that are missing or not usable."""
        keys.check_curve()
        _check_folder(folder)
        self._key = keys.load_key_file(folder / keys.SERVICE_KEY_FILE)
        if self._key.server != self._key.public:
            raise ConfigError(f"{folder / keys.SERVICE_KEY_FILE} is not the key of the service itself")
        self._registry = Registry(folder / keys.GRANTS_FILE)
        self.context: zmq.Context[Any] = zmq.Context(IO_THREADS)
        self._authenticator = Authenticator(
            self.context, self._lets_in, look=self._registry.look, on_refused=self._refused
        )
        self._strangers: dict[str, bool] = {}  # keys of self-tests: whether the authenticator was asked about it
        self._inside: dict[str, set[str]] = {}  # keys that were let in, by domain
        self._restarts = 0
        self._lines = Rates(_LINES_PER_S, _LINES_BURST)
        self.on_refused: OnRefused = lambda domain, address, name: None

    @classmethod
    def of(cls, settings: Settings) -> Gate | None:
        """The gate of this host's programs, None where callers have no keys. Raises ConfigError."""
        return cls(Path(settings.security.keys_dir)) if keys.curve_on(settings.security) else None

    def __repr__(self) -> str:
        return f"Gate({self._registry!r}, {self._authenticator!r})"

    @property
    def grants(self) -> Grants:
        """Those in force now; another object when they have changed."""
        return self._registry.grants

    def open(self) -> None:
        """Start to answer for the sockets; before they are bound. Raises CannotStart."""
        LEDGER.more_bytes = CURVE_BYTES
        self._authenticator.start()

    def protect(self, socket: zmq.Socket[Any], domain: str) -> None:
        """Have a socket of `context` let in only keys that may enter this domain; before it is bound."""
        if domain not in DOMAINS:
            raise ConfigError(f"there is no kind of socket {domain!r}")
        if socket.context is not self.context:
            raise CannotStart("a socket of another context has no authenticator")
        keys.apply_server(socket, self._key, domain)

    def verify(self, socket: zmq.Socket[Any]) -> None:
        """Have a stranger knock at a bound socket: without a key, and with one that nobody knows. Raises CannotStart
        unless both are refused, and the authenticator was asked."""
        stranger = keys.new_key("stranger", self._key.public)
        name = stranger.public.decode()
        self._strangers[name] = False
        try:
            check_refused(socket, None)
            check_refused(socket, stranger)
            if not self._strangers[name]:
                raise CannotStart(f"{endpoint(socket)} refused a key without asking the authenticator")
        finally:
            del self._strangers[name]

    def identity(self, user_id: str | None, on_behalf_of: str | None = None) -> Identity:
        """Who sends messages with this User-Id, and for whom. Raises AccessDenied, also for keys revoked since."""
        return self._registry.identity(user_id, on_behalf_of)

    def has_outstayed(self, domain: str) -> bool:
        """Whether a key that was let into sockets of this kind may not enter any more; told once. For sockets that only
        send, where nothing comes that could be refused."""
        inside = self._inside.setdefault(domain, set())
        gone = [public for public in list(inside) if not self._registry.lets_in(domain, public)]
        inside.difference_update(gone)
        return bool(gone)

    def look(self) -> None:
        """To be called every second or so: an authenticator that has died is told of, and started again."""
        if self._authenticator.is_alive() or self.context.closed:
            return
        self._restarts += 1
        log.error("authenticator_ended", reason="nobody could connect; it is started again", restarts=self._restarts)
        try:
            self._authenticator.start()
        except CannotStart as error:
            log.error("authenticator_not_restarted", reason=error.message)

    def figures(self) -> dict[str, Any]:
        """state ("ready", "unavailable": nobody new can connect), keys, accepted and refused connections, restarts of
        the authenticator, and what is wrong with the grants, if something is."""
        authenticator, registry = self._authenticator, self._registry
        return {
            "state": "ready" if authenticator.is_alive() else "unavailable",
            "keys": len(registry.grants.by_key),
            "accepted": authenticator.accepted,
            "refused": authenticator.refused,
            "failures": authenticator.failures,
            "restarts": self._restarts,
            "grants_problem": registry.problem,
        }

    def close(self) -> None:
        """End the context and with it the authenticator; all sockets have been closed. May be called twice."""
        if not self.context.closed:
            self.context.term()
            self._authenticator.join()

    def _lets_in(self, domain: str, public: str) -> bool:
        if public in self._strangers:
            self._strangers[public] = True
            return False
        if not self._registry.lets_in(domain, public):
            return False
        self._inside.setdefault(domain, set()).add(public)
        return True

    def _refused(self, domain: str, address: str, public: str) -> None:
        if public in self._strangers:
            return
        grant = self._registry.grants.by_key.get(public)
        name = "" if grant is None else grant.name
        if not self._lines.take("", time.monotonic()):
            log.info("connection_refused", domain=domain, address=address, key=name or "unknown")
        self.on_refused(domain, address, name)


def _check_folder(folder: Path) -> None:
    """Raise ConfigError for a folder in which others can put files of their own in the place of these."""
    try:
        mode = folder.stat().st_mode
    except OSError as error:
        raise ConfigError(f"the keys' folder {folder} cannot be read: {error.strerror}") from None
    keys.check_private(folder, mode, readable=True)

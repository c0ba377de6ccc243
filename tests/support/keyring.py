"""Keys and grants for a test: a folder as `make keys` leaves it, and peers that show a key.

ring = KeyRing(tmp_path / "keys")
ring.add("planner", roles=["writer"], namespaces=["home"])
with running_orchestrator(tmp_path, **ring.settings()) as orchestrator, ring.peer(orchestrator, "planner") as peer:
    peer.ask("add_memory", content="x")
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
import zmq

from memory_system import keys
from memory_system.keys import KeyFile
from tests.support.process import Orchestrator, Peer, wait_until
from tests.support.wire import decode_reply, encode, envelope

PROGRAMS = {
    "orchestrator": {"roles": ["reader"]},
    "health_manager": {"roles": ["operator"]},
    "memory_scheduler": {"roles": ["admin"], "namespaces": ["*"]},
    "knowledge_base_agent": {"roles": ["writer"], "namespaces": ["*"], "act_for": ["*"]},
    "session_memory_agent": {"roles": ["writer"], "namespaces": ["*"], "act_for": ["*"]},
    "context_manager_agent": {"roles": ["writer"], "namespaces": ["*"], "act_for": ["*"]},
}
# What the tests themselves call with, to see whether a program is there.
OBSERVER = "observer"


class KeyRing:
    """A folder with the service's key, those of its programs, and `add`ed ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys: dict[str, KeyFile] = {}
        self._grants: list[dict[str, Any]] = []
        folder.mkdir(mode=0o700)
        service = keys.new_key(keys.SERVICE)
        self.server = service.public
        keys.write_private(folder / keys.SERVICE_KEY_FILE, keys.key_text(service, "a test's"))
        for name, grant in PROGRAMS.items():
            self.add(name, **grant)
        self.add(OBSERVER, roles=["operator"])

    def add(
        self, name: str, *, roles: Sequence[str], namespaces: Sequence[str] = (), act_for: Sequence[str] = ()
    ) -> Path:
        """Make a key; the path of its file."""
        key = keys.new_key(name, self.server)
        path = self.folder / f"{name}.key"
        keys.write_private(path, keys.key_text(key, "a test's"))
        self.adopt(key, roles=roles, namespaces=namespaces, act_for=act_for)
        return path

    def adopt(
        self, key: KeyFile, *, roles: Sequence[str], namespaces: Sequence[str] = (), act_for: Sequence[str] = ()
    ) -> None:
        """Grant a key that there is already; programs that run see it within a second."""
        self.keys[key.name] = key
        self._grants.append(
            {
                "name": key.name,
                "public_key": key.public.decode(),
                "roles": list(roles),
                "namespaces": list(namespaces),
                "act_for": list(act_for),
            }
        )
        self._write()

    def revoke(self, name: str) -> None:
        for grant in self._grants:
            grant["revoked"] = grant["name"] == name or grant.get("revoked", False)
        self._write()

    def settings(self) -> dict[str, Any]:
        """Overrides for a program under test."""
        return {"security__keys_dir": self.folder, "security__curve": "on"}

    def options(self, name: str) -> dict[str, Any]:
        """Options of a socket that shows this key."""
        key = self.keys[name]
        return {"CURVE_SERVERKEY": key.server, "CURVE_PUBLICKEY": key.public, "CURVE_SECRETKEY": key.secret}

    def peer(self, orchestrator: Orchestrator, name: str, *, dealer: bool = False) -> Peer:
        return Peer(orchestrator.context, orchestrator.address, dealer=dealer, **self.options(name))

    def start(self, orchestrator: Orchestrator) -> None:
        """Start it, and return when it answers a key."""
        orchestrator.start(wait=False)
        self.wait_for(orchestrator)

    def wait_for(self, orchestrator: Orchestrator, state: str = "") -> None:
        """Return when it answers a key; with `state`, when that is its state."""

        def answers() -> bool:
            assert orchestrator.alive, orchestrator.errors()
            with self.peer(orchestrator, OBSERVER) as peer, contextlib.suppress(TimeoutError):
                peer.send(encode(envelope("health_check", {}), "msgpack"))
                return state in ("", decode_reply(peer.receive(0.5), "msgpack")["state"])
            return False

        wait_until(answers, f"the orchestrator answers a key {state}", 20.0)

    def subscriber(self, context: zmq.Context[Any], address: str, name: str) -> zmq.Socket[bytes]:
        """A SUB socket for everything, with this key."""
        socket = context.socket(zmq.SUB)
        socket.setsockopt(zmq.LINGER, 0)
        for option, value in self.options(name).items():
            socket.setsockopt(getattr(zmq, option), value)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(address)
        return socket

    def secrets(self) -> list[str]:
        """The secret of every key, none of which may stand in a log or a reply."""
        service = keys.load_key_file(self.folder / keys.SERVICE_KEY_FILE)
        return [key.secret.decode() for key in (service, *self.keys.values())]

    def _write(self) -> None:
        path = self.folder / keys.GRANTS_FILE
        aside = path.with_name("grants.new")
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            yaml.safe_dump(self._grants, file)
        aside.replace(path)

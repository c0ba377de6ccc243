"""Whose a request to a program with actions is, and whether that key may make it; the audit log hears what was refused,
and what administrators did."""

from __future__ import annotations

import functools
from collections.abc import Callable

from memory_system.audit import AuditLog, Entry
from memory_system.envelope import Request, read_request
from memory_system.errors import AccessDenied
from memory_system.grants import ADMIN, READ, WRITE, Identity, permission_for
from memory_system.router import Sender
from memory_system.security import Gate
from memory_system.security.guard import Asked, principal_of
from memory_system.settings import Settings

# An action -> what a key has to permit, see grants.py.
Needs = Callable[[str], str]


class Permits:
    """`needs(action)`: what a key has to permit; of what reads or writes memories, the namespace has to be granted as
    well."""

    def __init__(self, gate: Gate, needs: Needs = permission_for, audit: AuditLog | None = None) -> None:
        self._gate = gate
        self._needs = needs
        self._audit = audit
        gate.on_refused = self._not_let_in

    @classmethod
    def of(cls, gate: Gate | None, needs: Needs, settings: Settings, program: str) -> Permits | None:
        """None where callers have no keys. Raises ConfigError when the audit log cannot be written."""
        return None if gate is None else cls(gate, needs, AuditLog.open(settings, program))

    def read(self, body: bytes, peer: bytes, sender: Sender, *, flat: bool) -> Request:
        """As `read_request`, with the identity."""
        identify = functools.partial(self._identity, sender)
        return read_request(body, peer, sender.address, flat=flat, identify=identify)

    def check(self, action: str, request: Request) -> None:
        """Raise AccessDenied for what the caller's key does not permit."""
        identity, needed = request.identity, self._needs(action)
        if identity is None:
            raise AccessDenied("the connection has no key")
        try:
            identity.check_permission(needed, action)
            if needed in (READ, WRITE):
                identity.check_namespace(request.namespace)
        except AccessDenied as error:
            if self._audit is not None:
                self._audit.denied(_entry(action, request, identity), error.code)
            raise
        if needed == ADMIN and self._audit is not None:
            self._audit.admin(_entry(action, request, identity), "admitted")

    def close(self) -> None:
        """May be called twice."""
        if self._audit is not None:
            self._audit.close()

    def _not_let_in(self, domain: str, address: str, name: str) -> None:
        """A connection was refused. In the authenticator's thread."""
        if self._audit is not None:
            self._audit.denied(
                Entry(name or _unknown(address), address, "connect", namespace=domain), AccessDenied.code
            )

    def _identity(self, sender: Sender, on_behalf_of: str | None) -> Identity:
        try:
            return self._gate.identity(sender.user_id, on_behalf_of)
        except AccessDenied as error:
            if self._audit is not None:
                entry = Entry(self._name(sender), sender.address, "request", on_behalf_of=on_behalf_of or "")
                self._audit.denied(entry, error.code)
            raise

    def _name(self, sender: Sender) -> str:
        grant = self._gate.grants.by_key.get(sender.user_id or "")
        return _unknown(sender.address) if grant is None else grant.name


def _unknown(address: str) -> str:
    """What the log calls somebody whose key nobody knows."""
    return principal_of(None, Asked("", "", address=address))


def _entry(action: str, request: Request, identity: Identity) -> Entry:
    return Entry(
        name=identity.name,
        address=request.address,
        action=action,
        namespace=request.namespace,
        request_id=request.request_id or "",
        on_behalf_of="" if identity.caller == identity.name else identity.scope,
    )

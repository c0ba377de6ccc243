"""What a request passes before it is done: who asks, whether it may, how often; and what the audit log is told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, Protocol

from memory_system import protocol
from memory_system.audit import AuditLog, Entry
from memory_system.errors import AccessDenied, InvalidField, RateLimited
from memory_system.grants import OPERATE, OPERATOR_ACTIONS, Identity
from memory_system.limits_settings import LimitsSettings
from memory_system.rates import Rates
from memory_system.security.authorise import authorise
from memory_system.security.peers import is_admin
from memory_system.settings import Settings

# What operators may ask as well changes nothing, and would push out lines of what does.
_NOTED: Final = protocol.ADMIN_ACTIONS - OPERATOR_ACTIONS
# What administrators alone may do is not counted, nor is what monitoring asks every few seconds.
_NOT_COUNTED: Final = _NOTED | {"health_check"}
_LOOPBACK: Final = ("127.", "::1", "localhost")


class Keys(Protocol):
    """Knows who a User-Id is."""

    def identity(self, user_id: str | None, on_behalf_of: str | None = None) -> Identity:
        """Raises AccessDenied for a key that is not known, was revoked, or may not act for that caller."""


class Asked(NamedTuple):
    """What the envelope of a request and its connection say. `address`: empty where all peers are of this machine."""

    action: str
    namespace: str
    agent_id: str = ""
    request_id: str | None = None
    on_behalf_of: str | None = None
    address: str = ""
    user_id: str | None = None


class Caller(NamedTuple):
    """Who a request is done for. `identity` None: a plaintext caller, who is who it says."""

    asked: Asked
    identity: Identity | None

    @property
    def label(self) -> str:
        """What it calls itself, and where it does not, what its key is called."""
        return self.asked.agent_id or self.own

    @property
    def scope(self) -> str:
        """Whose request_ids it uses."""
        return self.asked.agent_id if self.identity is None else self.identity.scope

    @property
    def own(self) -> str:
        """Whose latest writes a search of it waits for."""
        return self.asked.agent_id if self.identity is None else self.identity.caller

    @property
    def principal(self) -> str:
        """Whose limits and quota it counts against."""
        return principal_of(self.identity, self.asked)

    @property
    def sees_figures(self) -> bool:
        """Whether it may see how the service is, in figures that tell of all namespaces together."""
        return self.identity is None or self.identity.may(OPERATE)

    def sees_namespace(self, namespace: str) -> bool:
        return self.identity is None or self.identity.allows_namespace(namespace)


def principal_of(identity: Identity | None, asked: Asked) -> str:
    """The name of a key, or "@address/agent_id": what nobody has proved is told from names of keys by its "@"."""
    if identity is not None:
        return identity.caller
    return f"@{'' if asked.address.startswith(_LOOPBACK) else asked.address}/{asked.agent_id}"


def rates_of(limits: LimitsSettings) -> Rates | None:
    """None where callers may make as many requests as they like."""
    if not limits.rate_per_s:
        return None
    return Rates(limits.rate_per_s, float(limits.burst or max(1, math.ceil(limits.rate_per_s))))


class Guard:
    """`keys` None: callers are plaintext, and administrators are known by their address (`admits`)."""

    def __init__(
        self,
        *,
        keys: Keys | None = None,
        admits: Callable[[str], bool] = is_admin,
        rates: Rates | None = None,
        audit: AuditLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rate_limited = 0
        self._keys = keys
        self._admits = admits
        self._rates = rates
        self._audit = audit
        self._clock = clock

    @classmethod
    def of(cls, settings: Settings, program: str, keys: Keys | None = None) -> Guard:
        """The guard of a program. Raises ConfigError when its audit log cannot be written."""
        return cls(
            keys=keys,
            admits=partial(is_admin, bind=settings.network.bind),
            rates=rates_of(settings.limits),
            audit=AuditLog.open(settings, program),
        )

    def close(self) -> None:
        """Close the audit log. May be called twice."""
        if self._audit is not None:
            self._audit.close()

    def admit(self, asked: Asked) -> Caller:
        """Who it is done for. Raises AccessDenied, InvalidField, RateLimited."""
        try:
            identity = self._identity(asked)
        except AccessDenied as error:
            self.denied(asked, error)
            raise
        caller = Caller(asked, identity)
        self._take(caller, 1)
        if self._audit is not None and asked.action in _NOTED:
            self._audit.admin(_entry(asked, identity), "admitted")
        return caller

    def charge(self, caller: Caller, items: int) -> None:
        """The request turned out to be a batch: each further item counts as a request. Raises RateLimited."""
        if items > 1:
            self._take(caller, items - 1, taken=1)

    def ended(self, caller: Caller, outcome: str) -> None:
        """How an admitted request ended: success, or the code of its error."""
        if self._audit is not None and caller.asked.action in _NOTED:
            self._audit.admin(_entry(caller.asked, caller.identity), outcome)

    def denied(self, asked: Asked, error: AccessDenied) -> None:
        """A request was refused, here or by the address of its sender."""
        if self._audit is not None:
            self._audit.denied(_entry(asked, self._known(asked)), error.code)

    def not_let_in(self, domain: str, address: str, name: str) -> None:
        """A connection to sockets of this kind was refused; `name` is that of its key, "" for one that is not known."""
        if self._audit is not None:
            entry = Entry(name or principal_of(None, Asked("", "", address=address)), address, "connect", domain)
            self._audit.denied(entry, AccessDenied.code)

    def figures(self) -> dict[str, object]:
        """rate_limited (replies), audit (see AuditLog.figures)."""
        figures: dict[str, object] = {"rate_limited": self.rate_limited}
        return figures if self._audit is None else {**figures, "audit": self._audit.figures()}

    def _identity(self, asked: Asked) -> Identity | None:
        """Raises AccessDenied for who is unknown, and for what it may not do."""
        if self._keys is not None:
            identity = self._keys.identity(asked.user_id, asked.on_behalf_of)
            authorise(identity, asked.action, asked.namespace)
            return identity
        if asked.on_behalf_of is not None:
            raise InvalidField("on_behalf_of", "on_behalf_of names a key, and callers have none here")
        if asked.action in protocol.ADMIN_ACTIONS and not self._admits(asked.address):
            raise AccessDenied(
                f"{asked.action} is for callers of the service's own machine; {asked.address} is another"
            )
        return None

    def _known(self, asked: Asked) -> Identity | None:
        """The key of a request that was refused, for whomever it was to act; None where there is none."""
        if self._keys is None:
            return None
        try:
            return self._keys.identity(asked.user_id)
        except AccessDenied:
            return None

    def _take(self, caller: Caller, cost: int, taken: int = 0) -> None:
        if self._rates is None or caller.asked.action in _NOT_COUNTED:
            return
        wait_s = self._rates.take(caller.principal, self._clock(), cost, taken=taken)
        if wait_s > 0.0:
            self.rate_limited += 1
            raise RateLimited(
                "this caller makes more requests than limits.rate_per_s allows",
                retry_after_ms=math.ceil(wait_s * 1000.0),
            )


def _entry(asked: Asked, identity: Identity | None) -> Entry:
    return Entry(
        name=principal_of(None, asked) if identity is None else identity.name,
        address=asked.address,
        action=asked.action,
        namespace=asked.namespace,
        request_id=asked.request_id or "",
        on_behalf_of=asked.on_behalf_of or "",
    )

"""A ROUTER that takes requests: which of them are admitted, that each is answered once, and how it ends.

What a request means is the business of an `Answerer`: the dispatcher of the memory service, or `ActionServer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from memory_system.errors import AccessDenied, Busy, InvalidRequest, MemorySystemError, ShuttingDown
from memory_system.limits_settings import LimitsSettings
from memory_system.router import Route, Router, Sender
from memory_system.security import Gate, policy_for
from memory_system.settings import Settings

_MIB: Final = 1024 * 1024
_LOOK_S: Final = 1.0  # how often the gate is looked at


class Answerer(Protocol):
    """Turns the bytes of a request into those of its reply; knows nothing of sockets."""

    def handle(self, body: bytes, reply: Callable[[bytes], None], peer: bytes, sender: Sender) -> None:
        """Call `reply` exactly once, at once or later on the event loop.

        `peer` names the connection; `sender` has its IP address and its key, which the answerer asks the gate about.
        """

    def refuse(self, body: bytes, error: MemorySystemError) -> bytes:
        """The reply to a request that is not admitted."""


class Load:
    """How many requests are being worked on, and how many bytes they have together."""

    __slots__ = ("requests", "size")

    def __init__(self) -> None:
        self.requests = self.size = 0

    def add(self, size: int) -> None:
        self.requests += 1
        self.size += size

    def remove(self, size: int) -> None:
        self.requests -= 1
        self.size -= size


class Admission:
    """Counts what is in flight, in all and for each peer, and says whether more is taken. No I/O."""

    def __init__(self, limits: LimitsSettings) -> None:
        self.total = Load()
        self.by_peer: dict[bytes, Load] = {}
        self.draining = False
        self.busy_replies = 0
        self._limits = limits
        self._idle = asyncio.Event()

    def is_full(self) -> bool:
        """Whether so much is being worked on that nothing more is read."""
        limits, total = self._limits, self.total
        return total.requests >= limits.max_in_flight or total.size >= limits.max_in_flight_mb * _MIB

    def objection(self, peer: bytes) -> MemorySystemError | None:
        """Why a request of this peer is not admitted, None if it is."""
        if self.draining:
            return ShuttingDown("the service is stopping; try again in a moment", retry_after_ms=500)
        load, limits = self.by_peer.get(peer), self._limits
        if load is not None and (
            load.requests >= limits.max_in_flight_per_client
            or load.size >= limits.max_in_flight_mb_per_client * _MIB
            or self._has_more_than_its_share(load)
        ):
            self.busy_replies += 1
            return Busy(
                f"{load.requests} requests of this client with {load.size} bytes are in flight",
                retry_after_ms=limits.busy_retry_after_ms,
            )
        return None

    def _has_more_than_its_share(self, load: Load) -> bool:
        """Where half of all there is room for is taken, busy clients share that half: the other is for newcomers."""
        limits, clients = self._limits, len(self.by_peer)
        return (
            self.total.requests >= limits.max_in_flight / 2 and load.requests >= limits.max_in_flight / (2 * clients)
        ) or (
            self.total.size >= limits.max_in_flight_mb * _MIB / 2
            and load.size >= limits.max_in_flight_mb * _MIB / (2 * clients)
        )

    def begin(self, peer: bytes, size: int) -> None:
        self.by_peer.setdefault(peer, Load()).add(size)
        self.total.add(size)

    def end(self, peer: bytes, size: int) -> None:
        self.total.remove(size)
        load = self.by_peer[peer]
        load.remove(size)
        if not load.requests:
            del self.by_peer[peer]
        if self.draining and not self.total.requests:
            self._idle.set()

    async def idle(self, timeout_s: float) -> None:
        """While draining: return when nothing is in flight, at the latest after `timeout_s`."""
        if self.total.requests:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)


class RequestServer:
    """Moves frames between a ROUTER and an answerer; a peer with more than its share in flight is answered `busy`.

    With a `gate`, which the caller has opened and will close, only keys that may enter `domain` can connect.
    `on_denied` hears of requests that were refused for the address that they came from.
    """

    _answerer: Answerer

    def __init__(
        self,
        address: str,
        settings: Settings,
        *,
        program: str,
        port_key: str,
        gate: Gate | None = None,
        domain: str = "memory",
        on_denied: Callable[[Sender, AccessDenied], None] | None = None,
    ) -> None:
        self.started_at_s = time.monotonic()
        self.admission = Admission(settings.limits)
        self._gate = gate
        self._on_denied = on_denied
        self._looking: asyncio.TimerHandle | None = None
        self.router = Router(
            address,
            network=settings.network,
            on_message=self._receive,
            on_malformed=self._malformed,
            on_denied=self._denied,
            program=program,
            port_key=port_key,
            policy=policy_for(settings.network, settings.security) if gate is None else None,
            gate=gate,
            domain=domain,
            batch=settings.limits.receive_batch,
            is_full=self.admission.is_full,
        )

    def __repr__(self) -> str:
        return f"RequestServer({self.router!r}, in_flight={self.admission.total.requests})"

    def bind(self) -> None:
        """Take the address. Raises CannotStart."""
        self.router.bind()

    def start(self, answerer: Answerer) -> None:
        """Begin to answer, on the running loop; what came since `bind` has waited."""
        self._answerer = answerer
        self.router.start()
        if self._gate is not None:
            self._look(self._gate)

    def refuse_more(self) -> None:
        """From now on answer `shutting_down` to whatever comes."""
        self.admission.draining = True

    async def answered(self, timeout_s: float) -> None:
        """After `refuse_more`: wait until all that was accepted is answered, at most `timeout_s`."""
        await self.admission.idle(timeout_s)

    def close(self) -> None:
        """Close the socket; what was sent has half a second to leave. May be called at any time."""
        if self._looking is not None:
            self._looking.cancel()
        self.router.close()

    def figures(self) -> dict[str, Any]:
        """What every program's health_check says of its process and of its requests."""
        return {
            "pid": os.getpid(),
            "uptime_s": time.monotonic() - self.started_at_s,
            "in_flight": self.admission.total.requests,
            "dropped_replies": self.router.dropped,
            "busy_replies": self.admission.busy_replies,
            "draining": self.admission.draining,
        }

    def _look(self, gate: Gate) -> None:
        self._looking = asyncio.get_running_loop().call_later(_LOOK_S, self._look, gate)
        gate.look()

    def _receive(self, peer: bytes, route: Route, body: bytes, sender: Sender) -> None:
        refusal = self.admission.objection(peer)
        if refusal is not None:
            self.router.send(route, self._answerer.refuse(body, refusal))
            return
        answered = counted = False

        def reply(encoded: bytes) -> None:
            nonlocal answered
            answered = True
            if counted:
                self.admission.end(peer, len(body))
            self.router.send(route, encoded)

        self._answerer.handle(body, reply, peer, sender)
        if not answered:
            counted = True
            self.admission.begin(peer, len(body))

    def _malformed(self, route: Route, _peer: bytes, _sender: Sender) -> None:
        self.router.send(route, self._answerer.refuse(b"", InvalidRequest("a request is [empty frame, body]")))

    def _denied(self, route: Route, body: bytes, sender: Sender, error: AccessDenied) -> None:
        if self._on_denied is not None:
            self._on_denied(sender, error)
        self.router.send(route, self._answerer.refuse(body, error))

"""The broadcast: one XPUB socket on which subscribers hear errors, heartbeats and changes of health.

A message is one frame, its topic and then JSON, so that a plain SUB socket with the prefix `ERROR:` gets all errors.
Each carries `boot_id`, which is new with each start of the manager, and `seq`, which counts within its topic. The seq
of an error is its row in the history, and `prev_seq` is the seq of the error broadcast before it: a subscriber that has
last seen less than `prev_seq` has lost something and asks `get_errors`. The manager's own heartbeat carries
`last_error_seq`, so that a loss shows within an interval even when no error follows.

The latest HEARTBEAT and HEALTH of each component are kept, and sent again as they were when somebody subscribes.
A socket cannot send to one subscriber alone: the others see a seq that they have had, and drop it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

import zmq

from memory_system import log
from memory_system.errors import CannotStart
from memory_system.events import ERROR_TOPIC, HEALTH_TOPIC, HEARTBEAT_TOPIC, MAX_EVENT_BYTES, encode_message
from memory_system.router import bind_socket, server_options
from memory_system.security import Gate, is_loopback
from memory_system.settings import SecuritySettings, Settings

logger = log.get_logger("health_manager")

MANAGER: Final = "health_manager"
MAX_COMPONENTS: Final = 1000
# What comes up from subscribers is a byte and a prefix; a peer that sends more is cut off.
MAX_PREFIX_BYTES: Final = 1024
DOMAIN: Final = "bus"
_PORT_S: Final = 0.05  # between two tries to bind a port that was just let go of
BURST_S: Final = 0.05  # last values go out at most once in this time, however many subscribe
_READ_BATCH: Final = 256
_SUBSCRIPTIONS_QUEUED: Final = 64
_MAX_WANTED: Final = 64
# A burst goes out in slices, so that it does not fill the queues of those who keep up.
_SLICE: Final = 200
_SLICE_PAUSE_S: Final = 0.001
_LINGER_MS: Final = 200
_NOBLOCK: Final = int(zmq.NOBLOCK)
_LOOPBACK: Final = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
_KEPT_TOPICS: Final = (HEARTBEAT_TOPIC, HEALTH_TOPIC)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class LastValues:
    """The latest frame of each topic and component; of too many components, the one longest silent goes."""

    def __init__(self, limit: int = MAX_COMPONENTS) -> None:
        self._limit = limit
        self._frames: dict[str, dict[str, bytes]] = {topic: {} for topic in _KEPT_TOPICS}

    @property
    def components(self) -> int:
        return len(set().union(*self._frames.values()))

    def keep(self, topic: str, component: str, frame: bytes) -> None:
        frames = self._frames[topic]
        frames.pop(component, None)  # the order is that of the latest message
        if len(frames) >= self._limit:
            del frames[next(iter(frames))]
        frames[component] = frame

    def forget(self, component: str) -> None:
        for frames in self._frames.values():
            frames.pop(component, None)

    def get(self, topic: str, component: str) -> bytes | None:
        return self._frames[topic].get(component)

    def matching(self, prefixes: Iterable[bytes]) -> list[tuple[str, str]]:
        """Topic and component of what subscribers of these prefixes would have got."""
        wanted = tuple(prefixes)
        return [
            (topic, component)
            for topic, frames in self._frames.items()
            for component, frame in frames.items()
            if frame.startswith(wanted)
        ]


class Broadcaster:
    """Publishes on `address`. Used on the event loop's thread alone; no method blocks.

    A subscriber that does not read loses its own messages once `error_bus.queue_per_subscriber` are waiting for it.
    With a `gate`, only keys that may operate get a connection; `look` is to be called every second or so.
    """

    def __init__(
        self,
        address: str,
        settings: Settings,
        boot_id: str,
        *,
        last_error_seq: int = 0,
        component: str = MANAGER,
        gate: Gate | None = None,
    ) -> None:
        self.address = address
        self.boot_id = boot_id
        self.last_error_seq = last_error_seq
        self.subscriptions = 0
        self._settings = settings
        self._component = component
        self._seqs = dict.fromkeys(_KEPT_TOPICS, 0)
        self._last = LastValues()
        self._counts = {"published": 0, "unpublishable": 0, "ignored_frames": 0}
        self._wanted: set[bytes] = set()
        self._burst: deque[tuple[str, str]] = deque()
        self._burst_at_s = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._scheduled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gate = gate
        self._context: zmq.Context[Any] = zmq.Context() if gate is None else gate.context
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.XPUB)

    def __repr__(self) -> str:
        return f"Broadcaster({self.address}, {self.subscriptions} subscriptions, last error {self.last_error_seq})"

    # -- life -------------------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Raises CannotStart."""
        socket = self._socket
        for option, value in _options(self._settings, self.address).items():
            socket.setsockopt(option, value)
        if self._gate is None:
            for accepted in accept_filters(self._settings.network.bind, self._settings.security):
                socket.setsockopt(zmq.TCP_ACCEPT_FILTER, accepted.encode())
        names = {"program": "health manager", "port_key": "health.publish_port"}
        bind_socket(socket, self.address, **names, gate=self._gate, domain=DOMAIN)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        loop.add_reader(self._socket.fileno(), self._schedule)
        self._schedule()

    def close(self) -> None:
        """Send what is queued if that takes no time, and let go of the port. Closing again does nothing."""
        self._let_go()
        if self._gate is None:
            self._context.term()

    def look(self) -> None:
        """Cut all connections if a key that may have one was revoked: those who may come back at once.

        Who listens is asked for a key when it connects, and never sends anything that could be refused later.
        """
        if self._gate is None or self._socket.closed or not self._gate.has_outstayed(DOMAIN):
            return
        logger.info("subscribers_cut_off", reason="a key that may listen was revoked")
        self._let_go()
        self.subscriptions = 0
        self._begin_again()

    def _begin_again(self) -> None:
        """Bind anew, as soon as libzmq has let go of the port. What is published meanwhile subscribers see as a gap."""
        assert self._loop is not None
        self._timer = None
        self._socket = self._context.socket(zmq.XPUB)
        try:
            self.bind()
        except CannotStart:
            self._socket.close(0)
            self._timer = self._loop.call_later(_PORT_S, self._begin_again)
        else:
            self.start(self._loop)

    def _let_go(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._burst.clear()
        if self._socket.closed:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close()

    # -- publishing -------------------------------------------------------------------------------------------

    def publish_error(self, fields: Mapping[str, Any]) -> None:
        """Broadcast an error, or repeats summed up. `fields["seq"]` is its row in the history; `prev_seq` is set here.

        One that cannot be broadcast leaves a gap, which subscribers close from the history.
        """
        before, self.last_error_seq = self.last_error_seq, max(self.last_error_seq, fields["seq"])
        frame = self._encode(ERROR_TOPIC, {**fields, "prev_seq": before, "boot_id": self.boot_id})
        if frame is not None:
            self._send(frame)

    def publish_heartbeat(self, component: str, fields: Mapping[str, Any]) -> None:
        """Broadcast that a component lives, with its figures; kept as the component's last value."""
        kept = {name: value for name, value in fields.items() if name != "last_error_seq"}
        if component == self._component:
            kept["last_error_seq"] = self.last_error_seq
        self._publish_kept(HEARTBEAT_TOPIC, component, kept)

    def publish_health(self, component: str, fields: Mapping[str, Any]) -> None:
        """Broadcast a component's new state; kept as the component's last value."""
        self._publish_kept(HEALTH_TOPIC, component, fields)

    def forget(self, component: str) -> None:
        """Send nothing of this component to new subscribers any more."""
        self._last.forget(component)

    def figures(self) -> dict[str, int]:
        """Subscriptions as subscribers told of them, components with a last value, and counts since the start."""
        return {"subscriptions": self.subscriptions, "components": self._last.components, **self._counts}

    def _publish_kept(self, topic: str, component: str, fields: Mapping[str, Any]) -> None:
        own = {"component": component, "boot_id": self.boot_id, "seq": self._seqs[topic] + 1}
        frame = self._encode(topic, {"timestamp": time.time(), **fields, **own})
        if frame is not None:
            self._seqs[topic] += 1
            self._last.keep(topic, component, frame)
            self._send(frame)

    def _encode(self, topic: str, fields: Mapping[str, Any]) -> bytes | None:
        try:
            frame = encode_message(topic, fields)
        except (ValueError, TypeError, RecursionError) as error:
            self._counts["unpublishable"] += 1
            logger.warning("not_broadcast", topic=topic, reason=type(error).__name__)
            return None
        if len(frame) > MAX_EVENT_BYTES:
            self._counts["unpublishable"] += 1
            logger.warning("not_broadcast", topic=topic, reason="too large", size=len(frame))
            return None
        return frame

    def _send(self, frame: bytes) -> None:
        if self._socket.closed:
            return
        self._socket.send(frame, _NOBLOCK)  # an XPUB drops for those whose queue is full, and never refuses
        self._counts["published"] += 1
        self._schedule()

    # -- subscriptions ----------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        """Look at the socket soon. The descriptor only signals changes, so every send has to be followed by a look."""
        if not self._scheduled and self._loop is not None:
            self._scheduled = True
            self._loop.call_soon(self._receive)

    def _receive(self) -> None:
        self._scheduled = False
        if self._socket.closed:
            return
        for _ in range(_READ_BATCH):
            try:
                frame = self._socket.recv(_NOBLOCK)
            except zmq.Again:
                return
            self._heard(frame)
        self._schedule()

    def _heard(self, frame: bytes) -> None:
        kind, prefix = frame[:1], frame[1:]
        if kind == b"\x01":
            self.subscriptions += 1
            self._want(prefix)
        elif kind == b"\x00":
            self.subscriptions = max(0, self.subscriptions - 1)
        else:
            self._counts["ignored_frames"] += 1

    def _want(self, prefix: bytes) -> None:
        if not any(topic.startswith(prefix) or prefix.startswith(topic) for topic in map(str.encode, _KEPT_TOPICS)):
            return
        self._wanted.add(prefix)
        if len(self._wanted) > _MAX_WANTED:
            self._wanted = {b""}
        if self._timer is None and self._loop is not None:
            self._timer = self._loop.call_at(max(self._loop.time(), self._burst_at_s + BURST_S), self._send_last_values)

    def _send_last_values(self) -> None:
        assert self._loop is not None
        self._timer = None
        self._burst_at_s = self._loop.time()
        self._burst.extend(self._last.matching(self._wanted))
        self._wanted.clear()
        self._send_slice()

    def _send_slice(self) -> None:
        assert self._loop is not None
        self._timer = None
        for _ in range(min(_SLICE, len(self._burst))):
            # Looked up only now: what was published since the burst began must not be followed by what it replaced.
            frame = self._last.get(*self._burst.popleft())
            if frame is not None:
                self._send(frame)
        if self._burst:
            self._timer = self._loop.call_later(_SLICE_PAUSE_S, self._send_slice)
        elif self._wanted:
            self._timer = self._loop.call_at(self._burst_at_s + BURST_S, self._send_last_values)


def accept_filters(bind: str, security: SecuritySettings) -> list[str]:
    """The networks whose connections an address that others can reach accepts, this host's own among them; empty, for
    all, on loopback.

    An IPv6 socket sees IPv4 peers at ::ffff:a.b.c.d. libzmq would map the address of 10.0.0.0/8 so but not its
    length, and ::ffff:10.0.0.0/8 is everybody: the mapping is done here.
    """
    if is_loopback(bind):
        return []
    allowed = security.insecure_peers if security.allow_insecure else ()
    own = [] if ipaddress.ip_address(bind).is_unspecified else [bind]
    networks: list[Network] = [*_LOOPBACK, *map(ipaddress.ip_network, (*own, *allowed))]
    if ":" in bind:
        return [str(network) if network.version == 6 else _mapped(network) for network in networks]
    return [str(network) for network in networks if network.version == 4]


def _mapped(network: Network) -> str:
    return f"::ffff:{network.network_address}/{96 + network.prefixlen}"


def _options(settings: Settings, address: str) -> dict[int, int]:
    return {
        **server_options(settings.network, address),
        zmq.XPUB_VERBOSER: 1,  # every subscription and every end of one, not only the first and last of a prefix
        zmq.MAXMSGSIZE: MAX_PREFIX_BYTES,
        zmq.SNDHWM: settings.error_bus.queue_per_subscriber,
        zmq.RCVHWM: _SUBSCRIPTIONS_QUEUED,
        zmq.LINGER: _LINGER_MS,
    }

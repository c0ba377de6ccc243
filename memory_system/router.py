"""A ROUTER socket on the event loop: options, bounded reading, sends that never block. It knows no protocol.

    router = Router(address, network=settings.network, on_message=receive, program="planner", port_key="network.port")
    router.bind()
    router.start()

The backlog stays inside ZeroMQ, which queues fairly over the peers: at most `batch` messages are read before others
get their turn, and none while `is_full()`. A peer that does not read loses its replies and asks again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import zmq

from memory_system import protocol
from memory_system.connections import IO_THREADS, LEDGER
from memory_system.errors import AccessDenied, CannotStart
from memory_system.log import get_logger
from memory_system.security import Gate, PeerPolicy
from memory_system.settings import NetworkSettings

log = get_logger("router")

Route = list[bytes]


class Sender(NamedTuple):
    """Where a message came from: an IP address, empty where all peers are of this machine, and the key's User-Id."""

    address: str
    user_id: str | None


OnMessage = Callable[[bytes, Route, bytes, Sender], None]
OnMalformed = Callable[[Route, bytes, Sender], None]
OnDenied = Callable[[Route, bytes, Sender, AccessDenied], None]

_LOCAL: Final = Sender("", None)
# Plain integers: pyzmq's flags are enums, whose arithmetic costs microseconds, and so do its multipart helpers.
_NOBLOCK: Final = int(zmq.NOBLOCK)
_NOBLOCK_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_MAX_TTL_MS: Final = 6_553_500  # the wire has 16 bits of deciseconds for it
_LINGER_MS: Final = 500
_TURN_S: Final = 0.002  # replies and results wait no longer for what is read
# A message of more parts is none of ours. What comes beyond is dropped, so many at a time: others get their turn.
_MAX_PARTS: Final = 16
_PARTS_AT_ONCE: Final = 256


def server_options(network: NetworkSettings, address: str) -> dict[int, int]:
    """Options of any socket that binds: bounded messages and queues, peers that vanish or never speak are cut off."""
    heartbeat_ms = int(network.heartbeat_s * 1000)
    return {
        zmq.MAXMSGSIZE: protocol.SOCKET_MAX_MESSAGE_BYTES,
        zmq.RCVHWM: network.queue_per_client,
        zmq.SNDHWM: network.queue_per_client,
        zmq.HANDSHAKE_IVL: int(network.handshake_s * 1000),
        zmq.HEARTBEAT_IVL: heartbeat_ms,
        zmq.HEARTBEAT_TIMEOUT: 2 * heartbeat_ms,
        zmq.HEARTBEAT_TTL: min(3 * heartbeat_ms, _MAX_TTL_MS),
        zmq.TCP_KEEPALIVE: 1,
        zmq.TCP_KEEPALIVE_IDLE: 60,
        zmq.TCP_KEEPALIVE_INTVL: 15,
        zmq.TCP_KEEPALIVE_CNT: 4,
        zmq.BACKLOG: network.backlog,
        zmq.LINGER: _LINGER_MS,
        zmq.IPV6: int("[" in address),
    }


def bind_socket(
    socket: zmq.Socket[bytes],
    address: str,
    *,
    program: str,
    port_key: str,
    gate: Gate | None = None,
    domain: str = "",
) -> None:
    """Bind, or raise CannotStart with what to do; `port_key` is the setting that the port came from.

    With a `gate`, in whose context the socket is, only keys that may enter `domain` come in; strangers were tried.
    """
    if gate is not None:
        gate.protect(socket, domain)
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        hint = f"is another {program} running? Stop it, or set {port_key}"
        if error.errno != zmq.EADDRINUSE:
            hint = f"see network.bind and {port_key}"
        raise CannotStart(f"cannot listen on {address}: {error.strerror}; {hint}") from None
    if gate is not None:
        gate.verify(socket)


def sender_of(frame: zmq.Frame) -> Sender:
    """Who sent a received frame; what libzmq does not know is the address "unknown", or no User-Id."""
    return Sender(_property(frame, "Peer-Address") or "unknown", _property(frame, "User-Id") or None)


def _property(frame: zmq.Frame, name: str) -> str:
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        return ""


def split(frames: list[bytes]) -> tuple[Route, bytes | None]:
    """The way back (all frames up to the empty one) and the body; None when there is not exactly one body."""
    if len(frames) == 3 and not frames[1]:
        return frames[:2], frames[2]
    if b"" not in frames[1:]:
        return frames[:1], None
    end = frames.index(b"", 1)
    return frames[: end + 1], frames[end + 1] if len(frames) == end + 2 else None


class Incoming:
    """Reads the messages of a socket. One of very many parts is read over several turns, and comes as its first part.

    `own` parts in front are the socket's (a ROUTER's peer), not the sender's.
    """

    __slots__ = ("_first", "_own", "_socket")

    def __init__(self, socket: zmq.Socket[bytes], own: int = 0) -> None:
        self._socket = socket
        self._own = own
        self._first: bytes | None = None  # of a message that is being dropped

    def read(self) -> tuple[list[bytes], zmq.Frame] | None:
        """The next message and its last part; None: not to its end yet. Raises zmq.Again when there is none."""
        frames: list[bytes] = []
        for _ in range(_PARTS_AT_ONCE if self._first is not None else _MAX_PARTS):
            try:
                frame = self._socket.recv(_NOBLOCK, copy=False)
            except zmq.Again:
                LEDGER.nothing_left()
                raise
            frames.append(frame.bytes)
            if not frame.more:
                self._note(frame, frames)
                if self._first is not None:
                    frames, self._first = [self._first], None
                return frames, frame
        self._note(frame, frames)
        if self._first is None:
            self._first = frames[0]
        return None

    def _note(self, last: zmq.Frame, frames: list[bytes]) -> None:
        peer = (self._first or frames[0]) if self._own else b""
        LEDGER.note(last, frames[self._own :] if self._first is None else frames, peer)


class Router:
    """Receives `[peer, ..., empty, body]` and sends along the same way.

    `on_message(peer, route, body, sender)` gets each body; `route` is what `send` takes to answer it. Of the `sender`
    the address is known where a `policy` or a `gate` is given, the key where a `gate` is: looking them up costs time.
    `on_malformed(route, peer, sender)` hears of messages of another shape, `on_denied(route, body, sender, error)` of
    those that the policy does not let in; without them such messages are only counted.
    With a `gate`, which the caller has opened and will close, only keys that may enter `domain` can connect.
    `options` are laid over `server_options`. With a `context` of the caller's, the caller ends it.
    """

    def __init__(
        self,
        address: str,
        *,
        network: NetworkSettings,
        on_message: OnMessage,
        program: str,
        port_key: str,
        policy: PeerPolicy | None = None,
        on_malformed: OnMalformed | None = None,
        on_denied: OnDenied | None = None,
        batch: int = 64,
        is_full: Callable[[], bool] | None = None,
        options: dict[int, int] | None = None,
        context: zmq.Context[Any] | None = None,
        gate: Gate | None = None,
        domain: str = "memory",
    ) -> None:
        self.address = address
        self.dropped = self.malformed = self.denied = 0
        self._program = program
        self._port_key = port_key
        self._policy = policy
        self._on_message = on_message
        self._on_malformed = on_malformed
        self._on_denied = on_denied
        self._batch = batch
        self._is_full = is_full
        self._gate = gate
        self._domain = domain
        if gate is not None:
            context = gate.context
        self._own_context: zmq.Context[Any] | None = None if context is not None else zmq.Context(IO_THREADS)
        self._socket: zmq.Socket[bytes] = (context or self._own_context).socket(zmq.ROUTER)  # type: ignore[union-attr]
        for option, value in {**server_options(network, address), zmq.ROUTER_MANDATORY: 1, **(options or {})}.items():
            self._socket.setsockopt(option, value)
        self._incoming = Incoming(self._socket, own=1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False

    def __repr__(self) -> str:
        state = "closed" if self._socket.closed else "idle" if self._loop is None else "serving"
        return f"Router({self.address}, {state}, dropped={self.dropped})"

    def bind(self) -> None:
        """Take the address; peers may connect and wait from now on. Raises CannotStart."""
        where = {"program": self._program, "port_key": self._port_key}
        bind_socket(self._socket, self.address, **where, gate=self._gate, domain=self._domain)

    def start(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Begin to read, on this loop (default: the running one)."""
        self._loop = loop or asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self.schedule)
        self.schedule()

    def schedule(self) -> None:
        """Look at the socket soon. The descriptor only signals changes, so every send has to be followed by a look.

        To be called as well when `is_full` has become false.
        """
        if not self._scheduled and self._loop is not None:
            self._scheduled = True
            self._loop.call_soon(self._receive)

    def send(self, route: Route, body: bytes) -> bool:
        """Send without ever blocking; False when the peer has gone or does not read, which is counted in `dropped`."""
        try:
            for frame in route:
                self._socket.send(frame, _NOBLOCK_MORE)
            self._socket.send(body, _NOBLOCK)
        except zmq.ZMQError as error:  # EHOSTUNREACH, EAGAIN, or we have closed
            self.dropped += 1
            log.debug("reply_dropped", reason=error.strerror, dropped=self.dropped)
            return False
        finally:
            self.schedule()
        return True

    def close(self) -> None:
        """Stop reading and close; what was sent has half a second to leave. May be called at any time."""
        if self._loop is not None and not self._socket.closed:
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        if self._own_context is not None:
            self._own_context.term()

    def _receive(self) -> None:
        if self._socket.closed:
            return
        again = True  # if the receiver fails at one message, those behind it are still to be read
        try:
            again = self._drain()  # which looks after each reply that it sends, so none of them schedules another
        finally:
            self._scheduled = False
            if again:
                self.schedule()

    def _drain(self) -> bool:
        """Read at most a batch, for a short time; whether there may be more to read now."""
        ends_s = time.monotonic() + _TURN_S
        for _ in range(self._batch):
            if time.monotonic() > ends_s:
                break
            if self._is_full is not None and self._is_full():
                return False  # each reply is followed by another look
            try:
                message = self._incoming.read()
            except zmq.Again:
                return False
            if message is not None:
                frames, last = message
                self._deliver(frames, self._sender_of(last))
        return True

    def _sender_of(self, frame: zmq.Frame) -> Sender:
        if self._gate is not None:
            return sender_of(frame)
        return _LOCAL if self._policy is None else Sender(_property(frame, "Peer-Address") or "unknown", None)

    def _deliver(self, frames: list[bytes], sender: Sender) -> None:
        route, body = split(frames)
        if body is None:
            self.malformed += 1
            if self._on_malformed is not None:
                self._on_malformed(route, frames[0], sender)
            return
        if self._policy is not None:
            try:
                self._policy.check(sender.address)
            except AccessDenied as error:
                self.denied += 1
                if self._on_denied is not None:
                    self._on_denied(route, body, sender, error)
                return
        self._on_message(frames[0], route, body, sender)

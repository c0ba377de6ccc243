"""A ROUTER socket on the event loop: options, bounded reading, sends that never block. It knows no protocol.

    router = Router(address, network=settings.network, on_message=receive, program="planner", port_key="network.port")
    router.bind()
    router.start()

The backlog stays inside ZeroMQ, which queues fairly over the peers: at most `batch` messages are read before others
get their turn, and none while `is_full()`. A peer that does not read loses its replies and asks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import zmq

from memory_system import protocol
from memory_system.errors import AccessDenied, CannotStart
from memory_system.log import get_logger
from memory_system.security import PeerPolicy
from memory_system.settings import NetworkSettings

log = get_logger("router")

Route = list[bytes]
OnMessage = Callable[[bytes, Route, bytes, str], None]
OnMalformed = Callable[[Route, bytes, str], None]
OnDenied = Callable[[Route, bytes, str, AccessDenied], None]

# Plain integers: pyzmq's flags are enums, whose arithmetic costs microseconds, and so do its multipart helpers.
_NOBLOCK: Final = int(zmq.NOBLOCK)
_NOBLOCK_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_MAX_TTL_MS: Final = 6_553_500  # the wire has 16 bits of deciseconds for it
_LINGER_MS: Final = 500


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


def bind_socket(socket: zmq.Socket[bytes], address: str, *, program: str, port_key: str) -> None:
    """Bind, or raise CannotStart with what to do; `port_key` is the setting that the port came from."""
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        hint = f"is another {program} running? Stop it, or set {port_key}"
        if error.errno != zmq.EADDRINUSE:
            hint = f"see network.bind and {port_key}"
        raise CannotStart(f"cannot listen on {address}: {error.strerror}; {hint}") from None


def split(frames: list[bytes]) -> tuple[Route, bytes | None]:
    """The way back (all frames up to the empty one) and the body; None when there is not exactly one body."""
    if len(frames) == 3 and not frames[1]:
        return frames[:2], frames[2]
    if b"" not in frames[1:]:
        return frames[:1], None
    end = frames.index(b"", 1)
    return frames[: end + 1], frames[end + 1] if len(frames) == end + 2 else None


class Router:
    """Receives `[peer, ..., empty, body]` and sends along the same way.

    `on_message(peer, route, body, address)` gets each body; `route` is what `send` takes to answer it. `address` is the
    sender's IP address where a `policy` is given, else empty: looking it up costs a microsecond.
    `on_malformed(route, peer, address)` hears of messages of another shape, `on_denied(route, body, address, error)` of
    those that the policy does not let in; without them such messages are only counted.
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
        self._context = context
        self._own_context: zmq.Context[Any] | None = None if context is not None else zmq.Context()
        self._socket: zmq.Socket[bytes] = (context or self._own_context).socket(zmq.ROUTER)  # type: ignore[union-attr]
        for option, value in {**server_options(network, address), zmq.ROUTER_MANDATORY: 1, **(options or {})}.items():
            self._socket.setsockopt(option, value)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False

    def __repr__(self) -> str:
        state = "closed" if self._socket.closed else "idle" if self._loop is None else "serving"
        return f"Router({self.address}, {state}, dropped={self.dropped})"

    def bind(self) -> None:
        """Take the address; peers may connect and wait from now on. Raises CannotStart."""
        bind_socket(self._socket, self.address, program=self._program, port_key=self._port_key)

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
        self._scheduled = False
        if self._socket.closed:
            return
        try:
            again = self._drain()
        except BaseException:
            self.schedule()  # the receiver failed at one message; those behind it are still to be read
            raise
        if again:
            self.schedule()

    def _drain(self) -> bool:
        """Read at most a batch; whether there may be more to read now."""
        for _ in range(self._batch):
            if self._is_full is not None and self._is_full():
                return False  # each reply is followed by another look
            try:
                frames, address = self._read()
            except zmq.Again:
                return False
            self._deliver(frames, address)
        return True

    def _read(self) -> tuple[list[bytes], str]:
        """The next message and, where it matters, its sender's address; raises zmq.Again when there is none."""
        frame = self._socket.recv(_NOBLOCK, copy=False)
        frames = [frame.bytes]
        while frame.more:
            frame = self._socket.recv(_NOBLOCK, copy=False)
            frames.append(frame.bytes)
        if self._policy is None:
            return frames, ""
        try:
            return frames, str(frame.get("Peer-Address"))
        except zmq.ZMQError:
            return frames, "unknown"

    def _deliver(self, frames: list[bytes], address: str) -> None:
        route, body = split(frames)
        if body is None:
            self.malformed += 1
            if self._on_malformed is not None:
                self._on_malformed(route, frames[0], address)
            return
        if self._policy is not None:
            try:
                self._policy.check(address)
            except AccessDenied as error:
                self.denied += 1
                if self._on_denied is not None:
                    self._on_denied(route, body, address, error)
                return
        self._on_message(frames[0], route, body, address)

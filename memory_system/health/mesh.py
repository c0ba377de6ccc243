"""The SUB socket that PUB sockets of the mesh connect to. Best effort: what comes is read as fast as it can be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import zmq

from memory_system.errors import AccessDenied
from memory_system.events import ERROR_TOPIC, MAX_EVENT_BYTES
from memory_system.router import Incoming, Sender, bind_socket, sender_of, server_options
from memory_system.security import Gate, PeerPolicy
from memory_system.settings import NetworkSettings

# Frames; the sender, known where there is a policy or a gate; the name of its key.
Message = tuple[list[bytes], Sender, str | None]

# A PUB drops what does not fit at once, so what a storm needs has to be kept on this side.
QUEUED: Final = 10_000
# Larger frames cut the connection; those between get an event about their sender.
MAX_FRAME_BYTES: Final = 4 * MAX_EVENT_BYTES
BATCH: Final = 200
LOOK_S: Final = 1.0

DOMAIN: Final = "ingest"
_NOBODY: Final = Sender("", None)


class MeshSubscriber:
    """Reads `ERROR:` messages on the event loop; `on_messages` gets up to BATCH at a time.

    A SUB that binds tells a new publisher what it wants only when its own thread touches the socket, and until then
    the publisher drops everything. The descriptor signals that, and a look every second makes it certain.
    """

    def __init__(
        self,
        address: str,
        *,
        network: NetworkSettings,
        on_messages: Callable[[list[Message]], None],
        is_full: Callable[[], bool],
        policy: PeerPolicy | None = None,
        gate: Gate | None = None,
    ) -> None:
        self.address = address
        self.denied = 0
        self._on_messages = on_messages
        self._is_full = is_full
        self._policy = policy
        self._gate = gate
        self._context: zmq.Context[Any] = zmq.Context() if gate is None else gate.context
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.SUB)
        own: dict[int, int] = {zmq.RCVHWM: QUEUED, zmq.MAXMSGSIZE: MAX_FRAME_BYTES, zmq.LINGER: 0}
        for option, value in {**server_options(network, address), **own}.items():
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.SUBSCRIBE, ERROR_TOPIC.encode())
        self._incoming = Incoming(self._socket)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._scheduled = False

    def __repr__(self) -> str:
        state = "closed" if self._socket.closed else "idle" if self._loop is None else "reading"
        return f"MeshSubscriber({self.address}, {state})"

    def bind(self) -> None:
        """Take the address. Raises CannotStart."""
        names = {"program": "health manager", "port_key": "health.mesh_port"}
        bind_socket(self._socket, self.address, **names, gate=self._gate, domain=DOMAIN)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to read, on this loop."""
        self._loop = loop
        loop.add_reader(self._socket.fileno(), self.schedule)
        self._look()

    def schedule(self) -> None:
        """Look at the socket soon; to be called as well when `is_full` has become false."""
        if not self._scheduled and self._loop is not None:
            self._scheduled = True
            self._loop.call_soon(self._receive)

    def stop(self) -> None:
        """Read no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._loop is not None and not self._socket.closed:
            self._loop.remove_reader(self._socket.fileno())
        self._loop = None

    def close(self) -> None:
        """May be called at any time."""
        self.stop()
        self._socket.close()
        if self._gate is None:
            self._context.term()

    def _look(self) -> None:
        assert self._loop is not None
        self.schedule()
        self._timer = self._loop.call_later(LOOK_S, self._look)

    def _receive(self) -> None:
        self._scheduled = False
        if self._loop is None:
            return
        self._socket.getsockopt(zmq.EVENTS)  # new publishers are told what is wanted here, even while nothing is read
        if self._is_full():
            return
        messages: list[Message] = []
        for _ in range(BATCH):
            try:
                message = self._read()
            except zmq.Again:
                break
            if message is not None:
                messages.append(message)
        else:
            self.schedule()
        if messages:
            self._on_messages(messages)

    def _read(self) -> Message | None:
        """The next message, None for one that the policy does not let in; raises zmq.Again when there is none."""
        read = self._incoming.read()
        if read is None:
            return None
        frames, frame = read
        if self._policy is None and self._gate is None:
            return frames, _NOBODY, None
        sender, name = sender_of(frame), None
        try:
            if self._gate is not None:
                name = self._gate.identity(sender.user_id).name  # it may have been revoked since it connected
            elif self._policy is not None:
                self._policy.check(sender.address)
        except AccessDenied:
            self.denied += 1
            return None
        return frames, sender, name

"""The start-up test of a socket: strangers connect to it over TCP, as they would, and must be refused."""

from __future__ import annotations

import math
import time
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from memory_system import keys
from memory_system.errors import CannotStart

_TIMEOUT_S: Final = 10.0
# Which sockets may knock at which.
_OPPOSITES: Final[dict[int, int]] = {
    zmq.ROUTER: zmq.DEALER,
    zmq.REP: zmq.REQ,
    zmq.XPUB: zmq.SUB,
    zmq.PUB: zmq.SUB,
    zmq.SUB: zmq.PUB,
    zmq.XSUB: zmq.PUB,
    zmq.PULL: zmq.PUSH,
}
_EVERY_ADDRESS: Final = {"tcp://0.0.0.0:": "tcp://127.0.0.1:", "tcp://[::]:": "tcp://[::1]:"}
_LET_IN: Final = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
_REFUSED: Final = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
_MISMATCH: Final = int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
_CLOSED: Final = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
# A caller without a key may be hung up on before it has read why; so often is an answer too.
_CLOSED_OFTEN: Final = 10
_RETRY_MS: Final = 10


def endpoint(socket: zmq.Socket[Any]) -> str:
    """Where a bound socket is reached from this host."""
    bound: str = socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]
    for every, one in _EVERY_ADDRESS.items():
        if bound.startswith(every):
            return one + bound[len(every) :]
    return bound


def check_refused(socket: zmq.Socket[Any], stranger: keys.KeyFile | None) -> None:
    """Raise CannotStart unless a peer with this key (None: none) is refused by a bound socket."""
    address = endpoint(socket)
    context: zmq.Context[Any] = zmq.Context()
    peer = context.socket(_OPPOSITES[socket.getsockopt(zmq.TYPE)])  # type: ignore[index]
    monitor = peer.get_monitor_socket(_LET_IN | _REFUSED | _MISMATCH | _CLOSED)
    try:
        peer.setsockopt(zmq.LINGER, 0)
        peer.setsockopt(zmq.RECONNECT_IVL, _RETRY_MS)
        peer.setsockopt(zmq.IPV6, int("[" in address))
        keys.apply_client(peer, stranger)
        peer.connect(address)
        event = _verdict(monitor, _MISMATCH if stranger is None else None)
    finally:
        peer.disable_monitor()
        monitor.close()
        peer.close()
        context.term()
    who = "a caller without a key" if stranger is None else "a caller with an unknown key"
    if event == _LET_IN:
        raise CannotStart(f"{address} lets in {who}; this is a defect, and the program does not start with it")
    if event != (_MISMATCH if stranger is None else _REFUSED):
        raise CannotStart(f"{address} did not answer {who}: is the authenticator running?")


def _verdict(monitor: zmq.Socket[Any], closed_means: int | None) -> int | None:
    """What the handshake ended with, None when it had no end; `closed_means`: so does hanging up, time and again."""
    ends_s = time.monotonic() + _TIMEOUT_S
    closed = 0
    while (left_s := ends_s - time.monotonic()) > 0 and (closed < _CLOSED_OFTEN or closed_means is None):
        if monitor.poll(math.ceil(left_s * 1000.0)):
            event = int(recv_monitor_message(monitor)["event"])
            if event != _CLOSED:
                return event
            closed += 1
    return closed_means if closed else None

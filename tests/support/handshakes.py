"""What becomes of a connection: in, refused, or neither, as libzmq tells the one who connects.

assert knock(endpoint, key) == IN
"""

from __future__ import annotations

import time
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from memory_system.keys import KeyFile, apply_client

IN, REFUSED, OTHER_MECHANISM, CLOSED, NOTHING = "in", "refused", "other mechanism", "closed", "nothing"
_RESULTS = {
    int(zmq.EVENT_HANDSHAKE_SUCCEEDED): IN,
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): REFUSED,
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): OTHER_MECHANISM,
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): CLOSED,
}


def knock(endpoint: str, key: KeyFile | None, kind: int = zmq.DEALER, *, timeout_s: float = 30.0) -> str:
    """Connect once with this key and wait for the end of the handshake. CLOSED counts when it happens three times: a
    peer that hangs up says nothing of why."""
    context: zmq.Context[Any] = zmq.Context()
    peer = context.socket(kind)
    monitor = peer.get_monitor_socket(sum(_RESULTS))
    try:
        peer.setsockopt(zmq.LINGER, 0)
        peer.setsockopt(zmq.RECONNECT_IVL, 10)
        peer.setsockopt(zmq.IPV6, 1)
        apply_client(peer, key)
        peer.connect(endpoint)
        return _result(monitor, time.monotonic() + timeout_s)
    finally:
        peer.disable_monitor()
        monitor.close()
        peer.close()
        context.term()


def _result(monitor: zmq.Socket[Any], ends_s: float) -> str:
    closed = 0
    while (left_s := ends_s - time.monotonic()) > 0:
        if not monitor.poll(int(left_s * 1000) + 1):
            break
        result = _RESULTS[int(recv_monitor_message(monitor)["event"])]
        closed += result == CLOSED
        if result != CLOSED or closed == 3:
            return result
    return CLOSED if closed else NOTHING

"""Sockets of a reader of the error bus: the subscription with its monitor, and the questions to the history."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

import zmq

from memory_system.errors import AccessDenied, InvalidReply, Unreachable, from_reply
from memory_system.keys import KeyFile, apply_client

ASK_S: Final = 2.0
_QUEUED: Final = 10_000
_MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
_NOBLOCK: Final = int(zmq.NOBLOCK)
_CONNECTED: Final = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
_LOST: Final = int(zmq.EVENT_DISCONNECTED)
_REFUSED: Final = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
_OTHER_MECHANISM: Final = int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
_BROKEN_OFF: Final = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]
_monitor_numbers = itertools.count()


class Subscription:
    """A SUB socket, and the monitor that tells when it is connected and when no more."""

    def __init__(self, context: Context, endpoint: str, *topics: str, key: KeyFile | None = None) -> None:
        self.endpoint = endpoint
        self.is_broken_off = False  # while the other side hangs up in the middle of the handshake
        self._key = key
        self.socket = connected(context, zmq.SUB, None, key)
        self.monitor = context.socket(zmq.PAIR)
        self.monitor.setsockopt(zmq.RCVHWM, 0)
        address = f"inproc://bus-connection-{next(_monitor_numbers)}"
        self.socket.monitor(address, _CONNECTED | _LOST | _REFUSED | _OTHER_MECHANISM | _BROKEN_OFF)
        self.monitor.connect(address)
        for topic in topics:
            self.socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
        self.socket.connect(endpoint)

    def changes(self) -> Iterator[bool]:
        """What happened to the connection since the last look: True for up, False for lost.

        Raises AccessDenied when this reader is not let in: its socket would not try again by itself.
        """
        while self.monitor.poll(0):
            (event, _) = struct.unpack("=hi", self.monitor.recv_multipart(_NOBLOCK)[0])
            if event in (_REFUSED, _OTHER_MECHANISM):
                raise AccessDenied(self._refusal(event))
            if event == _BROKEN_OFF:
                self.is_broken_off = True
            elif event == _CONNECTED:
                self.is_broken_off = False
            yield event == _CONNECTED

    def _refusal(self, event: int) -> str:
        if event == _OTHER_MECHANISM and self._key is None:
            return f"{self.endpoint} lets in nobody without a key: name its file (MEMORY_KEY_FILE, or --key)"
        if self._key is None or event == _OTHER_MECHANISM:
            return f"{self.endpoint} and this reader do not agree on how to encrypt: is it a port of the error bus?"
        return (
            f"{self.endpoint} does not let in the key of {self._key.name}: it has to be known there, not revoked, "
            "and its role operator or admin"
        )

    def receive(self) -> bytes | None:
        """The next message, None when there is none."""
        try:
            return self.socket.recv_multipart(_NOBLOCK)[0]
        except zmq.Again:
            return None

    def close(self) -> None:
        # The monitor ends before its reader does, else an event without a reader blocks the I/O thread.
        with contextlib.suppress(zmq.ZMQError):
            self.socket.monitor(None, 0)
        self.monitor.close(0)
        self.socket.close(0)


class Api:
    """One question at a time to the manager's API; the reply is looked for, never waited for."""

    def __init__(self, context: Context, endpoint: str, key: KeyFile | None = None) -> None:
        self._context = context
        self._endpoint = endpoint
        self._key = key
        self._request_id: str | None = None
        self.answer_until_s = math.inf
        self.socket = connected(context, zmq.DEALER, endpoint, key)

    @property
    def waits(self) -> bool:
        return self._request_id is not None

    def ask(self, data: Mapping[str, Any], now_s: float) -> None:
        self._request_id = os.urandom(16).hex()
        self.answer_until_s = now_s + ASK_S
        request = {"v": 1, "action": "get_errors", "data": data, "request_id": self._request_id}
        self.socket.send_multipart([b"", json.dumps(request).encode()], _NOBLOCK)

    def answer(self, now_s: float) -> dict[str, Any] | None:
        """The reply, None while there is none. Raises Unreachable when it is overdue, InvalidReply, or its error."""
        while self.socket.poll(0):
            reply = _decode(self.socket.recv_multipart(_NOBLOCK)[-1])
            if reply.get("request_id", self._request_id) != self._request_id:
                continue
            self._request_id = None
            if reply["status"] != "success":
                raise from_reply(reply)
            return reply
        if now_s < self.answer_until_s:
            return None
        self._request_id = None
        # A new socket: what is queued in the old one must not be sent when the manager comes back.
        self.socket.close(0)
        self.socket = connected(self._context, zmq.DEALER, self._endpoint, self._key)
        raise Unreachable(f"no answer from {self._endpoint}")


def connected(context: Context, kind: int, endpoint: str | None, key: KeyFile | None = None) -> Socket:
    """A socket with the options of a caller, connected if there is an endpoint."""
    socket = context.socket(kind)
    options = {
        zmq.LINGER: 0,
        zmq.RCVHWM: _QUEUED,
        zmq.MAXMSGSIZE: _MAX_MESSAGE_BYTES,
        zmq.IPV6: 1,
        zmq.CONNECT_TIMEOUT: 3000,
        zmq.HANDSHAKE_IVL: 3000,
        zmq.RECONNECT_IVL: 100,
        zmq.RECONNECT_IVL_MAX: 1000,
        zmq.HEARTBEAT_IVL: 3000,
        zmq.HEARTBEAT_TIMEOUT: 6000,
    }
    for option, value in options.items():
        socket.setsockopt(option, value)
    apply_client(socket, key)
    if endpoint is not None:
        socket.connect(endpoint)
    return socket


def _decode(body: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict) or reply.get("status") not in ("success", "error"):
        raise InvalidReply("the reply is not a JSON object with a status")
    return reply

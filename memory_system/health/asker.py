"""Asks one program for health_check over a connection that stays, and turns its answers into signs of life."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import zmq

from memory_system import protocol
from memory_system.errors import InvalidReply
from memory_system.health.life import Sign
from memory_system.keys import KeyFile, apply_client

# Requests that a program may owe an answer to: a slow one must not find a queue of questions.
MAX_OPEN: Final = 3
# A socket whose key was once refused never connects again: one without a connection is made anew after so long.
ANEW_S: Final = 5.0
_NOBLOCK: Final = int(zmq.NOBLOCK)
_RESERVED: Final = protocol.RESERVED_REPLY_FIELDS | {"state", "pid"}


@dataclass(frozen=True, slots=True)
class _Question:
    asked_s: float
    is_alone: bool


class Asker:
    """A DEALER on the event loop. `on_sign(sign)` gets every answer, however late; times are monotonic seconds."""

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        on_sign: Callable[[Sign], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        key: KeyFile | None = None,
    ) -> None:
        self._context = context
        self._endpoint = endpoint
        self._on_sign = on_sign
        self._key = key
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._heard_s = float("-inf")
        self._open: dict[str, _Question] = {}
        self._socket: zmq.Socket[bytes] | None = None
        self._blocked_s: float | None = None  # since when nothing could be sent

    def __repr__(self) -> str:
        return f"Asker({self._endpoint}, {'closed' if self._socket is None else f'{len(self._open)} open'})"

    def ask(self, patience_s: float) -> bool:
        """Ask; False when it was not sent: there is no connection, or the program owes too many answers.

        When answers are owed and none has come for `patience_s`, they are taken for lost, and the connection with them.
        """
        now_s = self._clock()
        if len(self._open) >= MAX_OPEN:
            oldest_s = min(question.asked_s for question in self._open.values())
            if now_s - max(oldest_s, self._heard_s) < patience_s:
                return False
            self.close()
        socket = self._socket or self._connect()
        request_id = protocol.new_request_id()
        body = protocol.encode_request({"v": protocol.VERSION, "action": "health_check", "request_id": request_id})
        try:
            socket.send_multipart([b"", body], _NOBLOCK)
        except zmq.Again:
            self._blocked(now_s)
            return False
        self._blocked_s = None
        self._open[request_id] = _Question(now_s, is_alone=not self._open)
        self._loop.call_soon(self.drain)  # a send may swallow the signal that something came
        return True

    def drain(self) -> None:
        """Take what has come."""
        while self._socket is not None:
            try:
                frames = self._socket.recv_multipart(_NOBLOCK)
            except zmq.Again:
                return
            self._heard_s = self._clock()
            self._on_sign(self._sign(frames[-1]))

    def close(self) -> None:
        """Drop the connection and what is owed on it; the next `ask` makes a new one."""
        self._open.clear()
        self._blocked_s = None
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close(0)
            self._socket = None

    def _blocked(self, now_s: float) -> None:
        if self._blocked_s is None:
            self._blocked_s = now_s
        elif now_s - self._blocked_s >= ANEW_S:
            self.close()

    def _connect(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        # Without a connection nothing is sent: a program that starts later is not met by old questions.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 3000)
        socket.setsockopt(zmq.MAXMSGSIZE, protocol.SOCKET_MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.IPV6, int("[" in self._endpoint))
        apply_client(socket, self._key)
        socket.connect(self._endpoint)
        self._loop.add_reader(socket.fileno(), self.drain)
        self._socket = socket
        return socket

    def _sign(self, body: bytes) -> Sign:
        try:
            reply = protocol.decode_reply(body)
        except InvalidReply:
            return Sign("degraded", figures=_instead("unreadable"))
        question = self._open.pop(str(reply.get("request_id")), None)
        # A question that stood behind another waited for that one too: only one asked alone is timed.
        is_timed = question is not None and question.is_alone
        latency_ms = (self._clock() - question.asked_s) * 1000.0 if question is not None and is_timed else None
        if reply["status"] == "error":
            code = str(reply.get("error_code"))
            state = "stopping" if code == "shutting_down" else "degraded"
            return Sign(state, latency_ms=latency_ms, figures=_instead(code))
        pid = reply.get("pid")
        figures = {name: value for name, value in reply.items() if name not in _RESERVED}
        return Sign(
            state=str(reply.get("state", "healthy")),
            pid=pid if isinstance(pid, int) and not isinstance(pid, bool) and pid > 0 else None,
            latency_ms=latency_ms,
            figures=figures,
        )


def _instead(answer: str) -> dict[str, Any]:
    """What is shown when health_check was answered, but not with figures."""
    return {"readiness": {"health_check": answer}}

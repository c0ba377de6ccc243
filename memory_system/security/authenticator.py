"""Who may connect: answers libzmq's questions about keys (ZAP, https://rfc.zeromq.org/spec/27/) in a thread of its own.

A handshake waits for this thread alone, however busy the event loop is. One for each ZeroMQ context: libzmq asks at a
fixed address of the context. While nobody answers there, sockets with an enforced domain let nobody in.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import zmq
from zmq.utils import z85

from memory_system.errors import CannotStart
from memory_system.log import get_logger

log = get_logger("security")

LOOK_S: Final = 1.0
_ENDPOINT: Final = "inproc://zeromq.zap.01"
_VERSION: Final = b"1.0"
_REQUEST_FRAMES: Final = 6  # before the credentials
_KEY_BYTES: Final = 32
_JOIN_S: Final = 5.0

# (domain, public key) -> whether it is let in
LetsIn = Callable[[str, str], bool]
# (domain, IP address, public key)
OnRefused = Callable[[str, str, str], None]


class Authenticator:
    """`lets_in` is asked for each connection, `look` called every second, `on_refused` told; all in the thread."""

    def __init__(
        self, context: zmq.Context[Any], lets_in: LetsIn, *, look: Callable[[], object], on_refused: OnRefused
    ) -> None:
        self.accepted = self.refused = self.failures = 0
        self._context = context
        self._lets_in = lets_in
        self._look = look
        self._on_refused = on_refused
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        state = "alive" if self.is_alive() else "dead"
        return f"Authenticator({state}, accepted={self.accepted}, refused={self.refused})"

    def start(self) -> None:
        """Begin to answer; again after the thread has died. Raises CannotStart."""
        socket = self._context.socket(zmq.REP)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(_ENDPOINT)
        except zmq.ZMQError as error:
            socket.close()
            raise CannotStart(f"the authenticator cannot start: {error.strerror}") from None
        self._thread = threading.Thread(target=self._run, args=(socket,), name="authenticator", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end of the thread, which comes with that of the context."""
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _run(self, socket: zmq.Socket[bytes]) -> None:
        try:
            self._serve(socket)
        except zmq.ContextTerminated:
            pass
        except BaseException as error:  # what ends the thread is told, and `is_alive` shows it
            log.critical("authenticator_died", error=type(error).__name__, exc_info=error)
        finally:
            socket.close()

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        look_at_s = time.monotonic() + LOOK_S
        while True:
            if socket.poll(max(0, math.ceil((look_at_s - time.monotonic()) * 1000.0))):
                frames = socket.recv_multipart()
                socket.send_multipart(self._answer(frames))
            if time.monotonic() >= look_at_s:
                look_at_s = time.monotonic() + LOOK_S
                self._safely(self._look)

    def _answer(self, frames: list[bytes]) -> list[bytes]:
        request_id = frames[1] if len(frames) > 1 else b""
        public = self._public(frames)
        if public is None:
            self.refused += 1
            return _reply(request_id, b"400", b"not a key")
        domain, address = (frame.decode("utf-8", "replace") for frame in frames[2:4])
        if self._safely(self._lets_in, domain, public):
            self.accepted += 1
            return _reply(request_id, b"200", b"OK", public.encode())
        self.refused += 1
        self._safely(self._on_refused, domain, address, public)
        return _reply(request_id, b"400", b"this key is not let in")

    @staticmethod
    def _public(frames: list[bytes]) -> str | None:
        """The key that is shown; None for what is no question about a CURVE key."""
        if len(frames) != _REQUEST_FRAMES + 1 or frames[0] != _VERSION or frames[5] != b"CURVE":
            return None
        return z85.encode(frames[6]).decode() if len(frames[6]) == _KEY_BYTES else None

    def _safely(self, function: Callable[..., object], *arguments: str) -> object:
        try:
            return function(*arguments)
        except Exception as error:  # without this thread nobody gets in any more; a failure refuses one
            self.failures += 1
            log.error("authenticator_failed", error=type(error).__name__, exc_info=error)
            return None


def _reply(request_id: bytes, status: bytes, text: bytes, user_id: bytes = b"") -> list[bytes]:
    return [_VERSION, request_id, status, text, user_id, b""]

"""The background thread of an error reporter: it owns context and socket, and takes what it sends from the outbox.

Used by error_bus.py alone. Whoever reports never touches a socket of ZeroMQ, and never waits for this thread.
"""

from __future__ import annotations

import _thread
import contextlib
import math
import socket
import threading
import time
from typing import Any, Final

import zmq

from memory_system.keys import KeyFile, apply_client
from memory_system.outbox import Outbox

# A connection that does not come up in this time is not waited for when the reporter closes.
CONNECT_S: Final = 0.2
# A socket whose key was once refused never connects again: one that has not connected in this time is made anew.
ANEW_S: Final = 5.0
# Without anything to say for so long, thread and connection end; the next report brings new ones.
IDLE_S: Final = 10.0
# Pause when no socket can be made: no descriptors left, or an endpoint that is none.
NO_SOCKET_S: Final = 1.0
# How often a thread that is to end looks whether it may.
FINISH_LOOK_MS: Final = 20
# For a last heartbeat, which nobody acknowledges.
LINGER_MS: Final = 100
MAX_ANSWER_BYTES: Final = 64 * 1024


class Sender:
    """The life of one thread, from the first thing to send until there was nothing for a while, or `finish`.

    The bell is a socket pair that interrupts its wait. `lock` is the reporter's: with it the thread decides to end, so
    that whoever reports finds it either alive or gone.
    """

    def __init__(self, endpoint: str, outbox: Outbox, lock: threading.RLock, key: KeyFile | None = None) -> None:
        self.ended = threading.Event()
        self.ended.set()
        self.is_alive = False
        self._endpoint = endpoint
        self._outbox = outbox
        self._lock = lock
        self._key = key
        self._bell: tuple[socket.socket, socket.socket] | None = None
        self._wants_events = False
        self._finish_from_s = 0.0
        self._finish_by_s: float | None = None
        self._blocked_s: float | None = None  # since when nothing could be sent
        self._busy_s = time.monotonic()

    def start(self) -> None:
        """Raises RuntimeError when there are no more threads."""
        # Not threading.Thread: its start waits for the new thread, with a lock that is not safe in a signal handler.
        self.ended.clear()
        self.is_alive = True
        try:
            _thread.start_new_thread(self._run, ())
        except RuntimeError:
            self.is_alive = False
            self.ended.set()
            raise

    def event_waits(self) -> None:
        """An event was put into the outbox. A thread that waits for an answer need not be told."""
        if self._wants_events:
            self._wants_events = False
            self.ring()

    def ring(self) -> None:
        """End the wait. With the lock: a descriptor that the thread closes meanwhile may be another's."""
        if self._bell is not None:
            with contextlib.suppress(BlockingIOError):  # it rings already
                self._bell[1].send(b"\0")

    def finish(self, deadline_s: float) -> None:
        """End when all is acknowledged, at the deadline, or when nobody answers. With the lock."""
        self._finish_from_s, self._finish_by_s = time.monotonic(), deadline_s
        self.ring()

    def close_bell(self) -> None:
        bell, self._bell = self._bell, None
        for end in bell or ():
            end.close()

    def _run(self) -> None:
        try:
            while self.is_alive:
                try:
                    self._talk()
                except (OSError, zmq.ZMQError):
                    self._pause()
        finally:
            with self._lock:
                self.is_alive = False
                self.close_bell()
            self.ended.set()

    def _pause(self) -> None:
        end_s = time.monotonic() + NO_SOCKET_S
        while self.is_alive and (now_s := time.monotonic()) < end_s:
            if self._finish_by_s is not None:
                self.is_alive = False
            else:
                time.sleep(min(0.05, end_s - now_s))

    def _talk(self) -> None:
        if self._bell is None:
            bell = socket.socketpair()
            for end in bell:
                end.setblocking(False)
            self._bell = bell
        context: zmq.Context[Any] = zmq.Context()
        try:
            while self.is_alive:
                self._use_connection(context)
        finally:
            context.term()

    def _use_connection(self, context: zmq.Context[Any]) -> None:
        """Talk over one connection until it is in doubt, or all is said."""
        link = context.socket(zmq.DEALER)
        linger_ms = 0
        try:
            _connect(link, self._endpoint, self._key)
            opened_s = time.monotonic()
            self._blocked_s = None
            while not self._is_in_doubt(time.monotonic()):
                blocked = not self._send(link)
                if self._is_over(opened_s if blocked else None):
                    linger_ms = 0 if blocked else LINGER_MS
                    break
                self._wait(link, blocked)
                self._receive(link)
        finally:
            link.close(linger_ms)

    def _is_in_doubt(self, now_s: float) -> bool:
        """Whether the answer, or the connection itself, has not come in time."""
        is_stuck = self._blocked_s is not None and now_s >= self._blocked_s + ANEW_S
        return is_stuck or self._outbox.is_overdue(now_s)

    def _send(self, link: zmq.Socket[bytes]) -> bool:
        """Send what is due; False: there is no connection to send it on."""
        now_s = time.monotonic()
        try:
            if (heartbeat := self._outbox.heartbeat(now_s)) is not None:
                link.send_multipart((b"", heartbeat), zmq.NOBLOCK)
                self._outbox.heartbeat_sent(heartbeat)
                self._busy_s, self._blocked_s = now_s, None
            if (batch := self._outbox.batch(now_s)) is not None:
                link.send_multipart((b"", batch), zmq.NOBLOCK)
                self._outbox.batch_sent(now_s)
                self._blocked_s = None
        except zmq.Again:
            self._blocked_s = now_s if self._blocked_s is None else self._blocked_s
            return False
        return True

    def _receive(self, link: zmq.Socket[bytes]) -> None:
        try:
            while True:
                frames = link.recv_multipart(zmq.NOBLOCK)
                self._outbox.heard(frames[-1], time.monotonic())
        except zmq.Again:
            return

    def _is_over(self, unconnected_since_s: float | None) -> bool:
        now_s = time.monotonic()
        if self._finish_by_s is None:
            return self._is_idle(now_s)
        silent = self._outbox.is_unanswered and now_s >= self._finish_from_s + CONNECT_S
        absent = unconnected_since_s is not None and now_s >= unconnected_since_s + CONNECT_S
        if self._outbox.is_empty or silent or absent or now_s >= self._finish_by_s:
            self.is_alive = False
        return not self.is_alive

    def _is_idle(self, now_s: float) -> bool:
        if not self._outbox.is_empty or self._outbox.heartbeat(now_s) is not None:
            self._busy_s = now_s
        if now_s < self._busy_s + IDLE_S:
            return False
        with self._lock:
            self.is_alive = not self._outbox.is_empty
        return not self.is_alive

    def _wait(self, link: zmq.Socket[bytes], blocked: bool) -> None:
        assert self._bell is not None
        self._wants_events = not self._outbox.is_under_way  # before the last look at what there is to send
        wait_ms = self._longest_wait_ms(blocked)
        events = zmq.POLLIN | zmq.POLLOUT if blocked else zmq.POLLIN
        zmq.zmq_poll([(link, events), (self._bell[0], zmq.POLLIN)], wait_ms)
        with contextlib.suppress(BlockingIOError):  # it did not ring
            self._bell[0].recv(4096)

    def _longest_wait_ms(self, blocked: bool) -> int:
        now_s = time.monotonic()
        if self._finish_by_s is not None:
            return FINISH_LOOK_MS
        wait_s = self._outbox.wait_s(now_s)
        if wait_s is None:
            wait_s = max(0.0, self._busy_s + IDLE_S - now_s)
        if self._blocked_s is not None:
            # Until there is a connection, or it is time for another try.
            until_anew_s = max(0.0, self._blocked_s + ANEW_S - now_s)
            wait_s = until_anew_s if blocked and self._outbox.is_under_way else min(wait_s, until_anew_s)
        return math.ceil(wait_s * 1000.0)


def _connect(link: zmq.Socket[bytes], endpoint: str, key: KeyFile | None) -> None:
    link.setsockopt(zmq.LINGER, 0)
    # What is sent without a connection would wait in a queue of libzmq, and leave it as a duplicate.
    link.setsockopt(zmq.IMMEDIATE, 1)
    link.setsockopt(zmq.IPV6, int("[" in endpoint))
    link.setsockopt(zmq.SNDHWM, 16)
    link.setsockopt(zmq.RCVHWM, 16)
    link.setsockopt(zmq.MAXMSGSIZE, MAX_ANSWER_BYTES)
    link.setsockopt(zmq.CONNECT_TIMEOUT, 3000)
    link.setsockopt(zmq.HANDSHAKE_IVL, 3000)
    link.setsockopt(zmq.RECONNECT_IVL, 100)
    link.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    link.setsockopt(zmq.HEARTBEAT_IVL, 5000)
    link.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
    apply_client(link, key)
    link.connect(endpoint)

"""Sockets of the client: one connection with its monitor, and one process's connections.

Used by memory_client.py alone; nothing here decides anything about calls.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import math
import os
import random
import struct
import threading
import time
import warnings
from typing import Any, Final

import zmq

from memory_system.errors import AccessDenied, ClientClosed
from memory_system.keys import KeyFile, apply_client
from memory_system.protocol import SOCKET_MAX_MESSAGE_BYTES

# Most replies come within this time, and waiting for the socket alone is cheaper than for socket and monitor.
FIRST_WAIT_MS: Final = 50
# How long `close` waits for a thread to let go of its link; more than any wait that does not look for the end.
RELEASE_S: Final = 1.0

_CONNECTED: Final = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
_DISCONNECTED: Final = int(zmq.EVENT_DISCONNECTED)
_KEY_REFUSED: Final = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
_OTHER_MECHANISM: Final = int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
_CLOSED_EARLY: Final = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
_EVENTS: Final = _CONNECTED | _DISCONNECTED | _KEY_REFUSED | _OTHER_MECHANISM | _CLOSED_EARLY
_EVENT: Final = struct.Struct("=HI")  # of a monitor's first frame: what happened, and a value

_monitor_numbers = itertools.count()


def only(frames: list[bytes]) -> bytes:
    """The body of a reply; b"", which is no reply, when there is not exactly one frame."""
    return frames[0] if len(frames) == 1 else b""


class Link:
    """A socket to the service and the monitor that tells when its connection is lost.

    Used by one thread at a time. After a fork the child must neither use nor close it, so its `close` does nothing.
    `look` reads the monitor: `lost` is then whether a connection has ended, `refusal` why the service takes none of
    this client, after which libzmq does not try again, `closed_early` how often it hung up in the handshake.
    """

    def __init__(
        self, context: zmq.Context[Any], kind: int, endpoint: str, connect_timeout_ms: int, key: KeyFile | None = None
    ) -> None:
        self.lock = threading.Lock()
        self.closed = self.lost = self._connected = False
        self.refusal: AccessDenied | None = None
        self.closed_early = 0
        self._endpoint = endpoint
        self._key = key
        self.missed = False  # the last send found no connection
        self._pid = os.getpid()
        self.socket = context.socket(kind)
        self.monitor = context.socket(zmq.PAIR)
        self.poller = zmq.Poller()
        self._opening = zmq.Poller()
        try:
            self._connect(endpoint, connect_timeout_ms)
        except BaseException:  # whatever it was, the two sockets must not outlive it
            self.close()
            raise

    def _connect(self, endpoint: str, connect_timeout_ms: int) -> None:
        socket = self.socket
        socket.setsockopt(zmq.LINGER, 0)
        # A send without a connection fails instead of waiting in a queue: "not sent" is then certain.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.SNDTIMEO, connect_timeout_ms)
        socket.setsockopt(zmq.RCVTIMEO, FIRST_WAIT_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, SOCKET_MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, 3000)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 3000)
        # libzmq doubles the interval up to the maximum: a restarted service is found within a second. Each link has
        # a rhythm of its own, else all clients of a service that went away would come back in the same instant.
        socket.setsockopt(zmq.RECONNECT_IVL, random.randint(50, 150))
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, random.randint(500, 1000))
        socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
        # libzmq's I/O thread writes events and would block for good on a full pipe that nobody reads.
        self.monitor.setsockopt(zmq.RCVHWM, 0)
        self.monitor.setsockopt(zmq.LINGER, 0)
        address = f"inproc://connection-lost-{next(_monitor_numbers)}"
        socket.monitor(address, _EVENTS)
        self.monitor.connect(address)
        apply_client(socket, self._key)
        socket.connect(endpoint)
        for poller, awaited in ((self.poller, zmq.POLLIN), (self._opening, zmq.POLLOUT)):
            poller.register(socket, awaited)
            poller.register(self.monitor, zmq.POLLIN)

    def send(self, body: bytes, wait_s: float) -> bool:
        """Send one frame; False if no connection came up within `wait_s`, or the service takes none: see `refusal`."""
        until_s = time.monotonic() + wait_s
        while True:
            try:
                self.socket.send(body, zmq.NOBLOCK)
                self.missed = False
                return True
            except zmq.Again:
                # A new socket has no connection yet, however near the service is.
                if not self._connection(until_s):
                    self.missed = True
                    return False

    def _connection(self, until_s: float) -> bool:
        """Wait for one; False if there is none by then, or will be none."""
        while self.refusal is None and (left_s := until_s - time.monotonic()) > 0.0:
            ready = dict(self._opening.poll(math.ceil(left_s * 1000.0)))
            if self.socket in ready:
                return True
            if self.monitor in ready:
                self.look()
        return False

    def look(self) -> None:
        """Read what has become of the connection."""
        while True:
            try:
                frames = self.monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._note(*_EVENT.unpack(frames[0]))

    def _note(self, event: int, value: int) -> None:
        if event == _CONNECTED:
            self._connected = True
            self.closed_early = 0
        elif event == _DISCONNECTED:  # also after a handshake that failed: that was no connection
            self.lost = self.lost or self._connected
            self._connected = False
        elif event == _CLOSED_EARLY:
            self.closed_early += 1
        else:
            self.refusal = _refusal(self._endpoint, self._key, event, value)

    def is_connected_again(self) -> bool:
        """Whether there is a connection now, while the last send found none. For the thread that sends."""
        with self.lock:
            return self.missed and not self.closed and bool(self.socket.getsockopt(zmq.EVENTS) & zmq.POLLOUT)

    def close(self) -> None:
        if self.closed or self._pid != os.getpid():
            return
        self.closed = True
        # The monitor ends before its reader does, else an event without a reader blocks the I/O thread.
        with contextlib.suppress(zmq.ZMQError):
            self.socket.monitor(None, 0)
        self.monitor.close(0)
        self.socket.close(0)

    def __del__(self) -> None:
        if not hasattr(self, "_opening"):
            return
        if self._pid == os.getpid():
            self.close()
            return
        with warnings.catch_warnings():
            # pyzmq closes nothing of another process, but warns that it was left open.
            warnings.simplefilter("ignore", ResourceWarning)
            del self.poller, self._opening, self.monitor, self.socket


def _refusal(endpoint: str, key: KeyFile | None, event: int, value: int) -> AccessDenied:
    """Why there will be no connection, from what the handshake ended with."""
    if event == _KEY_REFUSED:
        name = "this client" if key is None else key.name
        return AccessDenied(f"{endpoint} does not take the key of {name}: it is not known there, or was revoked")
    if key is None:
        return AccessDenied(f"{endpoint} takes callers with a key only; set MEMORY_KEY_FILE, or give a key_file")
    return AccessDenied(f"{endpoint} speaks without keys, and this client with one only (protocol error {value:#x})")


class Sockets:
    """One process's context and its links. The module keeps it alive until it is closed.

    A client that nobody closed may be collected together with all that it owns, in any order; a context that goes
    before its sockets then waits for them for ever. Kept here, they are closed in the right order: by `close` of the
    client, which its finalizer calls, or when the program ends.
    """

    def __init__(self) -> None:
        _close_at_exit()
        self.pid = os.getpid()
        self._context: zmq.Context[Any] = zmq.Context()
        self._links: set[Link] = set()
        _open.add(self)

    def connect(self, kind: int, endpoint: str, connect_timeout_ms: int, key: KeyFile | None) -> Link:
        """A new link. Raises ZMQError."""
        link = Link(self._context, kind, endpoint, connect_timeout_ms, key)
        self._links.add(link)
        return link

    def drop(self, link: Link) -> None:
        """Close a link that its only user has done with."""
        link.close()
        self._links.discard(link)

    def close(self, *, force: bool = False) -> None:
        """Close all links and the context; with `force` also a link that another thread does not let go of."""
        if self.pid != os.getpid():
            self._links.clear()  # inherited by a fork: let go while there is still a way to do it quietly
            return
        for link in list(self._links):
            # A thread in the middle of a call closes its own link when it sees the end. Only a signal handler that
            # interrupted this very thread waits in vain.
            free = link.lock.acquire(timeout=RELEASE_S)
            if free or force:
                link.close()
            if free:
                link.lock.release()
        if all(link.closed for link in self._links):
            self._links.clear()
            self._context.term()
            _open.discard(self)


_open: set[Sockets] = set()


@functools.cache
def _close_at_exit() -> None:
    atexit.register(_close_all)


def _close_all() -> None:
    for sockets in list(_open):
        sockets.close(force=True)


class _ThreadEnd:
    """Lies in a thread's local storage and goes with it: then the thread's link is closed."""

    def __init__(self, sockets: Sockets, link: Link) -> None:
        self._sockets, self._link = sockets, link

    def __del__(self) -> None:
        if self._sockets.pid == os.getpid():
            self._sockets.drop(self._link)


class Pool:
    """One process's links, one for each thread; a link closes when its thread ends."""

    def __init__(self, endpoint: str, connect_timeout_ms: int, key: KeyFile | None = None) -> None:
        self._endpoint = endpoint
        self._connect_timeout_ms = connect_timeout_ms
        self._key = key
        self._sockets: Sockets | None = None
        self._lock = threading.Lock()
        self._local = threading.local()
        self._closed = False

    def link(self) -> Link:
        """This thread's link, a new one if it has none. Raises ZMQError, or ClientClosed after `close`."""
        link: Link | None = getattr(self._local, "link", None)
        if link is not None and not link.closed:
            return link
        with self._lock:
            if self._closed:
                raise ClientClosed("the client is closed")
            if self._sockets is None:
                self._sockets = Sockets()
            link = self._sockets.connect(zmq.REQ, self._endpoint, self._connect_timeout_ms, self._key)
        self._local.end = _ThreadEnd(self._sockets, link)  # lets go of the link before
        self._local.link = link
        return link

    def is_connected_again(self) -> bool:
        """Of this thread's link."""
        link: Link | None = getattr(self._local, "link", None)
        return link is not None and link.is_connected_again()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            sockets, self._sockets = self._sockets, None
        if sockets is not None:
            sockets.close()

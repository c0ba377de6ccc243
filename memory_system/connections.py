"""The TCP connections of this process as the kernel knows them, and how much of each the program has taken (Linux).

ZeroMQ bounds a frame and counts whole messages. What it holds of a message that never ends it neither bounds nor
tells; but what a connection brought (the kernel knows) less what the program took is what ZeroMQ holds of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import socket
import struct
import sys
import termios
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import zmq

IS_KNOWN: Final = sys.platform == "linux"

_DESCRIPTORS: Final = "/proc/self/fd"
# struct tcp_info of linux/tcp.h: tcpi_bytes_acked and tcpi_bytes_received, since Linux 4.2.
_COUNTS: Final = struct.Struct("=QQ")
_COUNTS_AT: Final = 120
_TCP_INFO_BYTES: Final = 256
# linux/filter.h: a program of one instruction, "return 0": no byte of a packet is let through.
_SO_ATTACH_FILTER: Final = 26
_SO_DETACH_FILTER: Final = 27
_DROP_ALL: Final = struct.pack("HBBI", 6, 0, 0, 0)
_SOURCE: Final = int(zmq.SRCFD)
# ZMTP: a frame's flags and length; under CURVE a MESSAGE command, nonce, authenticator and flags beside it.
_SHORT_FRAME: Final = 255
_SHORT_HEADER: Final = 2
_LONG_HEADER: Final = 9
CURVE_BYTES: Final = 33
# For the context of a socket that binds. Each heartbeat that is answered has ZeroMQ search the timers of its I/O thread
# one by one: with ten thousand connections on one thread it does little else, and new ones are no longer let in.
IO_THREADS: Final = 4

Key = tuple[int, str]  # descriptor, and the peer's address: a descriptor is used again


@dataclass(frozen=True, slots=True)
class Connection:
    """One accepted connection. `received` and `acknowledged` (by the peer) count bytes since it was made, `unsent`
    those that wait for the peer in the kernel."""

    fd: int
    peer: str
    received: int
    acknowledged: int
    unsent: int

    @property
    def key(self) -> Key:
        return self.fd, self.peer


class Ledger:
    """Bytes that the program took from each connection, by descriptor. Any thread may ask, one socket's thread notes.

    A descriptor's count outlives its connection, until the next one brings a message; before that `held` finds it out
    by its being too high. `more_bytes` is what each part has on the wire beside its content and length: CURVE_BYTES
    where all connections are encrypted.
    """

    def __init__(self) -> None:
        self.more_bytes = 0
        self.nothing_left_s = float("-inf")  # monotonic: when the program last had taken all that there was to take
        self._taken: dict[int, int] = {}
        self._peers: dict[int, bytes] = {}

    def note(self, frame: zmq.Frame, frames: Sequence[bytes], peer: bytes = b"") -> None:
        """Parts of a message were taken: `frame` is one of them, `frames` are those that came over the wire.

        `peer` is what the socket calls the connection, if it has names for them: each has another.
        """
        try:
            fd = frame.get(_SOURCE)
        except zmq.ZMQError:  # not of a TCP connection
            return
        taken = self._taken.get(fd, 0)
        if peer and self._peers.get(fd) != peer:  # the descriptor is used again
            self._peers[fd] = peer
            taken = 0
        for each in frames:
            size = len(each) + self.more_bytes
            taken += size + (_SHORT_HEADER if size <= _SHORT_FRAME else _LONG_HEADER)
        self._taken[fd] = taken

    def nothing_left(self) -> None:
        """The socket has no message that is whole: what is held now belongs to unfinished ones."""
        self.nothing_left_s = time.monotonic()

    def held(self, connection: Connection) -> int:
        """Bytes that came over a connection and were not taken, about."""
        taken = self._taken.get(connection.fd, 0)
        if taken > connection.received * 1.25:  # of an earlier connection with this descriptor
            return connection.received
        return max(0, connection.received - taken)


LEDGER: Final = Ledger()  # one for the process, as its descriptors are


def accepted() -> list[Connection]:
    """The TCP connections that others made to this process."""
    return _look()[1]


def refuse_new(refused: bool) -> None:
    """Have the kernel drop what asks for a new connection to this process, or take it again: clients go on trying."""
    program = ctypes.create_string_buffer(_DROP_ALL)
    option = (_SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))
    for fd in _look()[0]:
        with _borrowed(fd) as sock, contextlib.suppress(OSError):
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, *(option if refused else (_SO_DETACH_FILTER, 0)))


def _look() -> tuple[list[int], list[Connection]]:
    """The descriptors that listen, and the connections that came to their ports."""
    listening: dict[int, int] = {}
    found: list[tuple[int, Connection]] = []
    for fd in _descriptors():
        with _borrowed(fd) as sock, contextlib.suppress(OSError):
            if sock is None:
                continue
            port = sock.getsockname()[1]
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                listening[fd] = port
            else:
                found.append((port, _look_at(fd, sock)))
    ports = set(listening.values())
    return list(listening), [connection for port, connection in found if port in ports]


def cut(connection: Connection) -> bool:
    """End a connection from outside of ZeroMQ, which then lets go of all that it holds of it."""
    with _borrowed(connection.fd) as sock, contextlib.suppress(OSError):
        if sock is not None and _peer_of(sock) == connection.peer:
            sock.shutdown(socket.SHUT_RDWR)
            return True
    return False


def is_open(connection: Connection) -> bool:
    """Whether ZeroMQ has not closed a connection yet, though it may have ended."""
    with _borrowed(connection.fd) as sock:
        if sock is None:
            return False
        try:
            return _peer_of(sock) == connection.peer
        except OSError:  # ended at both sides
            return True


def _descriptors() -> Iterable[int]:
    try:
        return [int(name) for name in os.listdir(_DESCRIPTORS)]
    except OSError:  # none is left to ask with
        return range(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket | None]:
    """The TCP socket behind a descriptor, None for anything else. A copy of the descriptor, which could not become
    another connection meanwhile, is not to be had when it matters most; that one would be made again."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        yield None
        return
    try:
        of_tcp = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
        yield sock if of_tcp else None
    finally:
        sock.detach()


def _look_at(fd: int, sock: socket.socket) -> Connection:
    acknowledged, received = _COUNTS.unpack_from(
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES), _COUNTS_AT
    )
    unsent = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]
    return Connection(fd, _peer_of(sock), received, acknowledged, unsent)


def _peer_of(sock: socket.socket) -> str:
    host, port = sock.getpeername()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

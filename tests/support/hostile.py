"""Peers that do not keep to ZeroMQ's protocol: plain TCP connections that write whatever a test wants."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Final

GREETING_BYTES: Final = 64
MORE: Final = 0x01
LONG: Final = 0x02
COMMAND: Final = 0x04


def greeting(mechanism: bytes = b"NULL", version: bytes = b"\x03\x00", *, as_server: bool = False) -> bytes:
    """The 64 bytes with which each side of a ZMTP connection begins."""
    return b"\xff" + bytes(8) + b"\x7f" + version + mechanism.ljust(20, b"\0") + bytes([as_server]) + bytes(31)


def frame(content: bytes, flags: int = 0, announced: int | None = None) -> bytes:
    """A frame; `announced` is the length that its header claims, by default the true one."""
    size = len(content) if announced is None else announced
    if size > 255:
        return struct.pack(">BQ", flags | LONG, size) + content
    return bytes([flags, size]) + content


def ready(kind: bytes = b"DEALER") -> bytes:
    """The command that ends the handshake of the mechanism NULL."""
    properties = b"\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind + b"\x08Identity" + bytes(4)
    return frame(b"\x05READY" + properties, COMMAND)


def connect(port: int, timeout_s: float = 20.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=timeout_s)


def shake_hands(port: int, kind: bytes = b"DEALER") -> socket.socket:
    """A connection that ZeroMQ takes for one of its own, and that waits for nothing afterwards."""
    sock = connect(port)
    sock.sendall(greeting() + ready(kind))
    got = b""
    while len(got) < GREETING_BYTES + 2:
        got += sock.recv(4096)
    return sock


def push(sock: socket.socket, block: bytes) -> bool:
    """Send it all; False when the other side has closed or does not read."""
    try:
        sock.sendall(block)
    except OSError:
        return False
    return True


def push_some(sock: socket.socket, block: bytes) -> int | None:
    """Send what goes without waiting for long, and read what comes; None when the other side has closed. Who waits for
    room to send alone would learn of that only a minute later."""
    try:
        readable, writable, _ = select.select([sock], [sock], [], 0.1)
        if readable and not sock.recv(65_536):
            return None
        return sock.send(block) if writable else 0
    except BlockingIOError:
        return 0
    except OSError:
        return None


def endless(part: bytes, block_bytes: int = 1 << 18) -> bytes:
    """A block of parts of a message, none of which is the last."""
    one = frame(part, MORE)
    return one * max(1, block_bytes // len(one))


class Attackers:
    """Threads that each send a message without an end, and connect again when they are cut off."""

    def __init__(self, port: int, part: bytes, count: int) -> None:
        self._port = port
        self._block = endless(part)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]
        self.cut = 0

    def __enter__(self) -> Attackers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError), shake_hands(self._port) as sock:
                sock.setblocking(False)
                at = 0  # in the block
                while not self._stop.is_set():
                    sent = push_some(sock, self._block[at:])
                    if sent is None:
                        self.cut += 1
                        break
                    at = (at + sent) % len(self._block)


# -- seeded garbage ---------------------------------------------------------------------------------------------------

MECHANISMS: Final = (b"NULL", b"CURVE", b"PLAIN", b"GSSAPI", b"", b"NULL\xff", b"\0" * 20, b"CURVE" * 4)
COMMANDS: Final = (b"\x05READY", b"\x05HELLO", b"\x08INITIATE", b"\x05ERROR", b"\x04PING", b"\x04PONG", b"\x07MESSAGE",
                   b"\x09SUBSCRIBE", b"\x07WELCOME", b"\xffREADY", b"\x00", b"")  # fmt: skip
LENGTHS: Final = (0, 1, 255, 256, 65_536, 16 * 2**20 + 1, 8 * 2**30, 2**63 - 1, 2**63, 2**64 - 1)


def noise(rng: random.Random) -> bytes:
    """Bytes that have nothing to do with the protocol."""
    return rng.randbytes(rng.choice((1, 8, 10, 64, 200, 5000)))


OTHERS: Final = (
    *(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"SSH-2.0-x\r\n", b"*1\r\n$4\r\nPING\r\n"),
    *(b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f", b"\x01\x00", b"\xff" * 64),  # of older ZMTP
)


def other_protocol(rng: random.Random) -> bytes:
    return rng.choice(OTHERS)


def bad_greeting(rng: random.Random) -> bytes:
    """A greeting with a strange mechanism, version or role, or some bytes of it changed, cut or followed by noise."""
    version = bytes([rng.choice((0, 1, 2, 3, 3, 3, 4, 255)), rng.randrange(256)])
    found = bytearray(greeting(rng.choice(MECHANISMS)[:20], version, as_server=rng.random() < 0.5))
    for _ in range(rng.randrange(4)):
        found[rng.randrange(len(found))] = rng.randrange(256)
    if rng.random() < 0.3:
        del found[rng.randrange(len(found)) :]
    return bytes(found) + noise(rng)


def bad_handshake(rng: random.Random) -> bytes:
    """A right greeting, NULL or CURVE, and commands that are none, or claim another size."""
    found = greeting(rng.choice((b"NULL", b"CURVE")))
    for _ in range(rng.randrange(1, 4)):
        content = rng.choice(COMMANDS) + rng.randbytes(rng.choice((0, 4, 32, 194, 257, 400)))
        announced = rng.choice(LENGTHS) if rng.random() < 0.4 else None
        found += frame(content, rng.choice((COMMAND, COMMAND, 0, MORE, 0xFF)) & ~LONG, announced)
    return found


def bad_frames(rng: random.Random) -> bytes:
    """A right handshake, then frames with wrong flags or lengths, and messages that do not end."""
    found = greeting() + ready(rng.choice((b"DEALER", b"REQ", b"ROUTER", b"SUB", b"PAIR", b"NONE")))
    for _ in range(rng.randrange(1, 6)):
        announced = rng.choice(LENGTHS) if rng.random() < 0.5 else None
        found += frame(rng.randbytes(rng.choice((0, 1, 100, 300))), rng.randrange(256) & ~LONG, announced)
    return found


GARBAGE: Final[tuple[Callable[[random.Random], bytes], ...]] = (
    noise,
    other_protocol,
    bad_greeting,
    bad_handshake,
    bad_handshake,
    bad_frames,
    bad_frames,
)


def throw(port: int, rng: random.Random, count: int, at_once: int = 40) -> int:
    """Make `count` connections, `at_once` of them open together, and write garbage to each; the bytes written."""
    written = 0
    with contextlib.ExitStack() as stack:
        for number in range(count):
            if number % at_once == 0:
                stack.close()
            sock = stack.enter_context(connect(port))
            garbage = rng.choice(GARBAGE)(rng)
            push(sock, garbage)
            written += len(garbage)
            if rng.random() < 0.2:  # a reset instead of an orderly end
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return written


@contextlib.contextmanager
def silent(port: int, count: int) -> Iterator[list[socket.socket]]:
    """`count` connections that say nothing; those that the system no longer makes are left out."""
    with contextlib.ExitStack() as stack:
        socks: list[socket.socket] = []
        with contextlib.suppress(OSError):
            for _ in range(count):
                socks.append(stack.enter_context(connect(port)))
        yield socks

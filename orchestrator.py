#!/usr/bin/env python3
"""The memory service: a ROUTER that receives requests, admits them, and sends replies.

    python orchestrator.py [--config FILE]

Exit status: 0 after SIGTERM or SIGINT, 1 when it cannot start or the store failed, 2 for a bad configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence

import zmq

from memory_system import log, protocol
from memory_system.errors import (
    AccessDenied,
    Busy,
    CannotStart,
    ConfigError,
    InvalidRequest,
    MemorySystemError,
    ShuttingDown,
)
from memory_system.runtime import Runtime
from memory_system.security import PeerPolicy, check_bind, is_loopback
from memory_system.settings import Settings, load_settings

logger = log.get_logger("orchestrator")

_WANTED_FILES = 16_384
_MIB = 1024 * 1024
# Plain integers: pyzmq's flags are enums, whose arithmetic costs microseconds, and so do its multipart helpers.
_NOBLOCK = int(zmq.NOBLOCK)
_NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_MAX_TTL_MS = 6_553_500  # the wire has 16 bits of deciseconds for it


class _Load:
    """How many requests are being worked on, and how many bytes they have together."""

    __slots__ = ("requests", "size")

    def __init__(self) -> None:
        self.requests = self.size = 0

    def add(self, size: int) -> None:
        self.requests += 1
        self.size += size

    def remove(self, size: int) -> None:
        self.requests -= 1
        self.size -= size


class Orchestrator:
    """Moves frames between the ROUTER socket and the dispatcher.

    The backlog stays inside ZeroMQ, which queues fairly over the peers: at most `receive_batch` requests are read
    before replies of others get their turn, none while `max_in_flight` are being worked on, and a peer with more
    than its share in flight is answered `busy`. Sends never block: a peer that does not read loses its reply
    and asks again under its request_id.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.started_at = time.monotonic()
        self._limits = settings.limits
        self._policy = None if is_loopback(settings.network.bind) else PeerPolicy(settings.security)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._in_flight: dict[bytes, _Load] = {}
        self._total = _Load()
        self._scheduled = False
        self._draining = False
        self._stop = asyncio.Event()
        self._idle = asyncio.Event()
        self._fatal: Exception | None = None
        self.dropped_replies = 0
        self.busy_replies = 0
        self.runtime = Runtime(settings, on_fatal=self._on_fatal, health=self._health)

    async def run(self) -> int:
        """Serve until told to stop; the exit status."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        try:
            self._bind()
            await self.runtime.start()
        except BaseException:
            self._close_socket()
            await self.runtime.close()
            raise
        self._loop.add_reader(self._socket.fileno(), self._schedule)
        self._schedule()
        logger.info("listening", address=self._address(), pid=os.getpid(), store=self.settings.storage.path)
        await self._stop.wait()
        await self._shut_down()
        return 0 if self._fatal is None else 1

    def _address(self) -> str:
        host = self.settings.network.bind
        host = "127.0.0.1" if host == "localhost" else host
        return f"tcp://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{self.settings.network.port}"

    def _bind(self) -> None:
        network = self.settings.network
        heartbeat_ms = int(network.heartbeat_s * 1000)
        options = {
            zmq.ROUTER_MANDATORY: 1,
            zmq.MAXMSGSIZE: protocol.SOCKET_MAX_MESSAGE_BYTES,
            zmq.RCVHWM: network.queue_per_client,
            zmq.SNDHWM: network.queue_per_client,
            zmq.HANDSHAKE_IVL: int(network.handshake_s * 1000),
            zmq.HEARTBEAT_IVL: heartbeat_ms,
            zmq.HEARTBEAT_TIMEOUT: 2 * heartbeat_ms,
            zmq.HEARTBEAT_TTL: min(3 * heartbeat_ms, _MAX_TTL_MS),
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: 60,
            zmq.TCP_KEEPALIVE_INTVL: 15,
            zmq.TCP_KEEPALIVE_CNT: 4,
            zmq.BACKLOG: network.backlog,
            zmq.LINGER: 500,
            zmq.IPV6: int(":" in network.bind),
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        try:
            self._socket.bind(self._address())
        except zmq.ZMQError as error:
            hint = "is another orchestrator running? Stop it, or set network.port"
            if error.errno != zmq.EADDRINUSE:
                hint = "see network.bind and network.port"
            raise CannotStart(f"cannot listen on {self._address()}: {error.strerror}; {hint}") from None

    # -- receiving --------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        """Look at the socket soon. The descriptor only signals changes, so every send has to be followed by a look."""
        if not self._scheduled and self._loop is not None:
            self._scheduled = True
            self._loop.call_soon(self._receive)

    def _receive(self) -> None:
        self._scheduled = False
        if self._socket.closed:
            return
        for _ in range(self._limits.receive_batch):
            if self._is_full():
                return  # each reply is followed by another look
            try:
                frames, address = self._read()
            except zmq.Again:
                return
            self._admit(frames, address)
        self._schedule()

    def _read(self) -> tuple[list[bytes], str]:
        """The next message and, where it matters, its sender's address; raises zmq.Again when there is none."""
        frame = self._socket.recv(_NOBLOCK, copy=False)
        frames = [frame.bytes]
        while frame.more:
            frame = self._socket.recv(_NOBLOCK, copy=False)
            frames.append(frame.bytes)
        if self._policy is None:
            return frames, ""
        try:
            return frames, str(frame.get("Peer-Address"))
        except zmq.ZMQError:
            return frames, "unknown"

    def _admit(self, frames: list[bytes], address: str) -> None:
        peer = frames[0]
        route, body = _split(frames)
        if body is None:
            self._send(route, self._refusal(b"", InvalidRequest("a request is [empty frame, body]")))
            return
        refusal = self._objection(peer, address)
        if refusal is not None:
            self._send(route, self._refusal(body, refusal))
            return
        answered = counted = False

        def reply(encoded: bytes) -> None:
            nonlocal answered
            answered = True
            if counted:
                self._answered(peer, len(body))
            self._send(route, encoded)

        self.runtime.dispatcher.handle(body, reply, peer)
        if not answered:
            counted = True
            self._in_flight.setdefault(peer, _Load()).add(len(body))
            self._total.add(len(body))

    def _is_full(self) -> bool:
        limits = self._limits
        return self._total.requests >= limits.max_in_flight or self._total.size >= limits.max_in_flight_mb * _MIB

    def _objection(self, peer: bytes, address: str) -> MemorySystemError | None:
        """Why a request is not admitted, None if it is."""
        if self._policy is not None:
            try:
                self._policy.check(address)
            except AccessDenied as error:
                return error
        if self._draining:
            return ShuttingDown("the service is stopping; try again in a moment", retry_after_ms=500)
        load = self._in_flight.get(peer)
        if load is not None and (
            load.requests >= self._limits.max_in_flight_per_client
            or load.size >= self._limits.max_in_flight_mb_per_client * _MIB
        ):
            self.busy_replies += 1
            return Busy(
                f"{load.requests} requests of this client with {load.size} bytes are in flight",
                retry_after_ms=self._limits.busy_retry_after_ms,
            )
        return None

    def _refusal(self, body: bytes, error: MemorySystemError) -> bytes:
        return self.runtime.dispatcher.refuse(body, error)

    # -- replying ---------------------------------------------------------------------------------------------

    def _answered(self, peer: bytes, size: int) -> None:
        self._total.remove(size)
        load = self._in_flight[peer]
        load.remove(size)
        if not load.requests:
            del self._in_flight[peer]
        if self._draining and not self._total.requests:
            self._idle.set()

    def _send(self, route: list[bytes], body: bytes) -> None:
        try:
            for frame in route:
                self._socket.send(frame, _NOBLOCK_MORE)
            self._socket.send(body, _NOBLOCK)
        except zmq.ZMQError as error:
            # Gone (EHOSTUNREACH), not reading (EAGAIN), or we have closed: the caller asks again under its request_id.
            self.dropped_replies += 1
            logger.debug("reply_dropped", reason=error.strerror, dropped=self.dropped_replies)
        self._schedule()

    # -- state ------------------------------------------------------------------------------------------------

    def _health(self) -> dict[str, int | float | bool]:
        return {
            "pid": os.getpid(),
            "uptime_s": time.monotonic() - self.started_at,
            "in_flight": self._total.requests,
            "dropped_replies": self.dropped_replies,
            "busy_replies": self.busy_replies,
            "draining": self._draining,
        }

    def _on_fatal(self, error: Exception) -> None:
        self._fatal = error
        self._stop.set()

    async def _shut_down(self) -> None:
        """Answer what was accepted, refuse what comes, flush, close."""
        self._draining = True
        logger.info("stopping", in_flight=self._total.requests)
        self.runtime.stop_writing_after(self._limits.shutdown_s / 2.0)
        if self._total.requests and self._fatal is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), self._limits.shutdown_s)
        await self.runtime.close()
        await asyncio.sleep(0)  # what closing answered is still to be sent
        self._close_socket()
        logger.info("stopped", unanswered=self._total.requests)

    def _close_socket(self) -> None:
        if self._loop is not None and not self._socket.closed:
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._context.term()


def _split(frames: list[bytes]) -> tuple[list[bytes], bytes | None]:
    """The way back (all frames up to the empty one) and the body; None when there is not exactly one body."""
    if len(frames) == 3 and not frames[1]:
        return frames[:2], frames[2]
    if b"" not in frames[1:]:
        return frames[:1], None
    end = frames.index(b"", 1)
    return frames[: end + 1], frames[end + 1] if len(frames) == end + 2 else None


def _raise_file_limit() -> None:
    """Each connection costs a file; take what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < 4096:
        logger.warning("few_files", limit=wanted, hint="raise `ulimit -n`: each client connection needs a file")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The memory service of the mesh.")
    parser.add_argument("--config", metavar="FILE", help="YAML file laid over the defaults (else MEMORY_CONFIG)")
    options = parser.parse_args(arguments)
    try:
        settings = load_settings(options.config)
        check_bind(settings.network, settings.security)
        log.configure("orchestrator", settings.log)
    except ConfigError as error:
        sys.stderr.write(f"orchestrator: {error.message}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"orchestrator: log.dir {settings.log.dir} cannot be written: {error.strerror}\n")
        return 2
    _raise_file_limit()
    try:
        return _run(settings)
    except MemorySystemError as error:
        logger.critical("cannot_start", reason=error.message)
        sys.stderr.write(f"orchestrator: {error.message}\n")
        return 2 if isinstance(error, ConfigError) else 1


def _run(settings: Settings) -> int:
    async def serve() -> int:
        return await Orchestrator(settings).run()

    try:
        import uvloop
    except ImportError:  # not built for every platform; asyncio's own loop is slower, nothing else
        return asyncio.run(serve())
    return uvloop.run(serve())


if __name__ == "__main__":
    sys.exit(main())

"""The connection of the asynchronous client: many calls over one DEALER socket.

Used by memory_client.py alone. It moves messages; what they mean is client_core.py's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import Any, Final

import zmq

from memory_system.client_core import Call, Reply
from memory_system.client_link import Link, Sockets, only
from memory_system.errors import ClientClosed, InvalidReply, InvalidRequest
from memory_system.keys import KeyFile
from memory_system.protocol import decode_reply

# The service answers `busy` above 64 requests of one client; half of that leaves room for repeated attempts.
MAX_IN_FLIGHT: Final = 32
# Messages taken in one turn of the event loop.
DRAIN_LIMIT: Final = 64


class Pipe:
    """A DEALER on one event loop: it carries many calls at once and hands each reply to its call by request_id.

    The loop watches the descriptors of socket and monitor and nothing is received by a task, so that a cancelled
    call takes nobody's message with it.
    """

    places: Final = MAX_IN_FLIGHT

    def __init__(self, endpoint: str, connect_timeout_ms: int, key: KeyFile | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.pid = os.getpid()
        self._endpoint = endpoint
        self._connect_timeout_ms = connect_timeout_ms
        self._key = key
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._sockets = Sockets()
        self._waiting: dict[str, asyncio.Future[Reply | InvalidReply | None]] = {}
        self._blocked: set[asyncio.Future[bool]] = set()
        self._received_s = 0.0
        self._link: Link | None = None
        self._closed = False
        self._ended = asyncio.Event()

    async def acquire(self, until_s: float) -> bool:
        """Take one of the places for calls in flight; False: none became free in time."""
        if not self._slots.locked():
            return await self._slots.acquire()
        try:
            async with asyncio.timeout(until_s - time.monotonic()):
                return await self._slots.acquire()
        except TimeoutError:
            return False

    def release(self) -> None:
        self._slots.release()

    async def pause(self, until_s: float) -> None:
        """Wait until then, or until `close`."""
        while (left_s := until_s - time.monotonic()) > 0.0 and not self._closed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), left_s)

    def is_connected_again(self) -> bool:
        if self._link is None or not self._link.is_connected_again():
            return False
        self._on_socket()  # asking can swallow the descriptor's signal that something is to be read
        return True

    async def attempt(self, call: Call) -> None:
        """One attempt of a call. Raises ZMQError when no socket can be made, ClientClosed after `close`,
        AccessDenied when the service takes no connection of this client."""
        body = call.body(time.monotonic())
        if body is None:
            return
        if call.request_id in self._waiting:
            call.fail(InvalidRequest("a call with this request_id is under way on this client"))
            return
        self._waiting[call.request_id] = self.loop.create_future()  # holds the place; replaced once sent
        try:
            link = await self._send(body, min(time.monotonic() + self._connect_timeout_ms / 1000.0, call.deadline_s))
            if link is None:
                call.not_sent(time.monotonic(), closed_early=self._link is not None and self._link.closed_early > 0)
                return
            call.sent(time.monotonic())
            future = self._waiting[call.request_id] = self.loop.create_future()
            self._on_socket()  # a send can swallow the descriptor's signal that something is to be read
            self._interpret(call, await self._until(call.attempt_ends_s, future), link)
        finally:
            del self._waiting[call.request_id]

    async def _send(self, body: bytes, until_s: float) -> Link | None:
        while True:
            link = self._open()
            try:
                link.socket.send_multipart((b"", body), zmq.NOBLOCK)
                link.missed = False
                return link
            except zmq.Again:
                connected = self.loop.create_future()
                self._blocked.add(connected)
                try:
                    if not await self._until(until_s, connected):
                        link.missed = True
                        return None
                    if link.refusal is not None:
                        raise link.refusal
                finally:
                    self._blocked.discard(connected)

    async def _until(self, until_s: float, future: asyncio.Future[Any]) -> Any:
        """The future's result, or None at that time."""
        timer = self.loop.call_later(max(0.0, until_s - time.monotonic()), _resolve, future, None)
        try:
            return await future
        finally:
            timer.cancel()

    def _interpret(self, call: Call, answer: Reply | InvalidReply | None, link: Link) -> None:
        now_s = time.monotonic()
        if isinstance(answer, InvalidReply):
            call.garbled(answer)
        elif answer is not None:
            call.answered(answer, now_s)
        else:
            call.unanswered(now_s)
            # Silence towards everyone: the connection itself is in doubt, so the next attempt makes a new one.
            if link is self._link and self._received_s < call.sent_s:
                self._drop_link()

    def _open(self) -> Link:
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._link is None:
            self._link = link = self._sockets.connect(zmq.DEALER, self._endpoint, self._connect_timeout_ms, self._key)
            self.loop.add_reader(link.socket.getsockopt(zmq.FD), self._on_socket)
            self.loop.add_reader(link.monitor.getsockopt(zmq.FD), self._on_monitor)
            # A descriptor signals only after its socket was once found empty.
            self.loop.call_soon(self._on_monitor)
        return self._link

    def _on_socket(self) -> None:
        if self._link is None:
            return
        socket = self._link.socket
        for _ in range(DRAIN_LIMIT):
            try:
                self._deliver(socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                break
        else:
            self.loop.call_soon(self._on_socket)
        if self._blocked and socket.getsockopt(zmq.EVENTS) & zmq.POLLOUT:
            for connected in self._blocked:
                _resolve(connected, True)

    def _on_monitor(self) -> None:
        """What matters is the loss of the connection, and with it of every reply that is waited for, or its refusal."""
        link = self._link
        if link is None:
            return
        link.look()
        if link.lost or link.refusal is not None:
            self._on_socket()  # replies that came before the end
            self._drop_link()

    def _deliver(self, frames: list[bytes]) -> None:
        self._received_s = time.monotonic()
        try:
            reply = decode_reply(only(frames[1:]) if frames[0] == b"" else b"")
        except InvalidReply as error:
            for future in self._waiting.values():
                _resolve(future, error)
            return
        request_id = reply.get("request_id")
        if request_id is None and len(self._waiting) == 1:
            request_id = next(iter(self._waiting))
        if isinstance(request_id, str) and request_id in self._waiting:
            _resolve(self._waiting[request_id], reply)

    def _drop_link(self) -> None:
        link, self._link = self._link, None
        if link is None:
            return
        if not self.loop.is_closed():
            self.loop.remove_reader(link.socket.getsockopt(zmq.FD))
            self.loop.remove_reader(link.monitor.getsockopt(zmq.FD))
            for future in self._waiting.values():
                _resolve(future, None)
            for connected in self._blocked:
                _resolve(connected, True)  # to try again, on the next link
        self._sockets.drop(link)

    def close(self) -> None:
        self._closed = True
        self._ended.set()
        self._drop_link()
        self._sockets.close()


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)

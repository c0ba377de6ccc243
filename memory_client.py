"""The client of the memory service: all that an agent needs.

    with MemoryClient(agent_id="planner") as memory:
        memory.create_session("ada")
        memory.add_memory("Ada prefers trains to planes.", tags=["travel"])
        print(memory.semantic_search("How does Ada like to travel?")["results"])

Every method returns the reply as a dict, also when it fails (status, error_code, message, retryable, details,
outcome). `outcome` says what became of the call: not_sent, failed (the service refused it) or unknown (it may have
been done; repeating it with the same request_id is safe).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, Self

import zmq

from memory_system.client_api import ClientMethods
from memory_system.client_core import Call, Reply
from memory_system.client_link import FIRST_WAIT_MS, Link, Pool, only
from memory_system.errors import AccessDenied, ClientClosed, RequestTimeout, Unreachable

if TYPE_CHECKING:
    from memory_system.client_pipe import Pipe

# How soon a waiting thread notices that the client was closed.
CLOSE_CHECK_MS: Final = 100


class MemoryClient(ClientMethods[Reply]):
    """The client for threads. Many threads may share one, and it survives a fork: each thread gets a socket of its own,
    each process a context and a breaker of its own. For the arguments see ClientCore."""

    def call(
        self,
        action: str,
        data: dict[str, Any] | None = None,
        *,
        deadline_ms: float | None = None,
        request_id: str | None = None,
    ) -> Reply:
        call = self._begin(action, data, deadline_ms, request_id)
        try:
            while call.reply is None:
                self._attempt(call)
        except BaseException:  # an interrupt must not leave the breaker waiting for this call
            call.abandon()
            raise
        return self._end(call)

    def close(self) -> None:
        """Close the sockets; calls under way in other threads end with `client_closed`. Closing twice is fine."""
        self._closed = True
        pool = self._connections.get(os.getpid())
        if pool is not None:
            pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_connections", None):
            self.close()

    def _attempt(self, call: Call) -> None:
        self._pause(call.resume_at_s)
        if self._closed:
            call.fail(ClientClosed("the client is closed"))
            return
        pid = os.getpid()
        pool: Pool | None = self._connections.get(pid)
        if pool is None:
            pool = self._connections.setdefault(pid, Pool(self.endpoint, self.connect_timeout_ms, self._key))
        try:
            link = pool.link()
        except ClientClosed as error:
            call.fail(error)
        except zmq.ZMQError as error:
            call.fail(Unreachable(f"cannot connect to {self.endpoint}: {error}", endpoint=self.endpoint))
        else:
            self._use(link, call)

    def _is_connected_again(self) -> bool:
        pool: Pool | None = self._connections.get(os.getpid())
        return pool is not None and pool.is_connected_again()

    def _use(self, link: Link, call: Call) -> None:
        with link.lock:
            done = False
            try:
                done = not link.closed and self._exchange(link, call)
            finally:
                # A REQ socket that was not answered can only be thrown away.
                if not done or self._closed:
                    link.close()

    def _exchange(self, link: Link, call: Call) -> bool:
        """Send and wait for the reply; False: the link is of no more use."""
        body = call.body(time.monotonic())
        if body is None:
            return True
        if not link.send(body, min(self.connect_timeout_ms / 1000.0, call.deadline_s - time.monotonic())):
            if link.refusal is not None:
                call.fail(link.refusal)
                return False
            call.not_sent(time.monotonic(), closed_early=link.closed_early > 0)
            return True
        call.sent(time.monotonic())
        answer = self._receive(link, call.attempt_ends_s)
        if answer is None:
            call.unanswered(time.monotonic())
            return False
        call.received(answer, time.monotonic())
        return True

    def _receive(self, link: Link, until_s: float) -> bytes | None:
        if (until_s - time.monotonic()) * 1000.0 > FIRST_WAIT_MS:
            try:
                return only(link.socket.recv_multipart())
            except zmq.Again:
                pass  # a try costs less than a context manager, on the path of every call
        while not self._closed:
            left_ms = (until_s - time.monotonic()) * 1000.0
            if left_ms <= 0.0:
                return None
            ready = dict(link.poller.poll(min(math.ceil(left_ms), CLOSE_CHECK_MS)))
            if link.socket in ready:
                return only(link.socket.recv_multipart())
            if link.monitor in ready:
                link.look()
                if link.lost or link.refusal is not None:
                    return None
        return None

    def _pause(self, until_s: float) -> None:
        while not self._closed and (left_s := until_s - time.monotonic()) > 0.0:
            time.sleep(min(left_s, CLOSE_CHECK_MS / 1000.0))


class AsyncMemoryClient(ClientMethods[Coroutine[Any, Any, Reply]]):
    """The same methods as coroutines, for one event loop at a time (asyncio or uvloop).

    Calls made together travel together: up to 32 are in flight, later ones wait for a place within their own budget.
    Methods that ask nobody (set_agent_id, get_circuit_breaker_status, ...) are plain methods here too.
    """

    async def call(
        self,
        action: str,
        data: dict[str, Any] | None = None,
        *,
        deadline_ms: float | None = None,
        request_id: str | None = None,
    ) -> Reply:
        call = self._begin(action, data, deadline_ms, request_id)
        try:
            if call.reply is None:
                await self._drive(call)
        except BaseException:  # a cancelled call must not leave the breaker waiting for it
            call.abandon()
            raise
        return self._end(call)

    async def close(self) -> None:
        """Close the connection; calls under way end with `client_closed`. Closing twice is fine."""
        self._closed = True
        self._close_pipe()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if getattr(self, "_connections", None):
            self._close_pipe()

    async def _drive(self, call: Call) -> None:
        pipe = self._pipe()
        if not await pipe.acquire(call.deadline_s):
            call.fail(RequestTimeout(f"{pipe.places} other calls of this client were under way all the time"))
            return
        try:
            while call.reply is None:
                await self._attempt(pipe, call)
        finally:
            pipe.release()

    async def _attempt(self, pipe: Pipe, call: Call) -> None:
        try:
            await pipe.pause(call.resume_at_s)
            await pipe.attempt(call)
        except (ClientClosed, AccessDenied) as error:
            call.fail(error)
        except zmq.ZMQError as error:
            call.fail(Unreachable(f"cannot connect to {self.endpoint}: {error}", endpoint=self.endpoint))

    def _is_connected_again(self) -> bool:
        pipe: Pipe | None = self._connections.get(os.getpid())
        return pipe is not None and pipe.is_connected_again()

    def _pipe(self) -> Pipe:
        # Who has an event loop has imported asyncio already; for others it would be a third of this module's import.
        import asyncio

        from memory_system.client_pipe import Pipe

        pipe: Pipe | None = self._connections.get(os.getpid())
        if pipe is None or pipe.loop is not asyncio.get_running_loop():
            self._close_pipe()
            pipe = self._connections[os.getpid()] = Pipe(self.endpoint, self.connect_timeout_ms, self._key)
        return pipe

    def _close_pipe(self) -> None:
        pipe: Pipe | None = self._connections.pop(os.getpid(), None)
        if pipe is not None:
            pipe.close()

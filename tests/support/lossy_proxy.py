"""A TCP proxy between clients and a service that does to their connections what a bad network does.

with LossyProxy(orchestrator.port, seed=7) as proxy, MemoryClient(proxy.endpoint) as client:
    with proxy.faulty("drip"):
        client.stats()

While a fault lasts it is that of all connections, also of new ones:

drop    nothing gets through, in either direction, and nobody is told
mute    requests arrive and their replies are lost
delay   each piece waits up to `DELAY_S`, so a request may arrive after its client has given it up
drip    one byte a second
reset   connections end with RST, some before and some after the request has arrived

A connection that has lost bytes is reset when the fault ends: its stream can no longer be right.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

FAULTS: Final = ("drop", "mute", "delay", "drip", "reset")
DELAY_S: Final = 3.0
DRIP_S: Final = 1.0
_RESET_SHARE: Final = 0.3
# SO_LINGER on, zero seconds: closing sends RST.
_AT_ONCE: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Fault:
    """One of FAULTS and how long it lasts, after a time in which all is well."""

    kind: str
    after_s: float
    lasts_s: float


def schedule(
    chance: random.Random, rounds: int, *, after_s: tuple[float, float], lasts_s: tuple[float, float]
) -> list[Fault]:
    """Every fault so many times, in an order and with times that the chance decides."""
    kinds = [*FAULTS] * rounds
    chance.shuffle(kinds)
    return [Fault(kind, chance.uniform(*after_s), chance.uniform(*lasts_s)) for kind in kinds]


class LossyProxy(threading.Thread):
    """Forwards connections to a port of this machine. `cut` lets what is sent still arrive and loses the replies, then
    hangs up; `faulty` is described above."""

    CUT_S = 0.05

    def __init__(self, upstream_port: int, seed: int = 0) -> None:
        super().__init__(name="lossy-proxy", daemon=True)
        self.port = 0
        self.fault: str | None = None
        self.chance = random.Random(f"proxy-{seed}")
        self.accepted = 0
        self._upstream_port = upstream_port
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._stopped = asyncio.Event()
        self._healed = asyncio.Event()
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> LossyProxy:
        self.start()
        assert self._listening.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self.join(10)

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    def cut(self) -> None:
        """Lose the replies of all connections from now on, and close them `CUT_S` later."""

        def begin() -> None:
            for connection in self._connections:
                connection.muted = True
                self._loop.call_later(self.CUT_S, connection.close)

        self._loop.call_soon_threadsafe(begin)

    def begin(self, kind: str) -> None:
        """From now on this fault, until `heal`."""
        assert kind in FAULTS, kind
        self._in_loop(lambda: self._set(kind))

    def heal(self) -> None:
        """All is well from now on; connections that have lost bytes are gone."""
        self._in_loop(lambda: self._set(None))

    @contextlib.contextmanager
    def faulty(self, kind: str) -> Iterator[None]:
        self.begin(kind)
        try:
            yield
        finally:
            self.heal()

    def play(self, faults: list[Fault]) -> None:
        """One fault after the other; returns when the last one is over."""
        for fault in faults:
            time.sleep(fault.after_s)
            with self.faulty(fault.kind):
                time.sleep(fault.lasts_s)

    def run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def pause(self, seconds: float) -> None:
        """Wait, at most until the fault is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._healed.wait(), seconds)

    def _in_loop(self, do: Callable[[], None]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (do(), done.set()))
        assert done.wait(30)

    def _set(self, kind: str | None) -> None:
        for connection in list(self._connections):
            if connection.torn or kind == "reset":
                connection.reset()
        self._healed.set()  # wakes what waits because of the fault before
        self._healed = asyncio.Event()
        self.fault = kind

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._stopped.wait()
        server.close()
        self._set(None)
        for connection in list(self._connections):
            connection.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:
            writer.transport.abort()
            self._tasks.discard(task)
            return
        connection = _Connection(self, writer, upstream[1])
        self._connections.add(connection)
        try:
            await asyncio.gather(connection.requests(reader), connection.replies(upstream[0]))
        finally:
            connection.close()
            self._connections.discard(connection)
            self._tasks.discard(task)


class _Connection:
    """One client's connection and the one to the service that was made for it."""

    def __init__(self, proxy: LossyProxy, client: asyncio.StreamWriter, upstream: asyncio.StreamWriter) -> None:
        self.muted = False  # by `cut`
        self.torn = False  # bytes of it were lost
        self._proxy = proxy
        self._client = client
        self._upstream = upstream

    async def requests(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                await self._carry(data, self._upstream, is_reply=False)
        self._upstream.transport.abort()

    async def replies(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if not self.muted:
                    await self._carry(data, self._client, is_reply=True)
        self.close()

    def close(self) -> None:
        for writer in (self._client, self._upstream):
            writer.transport.abort()

    def reset(self) -> None:
        for writer in (self._client, self._upstream):
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self.close()

    async def _carry(self, data: bytes, to: asyncio.StreamWriter, *, is_reply: bool) -> None:
        fault, chance = self._proxy.fault, self._proxy.chance
        if self.torn or fault == "drop" or (fault == "mute" and is_reply):
            self.torn = True
            return
        if fault == "drip":
            await self._drip(data, to)
            return
        if fault == "delay":
            await self._proxy.pause(chance.uniform(0.0, DELAY_S))
        is_reset = fault == "reset" and not is_reply and chance.random() < _RESET_SHARE
        if not is_reset or chance.random() < 0.5:
            to.write(data)
            await to.drain()
        if is_reset:
            await asyncio.sleep(0.01)  # for what was written to arrive
            self.reset()

    async def _drip(self, data: bytes, to: asyncio.StreamWriter) -> None:
        for index in range(len(data)):
            if self._proxy.fault != "drip":
                to.write(data[index:])
                break
            to.write(data[index : index + 1])
            await self._proxy.pause(DRIP_S)
        await to.drain()

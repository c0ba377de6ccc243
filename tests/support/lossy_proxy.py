"""A TCP proxy between clients and a service that loses replies when told to."""

from __future__ import annotations

import asyncio
import contextlib
import threading


class LossyProxy(threading.Thread):
    """Forwards connections to a port. `cut` lets what is sent still arrive and loses the replies, then hangs up."""

    CUT_S = 0.05

    def __init__(self, upstream_port: int) -> None:
        super().__init__(name="lossy-proxy", daemon=True)
        self.port = 0
        self._upstream_port = upstream_port
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._stopped = asyncio.Event()
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> LossyProxy:
        self.start()
        assert self._listening.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self.join(10)

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Lose the replies of all connections from now on, and close them `CUT_S` later."""

        def begin() -> None:
            for connection in self._connections:
                connection.muted = True
                self._loop.call_later(self.CUT_S, connection.close)

        self._loop.call_soon_threadsafe(begin)

    def run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._stopped.wait()
        server.close()
        for connection in list(self._connections):
            connection.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(writer, upstream[1])
        self._connections.add(connection)
        try:
            await asyncio.gather(_pump(reader, upstream[1]), connection.replies(upstream[0]))
        finally:
            connection.close()
            self._connections.discard(connection)
            self._tasks.discard(task)


class _Connection:
    def __init__(self, client: asyncio.StreamWriter, upstream: asyncio.StreamWriter) -> None:
        self.muted = False
        self._client = client
        self._upstream = upstream

    async def replies(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if not self.muted:
                    self._client.write(data)
                    await self._client.drain()
        self.close()

    def close(self) -> None:
        for writer in (self._client, self._upstream):
            writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()

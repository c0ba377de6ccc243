"""A bare ROUTER echo: what this machine gives to any Python service. Prints its port, serves until stdin ends.

The same shape as the service's own loop: the socket's descriptor in a uvloop loop, a bounded drain, replies that do not
block, a look at the socket after every round.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop
import zmq

DRAIN = 64


class Echo:
    def __init__(self, socket: zmq.Socket[bytes], loop: asyncio.AbstractEventLoop) -> None:
        self._socket = socket
        self._loop = loop
        self._scheduled = False

    def schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._receive)

    def _receive(self) -> None:
        self._scheduled = False
        for _ in range(DRAIN):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        self.schedule()


async def serve() -> None:
    loop = asyncio.get_running_loop()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        echo = Echo(socket, loop)
        ended = asyncio.Event()
        loop.add_reader(socket.fileno(), echo.schedule)
        loop.add_reader(sys.stdin.fileno(), ended.set)
        print(port, flush=True)
        await ended.wait()
        loop.remove_reader(socket.fileno())
        loop.remove_reader(sys.stdin.fileno())


if __name__ == "__main__":
    uvloop.run(serve())

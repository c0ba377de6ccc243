"""Clients that send as fast as they can and never read a reply; a process of its own, killed by who started it.

    with flood(address, clients=16) as flooders: ...

or `python -m tests.support.flood ADDRESS CLIENTS`.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import zmq

from tests.support.wire import encode, envelope

PROJECT = Path(__file__).resolve().parents[2]
PROCESSES = 2


def bodies(number: int) -> list[bytes]:
    """Reads and writes that are worked on for a while, and one with a large reply."""
    requests = [
        envelope("add_memory", {"content": f"flood {number}", "metadata": {"filler": "x" * 500}}),
        envelope("search_memory", {"query": "flood of words", "limit": 50, "touch": False}),
        envelope("list_memories", {"limit": 100}),
        envelope("get_memory", {"memory_id": "mem-none"}),
    ]
    return [encode(request, "msgpack") for request in requests]


def run(address: str, clients: int) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = []
    for _ in range(clients):
        socket = context.socket(zmq.DEALER)
        for option, value in ((zmq.LINGER, 0), (zmq.RCVHWM, 1), (zmq.SNDHWM, 1000)):
            socket.setsockopt(option, value)
        socket.connect(address)
        sockets.append(socket)
    poller = zmq.Poller()
    for socket in sockets:
        poller.register(socket, zmq.POLLOUT)
    for number in itertools.count():
        batch = bodies(number)
        for socket, _ in poller.poll(1000):
            with contextlib.suppress(zmq.Again):
                for body in batch:
                    socket.send_multipart([b"", body], zmq.NOBLOCK)


@contextlib.contextmanager
def flood(address: str, clients: int = 16) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`clients` of them, in two processes, until the block ends."""
    command = [sys.executable, "-m", "tests.support.flood", address, str(clients // PROCESSES)]
    processes = [subprocess.Popen(command, cwd=PROJECT) for _ in range(PROCESSES)]
    try:
        yield processes
        assert [process.poll() for process in processes] == [None] * PROCESSES, "a flooder ended by itself"
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))

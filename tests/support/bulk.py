"""Clients that send large requests one after the other, read each reply, and tell when their connection was closed.

They are plain sockets of ZeroMQ and not the clients of the project, which would connect again and say nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Final

import zmq

from tests.support.process import Orchestrator
from tests.support.wire import decode, encode, envelope

ITEMS: Final = 250
ANSWERED_S: Final = 60.0


def batch(number: int, turn: int, mib: float) -> bytes:
    """A `batch_add_memories` of about so many MiB."""
    words = f"parcel {number} of ship {turn} " * 1000
    size = int(mib * 2**20 / ITEMS)
    memories = [{"content": f"{item} {(words * (size // len(words) + 1))[:size]}"} for item in range(ITEMS)]
    return encode(envelope("batch_add_memories", {"memories": memories}, namespace=f"home/{number}"), "msgpack")


class BulkClient(threading.Thread):
    """Sends batches until the block of `bulk_clients` ends. `longest_s`: from sending one until its reply."""

    def __init__(self, orchestrator: Orchestrator, number: int, mib: float, stop: threading.Event) -> None:
        super().__init__(name=f"bulk-{number}")
        self.done = self.cut = 0
        self.longest_s = 0.0
        self.problem = ""
        self._orchestrator = orchestrator
        self._number = number
        self._mib = mib
        self._stop_event = stop

    def run(self) -> None:
        try:
            with self._orchestrator.peer() as peer:
                self._work(peer.socket)
        except Exception as error:  # noqa: BLE001  whatever ends the thread is a finding
            self.problem = repr(error)

    def _work(self, socket: zmq.Socket[bytes]) -> None:
        events = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            while not self._stop_event.is_set() and not self.cut:
                body = batch(self._number, self.done, self._mib)
                sent_s = time.monotonic()
                socket.send(body)
                self._receive(socket, events)
                self.longest_s = max(self.longest_s, time.monotonic() - sent_s)
        finally:
            socket.disable_monitor()
            events.close(0)

    def _receive(self, socket: zmq.Socket[bytes], events: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(events, zmq.POLLIN)
        ready = dict(poller.poll(int(ANSWERED_S * 1000)))
        if socket in ready:
            reply = decode(socket.recv(), "msgpack")
            assert reply["status"] == "success", reply
            self.done += 1
        else:
            assert events in ready, "no reply"
            self.cut += 1


@contextlib.contextmanager
def bulk_clients(orchestrator: Orchestrator, count: int, mib: float) -> Iterator[list[BulkClient]]:
    """`count` of them, until the block ends."""
    stop = threading.Event()
    clients = [BulkClient(orchestrator, number, mib, stop) for number in range(count)]
    for client in clients:
        client.start()
    try:
        yield clients
    finally:
        stop.set()
        for client in clients:
            client.join(ANSWERED_S)
    assert [client.problem for client in clients if client.problem] == []

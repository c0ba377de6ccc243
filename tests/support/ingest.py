"""The health manager's ingest as reporters see it: a ROUTER in a thread that acknowledges batches, or fails to.

As a program of its own (`python -m tests.support.ingest PORT`) it can be stopped and killed like one.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from typing import Any, Literal

import msgpack
import zmq

from memory_system.error_bus import ErrorReporter
from tests.support.process import wait_until

Message = dict[str, Any]
POLL_MS = 5


class FakeIngest:
    """`die` closes the socket as the end of a process does, `come_back` binds the same port again.

    mode: `ack`; `silent`, which takes batches and answers nothing; `retry`, which keeps nothing and says so.
    keeps_unacknowledged: whether a batch that is taken and not acknowledged was committed, as by a manager that is
    killed between its commit and its answer.
    """

    def __init__(self, *, start: bool = True, port: int = 0) -> None:
        self.mode: Literal["ack", "silent", "retry"] = "ack"
        self.acks_to_drop = 0
        self.keeps_unacknowledged = False
        self.retry_after_ms = 50.0
        self.batches: list[Message] = []
        self.events: list[Message] = []
        self.heartbeats: list[Message] = []
        self.peers: set[bytes] = set()
        self.other: list[Any] = []
        self._port = port
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if start:
            self.come_back()

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self._port}"

    def arrivals(self) -> Counter[str]:
        """How many times each event was committed, by its error_type."""
        return Counter(event["error_type"] for event in list(self.events))

    def kinds(self) -> list[str]:
        return [event["error_type"] for event in list(self.events)]

    def come_back(self) -> None:
        self._stop.clear()
        bound = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(bound,), daemon=True)
        self._thread.start()
        assert bound.wait(30.0)

    def die(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10.0)
            assert not self._thread.is_alive()
            self._thread = None

    def __enter__(self) -> FakeIngest:
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def _serve(self, bound: threading.Event) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            router.setsockopt(zmq.LINGER, 0)
            self._bind(router)
            bound.set()
            while not self._stop.is_set():
                if router.poll(POLL_MS):
                    self._take(router, *router.recv_multipart())

    def _bind(self, router: zmq.Socket[bytes]) -> None:
        end_s = time.monotonic() + 5.0
        while True:
            try:
                router.bind(f"tcp://127.0.0.1:{self._port or '*'}")
                break
            except zmq.ZMQError:  # the port of the socket just closed is released by a thread of libzmq
                if time.monotonic() > end_s:
                    raise
                time.sleep(0.01)
        self._port = int(router.getsockopt(zmq.LAST_ENDPOINT).decode().rsplit(":", 1)[1].rstrip("\0"))

    def _take(self, router: zmq.Socket[bytes], peer: bytes, *frames: bytes) -> None:
        assert frames[0] == b""
        assert len(frames) == 2
        self.peers.add(peer)
        message = msgpack.unpackb(frames[1], strict_map_key=True)
        if message["kind"] == "heartbeat":
            self.heartbeats.append(message)
            return
        if message["kind"] != "events":
            self.other.append(message)
            return
        self.batches.append(message)
        answer = self._answer(message)
        if answer is not None:
            router.send_multipart([peer, b"", msgpack.packb(answer)])

    def _answer(self, message: Message) -> Message | None:
        if self.mode == "retry":
            return {
                "kind": "retry",
                "batch": message["batch"],
                "retry_after_ms": self.retry_after_ms,
                "message": "full",
            }
        acknowledges = self.mode == "ack" and self.acks_to_drop <= 0
        if acknowledges or self.keeps_unacknowledged:
            self.events.extend(message["events"])
        if not acknowledges:
            self.acks_to_drop -= 1
            return None
        count = len(message["events"])
        return {"kind": "ack", "batch": message["batch"], "accepted": count, "known": 0, "malformed": 0}


def report_numbers(reporter: ErrorReporter, count: int, first: int = 0) -> None:
    """Events e0, e1, ...: one for each number."""
    for number in range(first, first + count):
        reporter.report(f"e{number}", "something failed", details={"number": number})


def numbers(count: int) -> set[str]:
    return {f"e{number}" for number in range(count)}


def acknowledged(reporter: ErrorReporter, count: int, timeout_s: float = 45.0) -> None:
    """Wait until so many of its events are."""
    wait_until(lambda: reporter.stats()["acknowledged"] >= count, f"{count} events acknowledged", timeout_s)


if __name__ == "__main__":
    with FakeIngest(port=int(sys.argv[1])) as ingest, contextlib.suppress(KeyboardInterrupt):
        sys.stdout.write("bound\n")
        sys.stdout.flush()
        sys.stdin.read()  # to the end of the test

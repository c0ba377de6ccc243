"""A ROUTER in a thread whose answers a test scripts, one behaviour for each request, then the default.

A behaviour takes the decoded request and returns what to send and when: a list of (delay_s, body).
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import msgpack
import pytest
import zmq

from memory_system.breaker import CircuitBreaker
from tests.support.process import free_port

Request = dict[str, Any]
Behaviour = Callable[[Request], list[tuple[float, bytes]]]

POLL_MS = 2


def ok(delay_s: float = 0.0, **fields: Any) -> Behaviour:
    def answer(request: Request) -> list[tuple[float, bytes]]:
        return [(delay_s, pack({"status": "success", "request_id": request["request_id"], **fields}))]

    return answer


def error(code: str, *, retryable: bool = False, with_id: bool = True, **details: Any) -> Behaviour:
    def answer(request: Request) -> list[tuple[float, bytes]]:
        reply = {"status": "error", "error_code": code, "message": code, "retryable": retryable, "details": details}
        if with_id:
            reply["request_id"] = request["request_id"]
        return [(0.0, pack(reply))]

    return answer


def busy(retry_after_ms: float = 20.0) -> Behaviour:
    return error("busy", retryable=True, retry_after_ms=retry_after_ms)


def raw(body: bytes) -> Behaviour:
    return lambda request: [(0.0, body)]


def drop(request: Request) -> list[tuple[float, bytes]]:
    return []


def stale(request: Request) -> list[tuple[float, bytes]]:
    return [(0.0, pack({"status": "success", "request_id": "of-another-call-entirely", "mark": "stale"}))]


def pack(reply: Request) -> bytes:
    body: bytes = msgpack.packb(reply)
    return body


class FakeOrchestrator:
    """`die` closes the socket as a killed process does; `come_back` binds the same port again."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.script: deque[Behaviour] = deque()
        self.default: Behaviour = ok()
        self.most_waiting = 0
        self._port = free_port()  # nobody else is given it while this one is dead
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.come_back()

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self._port}"

    @property
    def bodies_by_id(self) -> dict[str, int]:
        """How many times each request_id arrived."""
        counts: dict[str, int] = {}
        for request in list(self.requests):
            counts[request["request_id"]] = counts.get(request["request_id"], 0) + 1
        return counts

    def come_back(self) -> None:
        self._stop.clear()
        bound = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(bound,), daemon=True)
        self._thread.start()
        assert bound.wait(30.0)

    def die(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(30.0)
            assert not self._thread.is_alive()
            self._thread = None

    def wait_for(self, count: int, timeout_s: float = 15.0) -> None:
        """Until so many requests have arrived."""
        end_s = time.monotonic() + timeout_s
        while len(self.requests) < count:
            assert time.monotonic() < end_s, f"only {len(self.requests)} of {count} requests arrived"
            time.sleep(0.002)

    def __enter__(self) -> FakeOrchestrator:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.die()

    def _serve(self, bound: threading.Event) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            router.setsockopt(zmq.LINGER, 0)
            router.setsockopt(zmq.MAXMSGSIZE, 16 * 1024 * 1024)
            self._bind(router)
            bound.set()
            self._loop(router)

    def _bind(self, router: zmq.Socket[bytes]) -> None:
        end_s = time.monotonic() + 20.0
        while True:
            try:
                router.bind(self.endpoint)
                return
            except zmq.ZMQError:  # the port of the socket just closed is released by a thread of libzmq
                if time.monotonic() > end_s:
                    raise
                time.sleep(0.01)

    def _loop(self, router: zmq.Socket[bytes]) -> None:
        due: list[tuple[float, int, list[bytes]]] = []
        numbers = itertools.count()
        while not self._stop.is_set():
            if router.poll(POLL_MS):
                identity, empty, body = router.recv_multipart()
                request = msgpack.unpackb(body)
                self.requests.append(request)
                behaviour = self.script.popleft() if self.script else self.default
                for delay_s, answer in behaviour(request):
                    heapq.heappush(due, (time.monotonic() + delay_s, next(numbers), [identity, empty, answer]))
            self.most_waiting = max(self.most_waiting, len(due))
            while due and due[0][0] <= time.monotonic():
                router.send_multipart(heapq.heappop(due)[2])


def after_the_reset_timeout(monkeypatch: pytest.MonkeyPatch, reset_timeout_s: float) -> None:
    """From now on circuit breakers are asked as if so much time had passed since they opened."""
    allow = CircuitBreaker.allow
    monkeypatch.setattr(CircuitBreaker, "allow", lambda breaker, now_s: allow(breaker, now_s + reset_timeout_s))


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))

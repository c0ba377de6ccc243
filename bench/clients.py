"""The load: processes of bare REQ clients in a closed loop, each client one request at a time.

The same code drives the echo and the service, so that a ratio compares servers only. A process serves a pipe of jobs
and ends when its parent does.
"""

from __future__ import annotations

import multiprocessing as mp
import signal
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import msgpack
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workloads import BY_NAME, NAMESPACE, Job, Request, request

# How the clients are spread over processes: as many as keep the load from being the limit on two cores.
PROCESSES: Final = {1: 1, 8: 2, 64: 4}
REPLY_S: Final = 120.0
START_S: Final = 0.25
_OVERHEAD_BLOCK: Final = 200


class LoadFailure(Exception):
    """A request got no reply, or an error."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one measurement gave. Latencies in seconds, `elapsed_s` from the start to the last reply."""

    calls: int
    elapsed_s: float
    latencies_s: list[float]
    request_bytes: int
    reply_bytes: int

    @property
    def calls_per_s(self) -> float:
        return self.calls / self.elapsed_s

    def percentile_ms(self, percent: float) -> float:
        ordered = sorted(self.latencies_s)
        return 1000.0 * ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100.0))]


def process_count(clients: int) -> int:
    return PROCESSES.get(clients) or min(4, max(1, clients // 4))


class Load:
    """The processes that make the load; use as a context manager."""

    def __init__(self, processes: int) -> None:
        context = mp.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []
        for _ in range(processes):
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs,), daemon=True)
            # From its first moment on: until `work` says so itself, an interrupt would be told by a traceback.
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            process.start()
            signal.signal(signal.SIGINT, before)
            theirs.close()
            self._workers.append((process, mine))

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
            process.join()

    def measure(
        self, workload: str, endpoint: str, clients: int, seconds: float, seed: int, memory_ids: list[str]
    ) -> Sample:
        """Run one workload and gather what its processes saw. Raises LoadFailure."""
        count = process_count(clients)
        workers = self._workers[:count]
        shares = [clients // count + (number < clients % count) for number in range(count)]
        start_s = time.monotonic() + START_S
        for number, ((_, pipe), share) in enumerate(zip(workers, shares, strict=True)):
            pipe.send(Job(workload, endpoint, share, start_s, seconds, seed * 16 + number, memory_ids))
        return _gathered([_answer(pipe) for _, pipe in workers], start_s)

    def client_overhead(self, endpoint: str, memory_ids: list[str], seconds: float) -> list[float]:
        """What MemoryClient costs beyond a bare REQ: microseconds a call, one figure for each pair of blocks."""
        _, pipe = self._workers[0]
        pipe.send((endpoint, memory_ids, seconds))
        answer = _answer(pipe)
        assert isinstance(answer, list)
        return answer


def _answer(pipe: Connection) -> Any:
    answer = pipe.recv()
    if isinstance(answer, str):
        raise LoadFailure(answer)
    return answer


def _gathered(parts: list[tuple[float, bytes, int, int]], start_s: float) -> Sample:
    latencies = array("d")
    for _, raw, _, _ in parts:
        latencies.frombytes(raw)
    elapsed_s = max(last_s for last_s, *_ in parts) - start_s
    sent, received = sum(part[2] for part in parts), sum(part[3] for part in parts)
    calls = len(latencies)
    return Sample(calls, elapsed_s, latencies.tolist(), sent // calls, received // calls)


# -- in the load process --------------------------------------------------------------------------------------------


def work(pipe: Connection) -> None:
    """Serve jobs until the parent closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with zmq.Context() as context:
        while True:
            try:
                job = pipe.recv()
            except (EOFError, OSError):
                return
            try:
                pipe.send(Clients(context, job).run() if isinstance(job, Job) else overhead(context, *job))
            except (LoadFailure, zmq.ZMQError) as error:
                pipe.send(str(error))


class Clients:
    """A process's clients: sockets that each wait for their reply before the next request."""

    def __init__(self, context: zmq.Context[Any], job: Job) -> None:
        self._job = job
        self._requests: Iterator[Request] = BY_NAME[job.workload].requests(job)
        self._sockets = [connect(context, job.endpoint) for _ in range(job.clients)]
        self._latencies = array("d")
        self._sent_bytes = self._received_bytes = 0

    def run(self) -> tuple[float, bytes, int, int]:
        """Time of the last reply, latencies, bytes sent and received."""
        try:
            next(self._requests)  # made ready before the clock starts
            for socket in self._sockets:
                socket.send(msgpack.packb(request("get_commit_seq", {})))
                checked(receive(socket))
            time.sleep(max(0.0, self._job.start_s - time.monotonic()))
            last_s = self._alone() if len(self._sockets) == 1 else self._together()
        finally:
            for socket in self._sockets:
                socket.close(0)
        return last_s, self._latencies.tobytes(), self._sent_bytes, self._received_bytes

    def _send(self, socket: zmq.Socket[bytes]) -> float:
        body = msgpack.packb(next(self._requests))
        self._sent_bytes += len(body)
        sent_s = time.monotonic()
        socket.send(body)
        return sent_s

    def _received(self, body: bytes, sent_s: float) -> float:
        now_s = time.monotonic()
        self._latencies.append(now_s - sent_s)
        self._received_bytes += len(body)
        checked(body)
        return now_s

    def _alone(self) -> float:
        socket = self._sockets[0]
        end_s = now_s = time.monotonic()
        end_s += self._job.seconds
        while now_s < end_s:
            sent_s = self._send(socket)
            now_s = self._received(receive(socket), sent_s)
        return now_s

    def _together(self) -> float:
        """Send until the time is up, then wait for what is under way: all of it counts."""
        poller = zmq.Poller()
        for socket in self._sockets:
            poller.register(socket, zmq.POLLIN)
        end_s = now_s = time.monotonic()
        end_s += self._job.seconds
        sent_s = {socket: self._send(socket) for socket in self._sockets}
        while sent_s:
            ready = poller.poll(int(REPLY_S * 1000.0))
            if not ready:
                raise LoadFailure(f"{self._job.workload}: no reply within {REPLY_S:.0f} s")
            for socket, _ in ready:
                now_s = self._received(socket.recv(), sent_s.pop(socket))
                if now_s < end_s:
                    sent_s[socket] = self._send(socket)
        return now_s


def connect(context: zmq.Context[Any], endpoint: str, reply_s: float = REPLY_S) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(zmq.REQ)
    socket.linger = 0
    socket.rcvtimeo = int(reply_s * 1000.0)
    socket.connect(endpoint)
    return socket


def receive(socket: zmq.Socket[bytes]) -> bytes:
    try:
        return socket.recv()
    except zmq.Again:
        raise LoadFailure(f"no reply within {socket.rcvtimeo / 1000.0:.0f} s") from None


def checked(body: bytes) -> Request:
    reply: Request = msgpack.unpackb(body)
    if reply.get("status", "success") != "success":
        raise LoadFailure(f"{reply.get('error_code')}: {reply.get('message')}")
    return reply


def overhead(context: zmq.Context[Any], endpoint: str, memory_ids: list[str], seconds: float) -> list[float]:
    """get_memory by turns through MemoryClient and a bare REQ; the differences of the medians of each block."""
    from memory_client import MemoryClient

    socket = connect(context, endpoint)
    with socket, MemoryClient(endpoint, agent_id="bench", namespace=NAMESPACE, raise_on_error=True) as client:

        def bare(memory_id: str) -> None:
            socket.send(msgpack.packb(request("get_memory", {"memory_id": memory_id, "touch": True})))
            checked(receive(socket))

        differences: list[float] = []
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s or len(differences) < 4:
            through_us, bare_us = [], []
            for memory_id in memory_ids[:_OVERHEAD_BLOCK]:
                # Call by call, so that what else the machine does falls on both alike.
                through_us.append(_timed_us(client.get_memory, memory_id))
                bare_us.append(_timed_us(bare, memory_id))
            differences.append(statistics.median(through_us) - statistics.median(bare_us))
    return differences[1:]  # the first block connects and loads


def _timed_us(call: Callable[[str], object], memory_id: str) -> float:
    start_s = time.perf_counter()
    call(memory_id)
    return (time.perf_counter() - start_s) * 1e6

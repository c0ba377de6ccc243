"""Many clients in one process, each with a call every so often; says what became of them when its input ends.

crowd.py ENDPOINT KIND CLIENTS PERIOD_S NAME

KIND: `threads` (a MemoryClient in a thread each), `async` (AsyncMemoryClient), `naive`: sockets that send whether or
not anybody answers, as a client does that knows nothing of outages, or `sockets`, which connect one after the other,
ask all at once and stay connected. Prints "ready" when every client has been answered (`sockets`: twice), at the end
one line of JSON: for each client the times of its successes (monotonic, which all processes of a machine share), and
the texts that were acknowledged; and how often each error came.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import zmq

from memory_client import AsyncMemoryClient, MemoryClient
from memory_system.protocol import encode_request, new_request_id

# One call in so many writes.
WRITES = 5
# Sockets that connect at the same time.
BLOCK = 250


@dataclass
class Told:
    """What one client was told."""

    successes: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


class Crowd:
    def __init__(self, endpoint: str, clients: int, period_s: float, name: str) -> None:
        self.endpoint = endpoint
        self.period_s = period_s
        self.name = name
        self.told = [Told() for _ in range(clients)]
        self.errors: Counter[str] = Counter()
        self.answers = 1  # so many for each, and the crowd is ready
        self.ended = threading.Event()
        self._chance = random.Random(name)

    def begin_s(self) -> float:
        """When a client's first turn is: they are spread evenly over a period."""
        return time.monotonic() + self._chance.uniform(0.0, self.period_s)

    def next_s(self, turn_s: float) -> float:
        """Its next turn, without those that it has missed."""
        now_s = time.monotonic()
        missed = max(0, int((now_s - turn_s) // self.period_s))
        return turn_s + (missed + 1) * self.period_s

    def call_of(self, number: int, turn: int) -> tuple[str, dict[str, Any]]:
        if turn % WRITES:
            return "get_commit_seq", {}
        return "add_memory", {"content": f"{self.name} {number} {turn}"}

    def note(self, number: int, data: dict[str, Any], reply: dict[str, Any]) -> None:
        if reply["status"] != "success":
            self.errors[f"{reply['error_code']} {reply['outcome']}"] += 1
            return
        self.told[number].successes.append(round(time.monotonic(), 3))
        if data:
            self.told[number].texts.append(data["content"])

    def report(self) -> None:
        clients = [{"successes": told.successes, "texts": told.texts} for told in self.told]
        print(json.dumps({"clients": clients, "errors": self.errors}), flush=True)  # noqa: T201


def watch(crowd: Crowd) -> None:
    """Say when all have been answered; end with the input."""
    while not all(len(told.successes) >= crowd.answers for told in crowd.told):
        time.sleep(0.05)
    print("ready", flush=True)  # noqa: T201
    sys.stdin.read()
    crowd.ended.set()


def with_threads(crowd: Crowd) -> None:
    def live(number: int, turn_s: float) -> None:
        turn = 0
        with MemoryClient(crowd.endpoint, agent_id=f"{crowd.name}-{number}") as client:
            while not crowd.ended.wait(max(0.0, turn_s - time.monotonic())):
                action, data = crowd.call_of(number, turn)
                crowd.note(number, data, client.call(action, data))
                turn, turn_s = turn + 1, crowd.next_s(turn_s)

    threads = [threading.Thread(target=live, args=(n, crowd.begin_s())) for n in range(len(crowd.told))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def with_asyncio(crowd: Crowd) -> None:
    async def live(number: int, turn_s: float) -> None:
        turn = 0
        async with AsyncMemoryClient(crowd.endpoint, agent_id=f"{crowd.name}-{number}") as client:
            while not crowd.ended.is_set():
                await asyncio.sleep(max(0.0, turn_s - time.monotonic()))
                action, data = crowd.call_of(number, turn)
                crowd.note(number, data, await client.call(action, data))
                turn, turn_s = turn + 1, crowd.next_s(turn_s)

    await asyncio.gather(*(live(number, crowd.begin_s()) for number in range(len(crowd.told))))


def a_request() -> list[bytes]:
    request = {"v": 1, "action": "get_commit_seq", "data": {}, "request_id": new_request_id()}
    return [b"", encode_request(request)]


class Sockets(list[zmq.Socket[bytes]]):
    """A socket for each client; what it sends waits for the connection."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 60_000)

    def __enter__(self) -> Sockets:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def connect(self, count: int) -> None:
        """So many more."""
        for _ in range(min(count, len(self._crowd.told) - len(self))):
            self.append(self._context.socket(zmq.DEALER))
            self[-1].connect(self._crowd.endpoint)

    def ask(self, number: int) -> None:
        request = {"v": 1, "action": "get_commit_seq", "data": {}, "request_id": new_request_id()}
        self[number].send_multipart([b"", encode_request(request)], zmq.NOBLOCK)

    def hear(self) -> None:
        """Note the answers that are there. A poll of thousands of sockets would cost more."""
        for told, sock in zip(self._crowd.told, self, strict=False):  # those that are not connected yet have none
            while sock.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                sock.recv_multipart()
                told.successes.append(round(time.monotonic(), 3))

    def ask_until_heard(self, answers: int) -> None:
        """Have each ask until it has been answered so often; again after a period, if its request was lost."""
        asked_s = -math.inf
        while not self._crowd.ended.wait(0.02):
            self.hear()
            waiting = [number for number in range(len(self)) if len(self._crowd.told[number].successes) < answers]
            if not waiting:
                return
            if time.monotonic() - asked_s > self._crowd.period_s:
                asked_s = time.monotonic()
                for number in waiting:
                    self.ask(number)


def naive(crowd: Crowd) -> None:
    """Every period a request, also while there is no connection, where it waits for one."""
    with Sockets(crowd) as sockets:
        sockets.connect(len(crowd.told))
        turns = [crowd.begin_s() for _ in sockets]
        while not crowd.ended.wait(0.02):
            sockets.hear()
            for number in range(len(sockets)):
                if time.monotonic() >= turns[number]:
                    sockets.ask(number)
                    turns[number] += crowd.period_s


def asking_twice(crowd: Crowd) -> None:
    """Connect and ask, block by block, as agents do not all start in one instant; then all ask at once."""
    with Sockets(crowd) as sockets:
        while len(sockets) < len(crowd.told):
            sockets.connect(BLOCK)
            sockets.ask_until_heard(1)
        sockets.ask_until_heard(2)
        crowd.ended.wait()


def main() -> None:
    endpoint, kind, clients, period_s, name = sys.argv[1:]
    crowd = Crowd(endpoint, int(clients), float(period_s), name)
    crowd.answers = 2 if kind == "sockets" else 1
    watcher = threading.Thread(target=watch, args=(crowd,), daemon=True)
    watcher.start()
    if kind == "threads":
        with_threads(crowd)
    elif kind == "async":
        asyncio.run(with_asyncio(crowd))
    else:
        {"naive": naive, "sockets": asking_twice}[kind](crowd)
    crowd.report()


if __name__ == "__main__":
    main()

"""Requests that wait for the writer, in a lane for each client."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from memory_system.storage import idempotency
from memory_system.storage.context import Reply, WriteContext

Identity = tuple[str, str, str]  # namespace, caller, request_id


@dataclass(slots=True)
class WriteJob:
    """One request for the writer. `rows`: about how many rows it writes; `client`: whose turn it takes."""

    run: Callable[[WriteContext], Reply]
    namespace: str
    caller: str = ""
    key: idempotency.Key | None = None
    rows: int = 1
    counted: bool = True  # whether it raises the namespace's commit_seq
    deadline_s: float | None = None  # monotonic
    client: bytes = b""
    future: asyncio.Future[Reply] | None = None

    @property
    def identity(self) -> Identity | None:
        """What makes two attempts the same request; None for one without a key."""
        return None if self.key is None else (self.namespace, self.key.caller, self.key.request_id)

    @property
    def request_id(self) -> str | None:
        return None if self.key is None else self.key.request_id


class Lanes:
    """First in, first out for each client, and the clients in turn.

    One client with 64 batches of 1,000 rows under way would otherwise hold up everybody's writes for seconds.
    """

    def __init__(self) -> None:
        self._lanes: OrderedDict[bytes, deque[WriteJob]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, job: WriteJob) -> None:
        self._lanes.setdefault(job.client, deque()).append(job)
        self._count += 1

    def first(self) -> WriteJob:
        """The job whose turn it is; raises StopIteration when there is none."""
        return next(iter(self._lanes.values()))[0]

    def pop(self) -> WriteJob:
        """Take that job; its client goes to the end of the row."""
        client, lane = next(iter(self._lanes.items()))
        job = lane.popleft()
        self._count -= 1
        if lane:
            self._lanes.move_to_end(client)
        else:
            del self._lanes[client]
        return job

    def take_all(self) -> list[WriteJob]:
        return [self.pop() for _ in range(self._count)]

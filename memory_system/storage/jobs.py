"""Requests that wait for the writer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from memory_system.storage import idempotency
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.idempotency import Identity


@dataclass(slots=True)
class WriteJob:
    """One request for the writer. `rows`: about how many rows it writes; `client`: whose turn it takes; `owner`: whose
    quota its new memories count against."""

    run: Callable[[WriteContext], Reply]
    namespace: str
    caller: str = ""
    key: idempotency.Key | None = None
    rows: int = 1
    counted: bool = True  # whether it raises the namespace's commit_seq
    deadline_s: float | None = None  # monotonic
    client: bytes = b""
    owner: str = ""
    future: asyncio.Future[Reply] | None = None

    @property
    def identity(self) -> Identity | None:
        """What makes two attempts the same request; None for one without a key."""
        return None if self.key is None else (self.namespace, self.key.caller, self.key.request_id)

    @property
    def request_id(self) -> str | None:
        return None if self.key is None else self.key.request_id

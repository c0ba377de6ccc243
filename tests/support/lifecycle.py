"""A real orchestrator whose wall clock a test moves, so that days pass between two calls.

with ageing_orchestrator(tmp_path) as service:
    memory_id = service.add("a memory", importance=0.8)
    service.clock.advance(3 * DAY_S)
    assert service.record(memory_id)["importance"] < 0.8
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import sqlite3
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.process import Orchestrator, Peer, running_orchestrator, wait_until
from tests.support.wire import Reply, encode, envelope

DAY_S = 86_400.0

# Python runs this module at its start, before the program: from then on `time.time` and `datetime.now` follow the test.
_SITE = """
import datetime, mmap, os, struct, time

with open(os.environ["TEST_CLOCK"], "rb") as _file:
    _ahead = mmap.mmap(_file.fileno(), 8, access=mmap.ACCESS_READ)
_time = time.time
time.time = lambda: _time() + struct.unpack("d", _ahead)[0]
_datetime = datetime.datetime

class _Kind(type):
    def __instancecheck__(self, value):
        return isinstance(value, _datetime)

class datetime_of_test(_datetime, metaclass=_Kind):
    @classmethod
    def now(cls, tz=None):
        return _datetime.fromtimestamp(time.time(), tz)

datetime.datetime = datetime_of_test
"""


class MovableClock:
    """The wall clock of the processes that are started with `environ`; their monotonic clock goes on as it does."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(_SITE)
        shared = folder / "ahead"
        shared.write_bytes(struct.pack("d", 0.0))
        with shared.open("r+b") as file:
            self._ahead = mmap.mmap(file.fileno(), 8)
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environ = {"PYTHONPATH": os.pathsep.join(paths), "TEST_CLOCK": str(shared)}

    def __repr__(self) -> str:
        return f"MovableClock({self.ahead_s:+.0f} s)"

    @property
    def ahead_s(self) -> float:
        ahead_s: float = struct.unpack("d", self._ahead)[0]
        return ahead_s

    def time(self) -> float:
        return time.time() + self.ahead_s

    def advance(self, seconds: float) -> None:
        """Move on, or back when negative."""
        self._ahead[:] = struct.pack("d", self.ahead_s + seconds)

    def close(self) -> None:
        self._ahead.close()


class Ageing:
    """An orchestrator with a movable clock. `around` of a request is what stands beside its data."""

    def __init__(self, orchestrator: Orchestrator, clock: MovableClock) -> None:
        self.orchestrator = orchestrator
        self.clock = clock

    def ok(
        self, action: str, around: dict[str, Any] | None = None, /, *, timeout_s: float = 60.0, **data: Any
    ) -> Reply:
        reply = self.orchestrator.ask(action, around, timeout_s=timeout_s, **data)
        assert reply["status"] == "success", reply
        return reply

    def fails(self, code: str, action: str, around: dict[str, Any] | None = None, /, **data: Any) -> Reply:
        reply = self.orchestrator.ask(action, around, **data)
        assert reply.get("error_code") == code, reply
        return reply

    def add(self, content: str, around: dict[str, Any] | None = None, /, **data: Any) -> str:
        memory_id: str = self.ok("add_memory", around, content=content, **data)["memory_id"]
        return memory_id

    def record(self, memory_id: str, around: dict[str, Any] | None = None, /) -> dict[str, Any]:
        """The memory as a read gives it that leaves no trace."""
        memory: dict[str, Any] = self.ok("get_memory", around, memory_id=memory_id, touch=False)["memory"]
        return memory

    def found(self, query: str, action: str = "search_memory", **data: Any) -> set[str]:
        """Ids of the first thousand results of a search that leaves no trace."""
        limit = {"limit": 1000} if action == "search_memory" else {"k": 1000}
        reply = self.ok(action, query=query, touch=False, **limit, **data)
        assert "next_cursor" not in reply or action != "search_memory"
        return {result["memory_id"] for result in reply["results"]}

    def listed(self, around: dict[str, Any] | None = None, /, **data: Any) -> list[str]:
        """Ids of all pages of list_memories, in their order."""
        ids: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            reply = self.ok("list_memories", around, **{"limit": 1000, **data}, **cursor)
            ids += [memory["memory_id"] for memory in reply["results"]]
            if "next_cursor" not in reply:
                return ids
            cursor = {"cursor": reply["next_cursor"]}

    def accesses_written(self, memory_id: str, count: int) -> None:
        """Return when the buffered accesses of a memory are in the store."""
        wait_until(lambda: self.record(memory_id)["access_count"] == count, f"{count} accesses of {memory_id}")

    def vectors_ready(self, around: dict[str, Any] | None = None, /) -> None:
        """Return when every memory of the namespace has its vector, in the index too."""

        def ready() -> bool:
            # In this order: a memory that the index has not come to yet is not pending there.
            health = self.ok("health_check")
            followed = health["readiness"]["search_index"] == "ready" and health["index_lag"] == 0
            return followed and self.ok("stats", around)["pending"] == 0

        wait_until(ready, "all vectors", 60.0)

    def restart(self) -> None:
        """Kill the process with SIGKILL and start it anew."""
        self.orchestrator.restart()

    def restart_with(self, **overrides: Any) -> None:
        """End the process as an operator does, change its settings, and start it anew."""
        assert self.orchestrator.terminate() == 0
        self.orchestrator._forget()
        self.configure(**overrides)
        self.orchestrator.start()

    def configure(self, **overrides: Any) -> None:
        """Settings for the next start, given as section__key=value."""
        self.orchestrator.environ |= {f"MEMORY__{name.upper()}": str(value) for name, value in overrides.items()}

    # -- what the database holds, by a connection of its own --------------------------------------------------------

    def query(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        uri = f"file:{self.orchestrator.database}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30.0)) as db:
            return db.execute(sql, parameters).fetchall()

    def rows(self) -> dict[str, tuple[Any, ...]]:
        """Every memory of every namespace with all that is stored of it, by its memory_id."""
        return {row[0]: row for row in self.query("SELECT memory_id, * FROM memories")}

    def everything(self) -> dict[str, list[tuple[Any, ...]]]:
        """What a run that only shows what it would do must leave as it is. Vectors come by themselves, at any time."""
        tables = (
            *("memories", "namespaces", "relationships", "consolidations", "consolidation_members"),
            *("group_members", "sessions", "memory_history", "idempotency"),
        )
        stored = {table: self.query(f"SELECT * FROM {table} ORDER BY 1, 2") for table in tables}
        return stored | {"index_log": self.query("SELECT row_id, op FROM index_log WHERE op <> 'vector' ORDER BY seq")}


@contextlib.contextmanager
def ageing_orchestrator(tmp_path: Path, *, start: bool = True, **overrides: Any) -> Iterator[Ageing]:
    """An orchestrator with a clock that the test moves. Jumps of it count for nothing unless `clock__jump_s` is given.

    Accesses are flushed often, so that a test need not wait for them.
    """
    clock = MovableClock(tmp_path / "clock")
    settings = {"clock__jump_s": 1e9, "storage__access_flush_s": 0.1, **overrides}
    try:
        with running_orchestrator(tmp_path, start=False, **settings) as orchestrator:
            orchestrator.environ |= clock.environ
            if start:
                orchestrator.start()
            yield Ageing(orchestrator, clock)
    finally:
        clock.close()


@contextlib.contextmanager
def asking(service: Ageing, action: str, around: dict[str, Any], /, **data: Any) -> Iterator[Peer]:
    """A caller that has asked, and waits for the reply."""
    with service.orchestrator.peer() as peer:
        peer.send(encode(envelope(action, data, **around), "msgpack"))
        yield peer


def faded(importance: float, rate_per_day: float, days: float, accesses: int = 0) -> float:
    """What is left of an importance: the formula of the documents, written down once more."""
    return importance * math.exp(-rate_per_day * days / (1.0 + math.log(1.0 + accesses)))

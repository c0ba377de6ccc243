"""The service to test against: a Runtime in this process without a socket, or (process.py) a real orchestrator.

@service_test()                                       # once for each encoding of the wire, see ONE_ENCODING
async def test_something(service: Service) -> None:
    added = await service.ok("add_memory", content="x")
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sqlite3
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from memory_system import dispatch
from memory_system.runtime import Runtime
from memory_system.search import feed
from memory_system.service import runs
from memory_system.settings import load_settings
from memory_system.storage.database import connect_reader
from tests.support.process import PROJECT, Orchestrator, Peer, free_port, running_orchestrator, wait_until
from tests.support.wire import ENCODINGS, Reply, check_shape, decode, encode, envelope, environment, request_id

# Tests of both kinds import from here.
__all__ = [
    "ENCODINGS",
    "PROJECT",
    "Clock",
    "Orchestrator",
    "Peer",
    "Reply",
    "Service",
    "check_shape",
    "decode",
    "encode",
    "envelope",
    "environment",
    "eventually",
    "free_port",
    "request_id",
    "running_orchestrator",
    "running_service",
    "service_test",
    "wait_until",
]


# What the tests of these modules are about comes after decoding: each runs in one encoding, which its name draws.
ONE_ENCODING = (
    "test_consolidation",
    "test_maintenance_checks",
    "test_maintenance_merges",
    "test_maintenance_runs",
    "test_maintenance_sweeps",
    "test_operations_ageing",
    "test_operations_archiving",
    "test_operations_deletion",
    "test_operations_expiry",
    "test_operations_fairness",
)


class Clock:
    """Stands for the `time` module where the service asks what time it is; `ahead_s` moves the wall clock."""

    monotonic = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def time(self) -> float:
        return time.time() + self.ahead_s


class Service:
    """A running Runtime. `await service(body)` is the wire; `ask`, `ok` and `fails` speak it in one encoding."""

    def __init__(self, runtime: Runtime, path: Path, encoding: str, clock: Clock) -> None:
        self.runtime = runtime
        self.path = path
        self.encoding = encoding
        self.clock = clock

    async def __call__(self, body: bytes) -> bytes:
        return await self.runtime.dispatcher.answer(body)

    async def send(self, request: Any) -> Reply:
        """The reply to a whole request, envelope included."""
        return decode(await self(encode(request, self.encoding)), self.encoding)

    async def ask(self, action: str, around: dict[str, Any] | None = None, /, **data: Any) -> Reply:
        return await self.send(envelope(action, data, **(around or {})))

    async def ok(self, action: str, around: dict[str, Any] | None = None, /, **data: Any) -> Reply:
        reply = await self.ask(action, around, **data)
        assert reply["status"] == "success", reply
        return reply

    async def fails(self, code: str, action: str, around: dict[str, Any] | None = None, /, **data: Any) -> Reply:
        reply = await self.ask(action, around, **data)
        assert reply.get("error_code") == code, reply
        return reply

    async def add(self, content: str = "a memory", around: dict[str, Any] | None = None, /, **data: Any) -> str:
        memory_id: str = (await self.ok("add_memory", around, content=content, **data))["memory_id"]
        return memory_id

    async def session(self, around: dict[str, Any] | None = None, /, **data: Any) -> str:
        session_id: str = (await self.ok("create_session", around, **{"user_id": "ada", **data}))["session_id"]
        return session_id

    async def record(self, memory_id: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.ok("get_memory", memory_id=memory_id, touch=False))["memory"]
        return found

    async def walk(self, action: str, around: dict[str, Any] | None = None, /, **data: Any) -> list[dict[str, Any]]:
        """All results of a list, page by page."""
        found: list[dict[str, Any]] = []
        reply = await self.ok(action, around, **data)
        while True:
            found += reply["results"]
            if "next_cursor" not in reply:
                return found
            assert reply["results"], "a page that is not the last is empty"
            reply = await self.ok(action, around, **data, cursor=reply["next_cursor"])

    def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """What the database holds now, by a connection of its own."""
        with contextlib.closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as db:
            return db.execute(sql, parameters).fetchall()

    def count(self, table: str) -> int:
        number: int = self.rows(f"SELECT count(*) FROM {table}")[0][0]
        return number

    def texts_with(self, word: str, namespace: str = "default") -> int:
        """How many texts the index of words has with a word, in the present state of the database."""
        index = self.runtime._index
        with contextlib.closing(connect_reader(self.path)) as db, feed.snapshot(db) as last_seq:
            assert index.catch_up(db, last_seq)
        with index.reading() as view:
            assert view is not None
            return int(view.words.prepare(namespace, word).found_in.max(initial=0))

    async def settled(self) -> None:
        """Return when nothing is written without being asked for: the index has followed every change, every memory of
        every namespace has its vector, and none is being embedded once more because it changed meanwhile."""
        await eventually(self._nothing_pending)

    async def _nothing_pending(self) -> bool:
        index, embedding = self.runtime._index, self.runtime._embedding
        # In this order: what the index has not come to yet is not pending there, nor waits to be embedded.
        told = not index._news._missing
        health = await self.ok("health_check")
        followed = health["readiness"]["search_index"] == "ready" and health["index_lag"] == 0
        pending = sum(index.pending(name) for (name,) in self.rows("SELECT DISTINCT namespace FROM memories"))
        await asyncio.sleep(0)  # what the thread of the index has told reaches the queue
        return told and followed and pending == 0 and not any(embedding.depth) and not embedding._in_flight


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 45.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110  the condition is asked for over the wire
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running_service(tmp_path: Path, encoding: str = "msgpack", **overrides: Any) -> AsyncIterator[Service]:
    """A Runtime over a store in `tmp_path`; settings are given as section__key=value."""
    # Counted accesses are written when a test says so, not in the middle of one that takes its time.
    environ = environment(tmp_path, {"storage__access_flush_s": 3600, **overrides})
    settings = load_settings(environ={**environ, "MEMORY_CONFIG": os.devnull})
    fatal: list[Exception] = []
    runtime = Runtime(settings, on_fatal=fatal.append, health=lambda: {"pid": os.getpid()})
    clock = Clock()
    with mock.patch.object(dispatch, "time", clock), mock.patch.object(runs, "time", clock):
        try:
            await runtime.start()
            runtime._writer._runner._clock = clock.time
            yield Service(runtime, Path(settings.storage.path), encoding, clock)
        finally:
            await runtime.close()
    assert not fatal


def service_test(**overrides: Any) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., None]]:
    """Make a test of an async function: its first argument is a Service of its own, once for each encoding to test."""

    def decorate(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
        def run(tmp_path: Path, encoding: str, **arguments: Any) -> None:
            async def scenario() -> None:
                async with running_service(tmp_path, encoding, **overrides) as service:
                    await test(service, **arguments)

            asyncio.run(scenario())

        given = inspect.signature(run).parameters
        wanted = list(inspect.signature(test).parameters.values())[1:]
        named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in wanted]
        run.__signature__ = inspect.Signature([given["tmp_path"], given["encoding"], *named])  # type: ignore[attr-defined]
        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        run.pytestmark = getattr(test, "pytestmark", [])  # type: ignore[attr-defined]
        return pytest.mark.parametrize("encoding", _encodings_of(test))(run)

    return decorate


def _encodings_of(test: Callable[..., Awaitable[None]]) -> tuple[str, ...]:
    if test.__module__.rpartition(".")[2] not in ONE_ENCODING:
        return ENCODINGS
    return (ENCODINGS[zlib.crc32(test.__name__.encode()) % len(ENCODINGS)],)

"""What the service says of itself: health_check and stats."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from memory_system import __version__
from memory_system import models as m
from memory_system.cache import Caches
from memory_system.calls import Call
from memory_system.embedding import Embedder, EmbeddingQueue
from memory_system.process_figures import disk_free_bytes, process_figures
from memory_system.search.index import SearchIndex
from memory_system.service import Reply
from memory_system.storage.migrations import CURRENT_VERSION
from memory_system.storage.queries import Queries
from memory_system.storage.writer import Writer

# How long stats waits for the index, which trails the log by milliseconds.
_LOOKS: Final = 20
_LOOK_S: Final = 0.005
_EMBEDDING_READINESS = {"ready": "ready", "starting": "loading", "down": "unavailable", "off": "off"}
_INDEX_READINESS = {"ready": "ready", "loading": "loading", "failed": "unavailable"}
# What a heartbeat says of it; the rest is for whoever asks.
_HEARTBEAT: Final = (
    *("pid", "state", "readiness", "uptime_s", "in_flight", "write_queue", "index_lag", "last_commit_at"),
    *("memory_bytes", "open_files", "disk_free_bytes"),
)
# What a key is told that is no operator's: nothing that comes of what others keep or ask.
_FOR_EVERYBODY: Final = ("state", "readiness", "pid", "uptime_s", "draining", "version", "model_id")


class HealthService:
    """`process()` gives the program's own figures (uptime_s, in_flight, ...), `traffic()` the counters of requests,
    `runs()` what maintenance is under way."""

    def __init__(
        self,
        database: Path,
        writer: Writer,
        queries: Queries,
        caches: Caches,
        index: SearchIndex,
        embedder: Embedder,
        embedding: EmbeddingQueue,
        process: Callable[[], Mapping[str, Any]],
        traffic: Callable[[], Mapping[str, Any]],
        runs: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._database = database
        self._writer = writer
        self._queries = queries
        self._caches = caches
        self._index = index
        self._embedder = embedder
        self._embedding = embedding
        self._process = process
        self._traffic = traffic
        self._runs = runs
        self._was_healthy = False  # what loads again was lost

    def health_check(self, call: Call, p: m.NoParams) -> Reply:
        figures = self.figures()
        return figures if call.who.sees_figures else {name: figures[name] for name in _FOR_EVERYBODY}

    def heartbeat(self) -> Reply:
        """What is said of the service every few seconds."""
        figures = self.figures()
        return {name: figures[name] for name in _HEARTBEAT if name in figures}

    def figures(self) -> Reply:
        """Everything that health_check says. No query of the database, no wait; may be called from any thread."""
        readiness = {
            "store": "ready",
            "search_index": _INDEX_READINESS.get(self._index.state, "unavailable"),
            "embedding": _EMBEDDING_READINESS[self._embedder.state],
            "redis": self._caches.redis.state,
        }
        process = self._process()
        if "security" in process:
            readiness["authenticator"] = process["security"]["state"]
        depth = self._embedding.depth
        return {
            "state": self._state(readiness),
            "readiness": readiness,
            **process_figures(),
            **process,
            "version": __version__,
            "sqlite_version": sqlite3.sqlite_version,
            "model_id": self._embedder.model_id,
            "write_queue": self._writer.depth,
            "embedding_queue": {"fresh": depth.fresh, "backfill": depth.backfill, "poisoned": self._embedding.poisoned},
            "index_lag": max(0, self._writer.log_seq - self._index.applied_seq),
            "last_commit_at": self._writer.last_commit_at,
            "database": {
                "size_bytes": _size(self._database),
                "wal_bytes": _size(self._database.with_name(f"{self._database.name}-wal")),
                "schema_version": CURRENT_VERSION,
            },
            "disk_free_bytes": disk_free_bytes(self._database),
            "breakers": {} if readiness["redis"] == "off" else {"redis": self._caches.redis.breaker},
            "caches": self._caches.stats(),
            "maintenance": self._runs(),
            **self._traffic(),
        }

    def _state(self, readiness: Mapping[str, str]) -> str:
        """Redis is a cache and never a condition: it does not count."""
        needed = (readiness["search_index"], readiness["embedding"], readiness.get("authenticator", "off"))
        if self._process().get("draining"):
            return "stopping"
        if "unavailable" in needed:
            return "degraded"
        if "loading" in needed:
            return "degraded" if self._was_healthy else "starting"
        self._was_healthy = True
        return "healthy"

    async def stats(self, call: Call, p: m.NoParams) -> Reply:
        counts = await self._queries.counts(call.namespace, call.now_s)
        return {
            "namespace": call.namespace,
            **counts,
            "pending": await self._pending(call.namespace),
        }

    async def _pending(self, namespace: str) -> int:
        """What searches would say: the index counts, once it has followed the log to its end of now."""
        last_seq = await self._queries.last_log_seq()
        self._index.pace.hurry()
        for _ in range(_LOOKS):
            if self._index.state == "ready" and self._index.applied_seq >= last_seq:
                return self._index.pending(namespace)
            await asyncio.sleep(_LOOK_S)
        return await self._queries.pending(namespace, self._index.model_id)


def _size(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return 0  # SQLite removes its log when the last connection closes

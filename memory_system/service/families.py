"""The orchestrator's metrics, made of what health_check says; names and meanings stand in docs/operations.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from memory_system.metrics import Family, counter, gauge, single, states

STATES: Final = ("starting", "healthy", "degraded", "stopping")
READINESS: Final = ("ready", "loading", "unavailable", "off")
BREAKER: Final = ("closed", "open", "half_open")
CACHES: Final = ("records", "vectors", "results")


def service_families(figures: Mapping[str, Any]) -> list[Family]:
    """`figures`: HealthService.figures()."""
    return [*_state(figures), *_work(figures), *_storage(figures), *_caches(figures["caches"])]


def _state(figures: Mapping[str, Any]) -> list[Family]:
    return [
        states("state", "1 for the state that the service is in.", "component", _own(figures), STATES),
        states("readiness", "1 for the readiness of each part.", "part", figures["readiness"], READINESS),
        states("breaker_state", "1 for the state of each circuit breaker.", "breaker", figures["breakers"], BREAKER),
        single("uptime_seconds", "Time since the program started.", figures.get("uptime_s")),
    ]


def _own(figures: Mapping[str, Any]) -> dict[str, str]:
    return {"orchestrator": figures["state"]}


def _work(figures: Mapping[str, Any]) -> list[Family]:
    embedding = figures["embedding_queue"]
    queues: dict[tuple[str, ...], float | None] = {
        ("requests",): figures.get("in_flight"),
        ("writes",): figures["write_queue"],
        ("embedding_fresh",): embedding["fresh"],
        ("embedding_backfill",): embedding["backfill"],
    }
    return [
        gauge("queue_depth", "Requests being worked on, writes and memories that wait.", ("queue",), queues),
        single("index_lag", "Changes that the search index has not followed yet.", figures["index_lag"]),
        _total("memories_set_aside", "Memories that the embedding worker failed at for good.", embedding["poisoned"]),
        _total("replies_dropped", "Replies that nobody took.", figures.get("dropped_replies")),
        _total("replies_busy", "Requests refused for the load of their client.", figures.get("busy_replies")),
    ]


def _total(name: str, help: str, value: float | None) -> Family:
    return counter(name, help, (), {} if value is None else {(): value})


def _storage(figures: Mapping[str, Any]) -> list[Family]:
    database = figures["database"]
    sizes: dict[tuple[str, ...], float | None] = {("file",): database["size_bytes"], ("log",): database["wal_bytes"]}
    return [
        gauge("database_bytes", "Size of the database file and of its write-ahead log.", ("part",), sizes),
        single("disk_free_bytes", "Free space on the disk of the store.", figures["disk_free_bytes"]),
        single("last_commit_timestamp_seconds", "Time of the last commit, epoch seconds.", figures["last_commit_at"]),
    ]


def _caches(caches: Mapping[str, Any]) -> list[Family]:
    hits: dict[tuple[str, ...], float] = {(name, "process"): caches[name]["hits"] for name in CACHES}
    hits |= {(name, "redis"): caches[name]["redis_hits"] for name in CACHES if "redis_hits" in caches[name]}
    misses: dict[tuple[str, ...], float] = {(name,): caches[name]["misses"] for name in CACHES}
    entries: dict[tuple[str, ...], float | None] = {(name,): caches[name]["size"] for name in CACHES}
    return [
        counter("cache_hits", "What was found in a cache, and where.", ("cache", "where"), hits),
        counter("cache_misses", "What was found in none.", ("cache",), misses),
        gauge("cache_entries", "Entries that a cache of the process holds.", ("cache",), entries),
        counter("redis_failures", "Calls to Redis that failed.", (), {(): caches["redis"]["failures"]}),
    ]

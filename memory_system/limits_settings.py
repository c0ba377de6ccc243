"""Configuration of what one caller may take of the service, and of what all may take together."""

from __future__ import annotations

from dataclasses import dataclass

from memory_system.config_loader import key


@dataclass(frozen=True, slots=True)
class LimitsSettings:
    max_in_flight: int = key(
        1024,
        "Requests being worked on at once; beyond, callers wait in ZeroMQ or get busy.",
        unit="requests",
        span=(1, 100_000),
    )
    max_in_flight_per_client: int = key(
        64,
        "Requests of one connection being worked on at once; beyond, it gets busy.",
        unit="requests",
        span=(1, 100_000),
    )
    max_in_flight_mb: float = key(
        128.0,
        "Requests being worked on at once, by size; beyond, callers wait in ZeroMQ.",
        unit="MiB",
        span=(8, 65_536),
    )
    max_in_flight_mb_per_client: float = key(
        16.0, "The same for one connection; beyond, it gets busy.", unit="MiB", span=(8, 65_536)
    )
    connection_memory_mb: float = key(
        512.0,
        "Growth of a program's memory beyond which no connection is waited for whose message does not end or that does"
        " not read; from three quarters on the worst are closed. 0: no bound.",
        unit="MiB",
        span=(0, 1_000_000),
    )
    receive_batch: int = key(
        64, "Messages taken from the socket before replies get their turn.", unit="messages", span=(1, 10_000)
    )
    busy_retry_after_ms: int = key(
        50, "The wait that a busy reply suggests to the caller.", unit="ms", span=(0, 60_000)
    )
    rate_per_s: float = key(
        0.0,
        "Requests a second that one caller may make, each item of a batch counted as one; 0: as many as it likes.",
        unit="requests/s",
        span=(0, 1_000_000),
    )
    burst: int = key(
        0, "Requests that it may make at once; 0: those of a second.", unit="requests", span=(0, 1_000_000)
    )
    max_memories: int = key(
        0, "Memories that are kept for one caller; 0: any number.", unit="memories", span=(0, 1_000_000_000)
    )
    max_mb: float = key(
        0.0,
        "Size of these memories and their earlier versions; 0: any size.",
        unit="MiB",
        span=(0, 1_000_000),
    )
    query_s: float = key(
        5.0, "Longest time that one query of the database may take for a read.", unit="s", span=(0.1, 3600)
    )
    shutdown_s: float = key(3.0, "Time after SIGTERM to answer what was accepted.", unit="s", span=(0.1, 300))

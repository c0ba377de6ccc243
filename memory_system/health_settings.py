"""Settings of the health manager, of reporting to it, and of the metrics; part of `settings.py`."""

from __future__ import annotations

from dataclasses import dataclass

from memory_system.config_loader import key


def _not_empty(text: str) -> None:
    if not text.strip():
        raise ValueError("empty")


def _endpoint(text: str) -> None:
    if text and not text.startswith(("tcp://", "ipc://")):
        raise ValueError("not an endpoint")


@dataclass(frozen=True, slots=True)
class HealthSettings:
    port: int = key(7121, "TCP port of get_health and get_errors.", span=(1, 65535))
    publish_port: int = key(
        7150, "TCP port that subscribers connect to: heartbeats, health changes, errors.", span=(1, 65535)
    )
    mesh_port: int = key(
        7151, "TCP port that PUB sockets of other agents connect to with their errors.", span=(1, 65535)
    )
    report_port: int = key(7152, "TCP port that takes errors and heartbeats with acknowledgement.", span=(1, 65535))
    heartbeat_s: float = key(5.0, "Interval at which each program says that it lives.", unit="s", span=(0.1, 3600))
    check_s: float = key(5.0, "Interval at which each program is asked for health_check.", unit="s", span=(0.1, 3600))
    supervisor_s: float = key(1.0, "Interval at which supervisor is asked for its processes.", unit="s", span=(0.1, 60))
    hang_s: float = key(
        10.0, "A program that runs and gives no sign of life for so long hangs.", unit="s", span=(0.5, 3600)
    )
    start_s: float = key(60.0, "Longest time a program may take to its first answer.", unit="s", span=(0.1, 3600))
    slow_ms: float = key(1000.0, "A program whose answers take longer is degraded.", unit="ms", span=(1, 3_600_000))
    steady_s: float = key(
        4.0,
        "How long a condition has to hold before healthy turns to degraded, and degraded to healthy.",
        unit="s",
        span=(0, 3600),
    )
    flap_deaths: int = key(5, "Deaths within flap_window_s that make a program flapping.", span=(2, 1000))
    flap_window_s: float = key(300.0, "Time in which deaths are counted.", unit="s", span=(1, 86_400))
    flap_quiet_s: float = key(
        120.0, "Time without a death after which a program is not flapping any more.", unit="s", span=(1, 86_400)
    )
    min_free_mb: float = key(200.0, "Less free disk space than this is degraded.", unit="MiB", span=(0, 1e9))
    max_files_share: float = key(0.8, "A program with more of its open files in use is degraded.", span=(0, 1))
    heal: bool = key(True, "Kill a program that hangs, so that supervisor starts it again.")
    heal_limit: int = key(3, "Kills of one program within heal_window_s; then it is left alone.", span=(1, 1000))
    heal_window_s: float = key(600.0, "Time in which kills are counted.", unit="s", span=(1, 86_400))
    heal_backoff_s: float = key(
        10.0, "Pause after the first kill before the next; it doubles with each.", unit="s", span=(0, 3600)
    )


@dataclass(frozen=True, slots=True)
class ErrorBusSettings:
    enabled: bool = key(True, "Report errors of the programs to the health manager.")
    address: str = key(
        "",
        "Where errors are reported to; empty: health.report_port on this host.",
        noun="empty, or an endpoint such as tcp://10.0.0.2:7152",
        check=_endpoint,
    )
    queue_events: int = key(
        10_000, "Unacknowledged events that one program keeps; more are counted.", unit="events", span=(1, 1_000_000)
    )
    history_path: str = key(
        "data/health.db",
        "Database file of the error history; a relative path starts at the project folder.",
        noun="a file path",
        check=_not_empty,
        is_path=True,
    )
    history_days: float = key(30.0, "How long events are kept.", unit="days", span=(0.001, 36_500))
    history_mb: float = key(64.0, "Size of the history; the oldest events go first.", unit="MiB", span=(1, 1_000_000))
    rows_per_s: int = key(
        1000, "Events of one second that are kept one by one; the rest is counted.", unit="events", span=(1, 1_000_000)
    )
    fold_s: float = key(
        10.0, "Repeats of an event are broadcast once in this time, with their number.", unit="s", span=(0, 3600)
    )
    broadcasts_per_s: int = key(
        200, "Most events broadcast in one second; the rest is summed up.", unit="messages", span=(1, 100_000)
    )
    queue_per_subscriber: int = key(
        1000, "Messages queued for a subscriber that reads slowly; more are lost to it.", span=(1, 1_000_000)
    )


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    orchestrator_port: int = key(0, "HTTP port of the orchestrator's metrics; 0: none.", span=(0, 65535))
    health_manager_port: int = key(0, "HTTP port of the health manager's metrics; 0: none.", span=(0, 65535))
    memory_scheduler_port: int = key(0, "HTTP port of the scheduler's metrics; 0: none.", span=(0, 65535))
    knowledge_base_agent_port: int = key(0, "HTTP port of the knowledge base's metrics; 0: none.", span=(0, 65535))
    session_memory_agent_port: int = key(0, "HTTP port of the session memory's metrics; 0: none.", span=(0, 65535))
    context_manager_agent_port: int = key(0, "HTTP port of the context manager's metrics; 0: none.", span=(0, 65535))

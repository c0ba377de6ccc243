"""Configuration: frozen dataclasses built once at start. config/memory_config.yaml documents every key.

Each field carries the rule of its key (meaning, unit, range); what is loaded, refused and documented follows it.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from memory_system.agent_settings import AgentsSettings
from memory_system.backup_settings import BackupSettings
from memory_system.config_loader import Key, key, load_environment, load_file, overlay, walk
from memory_system.consolidation_settings import ConsolidationSettings
from memory_system.errors import ConfigError
from memory_system.health_settings import ErrorBusSettings, HealthSettings, MetricsSettings
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.limits_settings import LimitsSettings
from memory_system.maintenance_settings import ClockSettings, MaintenanceSettings
from memory_system.ranking_settings import RankingSettings
from memory_system.scheduler_settings import SchedulerSettings, check_jobs, with_one_trigger

PROJECT: Final = Path(__file__).resolve().parent.parent
CONFIG_VARIABLE: Final = "MEMORY_CONFIG"


def _address(text: str) -> None:
    if text != "localhost":
        ipaddress.ip_address(text)


def _not_empty(text: str) -> None:
    if not text.strip():
        raise ValueError("empty")


def _redis_url(text: str) -> None:
    if text and (urlsplit(text).scheme not in {"redis", "rediss", "unix"} or text.endswith("://")):
        raise ValueError("not a Redis URL")


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    bind: str = key(
        "127.0.0.1",
        "Address the service listens on. Any but a loopback address needs keys, or security.allow_insecure.",
        noun="an IP address or localhost",
        check=_address,
    )
    port: int = key(7140, "TCP port of the service.", span=(1, 65535))
    heartbeat_s: float = key(
        10.0, "Interval of connection heartbeats, by which a vanished peer is noticed.", unit="s", span=(0.1, 3600)
    )
    handshake_s: float = key(
        3.0, "A peer that has not completed its handshake by then is cut off.", unit="s", span=(0.1, 300)
    )
    backlog: int = key(1024, "Connections waiting to be accepted.", unit="connections", span=(1, 65535))
    queue_per_client: int = key(
        128, "Messages queued in each direction for one connection.", unit="messages", span=(1, 1_000_000)
    )


@dataclass(frozen=True, slots=True)
class StorageSettings:
    path: str = key(
        "data/memory.db",
        "Database file; a relative path starts at the project folder.",
        noun="a file path",
        check=_not_empty,
        is_path=True,
    )
    synchronous: str = key(
        "full",
        "SQLite durability: full keeps acknowledged writes through a power cut, normal may lose the last ones.",
        choices=("full", "normal"),
    )
    group_jobs: int = key(64, "Most write requests in one transaction.", unit="requests", span=(1, 10_000))
    group_rows: int = key(
        2000, "Most rows in one transaction; a larger request stands alone.", unit="rows", span=(1, 1_000_000)
    )
    group_ms: float = key(
        20.0, "A transaction takes no further requests after this much work.", unit="ms", span=(0, 10_000)
    )
    readers: int = key(2, "Read-only database connections.", unit="connections", span=(1, 64))
    idempotency: bool = key(True, "Keep the request_id of writes, so that a retried write happens once.")
    idempotency_ttl_h: float = key(24.0, "How long request_ids of writes are kept.", unit="h", span=(0, 8760))
    access_flush_s: float = key(
        2.0, "Interval at which counted reads are written to the database.", unit="s", span=(0.01, 3600)
    )


@dataclass(frozen=True, slots=True)
class CacheSettings:
    max_records: int = key(50_000, "Memories kept in the process.", unit="memories", span=(0, 100_000_000))
    max_mb: float = key(128.0, "Size of the memories kept in the process.", unit="MiB", span=(0, 1_000_000))
    max_vectors: int = key(10_000, "Vectors of query texts kept in the process.", unit="vectors", span=(0, 10_000_000))
    max_results: int = key(2_000, "Search results kept in the process.", unit="results", span=(0, 10_000_000))
    result_ttl_s: float = key(60.0, "How long a search result may be served again.", unit="s", span=(0, 86_400))


@dataclass(frozen=True, slots=True)
class RedisSettings:
    url: str = key(
        "",
        "Shared cache; empty: the process keeps its own cache only.",
        noun="empty, or a redis://, rediss:// or unix:// URL",
        check=_redis_url,
        secret=True,
    )
    timeout_ms: int = key(50, "Longest wait for one call to Redis.", unit="ms", span=(1, 60_000))
    prefix: str = key("memory", "First part of every Redis key.", noun="text that is not empty", check=_not_empty)
    vector_ttl_s: int = key(7 * 86400, "How long Redis keeps a vector.", unit="s", span=(1, 31_536_000))
    failure_threshold: int = key(
        3, "Failed calls in a row after which Redis is left alone.", unit="calls", span=(1, 1000)
    )
    reset_timeout_s: float = key(
        5.0, "How long Redis is left alone before one call tries again.", unit="s", span=(0.01, 3600)
    )


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    provider: str = key(
        "sentence-transformers",
        "What turns text into vectors; stub hashes words (for tests), off leaves keyword search alone.",
        choices=("sentence-transformers", "stub", "off"),
    )
    model: str = key(
        "all-MiniLM-L6-v2",
        "Model: a folder, the name of an installed model package, or a hub name.",
        noun="a name or a folder",
        check=_not_empty,
    )
    backend: str = key(
        "auto",
        "What runs the model; auto: a GPU that PyTorch can use, else ctranslate2 if it takes the model, else torch.",
        choices=("auto", "ctranslate2", "torch", "torch-bf16", "cuda"),
    )
    threads: int = key(
        0,
        "CPU threads of the model; 0: one for each core (torch: for each second), at most 4.",
        unit="threads",
        span=(0, 1024),
    )
    nice: int = key(5, "Niceness of the model's process, so that it yields to the service.", span=(0, 19))
    batch_texts: int = key(32, "Most texts in one batch.", unit="texts", span=(1, 4096))
    batch_ms: float = key(
        60.0, "Work that one batch aims at, so that a query waits no longer.", unit="ms", span=(0, 10_000)
    )
    backfill_share: float = key(
        0.25, "Share of the batches guaranteed to memories that have waited longest.", span=(0, 1)
    )
    max_chars: int = key(8000, "Text beyond this length is not embedded.", unit="characters", span=(1, 1_000_000))
    start_timeout_s: float = key(120.0, "Longest wait for the model to load.", unit="s", span=(0.1, 3600))
    encode_timeout_s: float = key(
        60.0, "Longest wait for one batch; then the process is restarted.", unit="s", span=(0.1, 3600)
    )


@dataclass(frozen=True, slots=True)
class SearchSettings:
    wait_ms: int = key(150, "Longest wait for vectors of the caller's own latest writes.", unit="ms", span=(0, 60_000))
    candidates: int = key(
        50, "Candidates that each side (vectors, keywords) brings.", unit="memories", span=(1, 10_000)
    )
    exact_max: int = key(
        4_000,
        "Up to this many memories (that a filter lets pass) all vectors are compared; of more, their short forms.",
        unit="memories",
        span=(0, 10_000_000),
    )
    graph_from: int = key(
        2_000_000,
        "From this many memories on a graph is built, for searches whose filter lets most of them pass.",
        unit="memories",
        span=(1, 1_000_000_000),
    )
    hnsw_m: int = key(16, "Links of each vector in the graph.", unit="links", span=(2, 128))
    hnsw_ef_construction: int = key(
        100, "Candidates looked at when a vector enters the graph.", unit="vectors", span=(2, 10_000)
    )
    hnsw_ef: int = key(
        100, "Least candidates looked at in each part of the graph by a search.", unit="vectors", span=(1, 10_000)
    )
    threads: int = key(2, "Threads that run searches.", unit="threads", span=(1, 256))
    snapshot_s: float = key(300.0, "Interval at which a changed index is saved.", unit="s", span=(0.1, 86_400))
    filterable_metadata: tuple[str, ...] = key(
        (),
        "Metadata keys kept in memory, so that filters on them are fast.",
        noun="a list of metadata keys",
        check=_not_empty,
    )


@dataclass(frozen=True, slots=True)
class SecuritySettings:
    keys_dir: str = key(
        "data/keys",
        "Folder of the keys and grants that `make keys` makes; a relative path starts at the project folder.",
        noun="a folder path",
        check=_not_empty,
        is_path=True,
    )
    curve: str = key(
        "auto",
        "Whether callers need a key; auto: when keys_dir holds the key of the service.",
        choices=("auto", "on", "off"),
    )
    audit_log: str = key(
        "audit.log",
        "File of the denied requests and those of administrators; a relative path starts at log.dir; empty: none.",
        noun="a file path, or empty",
    )
    allow_insecure: bool = key(False, "Allow plaintext callers from the networks of insecure_peers.")
    insecure_peers: tuple[str, ...] = key(
        (),
        "Networks whose hosts may call in plaintext.",
        noun="a list of networks such as 10.1.0.0/16 (no host bits set)",
        check=ipaddress.ip_network,
    )


@dataclass(frozen=True, slots=True)
class LogSettings:
    level: str = key("info", "Least severe lines that are kept.", choices=("debug", "info", "warning", "error"))
    dir: str = key(
        "data/logs",
        "Folder of the log files; a relative path starts at the project folder.",
        noun="a folder path",
        check=_not_empty,
        is_path=True,
    )
    console: str = key(
        "auto", "Readable lines on stderr; auto: when it is a terminal.", choices=("auto", "always", "never")
    )


@dataclass(frozen=True, slots=True)
class Settings:
    network: NetworkSettings = field(default_factory=NetworkSettings)
    limits: LimitsSettings = field(default_factory=LimitsSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    redis: RedisSettings = field(default_factory=RedisSettings)
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    ranking: RankingSettings = field(default_factory=RankingSettings)
    lifecycle: LifecycleSettings = field(default_factory=LifecycleSettings)
    consolidation: ConsolidationSettings = field(default_factory=ConsolidationSettings)
    maintenance: MaintenanceSettings = field(default_factory=MaintenanceSettings)
    clock: ClockSettings = field(default_factory=ClockSettings)
    backup: BackupSettings = field(default_factory=BackupSettings)
    security: SecuritySettings = field(default_factory=SecuritySettings)
    log: LogSettings = field(default_factory=LogSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    error_bus: ErrorBusSettings = field(default_factory=ErrorBusSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    agents: AgentsSettings = field(default_factory=AgentsSettings)

    def all_keys(self) -> Iterator[Key]:
        """Every key with its value in this object and its rule, in the order of the documentation."""
        return walk(self)

    def resolved(self, root: Path = PROJECT) -> Settings:
        """A copy whose relative paths start at `root` and whose `~` is the home folder."""
        paths = (key for key in self.all_keys() if key.rule.is_path and key.value)
        return overlay(self, {key.name: str(root / Path(key.value).expanduser()) for key in paths})


def load_settings(path: str | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Built-in defaults, then a YAML file, then MEMORY__SECTION__KEY variables; paths come out absolute.

    The file is `path`, else what MEMORY_CONFIG names, else config/memory_config.yaml when it exists.
    Raises ConfigError with one line that names the key, its source and what is expected.
    """
    base = Settings()
    values: dict[str, object] = {}
    file = config_file(path, environ)
    if file is not None:
        values.update(with_one_trigger(load_file(base, file)))
    values.update(with_one_trigger(load_environment(base, environ)))
    settings = overlay(base, values).resolved()
    _check_together(settings)
    return settings


def config_file(path: str | None, environ: Mapping[str, str]) -> Path | None:
    """The YAML file that `load_settings` reads with these arguments, or None."""
    named = path or environ.get(CONFIG_VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    default = PROJECT / "config" / "memory_config.yaml"
    return default if default.exists() else None


def _check_together(settings: Settings) -> None:
    check_jobs(settings.scheduler.jobs)
    weights, limits = settings.ranking, settings.limits
    if weights.dense_weight + weights.keyword_weight <= 0:
        raise ConfigError("ranking.dense_weight and ranking.keyword_weight are both 0: expected one above 0")
    if limits.max_in_flight_per_client > limits.max_in_flight:
        raise ConfigError(
            f"limits.max_in_flight_per_client = {limits.max_in_flight_per_client}: "
            f"expected at most limits.max_in_flight = {limits.max_in_flight}"
        )

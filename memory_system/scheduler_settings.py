"""Settings of the scheduler: when each maintenance job runs; part of `settings.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from memory_system.config_loader import key, rule
from memory_system.cron import Interval, Recurrence, parse_cron, parse_interval
from memory_system.errors import ConfigError

_JOBS: Final = "scheduler.jobs."


def _cron(text: str) -> None:
    if text:
        parse_cron(text)


def _interval(text: str) -> None:
    if text:
        parse_interval(text)


@dataclass(frozen=True, slots=True)
class JobSettings:
    """One job. Of `cron` and `every` one is given, the other is empty."""

    enabled: bool = field(metadata=rule("Run this job."))
    cron: str = field(
        metadata=rule(
            "When it runs, in UTC: minute, hour, day of month, month, day of week. Given instead of every.",
            noun='empty, or five cron fields such as "15 3 * * *"',
            check=_cron,
        )
    )
    every: str = field(
        metadata=rule(
            "Interval at which it runs, counted from midnight UTC of 1970-01-01. Given instead of cron.",
            noun="empty, or an interval such as 90s, 15m, 6h or 1d",
            check=_interval,
        )
    )
    jitter_s: float = field(
        metadata=rule(
            "Each run begins later by up to this (at most half of every), so that jobs do not meet.",
            unit="s",
            span=(0, 3600),
        )
    )

    @property
    def trigger(self) -> str:
        """In words: `every 15m`, `cron 15 3 * * *`."""
        return f"cron {self.cron}" if self.cron else f"every {self.every}"

    def recurrence(self) -> Recurrence:
        return parse_cron(self.cron) if self.cron else Interval(parse_interval(self.every))


@dataclass(frozen=True, slots=True)
class JobsSettings:
    checkpoint: JobSettings = JobSettings(True, "", "30m", 30.0)
    cleanup: JobSettings = JobSettings(True, "", "1h", 120.0)
    decay: JobSettings = JobSettings(True, "", "1h", 120.0)
    consolidation: JobSettings = JobSettings(True, "30 2 * * *", "", 300.0)
    backup: JobSettings = JobSettings(True, "30 3 * * *", "", 300.0)
    integrity_check: JobSettings = JobSettings(True, "30 4 * * sun", "", 300.0)
    index_snapshot: JobSettings = JobSettings(True, "", "6h", 300.0)

    def items(self) -> list[tuple[str, JobSettings]]:
        """Name and settings of each job, in the order in which those that are overdue run."""
        return [(each.name, getattr(self, each.name)) for each in fields(self)]


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    port: int = key(7142, "TCP port of list_jobs and run_job.", span=(1, 65535))
    concurrent_jobs: int = key(2, "Jobs that run at the same time; others wait.", unit="jobs", span=(1, 16))
    call_s: float = key(
        30.0, "Longest wait for the end of a run before it is asked how the run is.", unit="s", span=(0.5, 3600)
    )
    failure_threshold: int = key(
        3, "Unanswered calls in a row after which the orchestrator is left alone.", unit="calls", span=(1, 1000)
    )
    reset_timeout_s: float = key(
        5.0, "How long the orchestrator is left alone before one call tries again.", unit="s", span=(0.1, 3600)
    )
    jobs: JobsSettings = field(default_factory=JobsSettings)


def with_one_trigger(given: Mapping[str, Any]) -> dict[str, Any]:
    """What one layer of the configuration gives, by full key name; where it gives a job either `cron` or `every`, it
    empties the other, which a lower layer may have given."""
    found = dict(given)
    for job, _ in JobsSettings().items():
        cron, every = f"{_JOBS}{job}.cron", f"{_JOBS}{job}.every"
        for one, other in ((cron, every), (every, cron)):
            if given.get(one) and other not in given:
                found[other] = ""
    return found


def check_jobs(jobs: JobsSettings) -> None:
    """Raises ConfigError for a job with two triggers or none."""
    for name, job in jobs.items():
        if job.cron and job.every:
            raise ConfigError(f"{_JOBS}{name} has both cron and every: expected one of them to be empty")
        if not job.cron and not job.every:
            raise ConfigError(
                f"{_JOBS}{name} has neither cron nor every: expected one (enabled: false switches it off)"
            )

"""The scheduler's metrics, made of what list_jobs says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memory_system.metrics import Family, counter, gauge, states

STATES = ("starting", "healthy", "degraded")
PHASES = ("idle", "waiting", "running", "delayed", "off")


def scheduler_families(
    figures: Mapping[str, Any], jobs: list[dict[str, Any]], runs: Mapping[tuple[str, ...], float]
) -> list[Family]:
    """`figures`: its health_check; `jobs`: the results of list_jobs; `runs`: how many, by job and outcome."""
    last = {each["name"]: each["last"] or {} for each in jobs}
    return [
        states(
            "state",
            "1 for the state that the service is in.",
            "component",
            {"memory_scheduler": figures["state"]},
            STATES,
        ),
        states(
            "job_state",
            "1 for the state that each job is in.",
            "job",
            {each["name"]: each["state"] for each in jobs},
            PHASES,
        ),
        counter("job_runs", "Runs by job and outcome: success, replayed, or the error code.", ("job", "outcome"), runs),
        gauge(
            "job_next_run_timestamp_seconds",
            "When the next run begins, epoch seconds.",
            ("job",),
            {(each["name"],): each["next_run_at"] for each in jobs},
        ),
        gauge(
            "job_last_start_timestamp_seconds",
            "When the last run began, epoch seconds.",
            ("job",),
            {(name,): run.get("started_at") for name, run in last.items()},
        ),
        gauge(
            "job_last_duration_seconds",
            "How long the last run took.",
            ("job",),
            {(name,): run.get("duration_s") for name, run in last.items()},
        ),
    ]

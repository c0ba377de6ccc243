"""The jobs that there are: what each is called in the configuration, and which action of the orchestrator does it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Final

from memory_system.errors import InvalidField
from memory_system.scheduler_settings import JobSettings, JobsSettings
from memory_system.scheduling.schedule import Schedule

# name -> the action, and the fields that it takes of those that run_job passes on.
_ACTIONS: Final = {
    "checkpoint": ("run_checkpoint", ()),
    "cleanup": ("run_cleanup", ("dry_run", "as_of")),
    "decay": ("run_decay", ("dry_run", "as_of")),
    "consolidation": ("run_consolidation", ("dry_run", "as_of")),
    "backup": ("backup", ("dry_run",)),
    "integrity_check": ("run_integrity_check", ()),
    "index_snapshot": ("run_snapshot", ()),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One job; `recorded_as` is the name that the orchestrator gives its runs."""

    name: str
    action: str
    takes: tuple[str, ...]
    settings: JobSettings
    schedule: Schedule

    @property
    def recorded_as(self) -> str:
        return self.action.removeprefix("run_")

    def fields(self, dry_run: bool, as_of: float | None) -> dict[str, Any]:
        """The data of a request for it. Raises InvalidField for what this job has not."""
        given: dict[str, Any] = {"dry_run": True} if dry_run else {}
        if as_of is not None:
            given["as_of"] = as_of
        for name in given:
            if name not in self.takes:
                raise InvalidField(name, f"the job {self.name} has no {name}")
        return given


def jobs_of(settings: JobsSettings, seed: str = "") -> dict[str, Job]:
    """Every job by name, in the order of the configuration."""
    return {
        name: Job(name, *_ACTIONS[name], job, Schedule(name, job.recurrence(), job.jitter_s, seed))
        for name, job in settings.items()
    }


def unknown_job(name: str) -> InvalidField:
    near = next(iter(difflib.get_close_matches(name[:80], _ACTIONS, n=1)), None)
    hint = f"did you mean {near}?" if near else f"there are {', '.join(_ACTIONS)}"
    return InvalidField("name", f"there is no job {name[:80]!r}; {hint}", **({"suggestion": near} if near else {}))

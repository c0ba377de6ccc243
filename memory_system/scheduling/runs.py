"""A run as the orchestrator records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

# The jobs whose work is to change memories: of these alone no changes mean that there was nothing to do.
CHANGE_MEMORIES: Final = frozenset({"cleanup", "decay", "consolidation"})


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a job. Times are epoch seconds; `state` is running, done, failed or interrupted."""

    request_id: str | None
    state: str
    started_at: float | None
    finished_at: float | None = None
    dry_run: bool = False
    result: str = ""
    error: str | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Run:
        """From a result of list_runs."""
        return cls(
            request_id=_text(fields.get("request_id")),
            state=str(fields.get("state")),
            started_at=_number(fields.get("started_at")),
            finished_at=_number(fields.get("finished_at")),
            dry_run=bool(fields.get("dry_run")),
            result=summary(fields),
            error=_text(fields.get("error")),
        )

    @classmethod
    def done(cls, request_id: str, reply: Mapping[str, Any]) -> Run:
        """From the reply to the request that asked for it."""
        return cls.of({**reply, "request_id": request_id, "state": "done"})

    @property
    def duration_s(self) -> float | None:
        """How long it took; None unless it has ended."""
        if self.started_at is None or self.finished_at is None:
            return None
        return round(max(0.0, self.finished_at - self.started_at), 3)

    def shown(self) -> dict[str, Any]:
        return {
            "started_at": self.started_at,
            "duration_s": self.duration_s,
            "state": self.state,
            "dry_run": self.dry_run,
            "result": self.result,
            "error": self.error,
        }


def summary(fields: Mapping[str, Any]) -> str:
    """What a run did, in a few words: its counts, else how many changes it made; while it runs, how far it has come."""
    progress = fields.get("progress")
    if isinstance(progress, Mapping):
        total = progress.get("total")
        return f"{progress.get('part')} {progress.get('done')}" + (f" of {total}" if total is not None else "")
    counts = fields.get("counts")
    told = {kind: number for kind, number in counts.items() if number} if isinstance(counts, Mapping) else {}
    if told:
        return ", ".join(f"{kind} {number}" for kind, number in told.items())
    changes = fields.get("changes")
    if not isinstance(changes, int):
        return ""
    if changes:
        return f"changes {changes}"
    return "nothing to do" if fields.get("job") in CHANGE_MEMORIES else "done"


def _text(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = ": ".join(str(value[name]) for name in ("error_code", "code", "message") if value.get(name))
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

"""What is asked of the error history, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from memory_system.errors import InvalidField, StorageFailed
from memory_system.events import SEVERITIES, Event, at_least

MAX_RESULTS: Final = 1000


class HistoryFailed(StorageFailed):
    """The history cannot be used now: the disk is full or fails, or too much waits. Nothing of the call was kept."""


@dataclass(frozen=True, slots=True)
class Committed:
    """What became of a submission: (row id, event) of what was new, and how many events were `known`.

    An event of a shared row stands for all of the submission that went into it. The counts of `rows` add up to those
    of the new events.
    """

    rows: tuple[tuple[int, Event], ...]
    known: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A row of the history. Of a row with a count the texts and ids are those of the first event."""

    seq: int
    received_at: float
    event: Event

    def fields(self) -> dict[str, Any]:
        return {"seq": self.seq, "received_at": self.received_at, **self.event.fields()}


@dataclass(frozen=True, slots=True)
class Query:
    """Which events; None: any. `since` is epoch seconds (the event's own time), `severity` the least severe."""

    since_seq: int | None = None
    since: float | None = None
    agent: str | None = None
    severity: str | None = None
    error_type: str | None = None
    limit: int = 100
    newest: bool = False

    def check(self) -> None:
        """Raise InvalidField for what cannot be asked."""
        if not 1 <= self.limit <= MAX_RESULTS:
            raise InvalidField("limit", f"limit is {self.limit}, expected 1 to {MAX_RESULTS}")
        if self.severity is not None and self.severity not in SEVERITIES:
            raise InvalidField("severity", f"severity is none of {', '.join(SEVERITIES)}")

    def where(self) -> tuple[str, list[Any]]:
        parts, values = ["1"], []
        for column, operator, value in (
            ("seq", ">", self.since_seq),
            ("timestamp", ">=", self.since),
            ("agent", "=", self.agent),
            ("error_type", "=", self.error_type),
        ):
            if value is not None:
                parts.append(f"{column} {operator} ?")
                values.append(value)
        if self.severity is not None:
            wanted = at_least(self.severity)
            parts.append(f"severity IN ({', '.join('?' * len(wanted))})")
            values.extend(wanted)
        return " AND ".join(parts), values


@dataclass(frozen=True, slots=True)
class Errors:
    """A page of the history, oldest first; with `newest` the last ones that match instead of the first.

    `last_seq`, `oldest_seq`: of the whole history (`oldest_seq` is `last_seq + 1` when it is empty). `total`: of how
    many events all matching rows tell, on this page or not. `next_since_seq`: where to go on, None at the end.
    """

    results: tuple[Stored, ...]
    last_seq: int
    oldest_seq: int
    total: int
    next_since_seq: int | None

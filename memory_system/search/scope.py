"""Which memories a search may see. Both sides, SQL and the in-memory columns, are driven by this one description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memory_system.filters import MATCH_ALL, Filter
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.storage.filter_sql import compile_filter


@dataclass(frozen=True, slots=True)
class Scope:
    """The memories of a namespace that exist at `now_s`, are no sessions, pass the filter and happened in the window.

    All times are epoch seconds. The window begins with `since_s` and ends before `until_s`; a memory happened when it
    occurred, or else when it was created.
    """

    namespace: str
    now_s: float
    filter: Filter = MATCH_ALL
    include_archived: bool = False
    since_s: float | None = None
    until_s: float | None = None

    def where(self, lifecycle: LifecycleSettings, alias: str = "m") -> tuple[str, list[Any]]:
        """The scope as a WHERE fragment over memories and its positional parameters."""
        sql, params = compile_filter(self.filter, now_s=self.now_s, lifecycle=lifecycle, alias=alias)
        state = "" if self.include_archived else f" AND {alias}.state = 'active'"
        ends = ((">=", self.since_s), ("<", self.until_s))
        window = [(compare, end) for compare, end in ends if end is not None]
        happened = f"coalesce({alias}.occurred_at, {alias}.created_at)"
        within = "".join(f" AND {happened} {compare} ?" for compare, _ in window)
        return (
            f"{alias}.namespace = ? AND {alias}.memory_type <> 'session'{state}"
            f" AND ({alias}.expires_at IS NULL OR {alias}.expires_at > ?){within} AND {sql}",
            [self.namespace, self.now_s, *(end for _, end in window), *params],
        )

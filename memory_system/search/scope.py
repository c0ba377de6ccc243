"""Which memories a search may see. Both sides, SQL and the in-memory columns, are driven by this one description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memory_system.filters import MATCH_ALL, Filter
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.storage.filter_sql import compile_filter


@dataclass(frozen=True, slots=True)
class Scope:
    """The memories of a namespace that exist at `now_s` (epoch seconds), are no sessions, and pass the filter."""

    namespace: str
    now_s: float
    filter: Filter = MATCH_ALL
    include_archived: bool = False

    def where(self, lifecycle: LifecycleSettings, alias: str = "m") -> tuple[str, list[Any]]:
        """The scope as a WHERE fragment over memories and its positional parameters."""
        sql, params = compile_filter(self.filter, now_s=self.now_s, lifecycle=lifecycle, alias=alias)
        state = "" if self.include_archived else f" AND {alias}.state = 'active'"
        return (
            f"{alias}.namespace = ? AND {alias}.memory_type <> 'session'{state}"
            f" AND ({alias}.expires_at IS NULL OR {alias}.expires_at > ?) AND {sql}",
            [self.namespace, self.now_s, *params],
        )

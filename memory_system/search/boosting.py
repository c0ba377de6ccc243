"""What a caller may add to the scores of one search: how recent and how important a memory is."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.storage.filter_sql import importance_sql

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_DAY_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Boost:
    """Weights of what is added to a score; 0 adds nothing. After `half_life_days` recency counts half."""

    recency: float = 0.0
    importance: float = 0.0
    half_life_days: float = 30.0

    def __bool__(self) -> bool:
        return self.recency > 0.0 or self.importance > 0.0


NO_BOOST: Final = Boost()


def recency(happened_at: Floats, now_s: float, half_life_days: float) -> Floats:
    """1 now (and for what is still to come), .5 one half-life ago, .25 two ago. Times are epoch seconds."""
    age_days = np.maximum(0.0, now_s - happened_at) / _DAY_S
    return np.exp2(-age_days / half_life_days)


def added(boost: Boost, now_s: float, happened_at: Floats, importance: Floats) -> dict[str, Floats]:
    """The parts of the score, by name, of memories with these times and importances; only those asked for."""
    parts = {}
    if boost.recency > 0.0:
        parts["recency"] = boost.recency * recency(happened_at, now_s, boost.half_life_days)
    if boost.importance > 0.0:
        parts["importance"] = boost.importance * importance
    return parts


def importances(conn: sqlite3.Connection, lifecycle: LifecycleSettings, row_ids: Ids, now_s: float) -> Floats:
    """The importance of each row at `now_s`, 0 where there is no such row."""
    sql = (
        f"SELECT m.row_id, {importance_sql(lifecycle)} FROM json_each(?) AS wanted"
        " CROSS JOIN memories AS m ON m.row_id = wanted.value"
    )
    found = dict(conn.execute(sql, (now_s, json.dumps(row_ids.tolist()))))
    return np.array([found.get(row_id, 0.0) for row_id in row_ids.tolist()], np.float64)

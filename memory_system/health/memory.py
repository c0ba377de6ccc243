"""What a manager keeps of each component for the one after it: its state and since when, its trouble, its last deaths,
who only beats.

Pure; `..._at` are epoch seconds, which a restart does not change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from memory_system.events import MAX_NAME_CHARS

FORGET_S: Final = 24 * 3600.0
MAX_KEPT: Final = 1000
_MAX_DEATHS: Final = 100
_STATES: Final = frozenset({"starting", "healthy", "degraded", "down", "flapping"})


@dataclass(frozen=True, slots=True)
class Memory:
    """One component. `troubled`: its trouble was told, and its recovery is still to be told. `heartbeat_s` is None
    for a program, which is known from the configuration. `pid` is 0 where no process is known."""

    state: str
    cause: str = ""
    troubled: bool = False
    deaths_at: tuple[float, ...] = ()
    heartbeat_s: float | None = None
    last_heartbeat_at: float | None = None
    address: str | None = None
    pid: int = 0
    since_at: float | None = None

    def matters(self, now_at: float) -> bool:
        is_agent = self.heartbeat_s is not None and now_at - (self.last_heartbeat_at or 0.0) < FORGET_S
        return self.troubled or bool(self.deaths_at) or bool(self.pid) or is_agent


def encode(memories: Mapping[str, Memory], now_at: float) -> str:
    """As JSON, without what does not matter, and of at most MAX_KEPT components: trouble before the rest."""
    matter = [(name, each) for name, each in memories.items() if each.matters(now_at)]
    matter.sort(key=lambda item: not item[1].troubled)
    return json.dumps({name: asdict(each) for name, each in matter[:MAX_KEPT]}, separators=(",", ":"))


def decode(text: str | None, now_at: float) -> dict[str, Memory]:
    """What `encode` wrote, without what cannot be read: a manager starts whatever is there."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    items = list(found.items())[:MAX_KEPT] if isinstance(found, dict) else []
    memories = {name: _memory(value, now_at) for name, value in items if 0 < len(name) <= MAX_NAME_CHARS}
    return {name: each for name, each in memories.items() if each is not None and each.matters(now_at)}


def _memory(value: Any, now_at: float) -> Memory | None:
    if not isinstance(value, dict) or value.get("state") not in _STATES:
        return None
    cause, address, deaths = value.get("cause"), value.get("address"), value.get("deaths_at")
    since_at = _number(value.get("since_at"))
    times = [_number(each) for each in deaths[-_MAX_DEATHS:]] if isinstance(deaths, list) else []
    return Memory(
        state=value["state"],
        cause=cause if isinstance(cause, str) else "",
        troubled=value.get("troubled") is True,
        deaths_at=tuple(sorted(each for each in times if each is not None and each <= now_at)),
        heartbeat_s=_number(value.get("heartbeat_s")),
        last_heartbeat_at=_number(value.get("last_heartbeat_at")),
        address=address if isinstance(address, str) else None,
        pid=int(_number(value.get("pid")) or 0),
        since_at=since_at if since_at is not None and since_at <= now_at else None,
    )


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return float(value) if is_number else None

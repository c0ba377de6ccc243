"""One component in the watch's list: its state, how it is asked, and its entry in the picture."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from memory_system.deployment import Address
from memory_system.events import MAX_NAME_CHARS
from memory_system.health.asker import Asker
from memory_system.health.life import Sign
from memory_system.health.memory import Memory
from memory_system.health.states import Component, State
from memory_system.health_settings import HealthSettings

_MAX_FIGURES: Final = 64
_MIN_INTERVAL_S: Final = 0.1
_MAX_INTERVAL_S: Final = 3600.0
_OF_HEARTBEAT: Final = frozenset({"v", "kind", "component", "timestamp", "pid", "state", "interval_s"})


@dataclass(slots=True)
class Watched:
    """`..._at` are epoch seconds, `..._s` monotonic ones; `address` is where it listens or where its heartbeats
    come from. `before` is what the last manager knew, until its state is known anew."""

    component: Component
    address: str | None = None
    asker: Asker | None = None
    asked_s: float = float("-inf")
    asked_pid: int = 0
    since_at: float = 0.0
    last_reply_at: float | None = None
    last_heartbeat_at: float | None = None
    # Of supervisord, which started this program, and neither is asked nor sends heartbeats.
    pid: int = 0
    before: Memory | None = None

    @classmethod
    def begun(
        cls,
        rules: HealthSettings,
        now_s: float,
        memory: Memory | None = None,
        heartbeat_s: float | None = None,
        address: str | None = None,
        pid: int = 0,
    ) -> Watched:
        """A component as it is first known; `memory`: what the manager before this one kept of it."""
        made = cls(Component(rules, now_s, heartbeat_s=heartbeat_s), address, pid=pid)
        if memory is not None:
            made._recall(memory, now_s)
        return made

    def came_at(self, state: State, now_at: float) -> float:
        """When it came into `state`, in which it is now; a restart of the manager is no change of it.

        What the manager before this one saw counts for the same process, as long as nothing else was seen of it.
        """
        before = self.before
        if state.state != "starting":
            self.before = None
        if before is None or before.since_at is None or self._pid() not in (0, before.pid):
            return now_at - (time.monotonic() - state.since_s)
        is_same = (state.state, state.cause) == (before.state, before.cause)
        return before.since_at if is_same else now_at - (time.monotonic() - state.since_s)

    def entry(
        self, name: str, kills: int, left_alone: bool, now_at: float, state: State | None = None
    ) -> dict[str, Any]:
        """This component in the picture, now or as it was when it came into `state`."""
        component = self.component
        state = state or component.state
        reason = f"{state.reason}; left alone after {kills} kills" if left_alone and state.reason else state.reason
        return {
            "component": name,
            "state": state.state,
            "cause": state.cause,
            "reason": reason,
            "since": self.since_at,
            "pid": component.pid or None,
            "address": self.address,
            "uptime_s": self._uptime_s(now_at),
            "last_reply_at": self.last_reply_at,
            "last_heartbeat_at": self.last_heartbeat_at,
            "latency_ms": component.latency_ms,
            "deaths": component.deaths,
            "kills": kills,
            "left_alone": left_alone,
            "readiness": component.figures.get("readiness"),
        }

    def memory(self) -> Memory:
        """What is to be kept of it over a restart of the manager."""
        component, now_s, now_at = self.component, time.monotonic(), time.time()
        return Memory(
            state=component.state.state,
            cause=component.state.cause,
            deaths_at=tuple(now_at - (now_s - each_s) for each_s in component.recent_deaths_s()),
            # One that signed off is not waited for.
            heartbeat_s=None if component.state.cause == "stopped" else component.heartbeat_s,
            last_heartbeat_at=self.last_heartbeat_at,
            address=self.address,
            pid=self._pid(),
            since_at=self.since_at,
        )

    def _recall(self, memory: Memory, now_s: float) -> None:
        now_at, self.before = time.time(), memory
        self.last_heartbeat_at = memory.last_heartbeat_at
        self.component.recall(memory.state, [now_s - (now_at - each_at) for each_at in memory.deaths_at], now_s)

    def _pid(self) -> int:
        return self.component.pid or self.pid

    def _uptime_s(self, now_at: float) -> float | None:
        process = self.component.process
        if process is not None:
            return max(0.0, now_at - process.start) if process.alive else None
        uptime_s = self.component.figures.get("uptime_s")
        return float(uptime_s) if isinstance(uptime_s, (int, float)) else None


def sign_of(fields: Mapping[str, Any]) -> Sign:
    """What a heartbeat says."""
    state, pid = fields.get("state"), fields.get("pid")
    return Sign(
        state=state[:MAX_NAME_CHARS] if isinstance(state, str) else "healthy",
        pid=pid if is_pid(pid) else None,
        is_heartbeat=True,
        figures=figures_of(fields),
    )


def is_pid(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def is_here(peer: str, address: Address | None) -> bool:
    """Whether a heartbeat can be one of a program of this host. "" is a peer of a port that only this host reaches."""
    if not peer or (address is not None and peer == address.bind):
        return True
    try:
        ip = ipaddress.ip_address(peer)
    except ValueError:
        return False
    return ip.is_loopback or (
        isinstance(ip, ipaddress.IPv6Address) and bool(ip.ipv4_mapped and ip.ipv4_mapped.is_loopback)
    )


def interval_of(fields: Mapping[str, Any], usual_s: float) -> float:
    """The interval of heartbeats that a sender names for itself, else the usual one."""
    value = fields.get("interval_s")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value <= _MAX_INTERVAL_S:
        return max(float(value), _MIN_INTERVAL_S)
    return usual_s


def figures_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a heartbeat says beside who and how: numbers, short texts, readiness; bounded, as anybody may send it."""
    found: dict[str, Any] = {}
    for name, value in list(fields.items())[: 2 * _MAX_FIGURES]:
        if name in _OF_HEARTBEAT or not isinstance(name, str) or len(found) >= _MAX_FIGURES:
            continue
        if isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= MAX_NAME_CHARS):
            found[name[:MAX_NAME_CHARS]] = value
        elif name == "readiness" and isinstance(value, Mapping):
            parts = [(part, state) for part, state in value.items() if isinstance(part, str) and isinstance(state, str)]
            found[name] = {part[:MAX_NAME_CHARS]: state[:MAX_NAME_CHARS] for part, state in parts[:_MAX_FIGURES]}
    return found

"""When a program that hangs is killed, so that supervisor starts it again. Pure: time is a parameter.

Each process is killed for hanging; between two kills of a program heal_backoff_s passes, doubling with each; after
heal_limit kills within heal_window_s it is left alone until it gives a sign of life, or somebody else ended it.
Nothing but a hang is healed: what is slow, starting, stopping or flapping is not asked about here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from memory_system.health_settings import HealthSettings

Act = Literal["kill", "leave_alone"]


@dataclass(slots=True)
class _Patient:
    kills: deque[float] = field(default_factory=deque)
    total: int = 0
    next_s: float = float("-inf")
    left_alone_pid: int = 0


class Healer:
    """The kills of every program, and whether the next one is due."""

    def __init__(self, rules: HealthSettings) -> None:
        self._rules = rules
        self._patients: dict[str, _Patient] = {}

    def __repr__(self) -> str:
        return (
            f"<Healer {'on' if self._rules.heal else 'off'} kills={ {n: p.total for n, p in self._patients.items()} }>"
        )

    def kills(self, name: str) -> int:
        """How often this program was killed here."""
        patient = self._patients.get(name)
        return 0 if patient is None else patient.total

    def is_left_alone(self, name: str) -> bool:
        patient = self._patients.get(name)
        return patient is not None and patient.left_alone_pid != 0

    def hangs(self, name: str, pid: int, now_s: float) -> Act | None:
        """What to do about a process that hangs: kill it, say once that it is left alone, or nothing now.

        `kill` counts as done.
        """
        rules, patient = self._rules, self._patients.setdefault(name, _Patient())
        if not rules.heal or patient.left_alone_pid == pid or now_s < patient.next_s:
            return None
        patient.left_alone_pid = 0
        while patient.kills and patient.kills[0] <= now_s - rules.heal_window_s:
            patient.kills.popleft()
        if len(patient.kills) >= rules.heal_limit:
            patient.left_alone_pid = pid
            return "leave_alone"
        patient.kills.append(now_s)
        patient.total += 1
        patient.next_s = now_s + rules.heal_backoff_s * 2.0 ** (len(patient.kills) - 1)
        return "kill"

    def lives(self, name: str) -> None:
        """It does not hang any more."""
        if name in self._patients:
            self._patients[name].left_alone_pid = 0

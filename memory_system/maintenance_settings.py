"""The settings of maintenance: how much of the store a run may take, and when the clock can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

from memory_system.config_loader import key


@dataclass(frozen=True, slots=True)
class MaintenanceSettings:
    slice_rows: int = key(
        16, "Memories that one write of a maintenance run looks at.", unit="memories", span=(1, 10_000)
    )
    share: float = key(0.5, "Largest part of the time that a run works; the rest belongs to requests.", span=(0.01, 1))
    runs_kept_days: float = key(
        30.0,
        "How long the runs of maintenance are kept; the last of each job and caller always is.",
        unit="days",
        span=(0, 3650),
    )


@dataclass(frozen=True, slots=True)
class ClockSettings:
    jump_s: float = key(
        60.0,
        "Wall and monotonic time may go apart by this much; beyond, the clock was set.",
        unit="s",
        span=(1, 1e10),
    )
    settle_s: float = key(
        600.0, "Nothing irreversible is done for this long after the clock was set.", unit="s", span=(0, 86_400)
    )

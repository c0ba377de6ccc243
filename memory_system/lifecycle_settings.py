"""The settings of how memories age: what each tier does, what types begin with, what counts as use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from memory_system.config_loader import key, rule, table

TIERS: Final = ("short", "medium", "long")


@dataclass(frozen=True, slots=True)
class TierSettings:
    decay_rate: float = field(metadata=rule("Importance fades as exp(-rate * days).", unit="1/day", span=(0, 100)))
    max_age_days: float = field(metadata=rule("Stay in this tier.", unit="days", span=(0, 36_500)))
    promote_importance: float = field(
        metadata=rule("Importance needed to move up at the end of the stay.", span=(0, 1))
    )
    archive_threshold: float = field(metadata=rule("Below this importance a memory is archived.", span=(0, 1)))


@dataclass(frozen=True, slots=True)
class TypeSettings:
    """What a memory of one type begins with, where the caller does not say; None: as every other type."""

    memory_tier: str | None = key(None, "Tier that a memory of this type begins in.", choices=TIERS)
    importance: float | None = key(None, "Importance that it begins with.", span=(0, 1))
    reinforcement_factor: float | None = key(
        None, "Factor by which reinforcing multiplies its importance.", span=(0.001, 100)
    )


@dataclass(frozen=True, slots=True)
class LifecycleSettings:
    short: TierSettings = TierSettings(0.1, 7.0, 0.5, 0.1)
    medium: TierSettings = TierSettings(0.05, 30.0, 0.6, 0.1)
    long: TierSettings = TierSettings(0.01, 365.0, 1.0, 0.05)
    memory_types: Mapping[str, TypeSettings] = table(
        TypeSettings, "What memories of a type begin with where the caller does not say.", noun="memory type"
    )
    access_weight_get: float = key(0.01, "Importance that a memory gains when it is read by its id.", span=(0, 1))
    access_weight_search: float = key(0.0, "Importance that a memory gains when a search returns it.", span=(0, 1))
    early_promote_accesses: int = key(
        10, "Accesses in its tier that promote a memory before its time; 0: none do.", unit="accesses", span=(0, 10**9)
    )
    early_promote_importance: float = key(
        0.9, "Importance that promotes a memory before its time when reinforcing reaches it; 0: none does.", span=(0, 1)
    )
    restore_importance: float = key(
        0.3, "Least importance of a memory that is brought back from the archive.", span=(0, 1)
    )
    recheck_days: float = key(
        7.0, "A memory that was due, and stays as it is, is looked at again after this.", unit="days", span=(0.01, 3650)
    )
    delete_enabled: bool = key(False, "Delete memories that have been archived for delete_after_days.")
    delete_after_days: float = key(365.0, "Stay in the archive before deletion.", unit="days", span=(0, 36_500))

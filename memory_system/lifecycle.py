"""How a memory ages: pure functions of the stored values and an instant.

Importance decays exponentially, and more slowly the more often a memory was used:

    importance(t) = importance * exp(-rate * days / (1 + ln(1 + access_count)))

with `days` since `importance_at` and `rate` per day of the memory's tier. The exponential is the forgetting
curve of H. Ebbinghaus (Über das Gedächtnis, 1885); the logarithm makes each further use count less than the
one before. Nothing is swept: the value is computed when it is asked for, so a restart changes nothing.
"""

from __future__ import annotations

import math
from typing import Final

from memory_system.settings import LifecycleSettings, TierSettings

SECONDS_PER_DAY: Final = 86_400.0
SESSION_TYPE: Final = "session"


def importance_at(importance: float, since_s: float, access_count: int, rate_per_day: float, now_s: float) -> float:
    """The importance (0..1) at `now_s` of a memory that had `importance` at `since_s`.

    A `now_s` before `since_s` (a clock set back) gives the stored value: importance never grows by itself.
    """
    days = max(0.0, now_s - since_s) / SECONDS_PER_DAY
    return importance * math.exp(-rate_per_day * days / (1.0 + math.log1p(access_count)))


def crossing_time(
    importance: float, since_s: float, access_count: int, rate_per_day: float, threshold: float
) -> float | None:
    """The instant at which importance falls to `threshold`; `since_s` if it is there already; None if it never is."""
    if importance <= threshold:
        return since_s
    if rate_per_day <= 0.0 or threshold <= 0.0:
        return None
    days = math.log(importance / threshold) * (1.0 + math.log1p(access_count)) / rate_per_day
    return since_s + days * SECONDS_PER_DAY


def tier_settings(settings: LifecycleSettings, memory_tier: str) -> TierSettings:
    """The settings of a tier by its name (short | medium | long)."""
    tier: TierSettings = getattr(settings, memory_tier)
    return tier


def decay_rate(settings: LifecycleSettings, memory_type: str, memory_tier: str) -> float:
    """Decay per day; sessions do not decay."""
    return 0.0 if memory_type == SESSION_TYPE else tier_settings(settings, memory_tier).decay_rate


def due_at(
    settings: LifecycleSettings,
    *,
    memory_type: str,
    memory_tier: str,
    importance: float,
    importance_at_s: float,
    access_count: int,
    tier_since_s: float,
    expires_at_s: float | None,
) -> float | None:
    """The earliest instant at which something is to be decided about the memory, or None.

    Candidates: falling to the tier's archive threshold, reaching the tier's maximal age, expiring.
    """
    instants = [] if expires_at_s is None else [expires_at_s]
    if memory_type != SESSION_TYPE:
        tier = tier_settings(settings, memory_tier)
        instants.append(tier_since_s + tier.max_age_days * SECONDS_PER_DAY)
        crossing = crossing_time(importance, importance_at_s, access_count, tier.decay_rate, tier.archive_threshold)
        if crossing is not None:
            instants.append(crossing)
    return min(instants, default=None)

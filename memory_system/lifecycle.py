"""How a memory ages: pure functions of the stored values and an instant.

Importance decays exponentially, and more slowly the more often a memory was used:

    importance(t) = importance * exp(-rate * days / (1 + ln(1 + access_count)))

with `days` since `importance_at` and `rate` per day of the memory's tier. The exponential is the forgetting
curve of H. Ebbinghaus (Über das Gedächtnis, 1885); the logarithm makes each further use count less than the
one before. Nothing is swept: the value is computed when it is asked for, so a restart changes nothing.

What is to be done with a memory follows from the same values. Each reason has its instant, and `decide` compares
instants, not importances: so it finds something to do from `due_at` on, to the last bit, and nothing before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from memory_system.lifecycle_settings import LifecycleSettings, TierSettings, TypeSettings

SECONDS_PER_DAY: Final = 86_400.0
SESSION_TYPE: Final = "session"
DEFAULT_TIER: Final = "short"
DEFAULT_IMPORTANCE: Final = 0.5
DEFAULT_FACTOR: Final = 1.2
NEXT_TIER: Final = {"short": "medium", "medium": "long"}

Kind = Literal["keep", "promote", "archive", "consolidate", "expire"]
Reason = Literal[
    "nothing_due",
    "important_at_max_age",  # promote; keep, where there is no tier above
    "used_often",  # promote
    "below_threshold",  # archive
    "faded_at_max_age",  # consolidate
    "expired",  # expire
    "archived_long_enough",  # expire
]


class Aged(Protocol):
    """What ageing needs of a stored memory: models.Memory has it, and so has the narrower row of storage/ageing.py.

    `importance` is as of `importance_at`, `tier_accesses` counts since `tier_since`, `promote_at` is when a promotion
    before its time was earned. All times are epoch seconds.
    """

    @property
    def memory_type(self) -> str: ...
    @property
    def memory_tier(self) -> str: ...
    @property
    def importance(self) -> float: ...
    @property
    def importance_at(self) -> float: ...
    @property
    def access_count(self) -> int: ...
    @property
    def tier_since(self) -> float: ...
    @property
    def tier_accesses(self) -> int: ...
    @property
    def expires_at(self) -> float | None: ...
    @property
    def archived_at(self) -> float | None: ...
    @property
    def promote_at(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done with a memory, and as of when it has to be looked at again once that is done.

    `importance` is as of the instant of the decision. `to_tier` is None unless the memory is promoted. `due_at` lies
    after that instant whenever the decision leaves the memory as it is, so that none is looked at for ever.
    """

    kind: Kind
    reason: Reason
    importance: float
    due_at: float | None
    to_tier: str | None = None


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


def importance_now(settings: LifecycleSettings, memory: Aged, now_s: float) -> float:
    """The importance (0..1) of a stored memory at `now_s`."""
    rate = decay_rate(settings, memory.memory_type, memory.memory_tier)
    return importance_at(memory.importance, memory.importance_at, memory.access_count, rate, now_s)


def due_at(settings: LifecycleSettings, memory: Aged) -> float | None:
    """The earliest instant at which something is to be decided about the memory, or None.

    An active memory: falling to the tier's archive threshold, reaching the tier's maximal age, an earned promotion,
    expiring. An archived one: expiring, and deletion where that is enabled. A session: expiring.
    """
    instants = (memory.expires_at, _deletion(settings, memory), *_turning_points(settings, memory))
    return min((instant for instant in instants if instant is not None), default=None)


def decide(settings: LifecycleSettings, memory: Aged, as_of_s: float) -> Decision:
    """What is to be done with the memory as of `as_of_s`.

    promote: at the end of its stay it was important enough, or it earned it before; continuous, since `importance`
    becomes the stored one as of `as_of_s`. archive: it fell to the threshold of its tier. consolidate: it was not
    important enough at the end of its stay: it is merged with its kin, or fades on. expire: it is to be deleted.
    """
    kind, reason, to_tier = _choose(settings, memory, as_of_s)
    importance = importance_now(settings, memory, as_of_s)
    return Decision(kind, reason, importance, _next_due(settings, memory, as_of_s, kind, to_tier), to_tier)


def changed_fields(memory: Aged, decision: Decision, as_of_s: float) -> dict[str, Any]:
    """The fields of a stored memory that the decision changes, with their new values; `due_at` always is one.

    Accesses after `as_of_s` keep their clock: a promotion then counts from the last of them.
    """
    changes: dict[str, Any] = {"due_at": decision.due_at}
    if decision.kind == "promote":
        changes |= _promoted(memory, decision.to_tier, decision.importance, as_of_s)
    elif decision.kind == "archive":
        changes |= {"state": "archived", "archived_at": as_of_s, "promote_at": None}
    return changes


def earns_promotion(settings: LifecycleSettings, memory: Aged, *, reinforced: bool) -> bool:
    """Whether the access that the memory's values have just followed makes it move up before its time.

    It does when the memory was used often enough since it is in its tier, or when reinforcing made it important enough.
    """
    if memory.memory_tier not in NEXT_TIER or memory.memory_type == SESSION_TYPE or memory.archived_at is not None:
        return False
    often, important = settings.early_promote_accesses, settings.early_promote_importance
    return 0 < often <= memory.tier_accesses or (reinforced and 0.0 < important <= memory.importance)


def promotion_due(settings: LifecycleSettings, memory: Aged, now_s: float) -> bool:
    """Whether the memory is to be promoted already: who moves its clock has to keep that, by `promote_at`."""
    return decide(settings, memory, now_s).kind == "promote"


def restore_importance(settings: LifecycleSettings, memory_tier: str) -> float:
    """The least importance of a memory that is brought back; above its tier's threshold, or it would not stay."""
    threshold = tier_settings(settings, memory_tier).archive_threshold
    wanted = settings.restore_importance
    return wanted if wanted > threshold else (threshold + 1.0) / 2.0


def type_settings(settings: LifecycleSettings, memory_type: str) -> TypeSettings:
    """What the settings say of a type; of one that they do not name, nothing."""
    return settings.memory_types.get(memory_type, TypeSettings())


def start_of(settings: LifecycleSettings, memory_type: str) -> tuple[str, float]:
    """The tier and the importance that a memory of this type begins with, when the caller does not say."""
    found = type_settings(settings, memory_type)
    memory_tier = DEFAULT_TIER if found.memory_tier is None else found.memory_tier
    return memory_tier, DEFAULT_IMPORTANCE if found.importance is None else found.importance


def reinforcement_factor(settings: LifecycleSettings, memory_type: str) -> float:
    """By how much reinforcing multiplies the importance of a memory of this type, when the caller does not say."""
    factor = type_settings(settings, memory_type).reinforcement_factor
    return DEFAULT_FACTOR if factor is None else factor


@dataclass(frozen=True, slots=True)
class _Fields:
    """A memory's values with some of them changed, to see when it is due then."""

    memory_type: str
    memory_tier: str
    importance: float
    importance_at: float
    access_count: int
    tier_since: float
    tier_accesses: int
    expires_at: float | None
    archived_at: float | None
    promote_at: float | None


_NAMES: Final = tuple(_Fields.__dataclass_fields__)


def _with(memory: Aged, changes: dict[str, Any]) -> _Fields:
    return _Fields(**{name: changes[name] if name in changes else getattr(memory, name) for name in _NAMES})


def _promoted(memory: Aged, to_tier: str | None, importance: float, as_of_s: float) -> dict[str, Any]:
    since_s = max(as_of_s, memory.importance_at)
    return {
        "memory_tier": to_tier,
        "importance": importance,
        "importance_at": since_s,
        "tier_since": since_s,
        "tier_accesses": 0,
        "promote_at": None,
    }


def _choose(settings: LifecycleSettings, memory: Aged, as_of_s: float) -> tuple[Kind, Reason, str | None]:
    if _reached(memory.expires_at, as_of_s):
        return "expire", "expired", None
    if _reached(_deletion(settings, memory), as_of_s):
        return "expire", "archived_long_enough", None
    crossing_s, earned_s, age_end_s = _turning_points(settings, memory)
    if _reached(crossing_s, as_of_s):
        return "archive", "below_threshold", None
    to_tier = NEXT_TIER.get(memory.memory_tier)
    if _reached(earned_s, as_of_s):
        return "promote", "used_often", to_tier
    if age_end_s is None or age_end_s > as_of_s:
        return "keep", "nothing_due", None
    if importance_now(settings, memory, age_end_s) < tier_settings(settings, memory.memory_tier).promote_importance:
        return "consolidate", "faded_at_max_age", None
    return "keep" if to_tier is None else "promote", "important_at_max_age", to_tier


def _turning_points(settings: LifecycleSettings, memory: Aged) -> tuple[float | None, float | None, float | None]:
    """When an active memory falls to its threshold, has earned its promotion, and ends its stay."""
    if memory.memory_type == SESSION_TYPE or memory.archived_at is not None:
        return None, None, None
    tier = tier_settings(settings, memory.memory_tier)
    crossing_s = crossing_time(
        memory.importance, memory.importance_at, memory.access_count, tier.decay_rate, tier.archive_threshold
    )
    earned_s = memory.promote_at if memory.memory_tier in NEXT_TIER else None
    return crossing_s, earned_s, memory.tier_since + tier.max_age_days * SECONDS_PER_DAY


def _deletion(settings: LifecycleSettings, memory: Aged) -> float | None:
    if not settings.delete_enabled or memory.archived_at is None or memory.memory_type == SESSION_TYPE:
        return None
    return memory.archived_at + settings.delete_after_days * SECONDS_PER_DAY


def _next_due(
    settings: LifecycleSettings, memory: Aged, as_of_s: float, kind: Kind, to_tier: str | None
) -> float | None:
    """When the memory is due again after the decision."""
    if kind == "promote":
        importance = importance_now(settings, memory, as_of_s)
        return due_at(settings, _with(memory, _promoted(memory, to_tier, importance, as_of_s)))
    if kind == "archive":
        return due_at(settings, _with(memory, {"archived_at": as_of_s}))
    instants = [memory.expires_at, _deletion(settings, memory), *_turning_points(settings, memory)]
    to_come = [instant for instant in instants if instant is not None and instant > as_of_s]
    if any(_reached(instant, as_of_s) for instant in instants):
        to_come.append(as_of_s + settings.recheck_days * SECONDS_PER_DAY)
    return min(to_come, default=None)


def _reached(instant_s: float | None, as_of_s: float) -> bool:
    return instant_s is not None and instant_s <= as_of_s

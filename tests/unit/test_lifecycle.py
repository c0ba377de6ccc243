"""Decay and due times as pure functions of stored values and an instant."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_system import lifecycle
from memory_system.lifecycle import SECONDS_PER_DAY, Decision, crossing_time, importance_at
from memory_system.lifecycle_settings import LifecycleSettings, TierSettings, TypeSettings

quick = settings(deadline=None)
SETTINGS = LifecycleSettings()
units = st.floats(0.0, 1.0)
counts = st.integers(0, 10_000)
rates = st.floats(0.0, 10.0)
days = st.floats(0.0, 10_000.0)


def test_known_values() -> None:
    day = SECONDS_PER_DAY
    assert importance_at(0.8, 1000.0, 0, 0.1, 1000.0) == 0.8
    assert importance_at(0.8, 0.0, 0, 0.1, 10 * day) == pytest.approx(0.8 * math.exp(-1.0))
    assert importance_at(0.8, 0.0, 9, 0.1, 10 * day) == pytest.approx(0.8 * math.exp(-1.0 / (1 + math.log(10))))
    assert importance_at(0.8, 0.0, 0, 0.0, 1e12) == 0.8
    assert importance_at(1.0, 0.0, 0, 100.0, 1e15) == 0.0


@quick
@given(units, counts, rates, days, days)
def test_importance_never_grows_and_stays_in_its_range(
    importance: float, count: int, rate: float, first: float, more: float
) -> None:
    early = importance_at(importance, 0.0, count, rate, first * SECONDS_PER_DAY)
    late = importance_at(importance, 0.0, count, rate, (first + more) * SECONDS_PER_DAY)
    assert 0.0 <= late <= early <= importance <= 1.0


@quick
@given(units, counts, rates, days)
def test_a_clock_set_back_changes_nothing(importance: float, count: int, rate: float, back: float) -> None:
    assert importance_at(importance, 1e9, count, rate, 1e9 - back * SECONDS_PER_DAY) == importance


@quick
@given(units, st.integers(0, 1000), st.floats(0.001, 1.0), st.floats(0.1, 100.0))
def test_use_slows_the_decay(importance: float, count: int, rate: float, age_days: float) -> None:
    now_s = age_days * SECONDS_PER_DAY
    assert importance_at(importance, 0.0, count + 1, rate, now_s) >= importance_at(importance, 0.0, count, rate, now_s)


@quick
@given(units, st.integers(0, 100), st.floats(0.01, 1.0), st.floats(0.0, 50.0), st.floats(0.0, 50.0))
def test_computing_in_two_steps_is_computing_at_once(
    importance: float, count: int, rate: float, first: float, second: float
) -> None:
    middle = importance_at(importance, 0.0, count, rate, first * SECONDS_PER_DAY)
    stepped = importance_at(middle, 0.0, count, rate, second * SECONDS_PER_DAY)
    at_once = importance_at(importance, 0.0, count, rate, (first + second) * SECONDS_PER_DAY)
    assert stepped == pytest.approx(at_once, rel=1e-9, abs=1e-12)


@quick
@given(st.floats(0.01, 1.0), counts, st.floats(0.001, 10.0), st.floats(0.001, 1.0), st.floats(0.0, 2e9))
def test_the_crossing_is_where_importance_meets_the_threshold(
    importance: float, count: int, rate: float, threshold: float, since_s: float
) -> None:
    crossing = crossing_time(importance, since_s, count, rate, threshold)
    assert crossing is not None
    if importance <= threshold:
        assert crossing == since_s
    else:
        assert crossing >= since_s
        assert importance_at(importance, since_s, count, rate, crossing) == pytest.approx(threshold, rel=1e-4)


def test_crossings_that_never_come() -> None:
    assert crossing_time(0.5, 7.0, 0, 0.0, 0.1) is None
    assert crossing_time(0.5, 7.0, 0, 0.1, 0.0) is None
    assert crossing_time(0.0, 7.0, 0, 0.0, 0.0) == 7.0


@dataclass(frozen=True)
class Stored:
    """The fields of a stored memory that ageing looks at."""

    memory_type: str = "general"
    memory_tier: str = "short"
    importance: float = 0.5
    importance_at: float = 0.0
    access_count: int = 0
    tier_since: float = 0.0
    tier_accesses: int = 0
    expires_at: float | None = None
    archived_at: float | None = None
    promote_at: float | None = None


def due_at(settings: LifecycleSettings = SETTINGS, **changes: Any) -> float | None:
    return lifecycle.due_at(settings, Stored(**changes))


def after(memory: Stored, decision: Decision, as_of_s: float) -> Stored:
    """The memory once the decision was carried out, without `due_at` and `state`, which follow from the rest."""
    changes = lifecycle.changed_fields(memory, decision, as_of_s)
    return replace(memory, **{name: value for name, value in changes.items() if name not in ("due_at", "state")})


def test_due_is_the_earliest_reason() -> None:
    tier = SETTINGS.short
    max_age_s = tier.max_age_days * SECONDS_PER_DAY
    assert due_at() == max_age_s
    assert due_at(expires_at=5.0) == 5.0
    assert due_at(expires_at=1e12) == max_age_s
    assert due_at(importance=0.11) == crossing_time(0.11, 0.0, 0, tier.decay_rate, tier.archive_threshold)
    assert due_at(importance=0.05) == 0.0
    assert due_at(tier_since=100.0, importance=1.0) == max_age_s + 100.0
    assert due_at(promote_at=3.0) == 3.0
    assert due_at(memory_tier="long", promote_at=3.0) == due_at(memory_tier="long")


def test_sessions_are_due_at_their_expiry_alone() -> None:
    assert due_at(memory_type="session") is None
    assert due_at(memory_type="session", importance=0.0, expires_at=9.0) == 9.0
    assert due_at(DELETING, memory_type="session", archived_at=1.0) is None
    assert lifecycle.decay_rate(SETTINGS, "session", "short") == 0.0


def test_the_archived_are_due_at_expiry_and_at_a_deletion_that_is_enabled() -> None:
    assert due_at(archived_at=5.0) is None
    assert due_at(archived_at=5.0, expires_at=9.0) == 9.0
    assert due_at(DELETING, archived_at=5.0) == 5.0 + 10 * SECONDS_PER_DAY


DAY = SECONDS_PER_DAY
DELETING = replace(SETTINGS, delete_enabled=True, delete_after_days=10.0)


@pytest.mark.parametrize(
    ("memory", "as_of_days", "kind", "reason", "to_tier"),
    [
        (Stored(importance=0.9), 6.9, "keep", "nothing_due", None),
        (Stored(importance=1.0, access_count=1), 7, "promote", "important_at_max_age", "medium"),
        (Stored(importance=0.9), 7, "consolidate", "faded_at_max_age", None),
        (Stored(importance=0.9), 21.9, "consolidate", "faded_at_max_age", None),
        (Stored(importance=0.9), 22, "archive", "below_threshold", None),
        (Stored(importance=0.05), 0, "archive", "below_threshold", None),
        (Stored(promote_at=1.0), 0, "keep", "nothing_due", None),
        (Stored(promote_at=1.0), 1, "promote", "used_often", "medium"),
        (Stored(promote_at=1.0, memory_tier="medium", importance=0.7), 1, "promote", "used_often", "long"),
        (Stored(promote_at=1.0, memory_tier="long"), 1, "keep", "nothing_due", None),
        (Stored(promote_at=1.0), 100, "archive", "below_threshold", None),
        (Stored(memory_tier="medium", importance=1.0, access_count=9), 30, "promote", "important_at_max_age", "long"),
        (Stored(memory_tier="medium", importance=1.0), 30, "consolidate", "faded_at_max_age", None),
        (Stored(memory_tier="long", importance=1.0), 365, "archive", "below_threshold", None),
        (Stored(memory_tier="long", importance=1.0, access_count=5), 365, "consolidate", "faded_at_max_age", None),
        (Stored(importance=1.0, expires_at=3 * DAY), 2.9, "keep", "nothing_due", None),
        (Stored(importance=1.0, expires_at=3 * DAY), 3, "expire", "expired", None),
        (Stored(memory_type="session", memory_tier="long", importance=0.0), 10_000, "keep", "nothing_due", None),
        (Stored(memory_type="session", expires_at=DAY), 1, "expire", "expired", None),
        (Stored(importance=0.0, archived_at=0.0), 10_000, "keep", "nothing_due", None),
        (Stored(archived_at=0.0, expires_at=DAY), 1, "expire", "expired", None),
    ],
)
def test_what_is_decided(memory: Stored, as_of_days: float, kind: str, reason: str, to_tier: str | None) -> None:
    # At 0.1 a day, 0.9 falls to 0.1 in 21.97 days.
    decision = lifecycle.decide(SETTINGS, memory, as_of_days * DAY)
    assert (decision.kind, decision.reason, decision.to_tier) == (kind, reason, to_tier)


def test_the_archived_are_deleted_only_where_that_is_enabled() -> None:
    memory = Stored(archived_at=0.0)
    assert lifecycle.decide(DELETING, memory, 9.9 * DAY).kind == "keep"
    decision = lifecycle.decide(DELETING, memory, 10 * DAY)
    assert (decision.kind, decision.reason) == ("expire", "archived_long_enough")
    assert lifecycle.decide(SETTINGS, memory, 10_000 * DAY).kind == "keep"


def test_a_late_run_decides_about_promotion_as_of_the_end_of_the_stay() -> None:
    """So it makes no difference how long nobody looked."""
    memory = Stored(importance=1.0, access_count=1)
    late = lifecycle.decide(SETTINGS, memory, 13 * DAY)
    assert late.importance < SETTINGS.short.promote_importance
    assert (late.kind, late.to_tier) == ("promote", "medium")


def test_one_without_a_tier_above_it_stays_when_it_is_still_important() -> None:
    settings = replace(SETTINGS, long=replace(SETTINGS.long, promote_importance=0.5))
    memory = Stored(memory_tier="long", importance=1.0, access_count=100)
    decision = lifecycle.decide(settings, memory, 365 * DAY)
    assert (decision.kind, decision.reason) == ("keep", "important_at_max_age")
    assert decision.due_at == (365 + settings.recheck_days) * DAY


def test_use_and_reinforcement_earn_a_promotion() -> None:
    def earns(settings: LifecycleSettings = SETTINGS, *, reinforced: bool = False, **fields: Any) -> bool:
        return lifecycle.earns_promotion(settings, Stored(**fields), reinforced=reinforced)

    often, important = SETTINGS.early_promote_accesses, SETTINGS.early_promote_importance
    assert not earns(tier_accesses=often - 1)
    assert earns(tier_accesses=often)
    assert not earns(tier_accesses=often, memory_tier="long")
    assert not earns(tier_accesses=often, archived_at=1.0)
    assert not earns(tier_accesses=often, memory_type="session")
    assert not earns(importance=important)
    assert earns(importance=important, reinforced=True)
    assert not earns(importance=important - 0.01, reinforced=True)
    off = replace(SETTINGS, early_promote_accesses=0, early_promote_importance=0.0)
    assert not earns(off, tier_accesses=10**6, importance=1.0, reinforced=True)


def test_types_say_what_their_memories_begin_with() -> None:
    settings = replace(
        SETTINGS,
        memory_types={
            "fact": TypeSettings("long", 0.7, 1.1),
            "note": TypeSettings(importance=0.0),
            "log": TypeSettings(),
        },
    )
    assert lifecycle.start_of(settings, "fact") == ("long", 0.7)
    assert lifecycle.start_of(settings, "note") == ("short", 0.0)
    assert lifecycle.start_of(settings, "log") == lifecycle.start_of(settings, "other") == ("short", 0.5)
    assert [lifecycle.reinforcement_factor(settings, kind) for kind in ("fact", "note", "other")] == [1.1, 1.2, 1.2]


def test_what_is_brought_back_stays() -> None:
    assert lifecycle.restore_importance(SETTINGS, "short") == 0.3
    strict = replace(SETTINGS, short=replace(SETTINGS.short, archive_threshold=0.4))
    assert lifecycle.restore_importance(strict, "short") == pytest.approx(0.7)
    assert lifecycle.restore_importance(strict, "long") == 0.3


# -- properties of decisions -----------------------------------------------------------------------------------------

instants = st.floats(0.0, 4e9)
tiers = st.builds(TierSettings, rates, st.floats(0.0, 1000.0), units, units)
any_settings = st.builds(
    LifecycleSettings,
    short=tiers, medium=tiers, long=tiers,
    recheck_days=st.floats(0.01, 100.0), delete_enabled=st.booleans(), delete_after_days=st.floats(0.0, 1000.0),
)  # fmt: skip
memories = st.builds(
    Stored,
    memory_type=st.sampled_from(["general", "general", "general", "session"]),
    memory_tier=st.sampled_from(["short", "medium", "long"]),
    importance=units, importance_at=instants, access_count=counts,
    tier_since=instants, tier_accesses=counts,
    expires_at=st.none() | instants, archived_at=st.none() | st.none() | instants, promote_at=st.none() | instants,
)  # fmt: skip
NOTHING = ("keep", "nothing_due")


@quick
@given(any_settings, memories, instants)
def test_something_is_decided_from_the_due_instant_on_and_nothing_before(
    settings: LifecycleSettings, memory: Stored, other_s: float
) -> None:
    due_s = lifecycle.due_at(settings, memory)
    for as_of_s in (other_s, due_s, due_s and math.nextafter(due_s, -math.inf), due_s and due_s + 1e6):
        if as_of_s is not None:
            decision = lifecycle.decide(settings, memory, as_of_s)
            is_due = due_s is not None and as_of_s >= due_s
            assert ((decision.kind, decision.reason) != NOTHING) == is_due
            if not is_due:
                assert decision.due_at == due_s


@quick
@given(any_settings, memories, instants)
def test_what_changes_nothing_is_due_later(settings: LifecycleSettings, memory: Stored, as_of_s: float) -> None:
    decision = lifecycle.decide(settings, memory, as_of_s)
    if decision.kind not in ("promote", "archive"):
        assert after(memory, decision, as_of_s) == memory
        assert decision.due_at is None or decision.due_at > as_of_s
    else:
        assert decision.due_at == lifecycle.due_at(settings, after(memory, decision, as_of_s))


@quick
@given(any_settings, memories, instants)
def test_a_memory_comes_to_rest_within_four_decisions(
    settings: LifecycleSettings, memory: Stored, as_of_s: float
) -> None:
    """short, medium, long, archived: decided about again and again at one instant, it is left alone at last."""
    for _ in range(4):
        decision = lifecycle.decide(settings, memory, as_of_s)
        if after(memory, decision, as_of_s) == memory:
            break
        memory = after(memory, decision, as_of_s)
    assert lifecycle.decide(settings, memory, as_of_s).kind not in ("promote", "archive")


@quick
@given(any_settings, memories, instants)
def test_a_decision_leaves_importance_as_it_was(settings: LifecycleSettings, memory: Stored, as_of_s: float) -> None:
    """Continuous at promotion, and untouched by archiving; also as of an instant before the last use."""
    decision = lifecycle.decide(settings, memory, as_of_s)
    later = after(memory, decision, as_of_s)
    before = lifecycle.importance_now(settings, memory, as_of_s)
    assert decision.importance == before
    assert lifecycle.importance_now(settings, later, as_of_s) == pytest.approx(before, rel=1e-12)
    assert later.importance_at >= memory.importance_at


@quick
@given(any_settings, memories, instants, st.lists(st.floats(0.0, 1e7), max_size=4))
def test_runs_that_come_to_nothing_change_nothing(
    settings: LifecycleSettings, memory: Stored, start_s: float, steps: list[float]
) -> None:
    """However often it was looked at before its time, the same is decided about it in the end."""
    due_s = lifecycle.due_at(settings, memory)
    seen = memory
    for step in steps:
        as_of_s = start_s + step
        if due_s is None or as_of_s < due_s:
            seen = after(seen, lifecycle.decide(settings, seen, as_of_s), as_of_s)
    assert seen == memory


@quick
@given(any_settings, memories, st.floats(0.0, 4e9), st.floats(0.0, 1e8))
def test_importance_is_monotone_through_all_decisions(
    settings: LifecycleSettings, memory: Stored, start_s: float, step_s: float
) -> None:
    before = math.inf
    for turn in range(8):
        now_s = start_s + turn * step_s
        importance = lifecycle.importance_now(settings, memory, now_s)
        assert 0.0 <= importance <= before * (1 + 1e-12)
        before = importance
        memory = after(memory, lifecycle.decide(settings, memory, now_s), now_s)


@quick
@given(any_settings, memories, counts, instants)
def test_a_memory_that_was_used_more_is_never_less_important(
    settings: LifecycleSettings, memory: Stored, more: int, now_s: float
) -> None:
    used = replace(memory, access_count=memory.access_count + more)
    assert lifecycle.importance_now(settings, used, now_s) >= lifecycle.importance_now(settings, memory, now_s)


def test_each_tier_has_its_rate() -> None:
    settings = LifecycleSettings(medium=TierSettings(0.07, 1.0, 0.5, 0.1))
    assert [lifecycle.decay_rate(settings, "general", tier) for tier in ("short", "medium", "long")] == [
        0.1,
        0.07,
        0.01,
    ]
    assert lifecycle.tier_settings(settings, "medium").max_age_days == 1.0

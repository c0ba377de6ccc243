"""When a program that hangs is killed: once for each process, ever more slowly, and not for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_system.health.healer import Healer
from memory_system.health_settings import HealthSettings

RULES = HealthSettings(heal=True, heal_limit=3, heal_window_s=600.0, heal_backoff_s=10.0)


def test_a_hang_is_answered_with_one_kill() -> None:
    healer = Healer(RULES)
    assert healer.hangs("a", 11, 100.0) == "kill"
    assert healer.hangs("a", 11, 100.2) is None
    assert healer.kills("a") == 1


def test_the_pause_doubles() -> None:
    healer = Healer(RULES)
    assert healer.hangs("a", 11, 0.0) == "kill"
    assert healer.hangs("a", 12, 9.9) is None
    assert healer.hangs("a", 12, 10.0) == "kill"
    assert healer.hangs("a", 13, 29.9) is None
    assert healer.hangs("a", 13, 30.0) == "kill"


def test_a_kill_without_effect_is_repeated_as_if_it_were_another() -> None:
    healer = Healer(RULES)
    assert [healer.hangs("a", 11, now_s) for now_s in (0.0, 5.0, 10.0)] == ["kill", None, "kill"]


def test_after_the_limit_it_is_left_alone_and_that_is_said_once() -> None:
    healer = Healer(RULES)
    acts = [healer.hangs("a", 11 + number, 100.0 * number) for number in range(4)]
    assert acts == ["kill", "kill", "kill", "leave_alone"]
    assert healer.is_left_alone("a")
    assert [healer.hangs("a", 14, 300.0 + now_s) for now_s in (1.0, 50.0, 5000.0)] == [None, None, None]


def test_a_sign_of_life_ends_being_left_alone() -> None:
    healer = Healer(RULES)
    for number in range(4):
        healer.hangs("a", 11 + number, 100.0 * number)
    healer.lives("a")
    assert not healer.is_left_alone("a")
    assert healer.hangs("a", 14, 400.0) == "leave_alone", "the window is not over"
    healer.lives("a")
    assert healer.hangs("a", 14, 601.0) == "kill"


def test_programs_have_nothing_to_do_with_each_other() -> None:
    healer = Healer(RULES)
    for number in range(4):
        healer.hangs("a", 11 + number, 100.0 * number)
    assert healer.hangs("b", 50, 300.0) == "kill"
    assert (healer.kills("b"), healer.is_left_alone("b"), healer.kills("never heard of")) == (1, False, 0)


def test_switched_off_it_does_nothing() -> None:
    healer = Healer(replace(RULES, heal=False))
    assert [healer.hangs("a", 11, 10.0 * number) for number in range(10)] == [None] * 10
    assert healer.kills("a") == 0
    assert not healer.is_left_alone("a")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 120), st.sampled_from(("hangs", "hangs", "restarted", "lives"))), max_size=80),
    st.integers(1, 4),
    st.sampled_from((0.0, 5.0, 60.0)),
)
@pytest.mark.parametrize("window_s", [50.0, 600.0])
def test_never_more_kills_than_the_limit_nor_faster_than_the_pause(
    window_s: float, history: list[tuple[int, str]], limit: int, backoff_s: float
) -> None:
    healer = Healer(replace(RULES, heal_limit=limit, heal_window_s=window_s, heal_backoff_s=backoff_s))
    now_s, pid, killed_s = 0, 1, list[int]()
    for pause_s, event in history:
        now_s += pause_s
        if event == "lives":
            healer.lives("a")
            continue
        pid += event == "restarted"
        if healer.hangs("a", pid, now_s) == "kill":
            recent = [at_s for at_s in killed_s if at_s > now_s - window_s]
            assert len(recent) < limit
            assert not killed_s or now_s - killed_s[-1] >= backoff_s
            if len(recent) > 1:
                assert now_s - recent[-1] >= backoff_s * 2 ** (len(recent) - 1)
            killed_s.append(now_s)
    assert healer.kills("a") == len(killed_s)

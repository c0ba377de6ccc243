"""When the index applies what was committed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from memory_system.search import pace
from memory_system.search.pace import Pace

LONG_S = 30.0


def lasted_s(wait: Callable[[], None]) -> float:
    began_s = time.monotonic()
    wait()
    return time.monotonic() - began_s


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each wait gathered, which takes no time."""
    found: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            found.append(timeout or 0.0)
            return self.is_set()

    monkeypatch.setattr(pace.threading, "Event", Event)
    return found


def test_commits_that_follow_each_other_are_gathered_ever_longer(waits: list[float]) -> None:
    followed = Pace()
    followed.tell()
    for _ in range(8):
        followed.wait()
    assert waits[1::2] == [0.01, 0.02, 0.04, 0.08, 0.1, 0.1, 0.1, 0.1]


def test_one_that_comes_after_a_pause_is_not(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    followed = Pace()
    followed.tell()
    for _ in range(3):
        followed.wait()
    times = iter([0.0, 0.5])
    monkeypatch.setattr(pace.time, "monotonic", lambda: next(times))
    followed.wait()
    assert waits[1::2] == [0.01, 0.02, 0.04, 0.005]


def test_nothing_is_gathered_while_somebody_waits(waits: list[float]) -> None:
    followed = Pace()
    followed.tell()
    for _ in range(3):
        followed.wait()
    followed.hurry()
    for _ in range(2):
        followed.wait()
    assert waits[1::2] == [0.01, 0.02, 0.04, 0.08, 0.01], "what hurries is over with the wait that it ended"


def test_without_a_word_it_returns_after_a_while(waits: list[float]) -> None:
    Pace().wait()
    assert waits == [1.0]


def test_hurrying_and_stopping_end_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_GATHER_S", (LONG_S, LONG_S))
    monkeypatch.setattr(pace, "_POLL_S", LONG_S)
    for end in (Pace.hurry, Pace.stop):
        followed = Pace()
        followed.tell()
        timer = threading.Timer(0.05, end, [followed])
        timer.start()
        assert lasted_s(followed.wait) < LONG_S / 2
        timer.join()
    followed.begin()
    assert lasted_s(followed.wait) < LONG_S / 2, "one that was stopped waits no more"

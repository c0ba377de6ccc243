"""When the index applies what was committed, and who has it hurry."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from memory_system.search import pace
from memory_system.search.pace import Pace
from memory_system.service.own_writes import OwnWrites

LONG_S = 30.0


class Waits(list[float]):
    """How long each wait for a word, and each gathering, may have lasted; none of them takes time. `passed_s`: how
    much time a wait for a word seems to take."""

    passed_s = 0.0
    now_s = 0.0

    def clock(self) -> float:
        self.now_s += self.passed_s / 2.0
        return self.now_s

    def gathered(self) -> list[float]:
        return [round(least_s + rest_s, 6) for least_s, rest_s in zip(self[1::3], self[2::3], strict=True)]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    found = Waits()

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            found.append(timeout or 0.0)
            return self.is_set()

    monkeypatch.setattr(pace, "threading", SimpleNamespace(Event=Event))
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=found.clock))
    return found


def told() -> Pace:
    followed = Pace()
    followed.tell()
    return followed


def test_commits_that_follow_each_other_are_gathered_ever_longer(waits: Waits) -> None:
    followed = told()
    for _ in range(8):
        followed.wait()
    assert waits.gathered() == [0.01, 0.02, 0.04, 0.08, 0.1, 0.1, 0.1, 0.1]


def test_one_that_comes_after_a_pause_is_not(waits: Waits) -> None:
    followed = told()
    for waits.passed_s in (0.0, 0.0, 0.0, 0.5, 0.0):
        followed.wait()
    assert waits.gathered() == [0.01, 0.02, 0.04, 0.005, 0.01]


def test_nor_is_one_that_comes_when_nothing_came_for_long(waits: Waits) -> None:
    followed = told()
    for _ in range(5):
        followed.wait()
    followed.begin()
    followed.wait()
    assert waits.pop() == 1.0
    followed.tell()
    followed.wait()
    assert waits.gathered()[-2:] == [0.1, 0.01]


def test_who_waits_has_the_next_be_gathered_for_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_GATHER_S", (0.01, LONG_S))
    followed = told()
    followed._gather_s = LONG_S
    followed.hurry()
    began_s = time.monotonic()
    followed.wait()
    assert 0.01 <= time.monotonic() - began_s < LONG_S / 2


def test_each_way_ends_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_GATHER_S", (0.01, LONG_S))
    monkeypatch.setattr(pace, "_POLL_S", LONG_S)
    for end in (Pace.hurry, Pace.ask, Pace.stop):
        followed = told()
        followed._gather_s = LONG_S
        timer = threading.Timer(0.05, end, [followed])
        timer.start()
        began_s = time.monotonic()
        followed.wait()
        assert time.monotonic() - began_s < LONG_S / 2
        timer.join()
    followed.begin()
    followed.wait()
    assert time.monotonic() - began_s < LONG_S / 2, "one that was stopped waits no more"


def test_a_search_that_waits_for_its_callers_writes_hurries_the_index() -> None:
    hurried: list[bool] = []
    present = False

    async def waited() -> None:
        nonlocal present
        writes = OwnWrites(lambda _row_id, _digest: present, lambda: hurried.append(present))
        writes.note(("default", "a"), {1: b"digest"})
        await writes.wait(("default", "b"), 1.0)
        assert hurried == [], "it has written nothing"
        waiting = asyncio.ensure_future(writes.wait(("default", "a"), LONG_S))
        for _ in range(3):
            await asyncio.sleep(0.001)
            writes.advanced()
        present = True
        writes.advanced()
        await waiting

    asyncio.run(waited())
    assert len(hurried) >= 2
    assert True not in hurried

"""Places of a pool that clients take in turn."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from memory_system.turns import CLIENT, Lanes, Turns


def test_a_newcomer_waits_for_one_of_the_busy_client_and_not_for_all() -> None:
    async def scenario() -> list[str]:
        turns, done = Turns(1), []

        async def work(client: str, number: int) -> None:
            CLIENT.set(client.encode())
            async with turns:
                await asyncio.sleep(0)
                done.append(f"{client}{number}")

        tasks = [asyncio.create_task(work("a", number)) for number in range(5)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(work("b", 0)))
        await asyncio.gather(*tasks)
        return done

    done = asyncio.run(scenario())
    assert done.index("b0") <= 2
    assert [each for each in done if each != "b0"] == ["a0", "a1", "a2", "a3", "a4"]


def test_no_more_than_the_places_are_taken_and_none_is_lost_by_who_gives_up() -> None:
    async def scenario() -> int:
        turns, inside, most = Turns(2), 0, 0

        async def work() -> None:
            nonlocal inside, most
            async with turns:
                inside += 1
                most = max(most, inside)
                try:
                    await asyncio.sleep(0.001)
                finally:
                    inside -= 1

        for cancelled in (0, 1, 3, 5):
            tasks = [asyncio.create_task(work()) for _ in range(8)]
            await asyncio.sleep(0)
            tasks[cancelled].cancel()
            await asyncio.sleep(0.0015)
            tasks[7 - cancelled].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert repr(turns) == "Turns(2 free, 0 waiting)"
        return most

    assert asyncio.run(scenario()) == 2


def test_a_place_given_to_one_who_is_cancelled_in_that_moment_is_passed_on() -> None:
    async def scenario() -> None:
        turns = Turns(1)
        await turns.__aenter__()

        async def work() -> None:
            async with turns:
                pass

        first, second = asyncio.create_task(work()), asyncio.create_task(work())
        await asyncio.sleep(0)
        await turns.__aexit__()  # the first has it now, and has not run yet
        first.cancel()
        await asyncio.wait_for(second, 5)
        assert repr(turns) == "Turns(1 free, 0 waiting)"

    asyncio.run(scenario())


class Item:
    def __init__(self, client: str) -> None:
        self.name = client
        self.client = client.encode()


def order(lanes: Lanes[Item]) -> str:
    return "".join(item.name for item in lanes.take_all())


def test_clients_take_turns_and_each_of_them_is_first_in_first_out() -> None:
    lanes: Lanes[Item] = Lanes()
    for name in "aaaabbc":
        lanes.add(Item(name))
    assert order(lanes) == "abcabaa"


def test_those_who_always_have_more_are_not_forgotten_over_newcomers() -> None:
    lanes: Lanes[Item] = Lanes()
    for _ in range(50):
        lanes.add(Item("a"))
    lanes.pop()
    taken = []
    for number in range(40):  # always a newcomer there
        lanes.add(Item(chr(1000 + number)))
        lanes.add(Item(chr(2000 + number)))
        taken.append(lanes.pop().name)
    assert taken.count("a") == 10


def test_what_comes_soon_is_told_and_not_taken() -> None:
    lanes: Lanes[Item] = Lanes()
    for name in "aaaabbc":
        lanes.add(Item(name))
    assert "".join(item.name for item in lanes.soon(5)) == "abcab"
    assert lanes.soon(1) == [lanes.first()]
    assert "".join(item.name for item in lanes.soon(100)) == "abcabaa"
    assert order(lanes) == "abcabaa"
    assert lanes.soon(3) == []


REMEMBERED = 4096  # turns, as there are in a minute or so of load


def test_of_clients_that_came_and_went_little_is_kept_and_not_for_long() -> None:
    lanes: Lanes[Item] = Lanes()
    tracemalloc.start()
    try:
        for number in range(REMEMBERED):
            lanes.add(Item(f"{number:010}"))
            lanes.pop()
        crowded = tracemalloc.get_traced_memory()[0]
        for _ in range(REMEMBERED):
            lanes.add(Item("stays"))
            lanes.pop()
        alone = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert crowded < REMEMBERED * 300  # a deque for each would be three times that
    assert alone < crowded * 0.7  # what is left is the table that they stood in


def served(monkeypatch: pytest.MonkeyPatch, remembered: int) -> str:
    """In what order clients are served of whom ten have much to do, and one comes back as soon as it was."""
    monkeypatch.setattr("memory_system.turns._REMEMBERED", remembered)
    lanes: Lanes[Item] = Lanes()
    for name in "abcdefghij" * 100 + "v":
        lanes.add(Item(name))
    taken = []
    for _ in range(500):
        taken.append(lanes.pop().name)
        if taken[-1] == "v":
            lanes.add(Item("v"))
    return "".join(taken)


def test_what_is_forgotten_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    all_turns = served(monkeypatch, 10**9)
    assert served(monkeypatch, 11) == all_turns
    assert served(monkeypatch, 1) != all_turns  # or else nothing here depends on what is remembered

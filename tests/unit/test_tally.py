"""Two runs that did the same have the same digest, in whatever order they did it."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from memory_system.service.tally import Tally

changes = st.lists(st.fixed_dictionaries({"memory_id": st.text(max_size=8), "to": st.sampled_from("ab")}), max_size=30)


def tally(these: list[dict[str, str]], limit: int = 50) -> Tally:
    found = Tally(limit)
    for change in these:
        found.add(change["to"], change)
    return found


@given(changes, st.randoms(use_true_random=False))
def test_the_order_plays_no_part(these: list[dict[str, str]], rng: random.Random) -> None:
    shuffled = these.copy()
    rng.shuffle(shuffled)
    assert tally(these).digest == tally(shuffled).digest
    assert tally(these).counts == tally(shuffled).counts


@given(changes, st.fixed_dictionaries({"memory_id": st.text(max_size=8), "to": st.just("a")}))
def test_one_change_more_is_another_digest(these: list[dict[str, str]], more: dict[str, str]) -> None:
    assert tally(these).digest != tally([*these, more]).digest


def test_the_same_change_twice_counts_twice() -> None:
    once, twice = tally([{"to": "a"}]), tally([{"to": "a"}] * 2)
    assert once.digest != twice.digest
    assert tally([{"to": "a"}] * 3).digest not in (once.digest, twice.digest)


def test_the_reply_shows_the_first_and_digests_all() -> None:
    these = [{"memory_id": str(number), "to": "a"} for number in range(10)]
    reply = tally(these, limit=3).reply()
    assert reply["results"] == these[:3]
    assert reply["count"] == 3
    assert reply["changes"] == 10
    assert reply["counts"] == {"a": 10}
    assert reply["digest"] == tally(these, limit=100).digest
    assert len(reply["digest"]) == 32
    assert tally([]).digest == "0" * 32


def test_the_order_of_a_changes_fields_plays_no_part() -> None:
    assert tally([{"memory_id": "m", "to": "a"}]).digest == tally([{"to": "a", "memory_id": "m"}]).digest


def test_what_hangs_together_is_part_of_the_digest() -> None:
    tallies = [Tally(1), Tally(1), Tally(1)]
    for tally, marks in zip(tallies, ([b"ab", b"cd"], [b"cd", b"ab"], [b"ac", b"bd"]), strict=True):
        for mark in marks:
            tally.mark(mark * 8)
    assert tallies[0].digest == tallies[1].digest != tallies[2].digest
    assert tallies[0].changes == 0

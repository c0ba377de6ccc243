"""Links from archived memories to the consolidated one that they speak for, whatever the order of changes."""

from __future__ import annotations

import random

import numpy as np

from memory_system.search.columns import Columns
from memory_system.search.rows import Row
from memory_system.search.speakers import NONE, Speakers
from tests.support.search_store import rows_of


def row(row_id: int, merged_into: int | None = None) -> Row:
    state = "active" if merged_into is None else "archived"
    return Row(
        row_id, "default", "turn", "short", state, None, "p", None, None, row_id.to_bytes(16), merged_into=merged_into
    )


def links(columns: Columns) -> dict[int, int]:
    """The row that each row speaks for."""
    slots = columns.alive()
    into = columns.speakers.into[slots]
    found = {
        int(columns.row_ids[slot]): int(columns.row_ids[to]) for slot, to in zip(slots, into, strict=True) if to >= 0
    }
    voices = columns.speakers.voices
    assert columns.speakers.count == len(found) == voices.sum()
    for slot in slots.tolist():
        assert voices[slot] == list(found.values()).count(int(columns.row_ids[slot]))
    return found


def test_links_are_those_of_the_rows_that_are_there() -> None:
    """Rows come and go in any order, also the merged one after its originals, and slots are given to others."""
    rng = random.Random(7)
    for _ in range(60):
        columns, held = Columns(), dict[int, Row]()
        for _ in range(80):
            row_id = rng.randint(1, 14)
            if row_id in held and rng.random() < 0.4:
                columns.remove(row_id)
                # With the row of a consolidated memory goes what it was made of: the originals are read again.
                del held[row_id]
                for other in [other for other in held.values() if other.merged_into == row_id]:
                    held[other.row_id] = row(other.row_id)
                    columns.put(held[other.row_id])
            else:
                held[row_id] = row(row_id, rng.choice([None, 15, 16, 17]) if row_id < 12 else None)
                columns.put(held[row_id])
            if rng.random() < 0.2:
                merged = rng.randint(15, 17)
                held[merged] = row(merged)
                columns.put(held[merged])
            wanted = {at: one.merged_into for at, one in held.items() if one.merged_into in held}
            assert links(columns) == wanted


def test_a_store_that_is_loaded_has_the_links_that_it_had() -> None:
    rows = [row(1, 9), row(2, 9), row(3), row(4, 8), row(9)]
    columns = Columns()
    columns.extend(rows_of(rows))
    columns.settle()
    assert links(columns) == {1: 9, 2: 9}
    columns.put(row(8))
    assert links(columns) == {1: 9, 2: 9, 4: 8}


def test_a_merged_row_that_is_gone_is_spoken_for_by_none() -> None:
    columns = Columns()
    for one in (row(5), row(1, 5), row(2, 5)):
        columns.put(one)
    slot = columns.slot(5)
    columns.remove(5)
    assert columns.put(row(6)) == slot and links(columns) == {}


def test_heard_is_what_is_allowed_and_what_speaks_for_it() -> None:
    speakers, slots = Speakers(), {10: 0, 11: 1, 12: 2, 13: 3, 14: 4}
    speakers.put(1, 11, 10, slots)
    speakers.put(2, 12, 13, slots)
    mask = np.array([True, False, False, False, False])
    expires = np.array([np.inf, 5.0, np.inf, np.inf, np.inf])
    assert speakers.heard(mask, expires, 4.0).tolist() == [True, True, False, False, False]
    assert speakers.heard(mask, expires, 5.0).tolist() == mask.tolist()
    assert speakers.shown(np.array([0, 1, 2, 4])).tolist() == [0, 0, 3, 4]
    assert speakers.into[:5].tolist() == [NONE, 0, 3, NONE, NONE]

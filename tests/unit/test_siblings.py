"""The order of memories below their parents, and what is read off a text or a question for the ranking."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import numpy as np
import pytest

from memory_system.search.columns import Columns, Row
from memory_system.search.dates import Date, dates, nearness
from memory_system.search.gathering import gather, nearest
from memory_system.search.keywords import NO_QUERY, WordIndex
from memory_system.search.notes import ASKS, note
from memory_system.search.query import SearchQuery
from memory_system.search.scope import Scope
from memory_system.search.siblings import NONE, Siblings
from memory_system.search.tokens import Tokenizer
from memory_system.search.view import View


def chain(siblings: Siblings, slot: int) -> list[int]:
    """The slots from the first to the last of a family, by its links."""
    while siblings.before[slot] != NONE:
        slot = int(siblings.before[slot])
    found = [slot]
    while siblings.after[found[-1]] != NONE:
        found.append(int(siblings.after[found[-1]]))
        assert siblings.before[found[-1]] == found[-2]
    return found


def test_siblings_stand_in_the_order_of_their_times() -> None:
    siblings = Siblings()
    for slot, time_s in ((0, 5.0), (1, 9.0), (2, 1.0), (3, 5.0)):
        siblings.add(slot, 1, time_s, row_id=100 - slot)
    assert chain(siblings, 0) == [2, 3, 0, 1]  # equal times by row id
    assert siblings.family(1).tolist() == [2, 3, 0, 1] and siblings.family(2).tolist() == []


def test_links_hold_through_any_changes() -> None:
    rng = random.Random(3)
    siblings, model = Siblings(), dict[int, tuple[int, float, int]]()
    for _ in range(4000):
        slot = rng.randrange(1500)
        if slot in model:
            siblings.remove(slot, model.pop(slot)[0])
        else:
            model[slot] = (rng.randrange(5), float(rng.randrange(40)), rng.randrange(10**6))
            siblings.add(slot, *model[slot])
    for parent in range(5):
        expected = sorted((slot for slot in model if model[slot][0] == parent), key=lambda slot: model[slot][1:])
        assert siblings.family(parent).tolist() == expected == chain(siblings, expected[0])
    free = [slot for slot in range(1500) if slot not in model]
    assert (siblings.before[free] == NONE).all() and (siblings.after[free] == NONE).all()


def test_what_has_no_place_is_not_taken_out_of_another() -> None:
    siblings = Siblings()
    siblings.add(0, 1, 1.0, 1)
    siblings.remove(3, 1)
    siblings.remove(0, 2)
    assert siblings.family(1).tolist() == [0]


def row(row_id: int, parent_id: str | None = "p", **more: object) -> Row:
    given = {"namespace": "default", "state": "active", "expires_at": None, "created_at": float(row_id)} | more
    return Row(
        row_id, memory_type="turn", memory_tier="short", parent_id=parent_id, session_id=None, user_id=None,
        digest=row_id.to_bytes(16), **given,
    )  # fmt: skip


def test_columns_keep_the_links_of_their_rows() -> None:
    columns = Columns()
    for row_id in (1, 2, 3, 4):
        columns.put(row(row_id))
    alone = columns.put(row(5, parent_id=None))
    elsewhere = columns.put(row(6, namespace="other"))
    slots = columns.slots([1, 2, 3, 4])
    assert columns.around(slots[1:2], 2)[:, 0].tolist() == [NONE, slots[0], slots[1], slots[2], slots[3]]
    assert columns.parents(np.array([alone, elsewhere])).tolist() == [-1, -1]
    assert len(set(columns.parents(slots).tolist())) == 1 and columns.parents(slots)[0] >= 0
    columns.put(row(2, occurred_at=99.0))
    columns.remove(3)
    assert columns.around(slots[:1], 2)[:, 0].tolist() == [NONE, NONE, slots[0], slots[3], slots[1]]
    columns.put(row(4, parent_id="q"))
    assert columns.around(slots[3:], 1)[:, 0].tolist() == [NONE, slots[3], NONE]


def test_what_is_put_again_is_as_if_put_once() -> None:
    """Whatever changes between two puts of a row: links, values and what is counted by them."""
    rng = random.Random(11)
    for _ in range(40):
        columns, last = Columns(), {}
        for _ in range(60):
            row_id = rng.randint(1, 12)
            last[row_id] = row(
                row_id,
                parent_id=rng.choice([None, "p", "q"]),
                namespace=rng.choice(["default", "default", "other"]),
                state=rng.choice(["active", "archived"]),
                expires_at=rng.choice([None, 50.0]),
                created_at=float(rng.randint(1, 4)),
            )
            for _ in range(rng.randint(1, 3)):
                columns.put(last[row_id])
        once = Columns()
        for one in last.values():
            once.put(one)
        for row_id in last:
            around = [held.around(held.slots([row_id]), 2)[:, 0] for held in (columns, once)]
            rows = [
                [int(held.row_ids[slot]) if slot >= 0 else None for slot in slots.tolist()]
                for held, slots in zip((columns, once), around, strict=True)
            ]
            assert rows[0] == rows[1]
        for scope in (Scope("default", 10.0), Scope("other", 60.0, include_archived=True)):
            found = [held.mask(scope) for held in (columns, once)]
            sets = [
                {int(row_id) for row_id in held.row_ids[: held.top][mask]}
                for held, mask in zip((columns, once), found, strict=True)
                if mask is not None
            ]
            assert sets[0] == sets[1] and columns.pending(scope.namespace) == once.pending(scope.namespace)
        for row_id in last:
            columns.remove(row_id)
        assert all(not [value for value in coding.values if value is not None] for coding in columns._codings.values())


def test_links_outgrow_the_first_slots() -> None:
    columns = Columns()
    for row_id in range(1, 3000):
        columns.put(row(row_id, parent_id=None if row_id < 2990 else "p"))
    assert columns.around(columns.slots([2989, 2990]), 1).tolist() == [[NONE, NONE], [2988, 2989], [NONE, 2990]]


def test_what_the_scope_hides_is_not_seen_around_a_memory() -> None:
    columns = Columns()
    rows = [row(1), row(2, state="archived"), row(3, expires_at=5.0), row(4, namespace="other")]
    slots = np.array([columns.put(some) for some in rows])
    assert columns.visible(np.append(slots, -1), Scope("default", 10.0)).tolist() == [True, False, False, False, False]
    everything = Scope("default", 1.0, include_archived=True)
    assert columns.visible(slots, everything).tolist() == [True, True, True, False]
    columns.remove(1)
    assert not columns.visible(slots[:1], everything).any()


def test_the_nearest_are_those_that_may_be_seen() -> None:
    """As if the hidden ones had never been there, whatever the memory itself is; where none is, as the links say."""
    rng = random.Random(7)
    for share in (0.0, 0.2, 0.6, 1.0):
        columns = Columns()
        hidden = {row_id for row_id in range(1, 41) if rng.random() < share}
        for row_id in range(1, 41):
            columns.put(row(row_id, parent_id=f"p{row_id % 3}", state="archived" if row_id in hidden else "active"))
        slots = columns.slots(range(1, 41))
        found = nearest(columns, Scope("default", 10.0), slots, 2)
        for column, row_id in zip(found.T.tolist(), range(1, 41), strict=True):
            family = [other for other in range(1, 41) if other % 3 == row_id % 3 and other not in hidden]
            before = [NONE, NONE, *(other for other in family if other < row_id)][-2:]
            after = [*(other for other in family if other > row_id), NONE, NONE][:2]
            row_ids = [int(columns.row_ids[slot]) if slot >= 0 else NONE for slot in column]
            assert row_ids == [*before, row_id, *after]
        everything = nearest(columns, Scope("default", 10.0, include_archived=True), slots, 2)
        assert (everything == columns.around(slots, 2)).all()
        assert (found == columns.around(slots, 2)).all() == (not hidden)


def test_what_is_found_beside_a_memory_has_its_own_surroundings() -> None:
    """One chain from each memory found says the same as looking around all of them anew."""
    rng = np.random.default_rng(5)
    for archived in (0.0, 0.3):
        columns = Columns()
        for row_id in range(1, 201):
            state = "archived" if rng.random() < archived else "active"
            columns.put(row(row_id, parent_id=f"p{rng.integers(9)}", state=state))
        view = View(columns, None, WordIndex(Tokenizer()), None, "", 0)
        scope = Scope("default", 10.0)
        mask = columns.visible(np.arange(200), scope) & (rng.random(200) < 0.7)
        found = np.flatnonzero(mask & (rng.random(200) < 0.2))
        slots, near = gather(view, SearchQuery("default", "", 10.0), NO_QUERY, found, mask)
        beside = nearest(columns, scope, found, 2)
        beside = beside[beside >= 0]
        assert slots.tolist() == sorted({*found.tolist(), *beside[mask[beside]].tolist()})
        around = nearest(columns, scope, slots, 2)
        assert ((near.around == len(near.lengths) - 1) == (around < 0)).all()
        pairs = {*zip(near.around[around >= 0].tolist(), around[around >= 0].tolist(), strict=True)}
        assert len(pairs) == len({number for number, _ in pairs}) == len({slot for _, slot in pairs})


def test_no_more_than_fourteen_in_a_row_are_passed_over() -> None:
    columns = Columns()
    for row_id in range(1, 33):
        columns.put(row(row_id, state="active" if row_id in (1, 16, 32) else "archived"))
    first, near, far = slots = columns.slots([1, 16, 32])
    found = nearest(columns, Scope("default", 10.0), slots, 1)
    assert found.T.tolist() == [[NONE, first, near], [first, near, NONE], [NONE, far, NONE]]


@pytest.mark.parametrize(
    ("text", "asks"),
    [
        ("Where is it?", True),
        ("Where is it? [image: a photo of a door]", True),
        ("Where is it?  ", True),
        ("What? I know.", False),
        ("[image: what?]", False),
        ("what?]", False),
        ("\u4f60\u597d\uff1f", True),
        ("", False),
    ],
)
def test_a_note_tells_whether_a_text_ends_with_a_question(text: str, asks: bool) -> None:
    assert bool(note(text) & ASKS) is asks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What did Ada do on 7 May 2023?", (Date(5, 7, 2023),)),
        ("on the 8th of June", (Date(6, 8),)),
        ("on October 13, 2023 and in July", (Date(10, 13, 2023), Date(7))),
        ("in May, 2023", (Date(5, None, 2023),)),
        ("since 2023-05-07", (Date(5, 7, 2023),)),
        ("during September", (Date(9),)),
        ("sept. 3rd", (Date(9, 3),)),
        ("the first week of November, by July or for March", (Date(11), Date(7), Date(3))),
        ("What did I buy for April, and what is a friend of June to do by May?", ()),
        ("since April", (Date(4),)),
        ("may I march in august company", ()),
        ("room 45 may 99", ()),
        ("2023-13-45", ()),
        ("nothing", ()),
    ],
)
def test_dates_of_a_question(text: str, expected: tuple[Date, ...]) -> None:
    assert dates(text) == expected


def at(*days: tuple[int, int, int]) -> np.ndarray:
    return np.array([datetime(*day, 12, tzinfo=UTC).timestamp() for day in days])


def test_nearness_to_a_day_and_to_a_month() -> None:
    around = at((2023, 5, 5), (2023, 5, 6), (2023, 5, 7), (2023, 5, 8), (2023, 5, 17), (2023, 5, 18), (2024, 5, 7))
    assert nearness((Date(5, 7, 2023),), around).tolist() == [0.0, 1.0, 1.0, 0.6, 0.6, 0.0, 0.0]
    assert nearness((Date(5, 7),), around).tolist() == [0.0, 1.0, 1.0, 0.6, 0.6, 0.0, 1.0]
    months = at((2023, 4, 30), (2023, 5, 1), (2023, 6, 30), (2023, 7, 1), (2022, 5, 9))
    assert nearness((Date(5, None, 2023),), months).tolist() == [0.0, 0.7, 0.3, 0.0, 0.0]
    assert nearness((Date(5),), months).tolist() == [0.0, 0.7, 0.3, 0.0, 0.7]
    assert nearness((Date(12, 30),), at((2024, 1, 3), (2023, 12, 29), (2024, 6, 1))).tolist() == [0.6, 1.0, 0.0]


def test_nearness_of_what_has_no_time_is_none() -> None:
    assert nearness((Date(5),), np.array([np.nan])).tolist() == [0.0]
    assert nearness((), at((2023, 5, 5))).tolist() == [0.0]
    assert nearness((Date(1, 1), Date(5)), at((2023, 5, 5))).tolist() == [0.7]

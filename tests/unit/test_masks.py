"""Masks of scopes: kept ones are what a fresh look would give, whatever has changed; a bulk load is many puts."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from memory_system.filters import parse_filter
from memory_system.search.columns import Columns
from memory_system.search.masks import KeptMasks
from memory_system.search.rows import Row
from memory_system.search.scope import Scope
from tests.support.search_store import rows_of

NOW_S = 1_700_000_000.0
FILTERS = (
    None,
    {"user_id": "u1"},
    {"user_id": {"in": ["u1", "u2", "nobody"]}},
    {"not": {"memory_type": {"in": ["a", "b"]}}},
    {"or": [{"memory_type": "a"}, {"parent_id": {"exists": True}}]},
    {"expires_at": {"exists": True}},
    {"metadata.n": 1},
    {"metadata.n": True},
)


def some_row(rng: random.Random, row_id: int) -> Row:
    return Row(
        row_id,
        rng.choice(("default", "default", "other")),
        rng.choice("abc"),
        "short",
        rng.choice(("active", "active", "archived")),
        rng.choice((None, None, NOW_S - 1.0, NOW_S + 1.0)),
        rng.choice((None, "p1", "p2")),
        None,
        f"u{rng.randrange(4)}",
        rng.randbytes(16),
        {"n": rng.choice((1, True, None, "x"))},
        rng.choice((None, NOW_S - 50.0)),
        NOW_S - rng.random() * 100.0,
    )


def scopes() -> list[Scope]:
    plain = [Scope("default", NOW_S, parse_filter(raw)) for raw in FILTERS]
    return [*plain, replace(plain[1], include_archived=True), Scope("default", NOW_S, since_s=NOW_S - 60.0)]


def fresh(rows: dict[int, Row], order: list[int]) -> Columns:
    """Columns that have the rows at the same slots, and have never been asked."""
    columns = Columns(["n"])
    for row_id in order:
        columns.put(rows.get(row_id) or replace(some_row(random.Random(0), row_id), namespace="gone"))
    return columns


def masked(columns: Columns, scope: Scope) -> set[int]:
    mask = columns.mask(scope)
    assert (mask is not None and not mask.flags.writeable) or len(mask) == columns.top
    return set(columns.row_ids[: columns.top][mask].tolist())


def test_kept_masks_follow_every_change() -> None:
    rng = random.Random(3)
    columns = Columns(["n"])
    rows: dict[int, Row] = {}
    for step in range(1, 1500):
        row_id = rng.randrange(1, 300)
        if rng.random() < 0.3:
            columns.remove(row_id)
            rows.pop(row_id, None)
        else:
            rows[row_id] = some_row(rng, row_id)
            columns.put(rows[row_id])
        if step % 50 == 0:
            expected = fresh(rows, sorted(rows))
            for scope in scopes():
                assert masked(columns, scope) == masked(expected, scope), (step, scope)
            for namespace in ("default", "other", "nobody"):
                assert columns.pending(namespace) == sum(row.namespace == namespace for row in rows.values())


def test_numbers_and_booleans_are_not_confused() -> None:
    columns = Columns(["n"])
    for row_id, value in enumerate((1, True), start=1):
        columns.put(
            replace(
                some_row(random.Random(1), row_id),
                namespace="default",
                state="active",
                expires_at=None,
                metadata={"n": value},
            )
        )
    found = [masked(columns, Scope("default", NOW_S, parse_filter({"metadata.n": value}))) for value in (1, True)]
    assert found == [{1}, {2}]


def test_what_expires_leaves_a_kept_mask_as_time_goes_by() -> None:
    columns = Columns()
    columns.put(replace(some_row(random.Random(1), 1), namespace="default", state="active", expires_at=NOW_S + 10.0))
    assert [masked(columns, Scope("default", NOW_S + after_s)) for after_s in (0.0, 11.0, 0.0)] == [{1}, set(), {1}]


def test_a_bulk_load_is_as_many_puts() -> None:
    rng = random.Random(5)
    rows = [some_row(rng, row_id) for row_id in range(1, 3001)]
    one, many = Columns(["n"]), Columns(["n"])
    for row in rows:
        one.put(row)
    for start in range(0, len(rows), 700):
        part = rows[start : start + 700]
        slots = many.extend(rows_of(part))
        assert slots.tolist() == list(range(start, start + len(part)))
    many.settle()
    for scope in scopes():
        assert masked(one, scope) == masked(many, scope)
    slots = np.arange(3000)
    assert np.array_equal(one.around(slots, 2), many.around(slots, 2))
    assert np.array_equal(one.parents(slots) >= 0, many.parents(slots) >= 0)
    assert np.array_equal(one.happened_at[:3000], many.happened_at[:3000])
    assert one.pending("default") == many.pending("default") > 0
    for columns in (one, many):  # what was loaded can be changed like anything else
        columns.put(replace(rows[7], parent_id="p2", user_id="u9"))
        columns.remove(9)
    assert np.array_equal(one.around(slots[10:], 2), many.around(slots[10:], 2))
    assert many.slot(9) is None and len(many) == 2999


def test_only_so_many_masks_are_kept() -> None:
    kept = KeptMasks()
    asked = []

    def evaluate(where: object) -> np.ndarray:
        asked.append(where)
        return np.ones(8, np.bool_)

    for key in range(40):
        kept.get(key, evaluate, 8)
    assert len(asked) == 40
    kept.get(39, evaluate, 8)
    assert len(asked) == 40, "the last ones are kept"
    kept.get(0, evaluate, 8)
    assert len(asked) == 41, "the first ones are not"


@pytest.mark.parametrize("changes", [10, 20_000])
def test_a_kept_mask_grows_with_the_columns(changes: int) -> None:
    columns = Columns()
    scope = Scope("default", NOW_S)
    for row_id in range(1, changes):
        columns.put(Row(row_id, "default", "t", "short", "active", None, None, None, None, bytes(16)))
        if row_id % 9 == 0:
            mask = columns.mask(scope)
            assert mask is not None and len(mask) == row_id and mask.all()

"""The vector side against a comparison of everything: each way to the nearest, whatever a filter lets pass."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from memory_system.search import narrowing, sketch, vectors
from memory_system.search.blocks import Blocks
from memory_system.search.columns import Columns
from memory_system.search.narrowing import highest
from memory_system.search.rows import Embedded, Row
from memory_system.search.scope import Scope
from memory_system.search.sketch import fit
from memory_system.search.vectors import VectorIndex, units
from memory_system.settings import SearchSettings

DIMENSION = 96
K = 20
LOCK = threading.Lock()
SHARES = (0.001, 0.01, 0.1, 0.5, 1.0)


def spread(count: int, seed: int = 1) -> np.ndarray:
    """Unit vectors that spread along some axes more than along others, as those of a model do."""
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((count, DIMENSION), dtype=np.float32) / (1.0 + np.arange(DIMENSION) / 4.0)
    made += np.float32(0.3)
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def row(row_id: int, digest: bytes = bytes(16)) -> Row:
    return Row(row_id, "default", "t", "short", "active", None, None, None, None, digest)


def index_of(made: np.ndarray, **settings: int) -> VectorIndex:
    columns = Columns()
    index = VectorIndex(columns, made.shape[1], SearchSettings(**settings))
    for row_id, vector in enumerate(made, start=1):
        index.put(columns.put(row(row_id)), vector)
    return index


def masks(top: int) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    scattered = [rng.random(top) < share for share in SHARES]
    together = [np.arange(top) < max(1, int(share * top)) for share in SHARES]
    return scattered + together


def recall(index: VectorIndex, top: int) -> float:
    """The least over all masks of what is found of the nearest, the mean of some queries."""
    found = []
    for mask in masks(top):
        shares = []
        for query in spread(30, seed=9):
            slots, cosines = index.search(query, mask, K)
            expected, best = index.nearest(query, mask, K)
            assert len(slots) == len(expected) and mask[slots].all()
            assert (np.diff(cosines) <= 0).all() and (len(best) == 0 or cosines[0] <= best[0] + 1e-6)
            shares.append(len(set(slots.tolist()) & set(expected.tolist())) / max(1, len(expected)))
        found.append(float(np.mean(shares)))
    return min(found)


def test_few_are_compared_one_by_one() -> None:
    made = spread(2000)
    index = index_of(made, exact_max=4000)
    query = spread(1, seed=3)[0]
    slots, cosines = index.search(query, np.ones(2000, np.bool_), K)
    assert slots.tolist() == np.argsort(-(made @ query))[:K].tolist()
    assert np.allclose(cosines, (made @ query)[slots], atol=1e-6)
    assert not index.improve(LOCK), "there is nothing to make for so few"


def test_short_forms_find_nearly_all_at_every_selectivity() -> None:
    index = index_of(spread(12_000), exact_max=100)
    assert index.improve(LOCK) and "Sketch" in repr(index)
    assert recall(index, 12_000) >= 0.98
    assert not index.improve(LOCK)


@pytest.mark.parametrize("lacking", [0, 1])
def test_without_a_margin_too_little_is_found(lacking: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above, for the heads and for the whole short forms."""
    monkeypatch.setattr(narrowing, "FIRST", 1)
    monkeypatch.setattr(narrowing, "_SECOND", 1)
    index = index_of(spread(12_000), exact_max=100)
    index.improve(LOCK)
    assert index._sketch is not None
    spreads = list(index._sketch.axes.spreads)
    spreads[lacking] = -5.0
    object.__setattr__(index._sketch.axes, "spreads", tuple(spreads))
    assert recall(index, 12_000) < 0.98


def test_vectors_without_main_axes_have_no_short_form() -> None:
    rng = np.random.default_rng(2)
    made = rng.standard_normal((3000, 64), dtype=np.float32)
    assert fit(made / np.linalg.norm(made, axis=1, keepdims=True)) is None
    index = index_of(made, exact_max=100)
    assert index.improve(LOCK) and not index.improve(LOCK)
    query = made[5] / np.linalg.norm(made[5])
    mask = np.ones(3000, np.bool_)
    assert index.search(query, mask, 5)[0].tolist() == index.nearest(query, mask, 5)[0].tolist()


def test_changes_after_the_axes_were_found_count() -> None:
    made = spread(3000)
    index = index_of(made, exact_max=100)
    index.improve(LOCK)
    fresh = spread(3, seed=77)
    index.put(7, fresh[0])
    index.put(index._columns.put(row(5000)), fresh[1])
    index.drop(11)
    mask = np.ones(3001, np.bool_)
    assert index.search(fresh[0], mask, 1)[0].tolist() == [7]
    assert index.search(fresh[1], mask, 1)[0].tolist() == [3000]
    assert 11 not in index.search(made[11], mask, 50)[0]
    assert np.isnan(index.similarities(fresh[0], np.array([11]))).all() and index.count == 3000


def test_what_is_written_while_axes_are_found_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(spread(3000), exact_max=100)
    fresh = spread(1, seed=77)[0]

    def write_meanwhile(sample: np.ndarray) -> sketch.Axes | None:
        index.put(7, fresh)
        return fit(sample)

    monkeypatch.setattr(vectors, "fit", write_meanwhile)
    original = sketch.Sketch.put_each

    def then_again(self: sketch.Sketch, slots: np.ndarray, matrix: Blocks) -> None:
        original(self, slots, matrix)
        if len(slots) > 1:
            index.put(8, -fresh)

    monkeypatch.setattr(sketch.Sketch, "put_each", then_again)
    index.improve(LOCK)
    mask = np.ones(3000, np.bool_)
    assert index.search(fresh, mask, 1)[0].tolist() == [7]
    assert index.search(-fresh, mask, 1)[0].tolist() == [8]


def test_a_graph_is_built_in_parts_and_loses_nothing_meanwhile() -> None:
    index = index_of(spread(3000), exact_max=100, graph_from=2000, hnsw_ef_construction=60)
    query, mask = spread(1, seed=3)[0], np.ones(3000, np.bool_)
    steps = 0
    while index.improve(LOCK):
        steps += 1
        found = set(index.search(query, mask, K)[0].tolist())
        assert len(found & set(index.nearest(query, mask, K)[0].tolist())) >= 0.9 * K
    assert steps > 10 and index.graph.count == 3000
    assert recall(index, 3000) >= 0.98
    for vector in spread(900, seed=8):
        index.put(index._columns.put(row(10_000 + index.count)), vector)
    assert index.graph.count == 3000 and recall(index, 3900) >= 0.98, "the rest is compared beside it"


def test_few_beside_a_graph_are_those_that_the_mask_allows() -> None:
    index = index_of(spread(3000), exact_max=100, graph_from=2000, hnsw_ef_construction=60)
    while index.improve(LOCK):
        pass
    later = spread(300, seed=5)
    for row_id, vector in enumerate(later, start=3001):
        index.put(index._columns.put(row(row_id)), vector)
    mask = np.arange(3300) < 3000
    mask[3000::15] = True
    assert index.graph.count == 3000
    for query in later[:40]:
        slots, _ = index.search(query, mask, K)
        assert mask[slots].all() and len(set(slots.tolist())) == K


def test_what_is_gone_from_a_graph_is_not_found_and_much_gone_gives_it_up() -> None:
    made = spread(1000)
    index = index_of(made, exact_max=100, graph_from=500, hnsw_ef_construction=60)
    while index.improve(LOCK):
        pass
    mask = np.ones(1000, np.bool_)
    index.drop(3)
    index.put(4, -made[4])
    assert index.graph.count == 998
    assert 3 not in index.search(made[3], mask, 30)[0]
    assert index.search(-made[4], mask, 1)[0].tolist() == [4]
    for slot in range(300, 600):
        index.drop(slot)
    assert index.graph.parts == [] and not set(range(300, 600)) & set(index.search(made[301], mask, 50)[0].tolist())
    while index.improve(LOCK):
        pass
    assert index.graph.count == index.count == 699


def test_what_goes_while_a_part_is_built_is_not_in_it() -> None:
    made = spread(1000)
    index = index_of(made, exact_max=100, graph_from=500, hnsw_ef_construction=60)
    index.improve(LOCK)
    index.improve(LOCK)
    index.drop(3)  # in already
    index.put(990, -made[990])  # still to come
    while index.improve(LOCK):
        pass
    mask = np.ones(1000, np.bool_)
    assert index.graph.count == 998 and 3 not in index.search(made[3], mask, 30)[0]
    assert index.search(-made[990], mask, 1)[0].tolist() == [990]


def test_the_highest_are_all_there() -> None:
    rng = np.random.default_rng(1)
    for count in (1, 100, 30_000, 200_000):
        scores = rng.standard_normal(count).astype(np.float32)
        scores[rng.random(count) < 0.5] = -np.inf
        for wanted in (1, 50, 400):
            places = highest(scores, wanted)
            assert len(places) >= min(wanted, count) and (np.diff(places) > 0).all()
            best = np.sort(scores)[::-1][: min(wanted, count)]
            assert np.array_equal(np.sort(scores[places])[::-1][: len(best)], best)


@pytest.mark.parametrize("by_axis", [False, True])
def test_blocks_hold_rows_across_their_borders(by_axis: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from memory_system.search import blocks

    monkeypatch.setattr(blocks, "_ROWS", 8)
    rows = np.random.default_rng(1).standard_normal((50, 5)).astype(np.float32)
    held = Blocks(5, by_axis)
    held.put_each(np.arange(40), rows[:40])
    for slot in range(40, 50):
        held.put(slot, rows[slot])
    held.put_each(np.array([3, 9, 30]), rows[[4, 10, 31]])
    expected = rows.copy()
    expected[[3, 9, 30]] = rows[[4, 10, 31]]
    chosen = np.array([0, 3, 7, 8, 9, 30, 49])
    assert np.array_equal(held.rows(chosen), expected[chosen]) and np.array_equal(held.row(9), expected[9])
    query = rows[0]
    for first, end in ((0, 50), (5, 6), (7, 25), (16, 24), (44, 60)):
        known = expected[first : min(end, 50)] @ query
        assert np.allclose(held.products(query, first, end)[: len(known)], known, atol=1e-5)
    assert np.allclose(held.products_of(query, chosen), expected[chosen] @ query, atol=1e-5)
    assert held.rows(np.zeros(0, np.int64)).shape == (0, 5)


def test_a_bulk_load_takes_what_is_a_vector_of_its_row() -> None:
    columns = Columns()
    index = VectorIndex(columns, 4, SearchSettings())
    for row_id in range(1, 7):
        columns.put(row(row_id))
    vectors = np.zeros((6, 4), np.float32)
    vectors[[0, 3, 4, 5]] = [3.0, 4.0, 0.0, 0.0]
    vectors[1] = np.nan
    digests = columns.digests[:6].copy()
    digests[3] = np.void(bytes(range(16)))
    row_ids = np.array([1, 2, 3, 4, 6, 9])
    digests[4] = digests[5] = columns.digests[5]
    index.extend(units(Embedded(row_ids[:2], digests[:2], vectors[:2])))
    index.extend(units(Embedded(row_ids[2:], digests[2:], vectors[2:])))
    columns.settle()
    assert columns.has_vector[:6].tolist() == [True, False, False, False, False, True] and index.count == 2
    vector = index.vector(0)
    assert vector is not None and np.allclose(vector, [0.6, 0.8, 0.0, 0.0])
    assert columns.pending("default") == 4 and columns.mask(Scope("default", 0.0)) is not None


def test_vectors_of_an_empty_store_are_of_no_row() -> None:
    index = VectorIndex(Columns(), 4, SearchSettings())
    index.extend(Embedded(np.array([7]), np.zeros(1, "V16"), np.ones((1, 4), np.float32)))
    assert index.count == 0

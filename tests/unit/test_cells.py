"""Searches that read some cells only, against a comparison of everything."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from memory_system.search import arranging, narrowing, vectors
from memory_system.search.arranging import Arranging
from memory_system.search.cells import runs
from memory_system.search.columns import Columns
from memory_system.search.order import NONE, Order
from memory_system.search.rows import Row
from memory_system.search.vectors import VectorIndex
from memory_system.settings import SearchSettings

DIMENSION = 96
COUNT = 12_000
K = 20
LOCK = threading.Lock()
SHARES = (0.02, 0.1, 0.4, 0.6, 1.0)


@pytest.fixture(autouse=True, scope="module")
def few_are_enough_for_cells() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1, "blas"):
        patch.setattr(vectors, "_CELLS_FROM", 1000)
        patch.setattr(narrowing, "FIRST", 2)
        yield


@pytest.fixture(scope="module")
def many(few_are_enough_for_cells: None) -> VectorIndex:
    """All in cells. Not to be written to."""
    return index_of(clustered(COUNT))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many heads each step of a search has read."""
    counts: list[int] = []
    original = narrowing.Narrowing.go_on

    def counted(self: narrowing.Narrowing, part: narrowing.Read) -> None:
        counts.append(len(part.about))
        original(self, part)

    monkeypatch.setattr(narrowing.Narrowing, "go_on", counted)
    yield counts


def clustered(count: int, seed: int = 1) -> np.ndarray:
    """Unit vectors around 60 points, along some axes more than along others."""
    points = np.random.default_rng(5).standard_normal((60, DIMENSION)) * 0.7
    rng = np.random.default_rng(seed)
    made = points[rng.integers(0, len(points), count)] + rng.standard_normal((count, DIMENSION))
    made = made / (1.0 + np.arange(DIMENSION) / 4.0) + 0.2
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def put(index: VectorIndex, row_id: int, vector: np.ndarray) -> int:
    row = Row(row_id, "default", "t", "short", "active", None, None, None, None, bytes(16))
    slot = index._columns.put(row)
    index.put(slot, vector)
    return slot


def remove(index: VectorIndex, row_id: int) -> None:
    slot = index._columns.slot(row_id)
    assert slot is not None
    index.drop(slot)
    index._columns.remove(row_id)


def index_of(made: np.ndarray, in_cells: bool = True) -> VectorIndex:
    index = VectorIndex(Columns(), made.shape[1], SearchSettings(exact_max=50))
    for row_id, vector in enumerate(made, start=1):
        put(index, row_id, vector)
    while in_cells and index.improve(LOCK):
        pass
    return index


def order_of(index: VectorIndex) -> Order:
    assert index._sketch is not None and index._sketch.order is not None
    return index._sketch.order


def found_share(index: VectorIndex, query: np.ndarray, mask: np.ndarray) -> float:
    """The share that is found of the nearest. What is found is allowed, in order, and has its own cosines."""
    slots, cosines = index.search(query, mask, K)
    expected, _ = index.nearest(query, mask, K)
    assert len(slots) == len(expected) == len(set(slots.tolist())) and mask[slots].all()
    assert (np.diff(cosines) <= 0.0).all()
    assert np.allclose(cosines[np.argsort(slots)], index.similarities(query, np.sort(slots)), atol=1e-6)
    return len(set(slots.tolist()) & set(expected.tolist())) / max(1, len(expected))


def recall(index: VectorIndex, mask: np.ndarray, queries: np.ndarray) -> float:
    return float(np.mean([found_share(index, query, mask) for query in queries]))


def masks(top: int) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [rng.random(top) < share for share in SHARES] + [np.arange(top) < share * top for share in SHARES]


def test_some_cells_hold_nearly_all_whatever_a_filter_lets_pass(many: VectorIndex, read: list[int]) -> None:
    assert order_of(many).count > 50 and order_of(many).loose == 0 and not many.improving
    for mask in masks(COUNT):
        read.clear()
        assert recall(many, mask, clustered(30, seed=9)) >= 0.98
        assert sum(read) <= 0.6 * 30 * np.count_nonzero(mask), "most of it need not be read"


def test_with_too_few_cells_too_little_is_found(many: VectorIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    assert many._cells is not None
    monkeypatch.setattr(many, "_cells", replace(many._cells, left=0.9))
    assert recall(many, np.ones(COUNT, np.bool_), clustered(30, seed=9)) < 0.98


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_a_filter_may_let_pass_what_is_far_away_only(many: VectorIndex, share: float) -> None:
    made = clustered(COUNT)
    parts = (made @ made[::200].T).argmax(axis=1)
    shares = []
    for query in clustered(30, seed=9):
        far = np.argsort(made[::200] @ query)[: int(share * COUNT / 200)]
        shares.append(found_share(many, query, np.isin(parts, far)))
    assert float(np.mean(shares)) >= 0.98


def test_next_to_nothing_may_be_allowed_where_the_nearest_are(many: VectorIndex) -> None:
    made = clustered(COUNT)
    query = clustered(1, seed=9)[0]
    mask = np.zeros(COUNT, np.bool_)
    mask[np.argsort(made @ query)[: int(0.7 * COUNT)]] = True
    assert found_share(many, query, mask) >= 0.9


def test_what_is_written_after_the_cells_were_made_counts_at_once() -> None:
    made = clustered(3000)
    index = index_of(made)
    order, fresh = order_of(index), clustered(4, seed=77)
    index.put(7, fresh[0])
    new = put(index, 5000, fresh[1])
    index.drop(11)
    mask = np.ones(3001, np.bool_)
    assert order.loose == 2 and order.top == 3002
    assert index.search(fresh[0], mask, 1)[0].tolist() == [7] and index.search(made[7], mask, 1)[1][0] < 0.999
    assert index.search(fresh[1], mask, 1)[0].tolist() == [new]
    assert 11 not in index.search(made[11], mask, 50)[0]
    index.put(7, fresh[2])
    assert order.loose == 2, "what is behind the cells is written over"
    assert index.search(fresh[2], mask, 1)[0].tolist() == [7] and index.search(fresh[0], mask, 1)[1][0] < 0.999
    remove(index, 21)
    assert put(index, 5001, fresh[3]) == 20, "the slot is used again"
    assert index.search(fresh[3], mask, 1)[0].tolist() == [20] and index.search(made[20], mask, 1)[1][0] < 0.999
    narrow = np.zeros(3001, np.bool_)
    narrow[[7, 11, 20, new, *range(100, 700)]] = True
    assert index.search(fresh[3], narrow, 1)[0].tolist() == [20]
    assert index.search(fresh[1], narrow, 1)[0].tolist() == [new] and recall(index, mask, clustered(20, seed=3)) >= 0.98


def test_cells_are_made_anew_when_much_is_behind_them() -> None:
    index = index_of(clustered(3000))
    before = order_of(index)
    for row_id, vector in enumerate(clustered(420, seed=2), start=10_000):
        put(index, row_id, vector)
    assert not index.improving and not index.improve(LOCK)
    for row_id, vector in enumerate(clustered(20, seed=3), start=20_000):
        put(index, row_id, vector)
    assert index.improving
    while index.improve(LOCK):
        pass
    assert before.loose == 440 and order_of(index).loose == 0 and order_of(index).top == 3440
    assert recall(index, np.ones(3440, np.bool_), clustered(30, seed=9)) >= 0.98


def test_what_is_written_while_cells_are_made_is_in_them_or_behind_them() -> None:
    made, later = clustered(3000), clustered(2000, seed=6)
    index = index_of(made, in_cells=False)
    assert index.improve(LOCK), "the short forms"
    steps, gone, changed = 0, [], []
    while index.improve(LOCK):
        for at in range(40 * steps, 40 * steps + 40):
            index.put(at, later[at])
            changed.append(at)
        remove(index, 2900 + steps)
        gone.append(2899 + steps)
        steps += 1
        mask = np.ones(3000, np.bool_)
        assert index.search(later[changed[-1]], mask, 1)[0].tolist() == [changed[-1]]
        assert gone[-1] not in index.search(made[gone[-1]], mask, 50)[0]
    assert steps >= 5 and order_of(index).loose >= 40 * (steps - 2)
    for at in changed[::10]:
        assert index.search(later[at], mask, 1)[0].tolist() == [at]
        assert index.search(made[at], mask, 1)[1][0] < 0.999, "the one before is not there any more"
    assert not set(gone) & set(index.search(made[gone[0]], mask, 100)[0].tolist())
    assert recall(index, mask, clustered(30, seed=9)) >= 0.98


def test_vectors_that_have_all_gone_want_no_cells() -> None:
    index = index_of(clustered(1500), in_cells=False)
    assert index.improve(LOCK) and index.improving
    index._columns.drop_vectors()
    assert index.improve(LOCK) and index.improve(LOCK)
    assert len(index.search(clustered(1)[0], np.ones(1500, np.bool_), K)[0]) == 0


def test_vectors_that_have_all_gone_want_no_axes() -> None:
    index = index_of(clustered(1500), in_cells=False)
    index._columns.drop_vectors()
    assert index.improve(LOCK) and index.improve(LOCK)
    assert len(index.search(clustered(1)[0], np.ones(1500, np.bool_), K)[0]) == 0


def test_cells_that_cannot_be_made_are_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(*_: object) -> float:
        raise MemoryError

    monkeypatch.setattr(arranging, "left_out", without_memory)
    made = clustered(3000)
    index = index_of(made)
    mask = np.ones(3000, np.bool_)
    assert index._cells is None and not index.improving and recall(index, mask, clustered(30, seed=9)) >= 0.98
    index.put(7, -made[7])
    assert index.search(-made[7], mask, 1)[0].tolist() == [7], "writes count as before"
    monkeypatch.undo()
    monkeypatch.setattr(vectors, "_CELLS_FROM", 1000)
    assert not index.improve(LOCK)
    now_s = time.monotonic() + vectors._AGAIN_S
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    while index.improve(LOCK):
        pass
    assert order_of(index).top == 3000 and index._cells is not None


def test_what_cells_are_made_of_is_let_go_with_them() -> None:
    index = index_of(clustered(1500), in_cells=False)
    assert index.improve(LOCK) and index._sketch is not None
    gc.disable()
    try:
        making = Arranging(index._sketch.axes, index._matrix, np.arange(1500))
        assert making.step() and making.step()
        gone = weakref.ref(making)
        holders = sys.getrefcount(index._matrix)
        del making
        left = sys.getrefcount(index._matrix)
    finally:
        gc.enable()
    assert gone() is None and left < holders


def test_searches_and_writes_go_on_beside_the_making() -> None:
    made, later = clustered(COUNT), clustered(4000, seed=6)
    index = index_of(made, in_cells=False)

    def improve() -> None:
        for _ in range(3000):
            index.improve(LOCK)

    written = 0
    with ThreadPoolExecutor(1) as beside:
        improving = beside.submit(improve)
        while not improving.done() and written < len(later):
            with LOCK:
                slot = put(index, 100_000 + written, later[written])
                mask = np.ones(index._columns.top, np.bool_)
                assert index.search(later[written], mask, 1)[0].tolist() == [slot]
                if written % 3 == 0:
                    remove(index, written + 1)
                    assert written not in index.search(made[written], mask, 5)[0]
            written += 1
        improving.result()
    assert order_of(index).count > 50 and written > 100
    while index.improve(LOCK):
        pass
    top = index._columns.top
    assert index.count == COUNT + written - len(range(0, written, 3))
    assert recall(index, np.ones(top, np.bool_), clustered(30, seed=9)) >= 0.98


def test_copies_of_few_vectors_can_stand_in_cells() -> None:
    made = np.repeat(clustered(400), 10, axis=0)
    index = index_of(made)
    mask = np.ones(4000, np.bool_)
    for query in clustered(10, seed=9):
        found, best = index.search(query, mask, K)[1], index.nearest(query, mask, K)[1]
        assert np.allclose(found, best, atol=1e-3)


def test_places_of_slots_and_slots_of_places() -> None:
    order = Order(np.array([2, 3, 5, 9]), np.array([1, 0, 1, 1], np.uint16), 3)
    assert order.bounds.tolist() == [0, 1, 4, 4] and order.slots(np.arange(4)).tolist() == [3, 2, 5, 9]
    assert order.places(np.array([2, 3, 9])).tolist() == [0, 1, 3]
    assert order.cells(np.array([2, 3])).tolist() == [1, 0]
    assert (order.put(5), order.put(30), order.put(5)) == (4, 5, 4) and order.loose == 2
    assert order.slots(np.arange(6)).tolist() == [3, 2, NONE, 9, 5, 30]
    assert order.places(np.array([5, 30])).tolist() == [4, 5] and order.cells(np.array([5, 30])).tolist() == [3, 3]


def test_cells_that_stand_together_are_read_together() -> None:
    bounds = np.array([0, 4, 4, 9, 12])
    firsts, ends = runs(bounds, np.array([True, False, True, True]))
    assert firsts.tolist() == [0, 4] and ends.tolist() == [4, 12]
    assert [part.tolist() for part in runs(bounds, np.zeros(4, np.bool_))] == [[], []]

"""The vector side: a matrix of unit vectors by slot, and an hnswlib graph over it once it is large.

An exact scan answers whenever the vectors are few, the allowed set is small or selective, or the graph is busy with
additions. Rows that the graph does not hold yet are scanned and merged, so an unfinished graph loses nothing.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from memory_system.search.columns import Columns, Ids, Mask
from memory_system.settings import SearchSettings

Vectors = npt.NDArray[np.float32]

# Below this share of allowed rows a graph would mostly return rows that are to be dropped.
GRAPH_MIN_SHARE: Final = 0.1
# Additions between two chances for a search: about 10 ms.
GRAPH_BATCH: Final = 16
_GRAPH_WAIT_S: Final = 0.003
_START: Final = 1024


def new_graph(settings: SearchSettings, dimension: int, capacity: int) -> Any:
    """An empty hnswlib index for inner products of unit vectors."""
    graph = empty_graph(dimension)
    graph.init_index(capacity, M=settings.hnsw_m, ef_construction=settings.hnsw_ef_construction, random_seed=100)
    return graph


def empty_graph(dimension: int) -> Any:
    """An hnswlib index that is neither initialised nor loaded."""
    import hnswlib  # here, because it is slow to import and small stores never need it

    graph = hnswlib.Index(space="ip", dim=dimension)
    graph.set_num_threads(1)
    return graph


def unit(vector: npt.ArrayLike) -> Vectors | None:
    """The vector as float32 of length 1, or None if it is not finite or has no direction."""
    array = np.asarray(vector, np.float32)
    norm = float(np.linalg.norm(array))
    return array / np.float32(norm) if np.isfinite(norm) and norm > 0.0 else None


def best(scores: npt.NDArray[Any], row_ids: Ids, k: int) -> Ids:
    """Positions of the k highest scores, best first; equal scores in the order of their row ids."""
    if k < len(scores):
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        chosen = np.flatnonzero(scores >= threshold)
    else:
        chosen = np.arange(len(scores))
    order: Ids = chosen[np.lexsort((row_ids[chosen], -scores[chosen]))][:k]
    return order


class VectorIndex:
    """Vectors of one model. The owner's lock guards everything but the graph, which has a lock of its own."""

    def __init__(self, columns: Columns, dimension: int, settings: SearchSettings) -> None:
        self.dimension = dimension
        self._columns = columns
        self._settings = settings
        self._matrix: Vectors = np.zeros((_START, dimension), np.float32)
        self.in_graph: Mask = np.zeros(_START, np.bool_)
        self.graph: Any = None
        self.graph_lock = threading.Lock()
        self._dead = 0
        self.graph_changes = 0

    def __repr__(self) -> str:
        state = "no graph" if self.graph is None else f"graph of {int(self.in_graph.sum())}"
        return f"<VectorIndex vectors={self.count} dimension={self.dimension} {state}>"

    @property
    def count(self) -> int:
        """How many rows have a vector."""
        return int(np.count_nonzero(self._columns.has_vector[: self._columns.top]))

    @property
    def wants_graph(self) -> bool:
        return self.count > self._settings.exact_max

    def put(self, slot: int, vector: npt.NDArray[np.float32]) -> bool:
        """Store a slot's vector; False if it is no vector of this index (then the slot has none)."""
        ready = unit(vector) if vector.shape == (self.dimension,) else None
        if ready is None:
            self.drop(slot, int(self._columns.row_ids[slot]))
            return False
        self._reserve(slot)
        if self._columns.has_vector[slot] and np.array_equal(self._matrix[slot], ready):
            return True
        self._unlink(slot, int(self._columns.row_ids[slot]))
        self._matrix[slot] = ready
        self._columns.has_vector[slot] = True
        return True

    def drop(self, slot: int, row_id: int) -> None:
        """Take away a slot's vector. To be called before the slot is given to another row."""
        self._unlink(slot, row_id)
        self._columns.has_vector[slot] = False

    def vector(self, slot: int) -> Vectors | None:
        return self._matrix[slot].copy() if self._columns.has_vector[slot] else None

    def similarities(self, query: Vectors, slots: Ids) -> npt.NDArray[np.float32]:
        """Cosines of the query with the vectors of `slots`, NaN where there is none."""
        found = np.full(len(slots), np.nan, np.float32)
        held = self._columns.has_vector[slots]
        found[held] = self._matrix[slots[held]] @ query
        return found

    def search(self, query: Vectors, mask: Mask, k: int) -> tuple[Ids, npt.NDArray[np.float32]]:
        """Slots and cosines of the k allowed vectors nearest to the unit vector `query`, best first."""
        allowed = mask & self._columns.has_vector[: len(mask)]
        count = int(np.count_nonzero(allowed))
        if count == 0 or k <= 0:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        slots = None
        if self.graph is not None and count > max(self._settings.exact_max, GRAPH_MIN_SHARE * self.count):
            slots = self._by_graph(query, allowed, k)
        if slots is None:
            return self._scan(query, allowed, count, k)
        scores = self._matrix[slots] @ query
        order = best(scores, self._columns.row_ids[slots], k)
        return slots[order], scores[order]

    def _scan(self, query: Vectors, allowed: Mask, count: int, k: int) -> tuple[Ids, npt.NDArray[np.float32]]:
        slots = np.flatnonzero(allowed)
        # Copying rows together costs more than multiplying some for nothing.
        dense = count * 3 > len(allowed)
        scores = (self._matrix[: len(allowed)] @ query)[slots] if dense else self._matrix[slots] @ query
        order = best(scores, self._columns.row_ids[slots], k)
        return slots[order], scores[order]

    def _by_graph(self, query: Vectors, allowed: Mask, k: int) -> Ids | None:
        """Candidate slots: the graph's and all that are not in it; None when the exact scan has to answer."""
        linked = allowed & self._linked(len(allowed))
        reachable = int(np.count_nonzero(linked))
        rest = np.flatnonzero(allowed & ~linked)
        if reachable < len(rest) or not self.graph_lock.acquire(timeout=_GRAPH_WAIT_S):
            return None
        try:
            labels = self._ask_graph(query, k, reachable)
        finally:
            self.graph_lock.release()
        if labels is None:
            return None
        slots = self._columns.slots(labels)
        slots = slots[slots < len(linked)]
        slots = slots[linked[slots]]
        return np.concatenate([slots, rest]) if len(slots) >= min(k, reachable) else None

    def _ask_graph(self, query: Vectors, k: int, reachable: int) -> list[int] | None:
        if self.graph is None:
            return None
        total = int(np.count_nonzero(self.in_graph))
        ask = min(total, int(1.2 * k * total / max(1, reachable)) + 10)
        self.graph.set_ef(max(self._settings.hnsw_ef, ask))
        try:
            labels, _ = self.graph.knn_query(query, k=ask, num_threads=1)
        except RuntimeError:  # fewer than `ask` could be reached
            return None
        found: list[int] = labels[0].tolist()
        return found

    def _linked(self, length: int) -> Mask:
        linked = np.zeros(length, np.bool_)
        known = min(length, len(self.in_graph))
        linked[:known] = self.in_graph[:known]
        return linked

    def unlinked(self, limit: int) -> tuple[Ids, Vectors]:
        """Slots and vectors of up to `limit` rows that the graph lacks."""
        top = self._columns.top
        slots = np.flatnonzero(self._columns.has_vector[:top] & ~self._linked(top))[:limit]
        return slots, self._matrix[slots]

    def link(self, slots: Ids, vectors: Vectors) -> None:
        """Add vectors to the graph. Takes milliseconds and needs only the graph's lock; `in_graph` is set later."""
        if self.graph is None:
            self.graph = new_graph(self._settings, self.dimension, max(_START, 2 * self.count))
        needed = self.graph.get_current_count() + len(slots)
        if needed > self.graph.get_max_elements():
            self.graph.resize_index(2 * needed)
        self.graph.add_items(vectors, self._columns.row_ids[slots], num_threads=1)
        self.graph_changes += len(slots)

    def adopt_graph(self, graph: Any, live_slots: Ids, dead_row_ids: list[int]) -> None:
        """Take over a loaded graph: `live_slots` are right in it, `dead_row_ids` are to be removed from it."""
        self.graph = graph
        self.in_graph[live_slots] = True
        for row_id in dead_row_ids:
            self._bury(row_id)
        self.graph_changes += len(dead_row_ids)

    def discard_graph(self) -> None:
        self.graph = None
        self.in_graph[:] = False
        self._dead = 0

    def _unlink(self, slot: int, row_id: int) -> None:
        if slot < len(self.in_graph) and self.in_graph[slot]:
            self.in_graph[slot] = False
            with self.graph_lock:
                self._bury(row_id)
            self.graph_changes += 1

    def _bury(self, row_id: int) -> None:
        if self.graph is None:
            return
        try:
            self.graph.mark_deleted(row_id)
        except RuntimeError:  # already marked; a label outside the graph cannot reach this
            return
        self._dead += 1
        if self._dead > max(_START, self.count):
            self.discard_graph()  # more dead than alive: searches would wade through them

    def _reserve(self, slot: int) -> None:
        if slot >= len(self._matrix):
            size = max(slot + 1, 2 * len(self._matrix))
            matrix = np.zeros((size, self.dimension), np.float32)
            matrix[: len(self._matrix)] = self._matrix
            linked = np.zeros(size, np.bool_)
            linked[: len(self.in_graph)] = self.in_graph
            self._matrix, self.in_graph = matrix, linked

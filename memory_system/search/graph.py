"""Graphs (hnswlib) over the short forms of very many vectors, for searches that hardly filter.

Rows are taken in part by part. A part is built aside and searched once it is whole; nothing is ever added to it. So it
needs no lock, is saved once, and what a save holds up the interpreter for is one part. What is gone is forgotten by its
place in the part; a part with much gone is given up, and its rows wait for another one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from memory_system.search.blocks import Blocks, Floats
from memory_system.search.columns import Columns, Ids, Mask
from memory_system.settings import SearchSettings

# Rows of a part: fewer, and a search has to look into many; more, and saving one holds up everything for long.
MAX_PART: Final = 1 << 16
# Added at a time, before whatever else is to be done gets its turn.
_STEP: Final = 256
_GONE_SHARE: Final = 0.2
# Neighbours asked for, of all parts together, for each one that is wanted: graphs and short forms err. Measured.
_ASK: Final = 60
_ASK_LEAST: Final = 20
_NONE: Final = -1


def empty_graph(length: int) -> Any:
    """An hnswlib index for inner products that is neither initialised nor loaded."""
    import hnswlib  # here, because it is slow to import and most stores never need it

    graph = hnswlib.Index(space="ip", dim=length)
    graph.set_num_threads(1)
    return graph


@dataclass(slots=True, eq=False)
class Part:
    """`slots`, `row_ids`, `digests`: of each vector, by its label in the graph; slot -1 once it is gone."""

    graph: Any
    slots: npt.NDArray[np.int32]
    row_ids: Ids
    digests: npt.NDArray[np.void]
    gone: int = 0
    file: str | None = None  # its name on disk

    def __len__(self) -> int:
        return len(self.slots)


class Graph:
    """Parts of at least `least` rows, and which slot is where. The owner's lock guards everything but what `grow` says
    of itself."""

    def __init__(self, settings: SearchSettings) -> None:
        self._settings = settings
        self.least = min(MAX_PART, max(1, settings.graph_from // 2))  # rows of a part
        self.axes: Floats | None = None  # [dimension, length]
        self.parts: list[Part] = []
        self.changed = False  # since it was saved
        self._building: Part | None = None
        self._held: Mask = np.zeros(0, np.bool_)
        self._of: npt.NDArray[np.int32] = np.zeros(0, np.int32)  # the slot's label, in the part that has it

    def __repr__(self) -> str:
        return f"<Graph vectors={self.count} parts={len(self.parts)}>"

    @property
    def count(self) -> int:
        """How many rows it holds."""
        return sum(len(part) - part.gone for part in self.parts)

    def held(self, top: int) -> Mask:
        """Which slots up to `top` it holds."""
        held = np.zeros(top, np.bool_)
        known = min(top, len(self._held))
        held[:known] = self._held[:known]
        return held

    def search(self, query: Floats, wanted: float) -> Ids:
        """Slots of about `_ASK * wanted` rows that are near to the query, in any order."""
        assert self.axes is not None
        form = query @ self.axes
        found = []
        for part in self.parts:
            ask = min(len(part), int(_ASK * wanted * len(part) / max(1, self.count)) + _ASK_LEAST)
            part.graph.set_ef(max(self._settings.hnsw_ef, ask))
            labels, _ = part.graph.knn_query(form, k=ask, num_threads=1)
            found.append(part.slots[labels[0].astype(np.int64)])
        slots: Ids = np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)
        return np.extract(slots != _NONE, slots)

    def remove(self, slot: int) -> None:
        """Forget a slot's vector, if it is here."""
        if slot >= len(self._of) or self._of[slot] == _NONE:
            return
        label = int(self._of[slot])
        part = next(part for part in self._all() if label < len(part) and part.slots[label] == slot)
        part.slots[label] = self._of[slot] = _NONE
        self._held[slot] = False
        part.gone += 1
        if part.gone > _GONE_SHARE * len(part) and part in self.parts:
            self._give_up(part)

    def adopt(self, axes: Floats, parts: list[Part]) -> None:
        """Take over loaded parts, whose slots are right or -1."""
        self.axes = axes
        for part in parts:
            part.gone = int(np.count_nonzero(part.slots == _NONE))
            if part.gone <= _GONE_SHARE * len(part):
                self._register(part)
                self._publish(part)
        self.changed = len(self.parts) != len(parts)

    def grow(self, lock: AbstractContextManager[object], columns: Columns, matrix: Blocks, axes: Floats | None) -> bool:
        """Take some rows in, and whether there were enough to begin; called without the owner's lock, by one thread.
        `axes`: for the first part; the others have the same. None: the vectors are taken as they are."""
        part = self._building
        if part is None:
            with lock:
                if self.axes is None:
                    self.axes = np.eye(matrix.width, dtype=np.float32) if axes is None else axes
                part = self._building = self._begin(columns, self.axes.shape[1])
            if part is None:
                return False
        assert self.axes is not None
        start = part.graph.get_current_count()
        labels = np.arange(start, min(len(part), start + _STEP))
        slots = np.maximum(part.slots[labels], 0).astype(np.int64)  # what is gone is put in as anything else
        order = np.argsort(slots)
        part.graph.add_items(matrix.rows(slots[order]) @ self.axes, labels[order], num_threads=1)
        if start + len(labels) == len(part):
            with lock:
                self._building = None
                self._publish(part)
                self.changed = True
        return True

    def _begin(self, columns: Columns, length: int) -> Part | None:
        top = columns.top
        slots = np.flatnonzero(columns.has_vector[:top] & ~self.held(top))[:MAX_PART]
        if len(slots) < self.least:
            return None
        graph = empty_graph(length)
        construction = self._settings.hnsw_ef_construction
        graph.init_index(len(slots), M=self._settings.hnsw_m, ef_construction=construction, random_seed=100)
        part = Part(graph, slots.astype(np.int32), columns.row_ids[slots], columns.digests[slots])
        self._register(part)
        return part

    def _register(self, part: Part) -> None:
        """Note where each slot of a part is."""
        labels = np.flatnonzero(part.slots != _NONE)
        slots = part.slots[labels]
        lack = int(slots.max(initial=-1)) + 1 - len(self._of)
        if lack > 0:
            more = max(lack, len(self._of))
            self._of = np.concatenate([self._of, np.full(more, _NONE, np.int32)])
            self._held = np.concatenate([self._held, np.zeros(more, np.bool_)])
        self._of[slots] = labels

    def _publish(self, part: Part) -> None:
        self._held[part.slots[part.slots != _NONE]] = True
        self.parts.append(part)

    def _give_up(self, part: Part) -> None:
        slots = part.slots[part.slots != _NONE]
        self._held[slots] = False
        self._of[slots] = _NONE
        self.parts.remove(part)
        self.changed = True

    def _all(self) -> list[Part]:
        return [*self.parts, *([] if self._building is None else [self._building])]

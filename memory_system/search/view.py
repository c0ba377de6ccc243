"""The index as it is searched: columns and vectors that belong together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memory_system.search import feed
from memory_system.search.columns import Columns
from memory_system.search.vectors import VectorIndex


@dataclass(slots=True)
class View:
    """The index as of `seq`. `vectors` is None while the model is not known."""

    columns: Columns
    vectors: VectorIndex | None
    model_id: str | None
    epoch: str
    seq: int


def put(view: View, entry: feed.Entry) -> None:
    row, blob = entry
    slot = view.columns.put(row)
    if view.vectors is None:
        return
    if blob is None or len(blob) != 4 * view.vectors.dimension:
        view.vectors.drop(slot, row.row_id)
    else:
        view.vectors.put(slot, np.frombuffer(blob, "<f4"))


def remove(view: View, row_id: int) -> None:
    slot = view.columns.slot(row_id)
    if slot is not None:
        if view.vectors is not None:
            view.vectors.drop(slot, row_id)
        view.columns.remove(row_id)


def has_vector(view: View, row_id: int) -> bool:
    slot = view.columns.slot(row_id)
    return slot is not None and bool(view.columns.has_vector[slot])

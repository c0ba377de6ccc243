"""The index as it is searched: columns, vectors and words that belong together."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from memory_system.search import feed
from memory_system.search.columns import Columns
from memory_system.search.keywords import WordIndex
from memory_system.search.vectors import VectorIndex


@dataclass(slots=True)
class View:
    """The index as of `seq`. `vectors` is None while the model is not known.

    `lacking`: rows whose words are still to be taken in, the next one last.
    """

    columns: Columns
    vectors: VectorIndex | None
    words: WordIndex
    model_id: str | None
    epoch: str
    seq: int
    lacking: list[int] = field(default_factory=list)


def put(view: View, entry: feed.Entry) -> None:
    """Insert or replace a row. The words of a new content are to be added after it."""
    row, blob = entry
    if not holds(view, row.row_id, row.digest):
        forget_texts(view, row.row_id)
    slot = view.columns.put(row)
    if view.vectors is None:
        return
    if blob is None or len(blob) != 4 * view.vectors.dimension:
        view.vectors.drop(slot)
    else:
        view.vectors.put(slot, np.frombuffer(blob, "<f4"))


def remove(view: View, row_id: int) -> None:
    slot = view.columns.slot(row_id)
    if slot is not None:
        if view.vectors is not None:
            view.vectors.drop(slot)
        view.words.remove(slot)
        view.columns.remove(row_id)


def holds(view: View, row_id: int, digest: bytes) -> bool:
    """Whether the row is known with a content of this digest."""
    slot = view.columns.slot(row_id)
    return slot is not None and view.columns.digests[slot].tobytes() == digest


def forget_texts(view: View, row_id: int) -> None:
    """The words of a row, and the vector."""
    slot = view.columns.slot(row_id)
    if slot is not None:
        view.words.remove(slot)
        if view.vectors is not None:
            view.vectors.drop(slot)


def model_of(view: View) -> tuple[str, int] | None:
    """The model whose vectors these are, and its dimension."""
    return (view.model_id, view.vectors.dimension) if view.vectors and view.model_id else None


def forget_vectors(view: View) -> None:
    """Those of all rows: they are of another model than the one to come."""
    view.vectors = None
    view.columns.drop_vectors()


def has_vector(view: View, row_id: int, digest: bytes | None = None) -> bool:
    """Whether the row's content (of this digest, if given) has a vector."""
    slot = view.columns.slot(row_id)
    if slot is None:
        return False
    present = digest is None or view.columns.digests[slot].tobytes() == digest
    return present and bool(view.columns.has_vector[slot])

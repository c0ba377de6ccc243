"""The vector graph on disk: what is saved of it, and how much of that is still true when it is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memory_system.log import get_logger
from memory_system.search import snapshot
from memory_system.search.vectors import VectorIndex
from memory_system.search.view import View
from memory_system.settings import SearchSettings

log = get_logger(__name__)


def _identity(view: View, vectors: VectorIndex, settings: SearchSettings) -> snapshot.Identity:
    return snapshot.Identity(
        view.epoch, view.model_id or "", vectors.dimension, settings.hnsw_m, settings.hnsw_ef_construction
    )


def restore(folder: Path, view: View, settings: SearchSettings) -> None:
    """Take over the saved graph, row by row as far as it agrees with the database."""
    vectors, columns = view.vectors, view.columns
    if vectors is None or not vectors.wants_graph:
        return
    try:
        graph, rows = snapshot.load(folder, _identity(view, vectors, settings), view.seq)
    except snapshot.SnapshotRefused as refusal:
        log.info("search_snapshot_refused", reason=str(refusal), action="the graph is built anew")
        return
    live, dead = [], []
    for row_id, digest in zip(rows["row_id"].tolist(), rows["digest"], strict=True):
        slot = columns.slot(row_id)
        if slot is not None and columns.has_vector[slot] and columns.digests[slot] == digest:
            live.append(slot)
        else:
            dead.append(row_id)
    vectors.adopt_graph(graph, np.array(live, np.int64), dead)
    log.info("search_snapshot_loaded", rows=len(live), removed=len(dead), missing=vectors.count - len(live))


def save(folder: Path, view: View, settings: SearchSettings) -> bool:
    """Save the graph if it changed since it was saved last; whether it was saved. A failure is logged."""
    vectors, columns = view.vectors, view.columns
    if vectors is None or vectors.graph is None or vectors.graph_changes == 0:
        return False
    slots = np.flatnonzero(vectors.in_graph)
    rows = np.zeros(len(slots), snapshot.ROWS_DTYPE)
    rows["row_id"], rows["digest"] = columns.row_ids[slots], columns.digests[slots]
    try:
        with vectors.graph_lock:
            snapshot.save(folder, vectors.graph, rows, _identity(view, vectors, settings), view.seq)
    except (OSError, RuntimeError) as error:
        log.warning("search_snapshot_failed", reason=str(error))
        return False
    vectors.graph_changes = 0
    log.info("search_snapshot_saved", rows=len(slots), seq=view.seq)
    return True

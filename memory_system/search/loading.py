"""A view of the index made from the database, and from what was kept of an earlier one."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from memory_system.log import get_logger
from memory_system.search import feed, graph_file, word_keeping
from memory_system.search.columns import Columns
from memory_system.search.keywords import WordIndex
from memory_system.search.tokens import Tokenizer
from memory_system.search.vectors import VectorIndex
from memory_system.search.view import View
from memory_system.settings import SearchSettings

log = get_logger(__name__)

_PROGRESS_S: Final = 2.0
# So few texts are taken in before the index is shown; of more, searches see the newest first.
_AT_ONCE: Final = 5_000


class Closing(Exception):
    """The index is being closed while it loads."""


def read(
    conn: sqlite3.Connection,
    settings: SearchSettings,
    tokenizer: Tokenizer,
    model: tuple[str, int] | None,
    is_closing: Callable[[], bool],
) -> View:
    """All rows with their vectors, of one state of the database. `model`: name and dimension. Raises Closing."""
    with_metadata = bool(settings.filterable_metadata)
    with feed.snapshot(conn):
        columns = Columns(settings.filterable_metadata)
        vectors = VectorIndex(columns, model[1], settings) if model else None
        model_id = model[0] if model else None
        view = View(columns, vectors, WordIndex(tokenizer), model_id, feed.store_epoch(conn), feed.last_seq(conn))
        progress_s = time.monotonic()
        for rows, blobs in feed.read_all(conn, model_id, with_metadata):
            slots = columns.extend(rows)
            if vectors is not None:
                vectors.extend(slots, blobs)
            if is_closing():
                raise Closing
            if time.monotonic() - progress_s >= _PROGRESS_S:
                progress_s = time.monotonic()
                log.info("search_index_loading", rows=len(columns))
        columns.settle()
    return view


def take_over(
    conn: sqlite3.Connection,
    view: View,
    before: View | None,
    applying: AbstractContextManager[object],
    folder: Path,
    settings: SearchSettings,
) -> None:
    """Words and graph, as far as they are of the same texts: of the view before this one, or else from disk.
    `applying`: the lock without which nobody changes the view before."""
    if before is not None and before.epoch == view.epoch:
        with applying:
            word_keeping.inherit(view, before)
    else:
        word_keeping.restore(folder, view)
    while 0 < len(view.lacking) <= _AT_ONCE:
        word_keeping.fill(conn, view, threading.Lock())
    graph_file.restore(folder, view, settings)

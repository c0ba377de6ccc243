"""A view of the index made from the database, and from what was kept of an earlier one."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Final

from memory_system.log import get_logger
from memory_system.search import feed, graph_file, word_keeping
from memory_system.search.columns import Columns
from memory_system.search.keywords import WordIndex
from memory_system.search.rows import Embedded, Rows
from memory_system.search.tokens import Tokenizer
from memory_system.search.vectors import VectorIndex, units
from memory_system.search.view import View
from memory_system.settings import SearchSettings

log = get_logger(__name__)

_PROGRESS_S: Final = 2.0
# So few texts are taken in before the index is shown; of more, searches see the newest first.
_AT_ONCE: Final = 5_000


# Batches of vectors that wait to be taken in.
_AHEAD: Final = 4
# Of SQLite's machine, between two looks whether the index is being closed.
_LOOK_STEPS: Final = 100_000


class Closing(Exception):
    """The index is being closed while it loads, or what it loads has become of no use."""


def read(
    connect: Callable[[], sqlite3.Connection],
    settings: SearchSettings,
    tokenizer: Tokenizer,
    model: tuple[str, int] | None,
    is_closing: Callable[[], bool],
) -> View:
    """All rows with their vectors, of one state of the database. `model`: name and dimension. Raises Closing."""
    with contextlib.closing(connect()) as conn, feed.snapshot(conn) as seq:
        columns = Columns(settings.filterable_metadata)
        vectors = VectorIndex(columns, model[1], settings) if model else None
        model_id = model[0] if model else None
        view = View(columns, vectors, WordIndex(tokenizer), model_id, feed.store_epoch(conn), seq)
        with _ahead(connect, model, is_closing) as embedded:
            _take_in(view, feed.read_all(conn, bool(settings.filterable_metadata)), embedded, is_closing)
        columns.settle()
    return view


def _take_in(view: View, batches: Iterator[Rows], embedded: Iterator[Embedded], is_closing: Callable[[], bool]) -> None:
    """Rows, and vectors beside them: those of a batch as soon as all of its rows are in."""
    progress_s = time.monotonic()
    found = next(embedded, None)
    for rows in chain(batches, [None]):
        if rows is not None:
            view.columns.extend(rows)
        while found is not None and (rows is None or found.row_ids.max(initial=0) <= rows.row_id[-1]):
            if view.vectors is not None:
                view.vectors.extend(found)
            found = next(embedded, None)
        if is_closing():
            raise Closing
        if time.monotonic() - progress_s >= _PROGRESS_S:
            progress_s = time.monotonic()
            log.info("search_index_loading", rows=len(view.columns))


@contextlib.contextmanager
def _ahead(
    connect: Callable[[], sqlite3.Connection], model: tuple[str, int] | None, is_closing: Callable[[], bool]
) -> Iterator[Iterator[Embedded]]:
    """The unit vectors of the model, which a thread of their own reads ahead of whoever asks for them.

    Their state of the database may be later than that of the rows: a vector is one of a row's by the digest of its
    content, and what has come later stands in the log behind the rows' state.
    """
    if model is None:
        yield iter(())
        return
    with contextlib.closing(connect()) as conn, ThreadPoolExecutor(1, "search-vectors") as thread:
        # Where few vectors are of the model, one statement passes the whole table.
        conn.set_progress_handler(is_closing, _LOOK_STEPS)
        batches = map(units, feed.read_vectors(conn, *model))
        waiting = deque(thread.submit(next, batches, None) for _ in range(_AHEAD))

        def each() -> Iterator[Embedded]:
            while (found := _closing_or(waiting.popleft())) is not None:
                waiting.append(thread.submit(next, batches, None))
                yield found

        try:
            yield each()
        finally:
            conn.interrupt()
            thread.shutdown(cancel_futures=True)


def _closing_or(reading: Future[Embedded | None]) -> Embedded | None:
    """What was read. Raises Closing for what was broken off because of that."""
    try:
        return reading.result()
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
            raise Closing from None
        raise


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

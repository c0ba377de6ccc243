"""The search index: a thread that loads the database once and then follows its log of changes.

Start-up, replay after a crash and live changes are one mechanism, so they cannot come to differ. The index only
reads; whatever goes wrong in it, it is built anew from the database.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from memory_system.log import get_logger
from memory_system.search import feed, graph_file
from memory_system.search.columns import Columns
from memory_system.search.vectors import GRAPH_BATCH, VectorIndex
from memory_system.search.view import View, has_vector, put, remove
from memory_system.settings import SearchSettings

log = get_logger(__name__)

# A missed notification costs at most this.
_POLL_S: Final = 1.0
# Under a stream of commits, some are applied together: searches look at what is not applied yet by themselves.
_GATHER_S: Final = 0.005
_GRAPH_BATCHES: Final = 8
_PROGRESS_S: Final = 2.0
_RETRY_S: Final = (0.5, 30.0)


class LogGap(Exception):
    """Changes that the index has not seen are no longer in the log."""


class _Closing(Exception):
    """The index is being closed while it loads."""


def _ignore(_: object) -> None:
    return None


class SearchIndex:
    """Follows the database at `database_path`. Callbacks run in the index's thread and must be quick:

    `on_missing(row_ids)`: new or changed rows that have no vector yet; `on_backfill(row_ids)`: those found by a load,
    newest first; `on_advance(seq)`: every change up to `seq` can be searched.
    """

    def __init__(
        self,
        settings: SearchSettings,
        database_path: Path | str,
        connect: Callable[[], sqlite3.Connection],
        *,
        on_missing: Callable[[list[int]], None] = _ignore,
        on_backfill: Callable[[list[int]], None] = _ignore,
        on_advance: Callable[[int], None] = _ignore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._folder = Path(f"{database_path}.index")
        self._connect = connect
        self._on_missing, self._on_backfill, self._on_advance = on_missing, on_backfill, on_advance
        self._clock = clock
        self._lock = threading.Lock()
        self._view: View | None = None
        self._model: tuple[str, int] | None = None
        self._state = "loading"
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._snapshot_at_s = clock()
        self._wanted: deque[Future[bool]] = deque()  # who waits for a snapshot

    def __repr__(self) -> str:
        return f"<SearchIndex {self._state} seq={self.applied_seq} model={self._model}>"

    @property
    def state(self) -> str:
        """loading | ready | failed (and then loaded again after a pause)."""
        return self._state

    @property
    def model_id(self) -> str | None:
        return self._model[0] if self._model else None

    @property
    def applied_seq(self) -> int:
        """Log rows up to this seq are applied; nothing here needs them any more."""
        view = self._view
        return view.seq if view else 0

    def start(self) -> None:
        """Begin loading, in a thread of its own."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="search-index", daemon=True)
            self._thread.start()

    def notify(self) -> None:
        """Something was committed. Cheap, from any thread."""
        self._wake.set()

    def save_soon(self) -> Future[bool]:
        """Have the graph saved, once the index is loaded: False when there is none, or no change since the last time,
        or it could not be saved, which the log tells."""
        wanted: Future[bool] = Future()
        self._wanted.append(wanted)
        self._wake.set()
        return wanted

    def close(self) -> None:
        """Stop following; the graph is saved if it changed. Idempotent."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        while self._wanted:
            self._wanted.popleft().cancel()

    def set_model(self, model_id: str, dimension: int) -> None:
        """The model whose vectors count from now on. Vectors of another one are dropped at once."""
        with self._lock:
            if self._model == (model_id, dimension):
                return
            self._model = (model_id, dimension)
            self._state = "loading"
            if self._view is not None:
                self._view.vectors = None
                self._view.columns.has_vector[:] = False
        self._wake.set()

    @contextmanager
    def reading(self) -> Iterator[View | None]:
        """The index, held still; None while there is none. Hold it for milliseconds."""
        with self._lock:
            yield self._view

    def has_vector(self, row_id: int, digest: bytes | None = None) -> bool:
        """Whether a row's content (of this digest, if given) has a vector of the model, as far as the index knows."""
        # Without the lock, which searches hold for milliseconds: a row that changes meanwhile may be told either way.
        view = self._view
        slot = view.columns.slot(row_id) if view else None
        if view is None or slot is None:
            return False
        present = digest is None or view.columns.digests[slot].tobytes() == digest
        return present and bool(view.columns.has_vector[slot])

    def pending(self, namespace: str) -> int:
        """How many memories of the namespace, archived ones included, have no vector yet (0 while loading)."""
        with self._lock:
            return self._view.columns.pending(namespace) if self._view else 0

    # ---- the thread ----

    def _run(self) -> None:
        delay_s, longest_s = _RETRY_S
        while not self._closing.is_set():
            try:
                self._session()
                delay_s = _RETRY_S[0]
            except LogGap as gap:
                log.warning("search_index_gap", reason=str(gap))
            except _Closing:
                break
            except Exception:  # a derived index that fails in any way is built anew; search goes on without it
                reason = "the search index is built anew"
                log.exception("search_index_failed", reason=reason, retry_in_s=delay_s)
                self._state = "failed"
                with self._lock:
                    self._view = None
                self._closing.wait(delay_s)
                delay_s = min(2 * delay_s, longest_s)

    def _session(self) -> None:
        """Load and follow until the index is closed or has to be loaded anew."""
        conn = self._connect()
        try:
            view = self._load(conn)
            while not self._closing.is_set() and self._is_current(view):
                self._wake.clear()
                busy = self._apply(conn, view)
                busy = self._grow(view) or busy
                if self._wanted or self._clock() - self._snapshot_at_s >= self._settings.snapshot_s:
                    self._save(view)
                if not busy and self._wake.wait(_POLL_S):
                    self._closing.wait(_GATHER_S)
            if self._is_current(view):
                self._save(view)
        finally:
            conn.close()

    def _is_current(self, view: View) -> bool:
        model = (view.model_id, view.vectors.dimension) if view.vectors and view.model_id else None
        return model == self._model

    def _load(self, conn: sqlite3.Connection) -> View:
        started_s = self._clock()
        model = self._model
        with feed.snapshot(conn):
            columns = Columns(self._settings.filterable_metadata)
            vectors = VectorIndex(columns, model[1], self._settings) if model else None
            model_id = model[0] if model else None
            view = View(columns, vectors, model_id, feed.store_epoch(conn), feed.last_seq(conn))
            progress_s = started_s
            for batch in feed.read_all(conn, model_id, bool(self._settings.filterable_metadata)):
                for entry in batch:
                    put(view, entry)
                if self._closing.is_set():
                    raise _Closing
                if self._clock() - progress_s >= _PROGRESS_S:
                    progress_s = self._clock()
                    log.info("search_index_loading", rows=len(columns))
        graph_file.restore(self._folder, view, self._settings)
        with self._lock:
            if self._model != model:
                return view  # it came to be known meanwhile: the caller sees that, and loads anew
            self._view = view
        self._state = "ready"
        log.info("search_index_ready", rows=len(columns), seq=view.seq, seconds=round(self._clock() - started_s, 3))
        if vectors is not None and (missing := columns.missing()):
            self._on_backfill(missing)
        self._on_advance(view.seq)
        return view

    def _apply(self, conn: sqlite3.Connection, view: View) -> bool:
        """Follow the log by one batch; whether there was one. Raises LogGap."""
        with feed.snapshot(conn):
            changes = feed.read_log(conn, view.seq)
            last = feed.last_seq(conn)
            if changes[0][0] != view.seq + 1 if changes else last != view.seq:
                raise LogGap(f"applied up to {view.seq}, the log goes on at {changes[0][0] if changes else last + 1}")
            row_ids = list({row_id: None for _, row_id, _ in changes})
            entries = feed.read_rows(conn, row_ids, view.model_id, bool(self._settings.filterable_metadata))
        if not changes:
            return False
        with self._lock:
            if not self._is_current(view):
                return True  # another model was set meanwhile; all is about to be loaded anew
            for row_id in row_ids:
                entry = entries.get(row_id)
                remove(view, row_id) if entry is None else put(view, entry)
            view.seq = changes[-1][0]
            fresh = {row_id for _, row_id, op in changes if op == "put" and row_id in entries}
            missing = [row_id for row_id in row_ids if row_id in fresh and not has_vector(view, row_id)]
        if missing and view.vectors is not None:
            self._on_missing(missing)
        self._on_advance(view.seq)
        return True

    def _grow(self, view: View) -> bool:
        """Add some rows to the graph; whether there were any to add."""
        vectors = view.vectors
        if vectors is None or not vectors.wants_graph:
            return False
        for _ in range(_GRAPH_BATCHES):
            slots, batch = vectors.unlinked(GRAPH_BATCH)
            if len(slots) == 0:
                return False
            with vectors.graph_lock:
                vectors.link(slots, batch)
            with self._lock:
                vectors.in_graph[slots] = True
            if self._wake.is_set():
                break
        return True

    def _save(self, view: View) -> None:
        self._snapshot_at_s = self._clock()
        waiting = len(self._wanted)
        saved = graph_file.save(self._folder, view, self._settings)
        for _ in range(waiting):
            wanted = self._wanted.popleft()
            if wanted.set_running_or_notify_cancel():
                wanted.set_result(saved)

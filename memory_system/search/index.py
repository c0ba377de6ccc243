"""The search index: a thread that loads the database once and then follows its log of changes.

Start-up, replay after a crash and live changes are one mechanism, so they cannot come to differ. A search that finds
the index behind its own state of the database follows the log itself, so that it waits for no thread. The index only
reads; whatever goes wrong in it, it is built anew from the database.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from memory_system.log import get_logger
from memory_system.search import feed, graph_file, loading, word_keeping
from memory_system.search.following import LogGap, follow
from memory_system.search.news import News, Saves
from memory_system.search.pace import Pace
from memory_system.search.tokens import Tokenizer
from memory_system.search.view import View, forget_vectors, has_vector, model_of
from memory_system.settings import SearchSettings

log = get_logger(__name__)

_RETRY_S: Final = (0.5, 30.0)
# Batches of the log that a search follows by itself before it does without the rest.
_CATCH_UP: Final = 32
# The words of what was deleted or changed are out of the index after this much time, and off the disk with the next
# snapshot.
_PURGE_S: Final = 3600.0
# What was deleted before a stop goes soon after the next start, however often there is one.
_PURGE_AFTER_START_S: Final = 60.0


def _ignore(_: object) -> None:
    return None


class SearchIndex:
    """Follows the database at `database_path`. Callbacks run in the index's thread and must be quick:

    `on_missing(row_ids)`: new or changed rows that have no vector yet; `on_backfill(row_ids)`: those found by a load,
    newest first; `on_advance(seq)`: every change up to `seq` can be searched.

    `expects_model`: `set_model` is to be called, mostly with the model that made the newest vector: its are loaded.
    """

    def __init__(
        self,
        settings: SearchSettings,
        database_path: Path | str,
        connect: Callable[[], sqlite3.Connection],
        *,
        expects_model: bool = False,
        on_missing: Callable[[list[int]], None] = _ignore,
        on_backfill: Callable[[list[int]], None] = _ignore,
        on_advance: Callable[[int], None] = _ignore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._expects_model = settings, expects_model
        self._folder = Path(f"{database_path}.index")
        self._connect, self._clock = connect, clock
        self._on_backfill = on_backfill
        self.tokenizer = Tokenizer()
        self.pace = Pace()
        self._lock = threading.Lock()
        self._applying = threading.Lock()  # who holds it may change the view; taken before the other
        self._view: View | None = None
        self._loaded = threading.Event()
        self._news = News(on_missing, on_advance)
        self._purged_at_s = clock() - _PURGE_S + _PURGE_AFTER_START_S
        self._model: tuple[str, int] | None = None
        self._state = "loading"
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._snapshot_at_s = clock()
        self._saves = Saves()

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

    @property
    def view(self) -> View | None:
        """The index, for its identity: what is in it is to be read within `reading`."""
        return self._view

    @property
    def words_lacking(self) -> int:
        """How many memories cannot be found by their words yet."""
        view = self._view
        return len(view.lacking) if view else 0

    def start(self) -> None:
        """Begin loading, in a thread of its own."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="search-index", daemon=True)
            self._thread.start()

    def notify(self) -> None:
        """Something was committed. Cheap, from any thread."""
        self.pace.tell()

    def save_soon(self) -> Future[bool]:
        """Have graph and words saved, once the index is loaded: False when there is none, or no change since the last
        time, or it could not be saved, which the log tells."""
        wanted = self._saves.ask()
        self.pace.ask()
        return wanted

    def close(self) -> None:
        """Stop following; graph and words are saved if they changed. Idempotent."""
        self._closing.set()
        self.pace.stop()
        if self._thread is not None:
            self._thread.join()
        self._saves.cancel()

    def set_model(self, model_id: str, dimension: int) -> None:
        """The model whose vectors count from now on. Vectors of another one are dropped at once."""
        with self._lock:
            self._model = (model_id, dimension)
            if self._view is not None and model_of(self._view) != self._model:
                self._state = "loading"
                forget_vectors(self._view)
        self.pace.ask()

    @contextmanager
    def reading(self) -> Iterator[View | None]:
        """The index, held still; None while there is none. Hold it for milliseconds."""
        with self._lock:
            yield self._view

    def catch_up(self, conn: sqlite3.Connection, target: int) -> bool:
        """Follow the log up to `target`, the last seq that the transaction of `conn` sees; whether it could."""
        view = self._view
        if view is None:
            return False
        try:
            for _ in range(_CATCH_UP):
                if view.seq >= target:
                    break
                with self._applying:
                    if view.seq < target:
                        self._follow(conn, view)
                self.pace.tell()
        except LogGap:
            self.pace.tell()  # the thread finds it too, and loads anew
        return view.seq >= target

    def wait_loaded(self, timeout_s: float) -> bool:
        """Wait until there is an index, if one is being loaded; whether there is."""
        if self._thread is not None and self._state == "loading":
            self._loaded.wait(timeout_s)
        return self._loaded.is_set()

    def rebuild_words(self) -> bool:
        """Take all words from the texts again: `words_lacking` tells how many are to come. False: there is no index."""
        with self._applying, self._lock:
            if self._view is None:
                return False
            word_keeping.begin_anew(self._folder, self._view)
        self.pace.ask()
        return True

    def wrong_words(self, conn: sqlite3.Connection, texts: Sequence[feed.Text]) -> list[int]:
        """Those of some rows, read from `conn` just now, whose words are not those of their texts. What the index is
        still to take in is not wrong."""
        self.catch_up(conn, feed.last_seq(conn))
        view = self._view
        return [] if view is None or view.lacking else word_keeping.wrong(view, texts, self._lock)

    def has_vector(self, row_id: int, digest: bytes | None = None) -> bool:
        """Whether a row's content (of this digest, if given) has a vector of the model, as far as the index knows."""
        # Without the lock, which searches hold for milliseconds: a row that changes meanwhile may be told either way.
        return (view := self._view) is not None and has_vector(view, row_id, digest)

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
            except loading.Closing:
                continue  # another model came to be known, if it is not the end
            except Exception:  # a derived index that fails in any way is built anew; search goes on without it
                log.exception("search_index_failed", action="the search index is built anew", retry_in_s=delay_s)
                self._state = "failed"
                with self._lock:
                    self._view = None
                    self._loaded.clear()
                self._closing.wait(delay_s)
                delay_s = min(2 * delay_s, longest_s)

    def _session(self) -> None:
        """Load and follow until the index is closed or has to be loaded anew."""
        conn = self._connect()
        try:
            view = self._load(conn)
            self.pace.begin()
            while self._is_wanted(model_of(view)):
                busy = self._apply(conn, view)
                self._news.tell(view.seq)
                busy = word_keeping.fill(conn, view, self._lock) or busy
                busy = self._tidy(view) or busy
                vectors = view.vectors if self._model else None  # nothing is made for a model that may not come
                busy = (vectors is not None and vectors.improve(self._lock)) or busy
                if self._saves or self._clock() - self._snapshot_at_s >= self._settings.snapshot_s:
                    self._save(view)
                if not busy:
                    self.pace.wait()
                self.pace.begin()
            if self._model in (None, model_of(view)):
                self._save(view)
        finally:
            conn.close()

    def _is_wanted(self, model: tuple[str, int] | None) -> bool:
        return not self._closing.is_set() and self._model in (None, model)

    def _load(self, conn: sqlite3.Connection) -> View:
        started_s = self._clock()
        model = self._model or (feed.written_with(conn) if self._expects_model else None)
        view = loading.read(self._connect, self._settings, self.tokenizer, model, lambda: not self._is_wanted(model))
        loading.take_over(conn, view, self._view, self._applying, self._folder, self._settings)
        missing = view.columns.missing() if view.vectors else []
        with self._lock:
            if self._model not in (None, model):
                return view  # it came to be known meanwhile: the caller sees that, and loads anew
            self._view, self._state = view, "ready"
            self._loaded.set()
        seconds = round(self._clock() - started_s, 3)
        log.info("search_index_ready", rows=len(view.columns), seq=view.seq, seconds=seconds)
        if missing:
            self._on_backfill(missing)
        self._news.tell(view.seq, anew=True)
        return view

    def _apply(self, conn: sqlite3.Connection, view: View) -> bool:
        """Follow the log by one batch; whether there may be more by now. Raises LogGap."""
        with self._applying, feed.snapshot(conn):
            return self._follow(conn, view)

    def _follow(self, conn: sqlite3.Connection, view: View) -> bool:
        count, missing = follow(conn, view, self._lock, bool(self._settings.filterable_metadata))
        self._news.note(missing)
        return count >= feed.LOG_BATCH

    def _tidy(self, view: View) -> bool:
        """Merge what is due of the words; whether there was anything."""
        purge = self._clock() - self._purged_at_s >= _PURGE_S
        busy = view.words.merge_step(self._lock, purge)
        if purge:
            self._purged_at_s = self._clock()
            while view.words.merge_step(self._lock, purge) and not self._closing.is_set():
                pass
        return busy

    def _save(self, view: View) -> None:
        self._snapshot_at_s = self._clock()
        waiting = len(self._saves)
        saved = [graph_file.save(self._folder, view, self._settings), word_keeping.save(self._folder, view, self._lock)]
        self._saves.answer(waiting, any(saved))

"""Builds the service from its settings and owns the life of every part."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from memory_system.access import AccessBuffer
from memory_system.cache import make_caches
from memory_system.dispatch import Dispatcher, handlers_of
from memory_system.embedding import EmbedderState, EmbeddingQueue, Vectors, make_embedder
from memory_system.errors import MemorySystemError, ShuttingDown, StorageFailed
from memory_system.housekeeping import Housekeeping
from memory_system.log import get_logger
from memory_system.metrics import Family, traffic_families
from memory_system.metrics_start import start_metrics
from memory_system.reporting import Reporting
from memory_system.search.engine import SearchEngine
from memory_system.search.index import SearchIndex
from memory_system.security.guard import Guard, Keys
from memory_system.service.families import service_families
from memory_system.service.health import HealthService
from memory_system.service.own_writes import OwnWrites
from memory_system.service.reading import ReadingService
from memory_system.service.searching import SearchingService
from memory_system.service.upkeep import Parts, Upkeep
from memory_system.service.writing import WritingService
from memory_system.settings import Settings
from memory_system.storage import mark, rebase, usage, vectors
from memory_system.storage.context import Changes
from memory_system.storage.database import connect_reader, open_store, store_epoch
from memory_system.storage.first_look import FirstLook
from memory_system.storage.jobs import WriteJob
from memory_system.storage.queries import Queries
from memory_system.storage.readers import Readers
from memory_system.storage.rows import RecordView
from memory_system.storage.usage import Quota
from memory_system.storage.writer import Writer

log = get_logger("runtime")

COMPONENT: Final = "orchestrator"

# A large batch would push out what is read often, and hold up the loop while it does.
_CACHED_AT_ONCE: Final = 64
# A store is opened at once, unless it is migrated or re-based: then the program says after this that it lives.
_QUICK_START_S: Final = 1.0

_Opened = tuple[sqlite3.Connection, mark.Unmarked]


def _brought_up(look: FirstLook, path: Path, settings: Settings, stopped: Callable[[], bool]) -> _Opened:
    """A store of this schema and these settings, opened for writing; in a thread, as either may take long."""
    look.result()
    db = open_store(path, settings.storage.synchronous, looked_at=True)
    try:
        rebase.bring_up(db, settings.lifecycle, time.time(), stopped=stopped)
        usage.bring_up(db, Quota.of(settings.limits))
        return db, mark.keeper(path, db, settings.storage.synchronous)
    except BaseException as error:
        db.close()
        if isinstance(error, sqlite3.Error):
            raise StorageFailed(f"{path} cannot be written: {error}") from error
        raise


class _Opening:
    """A store on its way to be written to, which is not let go of before that is over."""

    def __init__(self, look: FirstLook, path: Path, settings: Settings, stopped: Callable[[], bool]) -> None:
        self._given_up = threading.Event()
        self._stopped = stopped
        self.opened = asyncio.ensure_future(asyncio.to_thread(_brought_up, look, path, settings, self._is_over))

    async def give_up(self) -> None:
        """End it: nobody is going to write."""
        self._given_up.set()
        with contextlib.suppress(Exception):  # whoever waited for it has been told
            db, keeper = await self.opened
            keeper.close()
            db.close()

    def _is_over(self) -> bool:
        return self._stopped() or self._given_up.is_set()


class Runtime:
    """Everything behind the socket. `start` opens the store and begins to load the rest; `close` flushes and stops."""

    dispatcher: Dispatcher

    def __init__(
        self,
        settings: Settings,
        *,
        on_fatal: Callable[[Exception], None],
        health: Callable[[], Mapping[str, Any]],
        keys: Keys | None = None,
        look: FirstLook | None = None,
    ) -> None:
        self._settings = settings
        self._on_fatal = on_fatal
        self._health = health
        self._keys = keys
        self._path = Path(settings.storage.path)
        self._look = look
        self._closers: list[Callable[[], Any]] = []

    async def start(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Raises MemorySystemError when the store cannot be opened, ShuttingDown when `stopped` says so before it is;
        `close` is to be called all the same."""
        self._loop = asyncio.get_running_loop()
        self._reporting = Reporting(self._settings, COMPONENT)
        self._heartbeat = _opening
        self._closers.append(self._reporting.close)
        try:
            await self._start_parts(stopped)
        except ShuttingDown:
            raise
        except Exception as error:
            message = error.message if isinstance(error, MemorySystemError) else type(error).__name__
            self._reporting.reporter.report("cannot_start", message, "critical")
            raise

    async def _start_parts(self, stopped: Callable[[], bool]) -> None:
        await self._open_store(stopped)
        self._caches = make_caches(self._settings.cache, self._settings.redis)
        self._caches.redis.on_state(partial(self._reporting.part_changed, "redis"))
        self._closers.append(self._caches.close)
        self._readers = Readers(self._path, self._settings.storage.readers, self._settings.limits.query_s)
        self._closers.append(self._readers.close)
        self._build_search()
        self._build_services()
        await self._readers.start()
        await self._runs.start()
        self._closers.append(self._runs.close)
        await self._caches.start()
        self._index.start()
        self._embedding.start()
        await self._embedder.start()
        self._housekeeping.start()
        self._closers.append(self._housekeeping.close)
        self._open_metrics()
        self._heartbeat = self._health_service.heartbeat
        self._begin_heartbeats()

    def stop_writing_after(self, seconds: float) -> None:
        """The program is to end: runs of maintenance stop, and writes that have not begun by then are refused."""
        self._runs.stop()
        self._writer.stop_after(seconds)

    async def close(self) -> None:
        """Stop every part in the reverse order of its start; may be called twice, and after a failed start."""
        while self._closers:
            closer = self._closers.pop()
            try:
                result = closer()
                if result is not None:
                    await result
            except Exception:  # one part that cannot close must not keep the rest from flushing
                log.exception("close_failed", part=getattr(closer, "__qualname__", "?"))

    def _begin_heartbeats(self) -> None:
        self._reporting.start(lambda: self._heartbeat())

    async def _open_store(self, stopped: Callable[[], bool]) -> None:
        look = self._look or FirstLook(self._path)
        self._closers.append(look.close)
        opening = _Opening(look, self._path, self._settings, stopped)
        self._closers.append(opening.give_up)
        if not (await asyncio.wait({opening.opened}, timeout=_QUICK_START_S))[0]:
            self._begin_heartbeats()
        db, keeper = await asyncio.shield(opening.opened)
        self._epoch = store_epoch(db)
        self._writer = Writer(
            db,
            self._settings.storage,
            self._settings.lifecycle,
            on_commit=self._on_commit,
            on_fatal=self._on_fatal,
            mark=keeper,
            quota=Quota.of(self._settings.limits),
        )
        self._writer.start()
        self._closers[-1] = self._writer.close

    def _build_search(self) -> None:
        settings = self._settings
        connect, query_s = partial(connect_reader, self._path), settings.limits.query_s
        self._embedder = make_embedder(settings.embedding)
        self._embedder.on_state(self._on_embedder)
        self._embedding = EmbeddingQueue(
            self._embedder,
            settings.embedding,
            load_texts=self._load_texts,
            store=self._store_vectors,
            vectors=self._caches.vectors,
        )
        self._index = SearchIndex(
            settings.search,
            self._path,
            connect,
            expects_model=settings.embedding.provider != "off",
            on_missing=partial(self._soon, self._embedding.add),
            on_backfill=partial(self._soon, self._embedding.backfill),
            on_advance=partial(self._soon, self._on_advance),
        )
        self._engine = SearchEngine(
            settings.search, settings.lifecycle, self._path, self._index, connect, query_s, settings.ranking
        )
        self._own_writes = OwnWrites(self._index.has_vector, self._index.pace.hurry)
        self._closers += [
            lambda: asyncio.to_thread(self._engine.close),
            lambda: asyncio.to_thread(self._index.close),
            self._embedder.close,
            self._embedding.close,
        ]

    def _build_services(self) -> None:
        settings = self._settings
        view, accesses = RecordView(settings.lifecycle), AccessBuffer()
        queries = self._queries = Queries(self._readers, settings.lifecycle)
        writing = WritingService(self._writer, queries, view, idempotency=settings.storage.idempotency)
        reading = ReadingService(
            self._writer, queries, view, self._caches.records, accesses, settings.lifecycle.access_weight_get
        )
        searching = SearchingService(
            settings,
            self._engine,
            queries,
            view,
            self._embedder,
            self._embedding,
            self._own_writes,
            self._caches.results,
            accesses,
            self._epoch,
            self._writer.commit_seq,
        )
        upkeep = self._build_upkeep()
        self._health_service = HealthService(
            self._path,
            self._writer,
            queries,
            self._caches,
            self._index,
            self._embedder,
            self._embedding,
            self._health,
            self._traffic,
            self._runs.figures,
        )
        services = [writing, reading, searching, upkeep.maintaining, upkeep.archiving, self._health_service]
        self._build_dispatcher(services)
        self._housekeeping = Housekeeping(
            self._writer, settings.storage, accesses, lambda: self._index.applied_seq, self._runs.is_clock_settled
        )

    def _build_dispatcher(self, services: list[Any]) -> None:
        self.guard = Guard.of(self._settings, COMPONENT, self._keys)
        self._closers.append(self.guard.close)
        self.dispatcher = Dispatcher(handlers_of(services), self._writer.commit_seq, self.guard)

    def _build_upkeep(self) -> Upkeep:
        parts = Parts(
            self._writer, self._readers, self._index, self._engine, self._caches, self._embedder, self._embedding
        )
        upkeep = Upkeep(self._settings, parts)
        self._runs, self._maintaining = upkeep.runs, upkeep.maintaining
        self._closers.append(upkeep.exports.close)
        return upkeep

    def _traffic(self) -> dict[str, Any]:
        requests, ignored_fields = self.dispatcher.traffic.requests(), self.dispatcher.ignored_fields
        return {"requests": requests, "ignored_fields": ignored_fields, **self.guard.figures()}

    def _open_metrics(self) -> None:
        close = start_metrics(self._settings, self._settings.metrics.orchestrator_port, self._families)
        self._closers.append(lambda: asyncio.to_thread(close))

    def _families(self) -> list[Family]:
        """The metrics as they are now; called in the thread of a scrape."""
        figures = self._health_service.figures()
        return [*service_families(figures), *traffic_families(self.dispatcher.traffic), *self._reporting.families()]

    # -- what the parts tell each other -----------------------------------------------------------------------

    def _soon(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run on the event loop, from another thread; a loop that has ended needs no news."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            log.debug("loop_ended")

    def _on_commit(self, changes: Changes) -> None:
        records = self._caches.records
        for gone in changes.removed:
            records.invalidate(gone.namespace, gone.memory_id)
        for namespace, memory_id in changes.stale:
            records.invalidate(namespace, memory_id)
        for memory in changes.written:
            if len(changes.written) <= _CACHED_AT_ONCE:
                records.put(memory)
            else:
                records.refresh(memory)
        if changes.removed:
            self._forget_vectors(changes)
        if changes.new_texts:
            self._own_writes.note(changes.caller, changes.new_texts)
        if changes.indexed:
            self._index.notify()

    def _forget_vectors(self, changes: Changes) -> None:
        """Deleted means gone: also what was cached of the text."""
        kept = {memory.row_id for memory in changes.written}
        gone = [memory.row_id for memory in changes.removed if memory.row_id not in kept]
        self._embedding.discard(gone)
        self._own_writes.discard(changes.caller, gone)
        self._caches.vectors.delete_many([memory.content_digest for memory in changes.removed])

    def _on_advance(self, _seq: int) -> None:
        self._own_writes.advanced()

    def _on_embedder(self, state: EmbedderState) -> None:
        self._reporting.part_changed("embedding_worker", state)
        model_id, dimension = self._embedder.model_id, self._embedder.dimension
        if state == "ready" and model_id is not None and dimension is not None:
            self._index.set_model(model_id, dimension)

    async def _load_texts(self, row_ids: Sequence[int]) -> dict[int, tuple[str, bytes]]:
        found = await self._readers.fetch(vectors.LOAD_TEXTS, (vectors.as_json(row_ids),))
        return {row_id: (content, digest) for row_id, content, digest in found}

    async def _store_vectors(self, model_id: str, made: list[tuple[int, bytes, Vectors]]) -> None:
        run = partial(vectors.store, model_id=model_id, vectors=made)
        await self._writer.submit(WriteJob(run, "", rows=len(made), counted=False))


def _opening() -> dict[str, Any]:
    """What heartbeats say until there is more to say."""
    return {"state": "starting", "readiness": {"store": "loading"}}

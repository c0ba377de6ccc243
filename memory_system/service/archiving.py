"""Taking the store's contents out and putting them in: backups, exports, imports."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from memory_system import admin_models as a
from memory_system import cursors, protocol
from memory_system.calls import Call, ResultList
from memory_system.embedding import Embedder
from memory_system.errors import InvalidCursor, InvalidField, MemorySystemError, StorageFailed
from memory_system.line_reader import Item, read_line
from memory_system.service import Reply
from memory_system.service.exports import Exports
from memory_system.service.run import LANE, Run, rest_s
from memory_system.service.runs import Runs
from memory_system.settings import Settings
from memory_system.storage import backup, load
from memory_system.storage.context import WriteContext
from memory_system.storage.dump import Dump, Position
from memory_system.storage.idempotency import Key
from memory_system.storage.jobs import WriteJob
from memory_system.storage.loading import Order
from memory_system.storage.writer import Writer

_LOOK_S: Final = 0.25  # between two looks at how far a copy has come
_STOP_S: Final = 1.0


class _Page(Struct):
    """What a thread read: lines, and where the next page begins."""

    results: ResultList
    after: Position | None
    totals: dict[str, int] | None


class ArchivingService:
    """`backup` is a run; exports are pages of one held state; an import is one write for each request."""

    def __init__(self, runs: Runs, writer: Writer, exports: Exports, embedder: Embedder, settings: Settings) -> None:
        self._runs = runs
        self._writer = writer
        self._exports = exports
        self._embedder = embedder
        self._database = Path(settings.storage.path)
        self._folder = backup.folder_of(settings)
        self._kept = (settings.backup.keep, settings.backup.keep_days)
        self._idempotency = settings.storage.idempotency
        self._share = settings.maintenance.share

    # -- backup -------------------------------------------------------------------------------------------------------

    def backup(self, call: Call, p: a.TakeBackup) -> Any:
        return self._runs.perform(call, "backup", self._back_up, asked={"dry_run": p.dry_run}, dry_run=p.dry_run)

    async def _back_up(self, run: Run) -> Reply:
        if run.dry_run:
            return await asyncio.to_thread(self._plan, time.time())
        stop = threading.Event()
        began_s, now_s = time.monotonic(), time.time()
        partial_file = self._folder / f"{backup.name_of(self._database, now_s)}{backup.PARTIAL}"
        copying = asyncio.ensure_future(asyncio.to_thread(self._copy, now_s, stop))
        try:
            while not (await asyncio.wait({copying}, timeout=_LOOK_S))[0]:
                run.progress("bytes", backup.size_of(partial_file), backup.size_of(self._database))
        except asyncio.CancelledError:
            stop.set()  # a run that is stopped leaves no thread behind, and no part of a file
            await asyncio.wait({copying}, timeout=_STOP_S)
            raise
        fields = copying.result()
        run.counts.update(fields["contents"])
        return {**fields, "took_ms": round((time.monotonic() - began_s) * 1000.0, 1)}

    def _copy(self, now_s: float, stop: threading.Event) -> Reply:
        """Make a backup and let old ones go; in a thread."""
        made, found = backup.back_up(self._database, self._folder, now_s, stopped=stop.is_set)
        removed = backup.rotate(self._folder, self._database, *self._kept, now_s)
        return {
            "path": str(made.path),
            "size_bytes": made.size_bytes,
            "taken_at": made.taken_at_s,
            "store_epoch": found.store_epoch,
            "schema_version": found.schema_version,
            "contents": found.counts(),
            "removed": removed,
        }

    def _plan(self, now_s: float) -> Reply:
        """What a backup would need and remove; in a thread. Raises StorageFull as a backup would."""
        return backup.plan(self._database, self._folder, *self._kept, now_s)

    # -- export -------------------------------------------------------------------------------------------------------

    async def export_memories(self, call: Call, p: a.ExportMemories) -> Reply:
        """A page of lines. All pages that a cursor joins are of one state of the store."""
        scope = cursors.scope("export_memories", call.namespace, p.all_namespaces, p.vectors)
        try:
            if p.cursor is None:
                namespaces = None if p.all_namespaces else [call.namespace]
                name = await self._exports.open(namespaces, call.now_s, vectors=p.vectors)
                position = None
            else:
                name, position = _opened(p.cursor, scope)
            read = partial(_read, ResultList(call.encoding, p.limit), position)
            page = await self._exports.use(name, read)
        except sqlite3.Error as error:
            raise StorageFailed(f"the database cannot be read: {error}") from error
        fields: Reply = {} if page.totals is None else {"totals": page.totals, "as_of": call.now_s}
        if page.after is not None:
            after = page.after
            key = [name, after.namespace, after.kind, after.key]
            fields["next_cursor"] = cursors.encode(cursors.Position(scope, call.now_s, key))
        return page.results.reply(**fields)

    # -- import -------------------------------------------------------------------------------------------------------

    async def import_memories(self, call: Call, p: a.ImportMemories) -> Reply:
        """Put lines into the namespace of the call: all of them or, when one is wrong, none.

        The reply comes after the rest that a run takes after such a write: who sends the next lines then leaves the
        store to the other requests as a run does.
        """
        began_s = time.monotonic()
        items = await asyncio.to_thread(_items, call, p)
        order = Order(overwrite=p.on_conflict == "overwrite", dry_run=p.dry_run, model=self._model())
        key = None
        if call.request_id is not None and self._idempotency and not p.dry_run:
            key = Key(call.who.scope, call.request_id, call.fingerprint)
        job = WriteJob(
            lambda context: _load(context, job, items, order),
            call.namespace,
            call.caller,
            key,
            rows=len(items),
            deadline_s=call.deadline_s,
            client=LANE,
        )
        reply = await self._writer.submit(job)
        await asyncio.sleep(rest_s(time.monotonic() - began_s, self._share))
        return reply

    def _model(self) -> tuple[str, int] | None:
        model_id, dimension = self._embedder.model_id, self._embedder.dimension
        return None if model_id is None or dimension is None else (model_id, dimension)


def _opened(cursor: str, scope: str) -> tuple[str, Position]:
    key = cursors.decode(cursor, scope).key
    if len(key) != 4 or not all(isinstance(part, str) for part in key[:3]) or not isinstance(key[3], list):
        raise InvalidCursor("the cursor is damaged; start again without one")
    return key[0], Position(*key[1:])


def _read(results: ResultList, position: Position | None, dump: Dump) -> _Page:
    """In a thread. Raises InvalidCursor for a position that no page ended at, sqlite3.Error."""
    try:
        after = dump.page(position, results.add)
    except (KeyError, ValueError, sqlite3.ProgrammingError):
        raise InvalidCursor("the cursor is damaged; start again without one") from None
    return _Page(results, after, dump.totals() if position is None else None)


def _items(call: Call, p: a.ImportMemories) -> list[Item]:
    """The lines of a request, checked; in a thread. Raises InvalidField with the line's index."""
    items, values = list[Item](), 0
    for index, raw in enumerate(p.records):
        where = f"records[{index}]"
        try:
            item, count = read_line(call.encoding, raw, call.namespace, where)
            values += count
            if values > protocol.MAX_BATCH_VALUES:
                limit = f"an import has at most {protocol.MAX_BATCH_VALUES} values in its metadata; send smaller ones"
                raise InvalidField(where, limit)
        except MemorySystemError as error:
            error.details["index"] = index
            raise
        items.append(item)
    return items


def _load(context: WriteContext, job: WriteJob, items: list[Item], order: Order) -> Reply:
    """In the writer. An import that changes nothing leaves commit_seq as it is."""
    tally = load.load(context, items, order)
    job.counted = not order.dry_run and tally.changes > 0
    return tally.reply()

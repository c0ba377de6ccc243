"""Writing groups of events to the error history, and reading it. Used by one thread at a time.

Only the first `rows_per_s` events of a second have a row each; see `folding.RowBudget`. A shared row is the first
event of its kind in that second with a growing count; the ids of the others are kept in `folded`, so that an event
that is sent again is known whether it has a row or not.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from memory_system.events import SEVERITIES, Event, new_event_id
from memory_system.health.folding import VARIOUS, RowBudget, RowKey
from memory_system.health.records import Committed, Errors, Query, Stored
from memory_system.health.schema import CLEAN
from memory_system.health_settings import ErrorBusSettings
from memory_system.log import get_logger
from memory_system.storage.database import transaction

log = get_logger("health.store")

FOLDED_KEPT_S: Final = 24 * 3600.0

_SLICE: Final = 500  # rows or pages
_SLICES: Final = 8
_REPLY_BYTES: Final = 2 * 1024 * 1024
_ROW_BYTES: Final = 400  # of a result, beside message and details
_FOLDED_BYTES: Final = 32
_MIB: Final = 1024 * 1024

_COLUMNS: Final = "event_id, timestamp, received_at, agent, error_type, severity, message, request_id, details, count"
_INSERT: Final = f"INSERT INTO events ({_COLUMNS}) VALUES ({', '.join('?' * 10)})"


@dataclass(slots=True)
class _Shares:
    """What one submission adds to shared rows: by key, the first event and how many it stands for."""

    firsts: dict[RowKey, Event] = field(default_factory=dict)
    counts: dict[RowKey, int] = field(default_factory=dict)
    ids: list[bytes] = field(default_factory=list)

    def add(self, key: RowKey, event: Event) -> None:
        self.counts[key] = self.counts.get(key, 0) + event.count
        if key in self.firsts or key[0] == VARIOUS:
            self.ids.append(_digest(event.event_id))  # the id of any other is kept with its row
        if key not in self.firsts:
            self.firsts[key] = _various(event) if key[0] == VARIOUS else event

    def events(self) -> list[tuple[RowKey, Event]]:
        return [(key, replace(first, count=self.counts[key])) for key, first in self.firsts.items()]


class Store:
    """The open file. Methods raise sqlite3.Error, after which nothing of the call is kept."""

    def __init__(self, db: sqlite3.Connection, settings: ErrorBusSettings) -> None:
        self.db = db
        self._settings = settings
        page_bytes: int = self._pragma("page_size")
        self._limit_pages = int(settings.history_mb * _MIB) // page_bytes
        self._folded_limit = int(settings.history_mb * _MIB) // 4 // _FOLDED_BYTES
        self._budget = RowBudget(settings.rows_per_s)
        self.last_seq: int = (db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone() or [0])[0]
        self._says_open = False
        self._folded: int = db.execute("SELECT count(*) FROM folded").fetchone()[0]

    def _pragma(self, name: str) -> int:
        value: int = self.db.execute(f"PRAGMA {name}").fetchone()[0]
        return value

    def size_bytes(self) -> int:
        """Size of the database file."""
        return self._pragma("page_count") * self._pragma("page_size")

    # -- writing ----------------------------------------------------------------------------------------------

    def write(self, groups: Sequence[tuple[Sequence[Event], bool]], now_s: float, mono_s: float) -> list[Committed]:
        """Commit groups of events in one transaction; the flag says whether their ids may come again."""
        budget = self._budget.begin(mono_s)
        seen = self._known(event.event_id for events, _ in groups for event in events)
        folded = self._folded
        try:
            done = self._write(groups, seen, budget, now_s)
        except BaseException:
            self._folded = folded
            raise
        self._says_open = True
        self._budget = budget
        self.last_seq = max([self.last_seq, *(seq for committed in done for seq, _ in committed.rows)])
        return done

    def _write(
        self, groups: Sequence[tuple[Sequence[Event], bool]], seen: set[str], budget: RowBudget, now_s: float
    ) -> list[Committed]:
        with transaction(self.db):
            if not self._says_open:
                self.set_meta(CLEAN, "0")
            done = [self._write_group(events, remember, seen, budget, now_s) for events, remember in groups]
            self._forget_folded()
            self._trim()
            self._vacuum(min(_SLICE, self._pragma("page_count") - self._limit_pages))
        return done

    def _known(self, event_ids: Iterable[str]) -> set[str]:
        """Those of the ids that the history has, with a row or counted."""
        names = list(dict.fromkeys(event_ids))
        ask = "SELECT 1 FROM events WHERE event_id = ?"
        known = {name for name in names if self.db.execute(ask, (name,)).fetchone()}
        if self._folded:
            ask = "SELECT 1 FROM folded WHERE event_id = ?"
            known.update(name for name in names if self.db.execute(ask, (_digest(name),)).fetchone())
        return known

    def _write_group(
        self, events: Sequence[Event], remember: bool, seen: set[str], budget: RowBudget, now_s: float
    ) -> Committed:
        rows: list[tuple[int, Event]] = []
        shares = _Shares()
        known = 0
        for event in events:
            if event.event_id in seen:
                known += 1
                continue
            seen.add(event.event_id)
            key = budget.place(event)
            if key is None:
                rows.append((self._insert(event, now_s), event))
            else:
                shares.add(key, event)
        for key, event in shares.events():
            rows.append((self._share(key, event, budget, now_s, shares), event))
        if remember and shares.ids:
            self._remember(shares.ids, now_s)
        return Committed(tuple(rows), known)

    def _insert(self, event: Event, now_s: float) -> int:
        details = json.dumps(event.details, separators=(",", ":"), default=repr) if event.details else None
        values = (event.event_id, event.timestamp, now_s, event.agent, event.error_type, event.severity, event.message)
        seq = self.db.execute(_INSERT, (*values, event.request_id, details, event.count)).lastrowid
        assert seq is not None
        return seq

    def _share(self, key: RowKey, event: Event, budget: RowBudget, now_s: float, shares: _Shares) -> int:
        seq = budget.rows.get(key)
        if seq is not None:
            grown = self.db.execute("UPDATE events SET count = count + ? WHERE seq = ?", (event.count, seq))
            if grown.rowcount:
                if key[0] != VARIOUS:
                    shares.ids.append(_digest(event.event_id))
                return seq
        seq = budget.rows[key] = self._insert(event, now_s)
        return seq

    def _remember(self, ids: list[bytes], now_s: float) -> None:
        before = self.db.total_changes
        self.db.executemany("INSERT OR IGNORE INTO folded VALUES (?, ?)", [(each, now_s) for each in ids])
        self._folded += self.db.total_changes - before

    # -- retention --------------------------------------------------------------------------------------------

    def retain(self, now_s: float) -> bool:
        """Drop what is too old or too much, and give room back, a slice each; whether there is more to do."""
        with transaction(self.db):
            dropped = self._drop_old(now_s) + self._trim()
            over = self._pragma("page_count") - self._limit_pages
            free = self._pragma("freelist_count")
            vacuumed = free and (over > 0 or free > max(256, self._pragma("page_count") // 4))
            if vacuumed:
                self._vacuum(min(_SLICE, free))
        return bool(dropped or vacuumed)

    def _drop_old(self, now_s: float) -> int:
        oldest = "SELECT seq, received_at FROM events ORDER BY seq LIMIT ?"
        events = self.db.execute(
            f"DELETE FROM events WHERE seq IN (SELECT seq FROM ({oldest}) WHERE received_at < ?)",
            (_SLICE, now_s - self._settings.history_days * 86_400.0),
        ).rowcount
        ids = self.db.execute(
            "DELETE FROM folded WHERE event_id IN (SELECT event_id FROM folded WHERE at < ? LIMIT ?)",
            (now_s - FOLDED_KEPT_S, _SLICE),
        ).rowcount
        self._folded -= ids
        return events + ids

    def _trim(self) -> int:
        """Drop the oldest events while the file is nearly full; their room is used for the next ones."""
        dropped = 0
        for _ in range(_SLICES):
            used = self._pragma("page_count") - self._pragma("freelist_count")
            if used <= self._limit_pages * 15 // 16:
                break
            first, last = self.db.execute(
                "SELECT (SELECT min(seq) FROM events), (SELECT max(seq) FROM events)"
            ).fetchone()
            if first is None or first == last:
                break
            up_to = first + min(_SLICE, max(1, (last - first) // 16))
            dropped += self.db.execute("DELETE FROM events WHERE seq < ?", (up_to,)).rowcount
        return dropped

    def _forget_folded(self) -> None:
        """Bound the ids of counted events; ours are ordered by time, so the lowest are the oldest."""
        too_many = self._folded - self._folded_limit
        if too_many > 0:
            self._folded -= self.db.execute(
                "DELETE FROM folded WHERE event_id IN (SELECT event_id FROM folded ORDER BY event_id LIMIT ?)",
                (too_many + self._folded_limit // 16,),
            ).rowcount

    def _vacuum(self, pages: int) -> None:
        for _ in range(pages):  # the module takes one step of a statement without columns, which is one page
            self.db.execute("PRAGMA incremental_vacuum(1)")

    # -- reading ----------------------------------------------------------------------------------------------

    def errors(self, query: Query) -> Errors:
        where, values = query.where()
        total: int = self.db.execute(f"SELECT coalesce(sum(count), 0) FROM events WHERE {where}", values).fetchone()[0]
        order = "DESC" if query.newest else "ASC"
        results: list[Stored] = []
        size, more = 0, False
        for row in self.db.execute(
            f"SELECT seq, {_COLUMNS} FROM events WHERE {where} ORDER BY seq {order} LIMIT ?", [*values, query.limit + 1]
        ):
            size += _ROW_BYTES + 4 * (len(row[7]) + len(row[9] or ""))
            if len(results) == query.limit or (results and size > _REPLY_BYTES):
                more = True
                break
            results.append(_stored(row))
        if query.newest:
            results.reverse()
        oldest: int | None = self.db.execute("SELECT min(seq) FROM events").fetchone()[0]
        go_on = results[-1].seq if more and not query.newest else None
        return Errors(tuple(results), self.last_seq, self.last_seq + 1 if oldest is None else oldest, total, go_on)

    def totals(self, since_s: float) -> dict[str, int]:
        """Number of events by severity that happened since then."""
        found = self.db.execute(
            "SELECT severity, sum(count) FROM events WHERE timestamp >= ? GROUP BY severity", (since_s,)
        )
        return dict.fromkeys(SEVERITIES, 0) | dict(found.fetchall())

    def meta(self) -> dict[str, str]:
        return dict(self.db.execute("SELECT key, value FROM meta").fetchall())

    def set_meta(self, key: str, value: str) -> None:
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def say_open(self) -> None:
        """Note that the file is in use, so that the next to open it knows of an end that was not clean.

        Left to the first write when there is no room now.
        """
        try:
            self.set_meta(CLEAN, "0")
            self._says_open = True
        except sqlite3.OperationalError as error:
            log.warning("history_not_marked", error=error.sqlite_errorname)

    def checkpoint(self) -> None:
        self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def close(self, *, clean: bool) -> None:
        """`clean`: nothing is amiss, and the next to open the file need not check it."""
        try:
            if clean:
                self.set_meta(CLEAN, "1")
        finally:
            self.db.close()


def _digest(event_id: str) -> bytes:
    """16 bytes for an id; those of our own ids keep their order, which is that of time."""
    try:
        own = bytes.fromhex(event_id)
    except ValueError:
        own = b""
    return own if len(own) == 16 else hashlib.blake2b(event_id.encode("utf-8", "replace"), digest_size=16).digest()


def _various(event: Event) -> Event:
    return replace(
        event,
        event_id=new_event_id(),
        agent=VARIOUS,
        error_type=VARIOUS,
        message="errors of many kinds in one second, only counted",
        request_id=None,
        details={},
    )


def _stored(row: tuple[Any, ...]) -> Stored:
    seq, event_id, timestamp, received_at, agent, error_type, severity, message, request_id, details, count = row
    event = Event(
        event_id, timestamp, agent, error_type, message, severity, request_id, json.loads(details or "{}"), count
    )
    return Stored(seq, received_at, event)

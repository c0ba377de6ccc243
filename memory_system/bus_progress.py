"""What of the error bus a reader has had: whether something is missing, and what is new. Pure.

The broadcast sums up repeats and the history has them one by one, so a reader that changes from one to the other, after
a gap or a restart of the manager, has to know which rows of the history a message stands for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from memory_system.events import MAX_AHEAD_S, Event, Kind, MalformedEvent, kind_of, parse_event

VARIOUS: Final = "(various)"  # the agent and error_type of a message that sums up several kinds
_KEPT_ROWS: Final = 10_000
_PRUNE_ABOVE: Final = 1000

VARIOUS_KIND: Final[Kind] = (VARIOUS, VARIOUS, "")


@dataclass(frozen=True, slots=True)
class BusEvent:
    """An event and its row in the history; `event.count` is how many it stands for, from `first_at` to `last_at`."""

    seq: int
    event: Event
    first_at: float
    last_at: float
    live: bool

    def fields(self) -> dict[str, Any]:
        found = {"seq": self.seq, **self.event.fields()}
        if self.first_at != self.last_at:
            found |= {"first_at": self.first_at, "last_at": self.last_at}
        return found


@dataclass(frozen=True, slots=True)
class Message:
    """What an ERROR message says about its place in the stream."""

    boot_id: str
    seq: int
    prev_seq: int
    first_seq: int
    told_seq: int
    repeats: int
    event: BusEvent

    @classmethod
    def parse(cls, fields: Mapping[str, Any], now_s: float) -> Message:
        """Raises MalformedEvent."""
        seq = _integer(fields, "seq")
        prev_seq = _integer(fields, "prev_seq")
        repeats = _integer(fields, "repeats", 0)
        event = parse_event(fields, now_s, ahead_s=math.inf)  # the manager's clock has judged it
        if repeats:
            event = replace(event, count=repeats)
        first_at, last_at = (_number(fields, name, event.timestamp) for name in ("first_at", "last_at"))
        return cls(
            boot_id=str(fields.get("boot_id")),
            seq=seq,
            prev_seq=prev_seq,
            first_seq=_integer(fields, "first_seq", seq),
            told_seq=_integer(fields, "told_seq", 0 if repeats else prev_seq),
            repeats=repeats,
            event=BusEvent(seq, event, first_at, last_at, live=True),
        )


class Had:
    """What a reader has given away, for the case that the history becomes another one, with numbers of its own. Pure.

    `since_s`: events from this time on, epoch seconds, may be new to it.
    """

    def __init__(self, begun_at: float) -> None:
        self._newest_at = begun_at
        self._ids: dict[str, None] = {}

    def __contains__(self, event: BusEvent) -> bool:
        return event.event.event_id in self._ids

    @property
    def since_s(self) -> float:
        return max(0.0, self._newest_at - MAX_AHEAD_S)

    def note(self, event: BusEvent) -> None:
        self._newest_at = max(self._newest_at, event.last_at)
        self._ids[event.event.event_id] = None
        if len(self._ids) > _KEPT_ROWS:
            del self._ids[next(iter(self._ids))]


class Progress:
    """What of the bus a reader has had: tells when something is missing, and lets nothing through twice. Pure.

    Every row up to `told_seq` has been had, by itself or counted in a sum. Above it some have: `_given` has those that
    came by themselves, with their counts, `_summed` the row up to which each kind was summed up. `_fetched` are rows
    of the history that a sum which is still to come may count once more.

    Only under overload is that not exact: what "(various)" stands for may come again after a gap, one by one, and of a
    row of the history that counts several, as many as were added while it was read may be left out.
    """

    def __init__(self) -> None:
        self.told_seq = 0
        self.boot_id: str | None = None
        self._seen_seq = 0
        self._history_seq = 0
        self._given: dict[int, int] = {}
        self._summed: dict[Kind, int] = {}
        self._fetched: deque[tuple[int, Kind, int]] = deque(maxlen=_KEPT_ROWS)

    def __repr__(self) -> str:
        return f"Progress(seen {self._seen_seq}, told {self.told_seq}, history {self._history_seq})"

    def is_behind(self, boot_id: str, prev_seq: int) -> bool:
        """Whether rows up to `prev_seq` may be missing, when a message of this start of the manager says so."""
        rebooted = self.boot_id not in (None, boot_id)
        self.boot_id = boot_id
        # What the last manager held back to be summed up went down with it.
        return rebooted or prev_seq > max(self._seen_seq, self._history_seq)

    def admit_row(self, row: BusEvent) -> BusEvent | None:
        """A row of the history; None when it was had before."""
        kind = kind_of(row.event)
        had = self._given.get(row.seq, 0)
        if row.seq <= self._summed.get(kind, 0) or had >= row.event.count:
            return None
        self._fetched.append((row.seq, kind, row.event.count))
        return _counting(row, row.event.count - had)

    def history_read(self, last_seq: int) -> bool:
        """The history was read to its end, row `last_seq`. False if it is another than before, which is to be read."""
        if last_seq < max(self._history_seq, self._seen_seq):
            self._begin_again()
            return last_seq == 0
        self._history_seq = last_seq
        self._told(last_seq)
        return True

    def admit_message(self, message: Message) -> BusEvent | None:
        """What a message adds, once `is_behind` says that nothing before it is missing; None when nothing."""
        known_seq = self._history_seq
        self._seen_seq = max(self._seen_seq, message.seq)
        found: BusEvent | None = message.event
        if message.repeats:
            if message.first_seq <= known_seq:
                found = _counting(message.event, message.repeats - self._overlap(message))
            self._summed[kind_of(message.event.event)] = message.seq
        elif message.first_seq <= known_seq or message.first_seq in self._given:
            found = None
        else:
            self._given[message.first_seq] = message.event.event.count
        self._told(message.told_seq)
        if message.told_seq >= known_seq:
            self._fetched.clear()
        return found

    def _overlap(self, message: Message) -> int:
        """How many of those that a message sums up came from the history."""
        kind = kind_of(message.event.event)
        return sum(
            count
            for seq, each, count in self._fetched
            if message.first_seq <= seq <= message.seq and kind in (each, VARIOUS_KIND)
        )

    def _told(self, seq: int) -> None:
        self.told_seq = max(self.told_seq, seq)
        if len(self._given) + len(self._summed) > _PRUNE_ABOVE:
            self._given = {row: count for row, count in self._given.items() if row > self.told_seq}
            self._summed = {kind: row for kind, row in self._summed.items() if row > self.told_seq}

    def _begin_again(self) -> None:
        """The history is another: its file was lost, and rows count from 1 again."""
        self.told_seq = self._seen_seq = self._history_seq = 0
        self._given.clear()
        self._summed.clear()
        self._fetched.clear()


def row_event(row: Mapping[str, Any], now_s: float) -> BusEvent:
    """A row of `get_errors`. Raises MalformedEvent."""
    event = parse_event(row, now_s, ahead_s=math.inf)
    return BusEvent(_integer(row, "seq"), event, event.timestamp, event.timestamp, live=False)


def _counting(event: BusEvent, count: int) -> BusEvent | None:
    return replace(event, event=replace(event.event, count=count)) if count > 0 else None


def _integer(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MalformedEvent(f"{name} is no count")
    return value


def _number(fields: Mapping[str, Any], name: str, default: float) -> float:
    value = fields.get(name)
    return float(value) if isinstance(value, (int, float)) else default

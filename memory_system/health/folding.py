"""Folding: in a storm, repeats are counted instead of kept or sent one by one. Pure.

`BroadcastFolder` decides what subscribers are sent and `RowBudget` what has a row of its own in the history.
Neither loses anything: the counts of what comes out add up to the counts of what went in. Clocks are parameters:
`now_s` is monotonic, while `first_at` and `last_at` are the events' own times.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any, Final

from memory_system.events import SEVERITIES, Event, Kind, kind_of

VARIOUS: Final = "(various)"
MAX_KEYS: Final = 10_000
MAX_KINDS: Final = 1_000
ROW_KEYS: Final = 100

RowKey = tuple[str, str, str, str]  # agent, error_type, what it is about, severity

_RANKS: Final = {severity: rank for rank, severity in enumerate(SEVERITIES)}


@dataclass(frozen=True, slots=True)
class Broadcast:
    """One message for subscribers.

    `event.count` is how many events it stands for. `seq` is the highest row id decided on so far, `prev_seq` the
    `seq` of the message before: who last saw less than `prev_seq` has missed something. `first_seq` is the lowest row
    it stands for. Every row up to `told_seq` has been told of, with this message at the latest: a reader that misses
    something asks from there. `repeats` is 0 for an event that is told by itself; otherwise the message sums up as
    many from `first_at` to `last_at`, and its text is that of the first of the worst.
    """

    seq: int
    prev_seq: int
    first_seq: int
    told_seq: int
    event: Event
    repeats: int
    first_at: float
    last_at: float

    def fields(self) -> dict[str, Any]:
        """The message as it travels; `repeats`, `first_at`, `last_at` only where it sums up."""
        found = {
            "seq": self.seq,
            "prev_seq": self.prev_seq,
            "first_seq": self.first_seq,
            "told_seq": self.told_seq,
            **self.event.fields(),
        }
        if self.repeats:
            found |= {"repeats": self.repeats, "first_at": self.first_at, "last_at": self.last_at}
        return found


@dataclass(slots=True)
class _Sum:
    """Events that wait to be told together."""

    worst: Event | None = None
    count: int = 0
    first_seq: int | None = None
    first_at: float = math.inf
    last_at: float = -math.inf
    told: bool = False

    def add(self, event: Event, first_at: float | None = None, last_at: float | None = None) -> None:
        self.count += event.count
        self.first_at = min(self.first_at, event.timestamp if first_at is None else first_at)
        self.last_at = max(self.last_at, event.timestamp if last_at is None else last_at)
        if self.worst is None or _RANKS[event.severity] > _RANKS[self.worst.severity]:
            self.worst = event

    def event(self) -> Event:
        assert self.worst is not None
        return replace(self.worst, timestamp=self.last_at, count=self.count)


@dataclass(slots=True)
class _Fold:
    """A kind that was told of, and its repeats until `until_s`. `told`: the worst severity that was told."""

    until_s: float
    told: str
    waiting: _Sum = field(default_factory=_Sum)


class BroadcastFolder:
    """Turns committed events into messages.

    The first event of a kind (`events.kind_of`) goes out at once; repeats within `fold_s` are summed up in one message
    at its end, except one more severe than what was told, which goes out at once. Of one second at most
    `broadcasts_per_s` messages go out; whatever is beyond is summed up in one message under "(various)" when the
    next second begins. One agent's storm does not hide the others: sums of repeats take half of the messages at most,
    and an agent that had less than a tenth of them has up to a quarter more, together with others like it.
    `last_seq`: of the history when the manager starts.
    """

    def __init__(self, fold_s: float, broadcasts_per_s: int, last_seq: int = 0) -> None:
        self._fold_s = fold_s
        self._limit = broadcasts_per_s
        self._folds: dict[Kind, _Fold] = {}  # in the order of their ends, since all last equally long
        self._seq = self._sent_seq = last_seq
        self._second_s = -math.inf
        self._sent = self._extra = 0  # in this second, within the limit and beyond it
        self._sent_by: dict[str, int] = {}
        self._rest = _Sum()
        self._rest_kinds: set[Kind] = set()
        self._held: list[tuple[int, int, _Sum]] = []  # a heap of the lowest rows that wait
        self._numbers = itertools.count()
        self._told_seq = last_seq

    def __repr__(self) -> str:
        return f"BroadcastFolder({len(self._folds)} kinds, seq {self._sent_seq} sent)"

    @property
    def sent_seq(self) -> int:
        """`seq` of the last message."""
        return self._sent_seq

    @property
    def next_due(self) -> float | None:
        """When `due` may have something, on the clock of `now_s`; None when nothing waits."""
        first = next(iter(self._folds.values()), None)
        fold_ends_s = math.inf if first is None else first.until_s
        rest_due_s = self._second_s + 1.0 if self._rest.count else math.inf
        due_s = min(fold_ends_s, rest_due_s)
        return None if due_s == math.inf else due_s

    def admit(self, seq: int, event: Event, now_s: float) -> list[Broadcast]:
        """What goes out when this event has been committed as row `seq`."""
        out = self.due(now_s)
        self._seq = max(self._seq, seq)
        kind = kind_of(event)
        fold = self._folds.get(kind)
        if fold is None:
            self._first(kind, seq, event, now_s, out)
        elif _RANKS[event.severity] > _RANKS[fold.told] and self._take(event.agent, self._limit):
            fold.told = event.severity
            out.append(self._single(seq, event))
        else:
            self._hold(fold.waiting, seq, event)
        return out

    def due(self, now_s: float) -> list[Broadcast]:
        """What goes out because its time has come."""
        out: list[Broadcast] = []
        if now_s >= self._second_s + 1.0:
            self._second_s, self._sent, self._extra = now_s, 0, 0
            self._sent_by.clear()
            self._send_rest(out)
        while self._folds:
            kind, fold = next(iter(self._folds.items()))
            if fold.until_s > now_s:
                break
            del self._folds[kind]
            if fold.waiting.count:
                self._repeats(kind, fold.waiting, now_s, out)
        return out

    def flush(self, now_s: float) -> list[Broadcast]:
        """Everything that still waits, whatever the limits: the manager stops."""
        out = self.due(now_s)
        out += [self._summed_up(fold.waiting) for fold in self._folds.values() if fold.waiting.count]
        self._folds.clear()
        self._send_rest(out)
        return out

    def _first(self, kind: Kind, seq: int, event: Event, now_s: float, out: list[Broadcast]) -> None:
        if len(self._folds) < MAX_KEYS and self._take(event.agent, self._limit):
            out.append(self._single(seq, event))
            if self._fold_s > 0:
                self._folds[kind] = _Fold(now_s + self._fold_s, event.severity)
        else:
            self._hold(self._rest, seq, event)
            self._note_kind(kind)

    def _repeats(self, kind: Kind, waiting: _Sum, now_s: float, out: list[Broadcast]) -> None:
        event = waiting.event()
        if self._take(event.agent, max(1, self._limit // 2)):
            out.append(self._summed_up(waiting))
            self._folds[kind] = _Fold(now_s + self._fold_s, event.severity)
            return
        assert waiting.first_seq is not None
        self._hold(self._rest, waiting.first_seq, event, waiting.first_at, waiting.last_at)
        self._note_kind(kind)
        waiting.told = True  # by the rest, from now on

    def _take(self, agent: str, limit: int) -> bool:
        """Whether one more message of this agent goes out in this second; if so, it is counted."""
        sent_by = self._sent_by.get(agent, 0)
        if self._sent < limit:
            self._sent += 1
        elif sent_by < max(1, self._limit // 10) and self._extra < max(1, self._limit // 4):
            self._extra += 1
        else:
            return False
        self._sent_by[agent] = sent_by + 1
        return True

    def _hold(
        self, waiting: _Sum, seq: int, event: Event, first_at: float | None = None, last_at: float | None = None
    ) -> None:
        waiting.add(event, first_at, last_at)
        if waiting.first_seq is None or seq < waiting.first_seq:
            waiting.first_seq = seq
            heapq.heappush(self._held, (seq, next(self._numbers), waiting))

    def _note_kind(self, kind: Kind) -> None:
        if len(self._rest_kinds) < MAX_KINDS:
            self._rest_kinds.add(kind)

    def _send_rest(self, out: list[Broadcast]) -> None:
        if not self._rest.count:
            return
        kinds = len(self._rest_kinds)
        several = f"{kinds} kinds" if kinds < MAX_KINDS else "many kinds"
        event = replace(
            self._rest.event(),
            agent=VARIOUS,
            error_type=VARIOUS,
            message=f"{self._rest.count} errors of {several}, more than are told one by one",
            request_id=None,
            details={"kinds": kinds},
        )
        out.append(self._summed_up(self._rest, event))
        self._sent += 1
        self._rest = _Sum()
        self._rest_kinds = set()

    def _summed_up(self, waiting: _Sum, event: Event | None = None) -> Broadcast:
        assert waiting.first_seq is not None
        waiting.told = True
        event = event or waiting.event()
        return self._send(waiting.first_seq, event, waiting.count, waiting.first_at, waiting.last_at)

    def _single(self, seq: int, event: Event) -> Broadcast:
        return self._send(seq, event, 0, event.timestamp, event.timestamp)

    def _send(self, first_seq: int, event: Event, repeats: int, first_at: float, last_at: float) -> Broadcast:
        while self._held and self._held[0][2].told:
            heapq.heappop(self._held)
        # A shared row of the history may grow after it was told of; that makes it no row that was not.
        self._told_seq = max(self._told_seq, self._held[0][0] - 1 if self._held else self._seq)
        message = Broadcast(self._seq, self._sent_seq, first_seq, self._told_seq, event, repeats, first_at, last_at)
        self._sent_seq = self._seq
        return message


@dataclass(slots=True)
class RowBudget:
    """Which events of one second have a row of their own: the first `rows_per_s`. The rest is counted in shared rows,
    one for each kind and severity, or under "(various)" beyond ROW_KEYS of these.

    One agent's storm does not hide the others: an agent with less than a fiftieth of the rows has up to a tenth more,
    together with others like it. `rows`: the shared rows of this second, by key, which the caller fills in.
    """

    rows_per_s: int
    second_s: float = -math.inf
    used: int = 0
    extra: int = 0
    used_by: dict[str, int] = field(default_factory=dict)
    rows: dict[RowKey, int] = field(default_factory=dict)
    keys: set[RowKey] = field(default_factory=set)

    def begin(self, now_s: float) -> RowBudget:
        """The budget to plan a group with; it replaces this one when the group has been committed."""
        if not 0.0 <= now_s - self.second_s < 1.0:
            return RowBudget(self.rows_per_s, second_s=now_s)
        return replace(self, used_by=dict(self.used_by), rows=dict(self.rows), keys=set(self.keys))

    def place(self, event: Event) -> RowKey | None:
        """None for a row of its own, else the key of the shared row."""
        if self._take(event.agent):
            return None
        key = (*kind_of(event), event.severity)
        if key not in self.keys:
            if len(self.keys) >= ROW_KEYS:
                return (VARIOUS, VARIOUS, "", event.severity)
            self.keys.add(key)
        return key

    def _take(self, agent: str) -> bool:
        used_by = self.used_by.get(agent, 0)
        if self.used < self.rows_per_s:
            self.used += 1
        elif used_by < max(1, self.rows_per_s // 50) and self.extra < max(1, self.rows_per_s // 10):
            self.extra += 1
        else:
            return False
        self.used_by[agent] = used_by + 1
        return True

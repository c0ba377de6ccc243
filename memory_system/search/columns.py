"""The fields that most filters name, held as numpy columns: one slot for each row that can be searched.

A slot is reused after its row is gone. Masks of scopes that were asked for are kept, and patched as rows change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from memory_system.filters import And, Condition, Filter, Not, conditions, dig, parse_path
from memory_system.search.coding import Codes, Coding, take_apart
from memory_system.search.masks import KeptMasks, Where
from memory_system.search.rows import CODED, Row, Rows
from memory_system.search.scope import Scope
from memory_system.search.siblings import NONE, Siblings
from memory_system.search.speakers import Speakers

Mask = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]

_ORDER: Final = {"gt": np.greater, "gte": np.greater_equal, "lt": np.less, "lte": np.less_equal}
_START: Final = 1024


class Columns:
    """Rows in slots. Not thread-safe: the owner holds a lock around every call."""

    def __init__(self, metadata_keys: Sequence[str] = ()) -> None:
        self._paths = {path for key in metadata_keys if (path := parse_path(key)) is not None}
        names: list[str | tuple[str, ...]] = [*CODED, *self._paths]
        self._codings: dict[str | tuple[str, ...], Coding] = {name: Coding() for name in names}
        self._codes: dict[str | tuple[str, ...], Codes] = {name: np.zeros(_START, np.int32) for name in names}
        self.row_ids: Ids = np.zeros(_START, np.int64)
        self.digests: npt.NDArray[np.void] = np.zeros(_START, "V16")
        self.has_vector: Mask = np.zeros(_START, np.bool_)
        self._alive: Mask = np.zeros(_START, np.bool_)
        self.expires = np.full(_START, np.inf)  # epoch seconds
        self.occurred_at = np.full(_START, np.nan)  # epoch seconds
        self.happened_at = np.zeros(_START)  # when it occurred, or else when it was created
        self.siblings = Siblings()
        self.speakers = Speakers()
        self._lacking: npt.NDArray[np.int64] = np.zeros(8, np.int64)  # rows without a vector, by namespace
        self._expiring = 0  # rows that expire some day
        self._kept = KeptMasks()
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._top = 0

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        return f"<Columns rows={len(self)} slots={self._top}>"

    @property
    def top(self) -> int:
        """The number of slots ever used; masks have this length."""
        return self._top

    def slot(self, row_id: int) -> int | None:
        return self._slots.get(row_id)

    def slots(self, row_ids: Iterable[int]) -> Ids:
        """The slots of those of the rows that are held, in the order given."""
        return np.array([slot for row_id in row_ids if (slot := self._slots.get(row_id)) is not None], np.int64)

    def namespaces(self, slots: npt.NDArray[np.integer[Any]]) -> tuple[list[str], Codes]:
        """Names, and for each slot which of them is its row's."""
        return self._codings["namespace"].values, self._codes["namespace"][slots]

    def lookup(self, row_ids: Ids) -> Ids:
        """The slot of each row, -1 where the row is not held; for many rows at once."""
        held = np.flatnonzero(self._alive[: self._top])
        if not len(held):
            return np.full(len(row_ids), -1, np.int64)
        order = held[np.argsort(self.row_ids[held], kind="stable")]
        at = np.minimum(np.searchsorted(self.row_ids[order], row_ids), len(order) - 1)
        return np.where(self.row_ids[order[at]] == row_ids, order[at], -1)

    def alive(self) -> Ids:
        """The slots of all rows."""
        return np.flatnonzero(self._alive[: self._top])

    def put(self, row: Row) -> int:
        """Insert or replace a row; its slot. A changed content takes the vector away."""
        slot = self._slots.get(row.row_id)
        known = slot is not None
        if slot is None:
            slot = self._new_slot(row.row_id)
        else:
            self._count_lacking(slot, -int(not self.has_vector[slot]))
            self._expiring -= bool(np.isfinite(self.expires[slot]))
        if self.digests[slot].tobytes() != row.digest:
            self.has_vector[slot] = False
            self.digests[slot] = np.void(row.digest)
        self.expires[slot] = np.inf if row.expires_at is None else row.expires_at
        self._expiring += row.expires_at is not None
        self.occurred_at[slot] = np.nan if row.occurred_at is None else row.occurred_at
        self._place(slot, row, known)
        self.speakers.put(slot, row.row_id, row.merged_into, self._slots)
        self._alive[slot] = True
        self._count_lacking(slot, int(not self.has_vector[slot]))
        self._kept.note(slot)
        return slot

    def _place(self, slot: int, row: Row, known: bool) -> None:
        """Write a row's values, and put it among its siblings. Mostly what is put again has only got its vector."""
        happened_at = row.created_at if row.occurred_at is None else row.occurred_at
        moves = not known or self.happened_at[slot] != happened_at
        family = self._family(slot)
        for name, coding in self._codings.items():
            value = dig(row.metadata, name) if isinstance(name, tuple) else getattr(row, name)
            codes = self._codes[name]
            if known:
                if value.__class__ is str and coding.values[codes[slot]] == value:
                    continue
                moves = moves or name in ("namespace", "parent_id")
                coding.give_back(int(codes[slot]))
            codes[slot] = coding.take(value)
        if moves:
            if known:
                self.siblings.remove(slot, family)
            self.happened_at[slot] = happened_at
            if row.parent_id is not None:
                self.siblings.add(slot, self._family(slot), happened_at, row.row_id)

    def extend(self, rows: Rows) -> Ids:
        """Insert many rows that are not held, where none was ever removed; their slots. `settle` is to follow."""
        first, count = self._top, len(rows.row_id)
        while first + count > len(self.row_ids):
            self._grow()
        new = slice(first, first + count)
        self._top += count
        self.row_ids[new] = rows.row_id
        self.digests[new] = np.frombuffer(b"".join(rows.digest), "V16")
        self.expires[new] = [np.inf if time_s is None else time_s for time_s in rows.expires_at]
        self._expiring += int(np.count_nonzero(np.isfinite(self.expires[new])))
        self.occurred_at[new] = occurred_at = np.array(rows.occurred_at, np.float64)  # None becomes NaN
        self.happened_at[new] = np.where(np.isnan(occurred_at), rows.created_at, occurred_at)
        each, counts, at = take_apart(rows.coded)
        for field, values in zip(CODED, each, strict=True):
            self._codes[field][new] = self._codings[field].take_each(values, counts)[at]
        for path in self._paths:
            self._codes[path][new] = self._codings[path].take_each([dig(one, path) for one in rows.metadata])
        self._alive[new] = True
        self._slots.update(zip(rows.row_id, range(first, self._top), strict=True))
        slots = np.arange(first, self._top)
        self.speakers.load(slots, rows.merged_into)
        return slots

    def settle(self) -> None:
        """Put all rows of `extend` into their places below their parents, and count what lacks a vector."""
        slots = np.arange(self._top)
        none = self._codings["parent_id"].table(Condition("parent_id", (), "exists", False))
        slots = slots[~none[self._codes["parent_id"][slots]]] if len(none) else slots
        families = self._codes["namespace"][slots].astype(np.int64) << 32 | self._codes["parent_id"][slots]
        self.siblings.load(slots, families, self.happened_at[slots], self.row_ids[slots])
        self.speakers.settle(self._slots)
        self._count_all_lacking()
        self._kept.clear()

    def set_vector(self, slot: int, present: bool) -> None:
        """Note whether the slot's row has a vector."""
        if bool(self.has_vector[slot]) != present:
            self.has_vector[slot] = present
            if self._alive[slot]:
                self._count_lacking(slot, -1 if present else 1)

    def drop_vectors(self) -> None:
        """No row has a vector any more."""
        self.has_vector[:] = False
        self._count_all_lacking()

    def remove(self, row_id: int) -> int | None:
        """Forget a row; the slot that it had, or None if it was not held."""
        slot = self._slots.pop(row_id, None)
        if slot is not None:
            self._leave(slot)
            self._alive[slot] = self.has_vector[slot] = False
            self.expires[slot] = np.inf
            self._kept.note(slot)
            self.digests[slot] = np.void(bytes(16))
            self._free.append(slot)
        return slot

    def pending(self, namespace: str, leaving_out: Iterable[int] = ()) -> int:
        """How many rows of the namespace have no vector, some rows left out."""
        code = self._codings["namespace"].code(namespace)
        if not 0 <= code < len(self._lacking):
            return 0
        out = self.slots(leaving_out)
        out = out[~self.has_vector[out] & (self._codes["namespace"][out] == code)]
        return int(self._lacking[code]) - len(out)

    def missing(self) -> list[int]:
        """The row ids without a vector, newest first."""
        return sorted(self.row_ids[self._alive & ~self.has_vector].tolist(), reverse=True)

    def covers(self, node: Filter) -> bool:
        """Whether every field that the filter names is held here."""
        return all(
            condition.field == "expires_at" or (condition.path or condition.field) in self._codings
            for condition in conditions(node)
        )

    def mask(self, scope: Scope) -> Mask | None:
        """By slot, whether the row is in scope; None if the filter names a field that is not held here. Read-only, and
        good until the columns change."""
        if not self.covers(scope.filter):
            return None
        # 1 and True are equal, and mean different things in a filter: their texts differ.
        key = (scope.namespace, repr(scope.filter), scope.include_archived, scope.since_s, scope.until_s)
        allowed = self._kept.get(key, lambda where: _allowed(self, scope, where), self._top)
        return allowed & (self.expires[: self._top] > scope.now_s) if self._expiring else allowed

    def visible(self, slots: Ids, scope: Scope) -> Mask:
        """Which of the slots hold a row that the scope's namespace, time and state let pass, whatever its filter."""
        seen = (slots >= 0) & self._alive[slots] & (self.expires[slots] > scope.now_s)
        seen &= self._codes["namespace"][slots] == self._codings["namespace"].code(scope.namespace)
        if not scope.include_archived:
            seen &= self._codes["state"][slots] == self._codings["state"].code("active")
        return _mask(seen)

    def around(self, slots: Ids, reach: int) -> Ids:
        """As `Siblings.around`."""
        return self.siblings.around(slots, reach)

    def parents(self, slots: Ids) -> Ids:
        """A number for the parent of each slot's row; -1 where it has no siblings."""
        alone = (self.siblings.before[slots] == NONE) & (self.siblings.after[slots] == NONE)
        return np.where(alone, -1, self._codes["parent_id"][slots].astype(np.int64))

    def _count_lacking(self, slot: int, change: int) -> None:
        code = int(self._codes["namespace"][slot])
        if code >= len(self._lacking):
            self._lacking = np.concatenate([self._lacking, np.zeros(max(code + 1, len(self._lacking)), np.int64)])
        self._lacking[code] += change

    def _count_all_lacking(self) -> None:
        codes = self._codes["namespace"][: self._top][self._alive[: self._top] & ~self.has_vector[: self._top]]
        self._lacking = np.bincount(codes, minlength=8)

    def _new_slot(self, row_id: int) -> int:
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._top
            if slot == len(self.row_ids):
                self._grow()
            self._top += 1
        self._slots[row_id] = slot
        self.row_ids[slot] = row_id
        return slot

    def _grow(self) -> None:
        self.row_ids, self.digests, self.happened_at = map(_doubled, (self.row_ids, self.digests, self.happened_at))
        self.has_vector, self._alive = _doubled(self.has_vector), _doubled(self._alive)
        self.expires, self.occurred_at = _doubled(self.expires), _doubled(self.occurred_at)
        self._codes = {name: _doubled(codes) for name, codes in self._codes.items()}
        self.siblings.reserve(len(self.row_ids))
        self.speakers.reserve(len(self.row_ids))

    def _family(self, slot: int) -> int:
        """A number for a row's parent within its namespace."""
        return int(self._codes["namespace"][slot]) << 32 | int(self._codes["parent_id"][slot])

    def _leave(self, slot: int) -> None:
        """Take back what a row's place and values are counted by."""
        self._count_lacking(slot, -int(not self.has_vector[slot]))
        self._expiring -= bool(np.isfinite(self.expires[slot]))
        self.siblings.remove(slot, self._family(slot))
        self.speakers.remove(slot)
        for name, coding in self._codings.items():
            coding.give_back(int(self._codes[name][slot]))


def _doubled(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate([array, np.zeros_like(array)])


def _mask(array: npt.NDArray[Any]) -> Mask:
    """For the type checker: comparisons of numpy arrays are typed as Any."""
    return cast(Mask, array)


def _allowed(columns: Columns, scope: Scope, where: Where) -> Mask:
    """Which of the slots the scope lets pass, whatever expires."""
    allowed = _filter(columns, scope.filter, where)
    allowed &= columns._alive[where]
    allowed &= _equals(columns, "namespace", scope.namespace, where)
    if not scope.include_archived:
        allowed &= _equals(columns, "state", "active", where)
    if scope.since_s is not None:
        allowed &= columns.happened_at[where] >= scope.since_s
    if scope.until_s is not None:
        allowed &= columns.happened_at[where] < scope.until_s
    return allowed


def _filter(columns: Columns, node: Filter, where: Where) -> Mask:
    """Which of the slots a filter lets pass, as a fresh array."""
    if isinstance(node, Condition):
        return _condition(columns, node, where)
    if isinstance(node, Not):
        return ~_filter(columns, node.part, where)
    conjunction = isinstance(node, And)
    result = np.full(len(columns.row_ids[where]), conjunction, np.bool_)
    for part in node.parts:
        mask = _filter(columns, part, where)
        result = result & mask if conjunction else result | mask
    return result


def _condition(columns: Columns, condition: Condition, where: Where) -> Mask:
    if condition.field == "expires_at":
        return _expiry(condition, columns.expires[where])
    name = condition.path or condition.field
    if condition.op == "eq" and isinstance(condition.operand, str):
        return _equals(columns, name, condition.operand, where)
    table = columns._codings[name].table(condition)
    # Free slots keep codes of long ago: they are masked out later and need only stay inside the table here.
    codes = columns._codes[name][where]
    return _mask(np.take(table, codes, mode="clip") if len(table) else np.zeros(len(codes), np.bool_))


def _equals(columns: Columns, name: str | tuple[str, ...], text: str, where: Where) -> Mask:
    return _mask(np.equal(columns._codes[name][where], columns._codings[name].code(text)))


def _expiry(condition: Condition, expires: npt.NDArray[np.float64]) -> Mask:
    operand = condition.operand
    never = np.isinf(expires)
    if condition.op == "exists":
        return _mask(~never if operand else never)
    if condition.op in _ORDER:
        return _mask(_ORDER[condition.op](expires, cast(float, operand)) & ~never)
    values = operand if isinstance(operand, tuple) else (operand,)
    equal = np.isin(expires, [value for value in values if value is not None])
    if None in values:
        equal = equal | never
    return _mask(~equal if condition.op in ("ne", "nin") else equal)

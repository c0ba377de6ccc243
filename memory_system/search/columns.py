"""The fields that most filters name, held as numpy columns: one slot for each row that can be searched.

A slot is reused after its row is gone. Strings and metadata values are coded by a dictionary, so that a condition
is decided once for each distinct value and then looked up for each row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from memory_system.filters import And, Condition, Filter, Not, conditions, dig, holds, parse_path
from memory_system.search.scope import Scope

Mask = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]

CODED_FIELDS: Final = ("memory_type", "memory_tier", "state", "parent_id", "session_id", "user_id")
_ORDER: Final = {"gt": np.greater, "gte": np.greater_equal, "lt": np.less, "lte": np.less_equal}
_START: Final = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """What the index needs of a memory. `digest`: 16 bytes of its content; `expires_at`: epoch seconds."""

    row_id: int
    namespace: str
    memory_type: str
    memory_tier: str
    state: str
    expires_at: float | None
    parent_id: str | None
    session_id: str | None
    user_id: str | None
    digest: bytes
    metadata: dict[str, Any] | None = None


class Coding:
    """Values of one column to small integers. A code is free again when no row has its value."""

    def __init__(self) -> None:
        self._codes: dict[Any, int] = {}
        self._values: list[Any] = []
        self._uses: list[int] = []
        self._free: list[int] = []

    def take(self, value: Any) -> int:
        """The code of `value` for one more row."""
        key = value if isinstance(value, str) else (json.dumps(value, sort_keys=True),)
        code = self._codes.get(key)
        if code is None:
            if self._free:
                code = self._free.pop()
                self._values[code] = value
            else:
                code = len(self._values)
                self._values.append(value)
                self._uses.append(0)
            self._codes[key] = code
        self._uses[code] += 1
        return code

    def give_back(self, code: int) -> None:
        """One row less has this code."""
        self._uses[code] -= 1
        if self._uses[code] == 0:
            value = self._values[code]
            del self._codes[value if isinstance(value, str) else (json.dumps(value, sort_keys=True),)]
            self._values[code] = None
            self._free.append(code)

    def code(self, text: str) -> int:
        """The code of a string, -1 if no row has it."""
        return self._codes.get(text, -1)

    def table(self, condition: Condition) -> Mask:
        """For each code, whether the condition holds of its value."""
        return np.fromiter((holds(condition, value) for value in self._values), np.bool_, len(self._values))


class Columns:
    """Rows in slots. Not thread-safe: the owner holds a lock around every call."""

    def __init__(self, metadata_keys: Sequence[str] = ()) -> None:
        self._paths = {path for key in metadata_keys if (path := parse_path(key)) is not None}
        names: list[str | tuple[str, ...]] = ["namespace", *CODED_FIELDS, *self._paths]
        self._codings: dict[str | tuple[str, ...], Coding] = {name: Coding() for name in names}
        self._codes: dict[str | tuple[str, ...], Codes] = {name: np.zeros(_START, np.int32) for name in names}
        self.row_ids: Ids = np.zeros(_START, np.int64)
        self.digests: npt.NDArray[np.void] = np.zeros(_START, "V16")
        self.has_vector: Mask = np.zeros(_START, np.bool_)
        self._alive: Mask = np.zeros(_START, np.bool_)
        self._expires = np.full(_START, np.inf)
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
        get = self._slots.get
        return np.array([slot for row_id in row_ids if (slot := get(row_id)) is not None], np.int64)

    def put(self, row: Row) -> int:
        """Insert or replace a row; its slot. A changed content takes the vector away."""
        slot = self._slots.get(row.row_id)
        if slot is None:
            slot = self._new_slot(row.row_id)
        else:
            self._release_codes(slot)
        if self.digests[slot].tobytes() != row.digest:
            self.has_vector[slot] = False
            self.digests[slot] = np.void(row.digest)
        self._expires[slot] = np.inf if row.expires_at is None else row.expires_at
        for name, coding in self._codings.items():
            value = dig(row.metadata, name) if isinstance(name, tuple) else getattr(row, name)
            self._codes[name][slot] = coding.take(value)
        self._alive[slot] = True
        return slot

    def remove(self, row_id: int) -> int | None:
        """Forget a row; the slot that it had, or None if it was not held."""
        slot = self._slots.pop(row_id, None)
        if slot is not None:
            self._release_codes(slot)
            self._alive[slot] = self.has_vector[slot] = False
            self.digests[slot] = np.void(bytes(16))
            self._free.append(slot)
        return slot

    def pending(self, namespace: str, leaving_out: Iterable[int] = ()) -> int:
        """How many rows of the namespace have no vector, some rows left out."""
        top = self._top
        lacking = self._alive[:top] & ~self.has_vector[:top] & self._equals("namespace", namespace)
        lacking[self.slots(leaving_out)] = False
        return int(np.count_nonzero(lacking))

    def missing(self) -> list[int]:
        """The row ids without a vector, newest first."""
        rows = self.row_ids[: self._top][self._alive[: self._top] & ~self.has_vector[: self._top]]
        return sorted(rows.tolist(), reverse=True)

    def covers(self, node: Filter) -> bool:
        """Whether every field that the filter names is held here."""
        return all(
            condition.field == "expires_at" or (condition.path or condition.field) in self._codings
            for condition in conditions(node)
        )

    def mask(self, scope: Scope) -> Mask | None:
        """By slot, whether the row is in scope; None if the filter names a field that is not held here."""
        if not self.covers(scope.filter):
            return None
        allowed = self._filter(scope.filter)
        allowed &= self._alive[: self._top]
        allowed &= self._equals("namespace", scope.namespace)
        allowed &= self._expires[: self._top] > scope.now_s
        if not scope.include_archived:
            allowed &= self._equals("state", "active")
        return allowed

    def _filter(self, node: Filter) -> Mask:
        """A fresh mask of the slots that a filter lets pass."""
        if isinstance(node, Condition):
            return self._condition(node)
        if isinstance(node, Not):
            return ~self._filter(node.part)
        conjunction = isinstance(node, And)
        result = np.full(self._top, conjunction, np.bool_)
        for part in node.parts:
            mask = self._filter(part)
            result = result & mask if conjunction else result | mask
        return result

    def _condition(self, condition: Condition) -> Mask:
        if condition.field == "expires_at":
            return self._expiry(condition)
        name = condition.path or condition.field
        if condition.op == "eq" and isinstance(condition.operand, str):
            return self._equals(name, condition.operand)
        table = self._codings[name].table(condition)
        # Free slots keep codes of long ago: they are masked out later and need only stay inside the table here.
        return _mask(np.take(table, self._codes[name][: self._top], mode="clip") if len(table) else table)

    def _equals(self, name: str | tuple[str, ...], text: str) -> Mask:
        return _mask(np.equal(self._codes[name][: self._top], self._codings[name].code(text)))

    def _expiry(self, condition: Condition) -> Mask:
        expires, operand = self._expires[: self._top], condition.operand
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
        def doubled(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.concatenate([array, np.zeros_like(array)])

        self.row_ids, self.digests = doubled(self.row_ids), doubled(self.digests)
        self.has_vector, self._alive = doubled(self.has_vector), doubled(self._alive)
        self._expires = doubled(self._expires)
        self._codes = {name: doubled(codes) for name, codes in self._codes.items()}

    def _release_codes(self, slot: int) -> None:
        for name, coding in self._codings.items():
            coding.give_back(int(self._codes[name][slot]))


def _mask(array: npt.NDArray[Any]) -> Mask:
    """For the type checker: comparisons of numpy arrays are typed as Any."""
    return cast(Mask, array)

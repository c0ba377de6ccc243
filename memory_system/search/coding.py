"""Values of a column as small integers, so that a condition is decided once for each distinct value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from memory_system.filters import Condition, holds

Codes = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


_NULL: Final = ("null",)


def _key(value: Any) -> str | tuple[str]:
    if value is None:
        return _NULL
    return value if isinstance(value, str) else (json.dumps(value, sort_keys=True),)


def take_apart(coded: Sequence[str]) -> tuple[list[tuple[Any, ...]], list[int], npt.NDArray[np.int64]]:
    """JSON arrays of the values of many rows, mostly the same ones again: the values of each of the different arrays,
    by column, how many rows have them, and which of them each row has."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(coded))}
    at = np.fromiter(map(numbers.__getitem__, coded), np.int64, len(coded))
    return list(zip(*json.loads(f"[{','.join(numbers)}]"), strict=True)), np.bincount(at).tolist(), at


class Coding:
    """Values of one column to small integers. A code is free again when no row has its value."""

    def __init__(self) -> None:
        self._codes: dict[str | tuple[str], int] = {}
        self._values: list[Any] = []
        self._uses: list[int] = []
        self._free: list[int] = []

    def __repr__(self) -> str:
        return f"<Coding values={len(self._codes)}>"

    @property
    def values(self) -> list[Any]:
        """By code; None where a code is free."""
        return self._values

    def take(self, value: Any, rows: int = 1) -> int:
        """The code of `value` for so many more rows."""
        key = _key(value)
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
        self._uses[code] += rows
        return code

    def take_each(self, values: Sequence[Any], rows: Sequence[int] | None = None) -> Codes:
        """The codes of the values of many more rows; `rows`: how many of them have each value, one if not told."""
        keys = [value if value.__class__ is str else _key(value) for value in values]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        at = np.array(list(map(numbers.__getitem__, keys)), np.int64)
        uses = np.bincount(at, rows, len(numbers)).astype(np.int64).tolist()
        distinct = (key if isinstance(key, str) else json.loads(key[0]) for key in numbers)
        codes = [self.take(value, count) for value, count in zip(distinct, uses, strict=True)]
        return np.array(codes, np.int32)[at]

    def give_back(self, code: int) -> None:
        """One row less has this code."""
        self._uses[code] -= 1
        if self._uses[code] == 0:
            del self._codes[_key(self._values[code])]
            self._values[code] = None
            self._free.append(code)

    def code(self, text: str) -> int:
        """The code of a string, -1 if no row has it."""
        return self._codes.get(text, -1)

    def table(self, condition: Condition) -> Flags:
        """For each code, whether the condition holds of its value."""
        operands = condition.operand if isinstance(condition.operand, tuple) else (condition.operand,)
        texts = [operand for operand in operands if isinstance(operand, str)]
        if condition.op in ("eq", "in") and len(texts) == len(operands):
            table = np.zeros(len(self._values), np.bool_)
            table[[code for text in texts if (code := self._codes.get(text)) is not None]] = True
            return table
        return np.fromiter((holds(condition, value) for value in self._values), np.bool_, len(self._values))

"""The filter grammar: what a caller may ask of a memory's fields. Pure; `storage/filter_sql.py` turns it into SQL.

    {"memory_type": "episode", "importance": {"gte": 0.4}, "tags": {"any": ["a", "b"]},
     "metadata.topic": {"in": ["x", "y"]}, "or": [{...}, {...}], "not": {...}}

Several keys of a map all have to hold. `{"field": value}` is short for `{"field": {"eq": value}}`. Fields are those
of a memory record and `metadata.` paths: keys joined by dots, descending through objects only; a dot or backslash
inside a key is written `\\.` or `\\\\`.

What the operators mean:

- A missing metadata path and null are the same thing, as is a null field. `eq null` and `exists false` are true of
  it, `eq`, `in`, `contains`, `any`, `all` and the comparisons with anything else are false, `ne` and `nin` true.
- Types are never converted: a string equals no number, and a boolean is no number. 1 equals 1.0.
- `gt gte lt lte` compare numbers with numbers, and in metadata also strings with strings, by code point.
- `contains` is a substring of a string (case matters) or an element of a list.
- `any` and `all`: at least one, or each, of the operands is an element of the list. No list, no match.
- `tags` counts as missing when it is empty.
- `importance` is the importance now, after decay.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, cast

from memory_system.errors import InvalidFilter
from memory_system.models import Memory
from memory_system.protocol import MAX_DEPTH

MAX_NODES: Final = 256
MAX_OPERANDS: Final = 1000

Scalar = str | int | float | bool | None

EQUALITY: Final = ("eq", "ne", "in", "nin", "exists")
ORDERING: Final = ("gt", "gte", "lt", "lte")
MEMBERSHIP: Final = ("contains", "any", "all")
LIST_OPERATORS: Final = frozenset({"in", "nin", "any", "all"})
OPERATORS: Final = frozenset((*EQUALITY, *ORDERING, *MEMBERSHIP))
CONNECTIVES: Final = frozenset({"and", "or", "not"})

# Kind of field -> the operators it takes.
APPLICABLE: Final[dict[str, frozenset[str]]] = {
    "text": frozenset((*EQUALITY, "contains")),
    "integer": frozenset((*EQUALITY, *ORDERING)),
    "real": frozenset((*EQUALITY, *ORDERING)),
    "tags": frozenset((*MEMBERSHIP, "exists")),
    "metadata": OPERATORS,
}
FIELDS: Final[dict[str, str]] = {
    "memory_id": "text",
    "content": "text",
    "memory_type": "text",
    "memory_tier": "text",
    "importance": "real",
    "access_count": "integer",
    "last_accessed_at": "real",
    "created_at": "real",
    "updated_at": "real",
    "occurred_at": "real",
    "expires_at": "real",
    "tags": "tags",
    "parent_id": "text",
    "session_id": "text",
    "user_id": "text",
    "created_by": "text",
    "version": "integer",
    "state": "text",
}
# Fields with a closed set of values, where any other value is a slip of the caller's.
_CLOSED: Final = {"memory_tier": ("short", "medium", "long"), "state": ("active", "archived")}
_METADATA: Final = "metadata."
_KEY = re.compile(r"((?:[^.\\]|\\[.\\])+)(\.(?=.)|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Condition:
    """One test of one field. `path` is the keys below metadata, empty for other fields."""

    field: str
    path: tuple[str, ...]
    op: str
    operand: Scalar | tuple[Scalar, ...]

    @property
    def kind(self) -> str:
        return "metadata" if self.path else FIELDS[self.field]


@dataclass(frozen=True, slots=True)
class And:
    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Or:
    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    part: Filter


Filter = Condition | And | Or | Not

MATCH_ALL: Final = And(())


def parse_filter(raw: Any) -> Filter:
    """The filter that `raw` (decoded JSON or msgpack, None for no filter) stands for. Raises InvalidFilter."""
    return MATCH_ALL if raw is None else _Parser().parse(raw, 1)


def conditions(node: Filter) -> list[Condition]:
    """Every condition of the filter, in order."""
    if isinstance(node, Condition):
        return [node]
    parts = (node.part,) if isinstance(node, Not) else node.parts
    return [found for part in parts for found in conditions(part)]


def parse_path(text: str) -> tuple[str, ...] | None:
    """The keys of a metadata path (`a.b`, without `metadata.`), or None if it is malformed."""
    keys, at = [], 0
    while at < len(text):
        match = _KEY.match(text, at)
        if match is None:
            return None
        keys.append(re.sub(r"\\(.)", r"\1", match[1]))
        at = match.end()
    return tuple(keys) or None


class _Parser:
    def __init__(self) -> None:
        self._nodes = 0

    def parse(self, raw: Any, depth: int) -> Filter:
        if not isinstance(raw, dict):
            raise InvalidFilter(f"a filter is a map of fields, not {_type_name(raw)}")
        if depth > MAX_DEPTH:
            raise InvalidFilter(f"the filter is nested more than {MAX_DEPTH} deep")
        parts: list[Filter] = []
        for key, value in raw.items():
            if not isinstance(key, str):
                raise InvalidFilter(f"a filter's keys are field names, not {_type_name(key)}")
            parts.extend([self._connective(key, value, depth)] if key in CONNECTIVES else self._field(key, value))
        self._count(1)
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def _count(self, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise InvalidFilter(f"the filter has more than {MAX_NODES} parts")

    def _connective(self, name: str, value: Any, depth: int) -> Filter:
        if name == "not":
            return Not(self.parse(value, depth + 1))
        if not isinstance(value, list | tuple) or not value:
            raise InvalidFilter(f"`{name}` takes a list of at least one filter", operator=name)
        parts = tuple(self.parse(part, depth + 1) for part in value)
        return And(parts) if name == "and" else Or(parts)

    def _field(self, name: str, value: Any) -> list[Filter]:
        path = _resolve(name)
        tests = value if isinstance(value, dict) else {"eq": value}
        if not tests:
            raise InvalidFilter(f"`{_shown(name)}` has no operator", field=_shown(name))
        self._count(len(tests))
        return [_condition(name, path, op, operand) for op, operand in tests.items()]


def _resolve(name: str) -> tuple[str, ...]:
    """The metadata path of a field name, empty for a field of the record."""
    if name in FIELDS:
        return ()
    path = parse_path(name.removeprefix(_METADATA)) if name.startswith(_METADATA) else None
    if path is None:
        _unknown("field", name, [*FIELDS, *CONNECTIVES, "metadata.<key>"], field=_shown(name))
    if len(path) > MAX_DEPTH:
        raise InvalidFilter(f"metadata is at most {MAX_DEPTH} levels deep", field=_shown(name))
    if "\0" in name or not _encodable(name):
        raise InvalidFilter("a metadata path has a character that metadata cannot have", field=_shown(name))
    return path


def _condition(name: str, path: tuple[str, ...], op: Any, operand: Any) -> Condition:
    kind = "metadata" if path else FIELDS[name]
    if op not in OPERATORS:
        _unknown("operator", op, sorted(APPLICABLE[kind]), field=_shown(name), operator=_shown(op))
    if op not in APPLICABLE[kind]:
        takes = ", ".join(sorted(APPLICABLE[kind]))
        raise InvalidFilter(f"`{op}` does not apply to `{_shown(name)}`, which takes: {takes}", field=name, operator=op)
    return Condition(name, path, op, _operand(name, kind, op, operand))


def _operand(name: str, kind: str, op: str, operand: Any) -> Scalar | tuple[Scalar, ...]:
    if op == "exists":
        if not isinstance(operand, bool):
            _refuse(name, op, "takes true or false")
        return operand
    if op not in LIST_OPERATORS:
        return _scalar(name, kind, op, operand, nullable=op in ("eq", "ne"))
    if not isinstance(operand, list | tuple) or not operand:
        _refuse(name, op, "takes a list of at least one value")
    if len(operand) > MAX_OPERANDS:
        _refuse(name, op, f"takes at most {MAX_OPERANDS} values")
    return tuple(_scalar(name, kind, op, item, nullable=op in ("in", "nin")) for item in operand)


def _scalar(name: str, kind: str, op: str, value: Any, *, nullable: bool) -> Scalar:
    """One checked operand. Raises InvalidFilter when the field or the operator cannot take it."""
    if value is None and nullable:
        return None
    if isinstance(value, str) and not _encodable(value):
        _refuse(name, op, "got text that is not valid Unicode")
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if numeric and not (math.isfinite(value) and -(2**63) <= value < 2**63):
        _refuse(name, op, "takes finite numbers of 64 bits")
    if kind in ("integer", "real"):
        if not numeric:
            _refuse(name, op, f"takes a number, not {_type_name(value)}")
        return float(value) if kind == "real" else value
    if kind == "metadata" and ((isinstance(value, bool) and op not in ORDERING) or numeric):
        return cast(Scalar, value)
    if not isinstance(value, str):
        _refuse(name, op, f"takes a {'string or number' if kind == 'metadata' else 'string'}, not {_type_name(value)}")
    if name in _CLOSED and op != "contains" and value not in _CLOSED[name]:
        _refuse(name, op, f"takes one of {', '.join(_CLOSED[name])}")
    return value


def _refuse(name: str, op: str, why: str) -> NoReturn:
    raise InvalidFilter(f"`{op}` on `{_shown(name)}` {why}", field=_shown(name), operator=op)


def _unknown(what: str, given: Any, known: Sequence[str], **details: Any) -> NoReturn:
    near = difflib.get_close_matches(str(given)[:128], known, 1, 0.5)
    suggestion = {"suggestion": near[0]} if near else {}
    ask = f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(known)}"
    raise InvalidFilter(f"unknown {what} `{_shown(given)}`{ask}", **details, **suggestion)


def _shown(name: Any) -> str:
    """A caller's name, fit for a message: short and encodable."""
    return str(name)[:128].encode("utf-8", "replace").decode()


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _type_name(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "a map"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


# ---- the meaning, in Python: what the SQL and the in-memory columns are held equal to ----


def matches(node: Filter, record: Memory, *, importance: float) -> bool:
    """Whether the filter holds of a memory whose importance is now `importance` (see lifecycle.importance_at)."""
    if isinstance(node, Condition):
        return holds(node, _value(node, record, importance))
    if isinstance(node, Not):
        return not matches(node.part, record, importance=importance)
    results = (matches(part, record, importance=importance) for part in node.parts)
    return all(results) if isinstance(node, And) else any(results)


def _value(condition: Condition, record: Memory, importance: float) -> Any:
    if condition.path:
        return dig(record.metadata, condition.path)
    if condition.field == "importance":
        return importance
    if condition.field == "tags":
        return record.tags or None
    return getattr(record, condition.field)


def dig(metadata: Any, path: Sequence[str]) -> Any:
    """The value at a path of keys, None if some part of the path is missing."""
    for key in path:
        metadata = metadata.get(key) if isinstance(metadata, dict) else None
    return metadata


def holds(condition: Condition, value: Any) -> bool:
    """Whether a condition is true of a field's value (None for null or missing)."""
    return _TESTS[condition.op](value, condition.operand)


def _same(value: Any, operand: Any) -> bool:
    return _order_kind(value) == _order_kind(operand) and bool(value == operand)


def _order_kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "bool" if value is not None else "null"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else "structure"


def _compare(order: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda value, operand: _order_kind(value) == _order_kind(operand) and order(value, operand)


def _in(value: Any, operands: Any) -> bool:
    return any(_same(value, operand) for operand in operands)


def _contains(value: Any, operand: Any) -> bool:
    if isinstance(value, str):
        return isinstance(operand, str) and operand in value
    return isinstance(value, list) and any(_same(item, operand) for item in value)


def _any(value: Any, operands: Any) -> bool:
    return isinstance(value, list) and any(_contains(value, operand) for operand in operands)


def _all(value: Any, operands: Any) -> bool:
    return isinstance(value, list) and all(_contains(value, operand) for operand in operands)


_TESTS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "eq": _same,
    "ne": lambda value, operand: not _same(value, operand),
    "in": _in,
    "nin": lambda value, operands: not _in(value, operands),
    "gt": _compare(lambda value, operand: value > operand),
    "gte": _compare(lambda value, operand: value >= operand),
    "lt": _compare(lambda value, operand: value < operand),
    "lte": _compare(lambda value, operand: value <= operand),
    "contains": _contains,
    "any": _any,
    "all": _all,
    "exists": lambda value, wanted: (value is not None) == wanted,
}

"""Filters and computed importance as SQL over the table memories.

Whatever the caller wrote, values and metadata keys alike, reaches SQLite as a bound parameter. Each fragment is
either true or false, never NULL, so that `not` means what it says (`filters.matches` is the reference).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from memory_system.filters import And, Condition, Filter, Not
from memory_system.lifecycle_settings import LifecycleSettings

Sql = tuple[str, list[Any]]

# NOT NULL columns compare without a guard, which leaves their indexes usable.
_NULLABLE: Final = frozenset({"last_accessed_at", "occurred_at", "expires_at", "parent_id", "session_id", "user_id"})
_SIGNS: Final = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
# JSON paths of SQLite compare a key with its encoded form; only such keys have one form in every encoding.
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_ \-]+\Z")
_NUMBER: Final = "IN ('integer', 'real')"


def importance_sql(lifecycle: LifecycleSettings, alias: str = "m", now: str = "?") -> str:
    """An expression for the importance at the instant bound to `now` (one occurrence): lifecycle.importance_at in SQL.

    The connection must have exp(x) and ln(x).
    """
    rates = " ".join(
        f"WHEN '{tier}' THEN {float(getattr(lifecycle, tier).decay_rate)!r}" for tier in ("short", "medium", "long")
    )
    rate = f"(CASE WHEN {alias}.memory_type = 'session' THEN 0.0 ELSE CASE {alias}.memory_tier {rates} END END)"
    days = f"(max(0.0, {now} - {alias}.importance_at) / 86400.0)"
    return f"({alias}.importance * exp(-{rate} * {days} / (1.0 + ln(1.0 + {alias}.access_count))))"


def compile_filter(node: Filter, *, now_s: float, lifecycle: LifecycleSettings, alias: str = "m") -> Sql:
    """A WHERE fragment over the table memories called `alias`, and its positional parameters."""
    return _Compiler(float(now_s), lifecycle, alias).compile(node)


class _Compiler:
    def __init__(self, now_s: float, lifecycle: LifecycleSettings, alias: str) -> None:
        self._now_s = now_s
        self._lifecycle = lifecycle
        self._alias = alias

    def compile(self, node: Filter) -> Sql:
        if isinstance(node, Condition):
            return self._condition(node)
        if isinstance(node, Not):
            sql, params = self.compile(node.part)
            return f"(NOT {sql})", params
        word, empty = ("AND", "1") if isinstance(node, And) else ("OR", "0")
        return _join([self.compile(part) for part in node.parts], word, empty)

    def _condition(self, condition: Condition) -> Sql:
        if condition.kind == "metadata":
            return self._negated(condition, _Json(*_locate(f"{self._alias}.metadata", condition.path)))
        if condition.kind == "tags":
            return _tags(_Json(*_locate(f"{self._alias}.tags", ())), condition)
        return self._negated(condition, self._column(condition))

    def _column(self, condition: Condition) -> _Column:
        if condition.field == "importance":
            return _Column(importance_sql(self._lifecycle, self._alias), [self._now_s], nullable=False)
        return _Column(f"{self._alias}.{condition.field}", [], nullable=condition.field in _NULLABLE)

    def _negated(self, condition: Condition, operand: _Column | _Json) -> Sql:
        """ne and nin are exactly the opposites of eq and in."""
        if condition.op in ("ne", "nin"):
            positive = {"ne": "eq", "nin": "in"}[condition.op]
            sql, params = _positive(operand, positive, condition.operand)
            return f"(NOT {sql})", params
        return _positive(operand, condition.op, condition.operand)


class _Column:
    """A column, or an expression, of one type."""

    def __init__(self, sql: str, params: list[Any], *, nullable: bool) -> None:
        self._sql = sql
        self._params = params
        self._nullable = nullable

    def equal(self, values: Sequence[Any]) -> Sql:
        some = [value for value in values if value is not None]
        parts = [_or_false(f"{self._sql} IN ({_marks(some)})", [*self._params, *some], self._nullable)] if some else []
        if len(some) < len(values):
            parts.append(self.null())
        return _join(parts, "OR", "0")

    def null(self) -> Sql:
        return f"({self._sql} IS NULL)", list(self._params)

    def compare(self, sign: str, value: Any) -> Sql:
        return _or_false(f"{self._sql} {sign} ?", [*self._params, value], self._nullable)

    def contains(self, value: Any) -> Sql:
        return _or_false(f"instr({self._sql}, ?) > 0", [*self._params, value], self._nullable)


class _Json:
    """A value inside a JSON column: expressions for its JSON type, its SQL value and its elements."""

    def __init__(self, kind: Sql, value: Sql, elements: Sql) -> None:
        self._kind = (f"coalesce({kind[0]}, 'null')", kind[1])
        self._value = value
        self._elements = elements

    def equal(self, values: Sequence[Any]) -> Sql:
        parts = []
        for (test, chosen), sql_values in _by_kind(values).items():
            kind = (f"{self._kind[0]} {test}", self._kind[1])
            parts.append(
                kind
                if not chosen
                else _both(kind, (f"{self._value[0]} IN ({_marks(sql_values)})", [*self._value[1], *sql_values]))
            )
        return _join(parts, "OR", "0")

    def null(self) -> Sql:
        return f"({self._kind[0]} = 'null')", list(self._kind[1])

    def compare(self, sign: str, value: Any) -> Sql:
        ((test, _),) = _by_kind([value])
        return _both(
            (f"{self._kind[0]} {test}", self._kind[1]), (f"{self._value[0]} {sign} ?", [*self._value[1], value])
        )

    def contains(self, value: Any) -> Sql:
        element = self.members([value], every=False)
        if not isinstance(value, str):
            return element
        text = (f"{self._kind[0]} = 'text'", self._kind[1])
        substring = _both(text, (f"instr({self._value[0]}, ?) > 0", [*self._value[1], value]))
        return _join([element, substring], "OR", "0")

    def members(self, values: Sequence[Any], *, every: bool) -> Sql:
        """Whether the value is a list that has one of (or, with `every`, all of) `values`."""
        parts: list[Sql] = []
        for (test, chosen), sql_values in _by_kind(values).items():
            where = f"e.type {test}" + (f" AND e.value IN ({_marks(sql_values)})" if chosen else "")
            # DISTINCT: a list may hold the same value twice.
            sql = f"(SELECT count(DISTINCT e.value) FROM {self._elements[0]} AS e WHERE {where})"
            wanted = len(sql_values) if chosen and every else 1
            parts.append((f"{sql} >= {wanted}", [*self._elements[1], *(sql_values if chosen else ())]))
        found = _join(parts, "AND" if every else "OR", "0")
        return _both((f"{self._kind[0]} = 'array'", self._kind[1]), found)


def _positive(operand: _Column | _Json, op: str, value: Any) -> Sql:
    if op in _SIGNS:
        return operand.compare(_SIGNS[op], value)
    if op == "contains":
        return operand.contains(value)
    if op == "exists":
        sql, params = operand.null()
        return (f"(NOT {sql})" if value else sql), params
    if op in ("any", "all"):
        assert isinstance(operand, _Json)  # the parser lets any and all through for lists only
        return operand.members(value, every=op == "all")
    return operand.equal(value if op == "in" else [value])


def _tags(tags: _Json, condition: Condition) -> Sql:
    if condition.op == "exists":
        sql, params = tags._elements
        return f"({'' if condition.operand else 'NOT '}EXISTS (SELECT 1 FROM {sql}))", list(params)
    operand = condition.operand
    values = operand if isinstance(operand, tuple) else (operand,)
    return tags.members(values, every=condition.op == "all")


def _locate(column: str, path: Sequence[str]) -> tuple[Sql, Sql, Sql]:
    """Expressions for the JSON type, the value and the elements of what stands at `path`."""
    if all(_PLAIN_KEY.match(key) for key in path):
        bound = ["$" + "".join(f'."{key}"' for key in path)]
        return tuple((f"{name}({column}, ?)", bound) for name in ("json_type", "json_extract", "json_each"))  # type: ignore[return-value]
    sources, tests = [f"json_each({column}) AS k0"], ["k0.key = ?"]
    for depth in range(1, len(path)):
        # The CASE keeps json_each from being handed a bare string, which is no JSON.
        inner = f"CASE k{depth - 1}.type WHEN 'object' THEN k{depth - 1}.value END"
        sources.append(f"json_each({inner}) AS k{depth}")
        tests.append(f"k{depth}.key = ?")
    last = f"k{len(path) - 1}"
    rest = f"FROM {', '.join(sources)} WHERE {' AND '.join(tests)} LIMIT 1"
    array = f"(SELECT CASE {last}.type WHEN 'array' THEN {last}.value END {rest})"
    params = list(path)
    return (
        (f"(SELECT {last}.type {rest})", params),
        (f"(SELECT {last}.value {rest})", params),
        (f"json_each({array})", params),
    )


def _by_kind(values: Sequence[Any]) -> dict[tuple[str, bool], list[Any]]:
    """Distinct operands grouped by the test of the JSON type they need; the flag: the value has to be compared too."""
    groups: dict[tuple[str, bool], dict[Any, None]] = {}
    for value in values:
        if value is None or isinstance(value, bool):
            key = ({None: "= 'null'", True: "= 'true'", False: "= 'false'"}[value], False)
        else:
            key = ("= 'text'", True) if isinstance(value, str) else (_NUMBER, True)
        groups.setdefault(key, {})[value] = None
    return {key: list(group) for key, group in groups.items()}


def _or_false(sql: str, params: list[Any], nullable: bool) -> Sql:
    return (f"coalesce({sql}, 0)" if nullable else f"({sql})"), params


def _both(left: Sql, right: Sql) -> Sql:
    return f"({left[0]} AND {right[0]})", [*left[1], *right[1]]


def _join(parts: Sequence[Sql], word: str, empty: str) -> Sql:
    if not parts:
        return empty, []
    joined = f" {word} ".join(sql for sql, _ in parts)
    return f"({joined})", [param for _, params in parts for param in params]


def _marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))

"""The filter grammar, and the equality of its three evaluators: Python, SQL and columns."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from memory_system.errors import InvalidFilter
from memory_system.filters import FIELDS, MATCH_ALL, MAX_DEPTH, MAX_NODES, matches, parse_filter, parse_path
from memory_system.lifecycle import decay_rate, importance_at
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.models import Memory
from memory_system.search.columns import Columns, Row
from memory_system.search.scope import Scope
from memory_system.storage.database import register_math
from memory_system.storage.filter_sql import compile_filter, importance_sql
from tests.support.search_store import SCHEMA, digest

NOW_S = 1_000_000.0
LIFECYCLE = LifecycleSettings()


@pytest.fixture(scope="module")
def db() -> Iterator[sqlite3.Connection]:
    conn = sqlite3.connect(":memory:", isolation_level=None)
    conn.executescript(SCHEMA.read_text())
    conn.execute("PRAGMA foreign_keys = OFF")
    register_math(conn)
    yield conn
    conn.close()


def store(db: sqlite3.Connection, records: list[Memory], ascii_json: bool) -> None:
    db.execute("DELETE FROM memories")
    for record in records:
        fields = {name: getattr(record, name) for name in record.__struct_fields__}
        fields["metadata"] = json.dumps(record.metadata, ensure_ascii=ascii_json)
        fields["tags"] = json.dumps(record.tags, ensure_ascii=ascii_json)
        marks = ", ".join("?" * len(fields))
        db.execute(f"INSERT INTO memories ({', '.join(fields)}) VALUES ({marks})", [*fields.values()])


def sql_rows(db: sqlite3.Connection, raw: Any) -> set[int]:
    where, params = compile_filter(parse_filter(raw), now_s=NOW_S, lifecycle=LIFECYCLE)
    return {row_id for (row_id,) in db.execute(f"SELECT m.row_id FROM memories AS m WHERE {where}", params)}


def importance_of(record: Memory) -> float:
    rate = decay_rate(LIFECYCLE, record.memory_type, record.memory_tier)
    return importance_at(record.importance, record.importance_at, record.access_count, rate, NOW_S)


def python_rows(records: list[Memory], raw: Any) -> set[int]:
    node = parse_filter(raw)
    return {record.row_id for record in records if matches(node, record, importance=importance_of(record))}


# Small pools of values, so that conditions hit as often as they miss.
TEXTS = st.sampled_from(
    ["", "a", "ab", "A", "b", "é", "e\u0301", "日本", "a'b", 'a"b', "1", "true", "null", "%", "_", "😀"]
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 0.0, 1.0, 0.5, -0.5, 1.5, 10**12, 2**53 + 1, -(2**63), 2**63 - 1])
SCALARS = st.one_of(st.none(), st.booleans(), TEXTS, NUMBERS)
KEYS = st.sampled_from(["a", "b", "a.b", 'q"q', "é", "b\\s", "0", "two words", "$", "[0]"])
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)
METADATA = st.dictionaries(KEYS, JSON, max_size=4)
IDS = st.one_of(st.none(), TEXTS.filter(bool))
TIMES = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 0.5, NOW_S, NOW_S + 1, NOW_S - 86_400.0]))
TIERS, STATES = ("short", "medium", "long"), ("active", "archived")


def numbered(records: list[Memory]) -> list[Memory]:
    return [structs.replace(record, row_id=n, memory_id=f"m{n}") for n, record in enumerate(records, 1)]


MEMORIES = st.lists(
    st.builds(
        Memory,
        row_id=st.just(0),
        namespace=st.just("n"),
        memory_id=st.just(""),
        content=TEXTS,
        content_digest=st.just(bytes(16)),
        memory_type=st.sampled_from(["a", "b", "session"]),
        memory_tier=st.sampled_from(TIERS),
        importance=st.sampled_from([0.0, 0.5, 1.0]),
        importance_at=st.sampled_from([NOW_S, NOW_S + 5.0, NOW_S - 86_400.0, 0.0]),
        access_count=st.sampled_from([0, 1, 2, 100]),
        last_accessed_at=TIMES,
        created_at=st.sampled_from([0.0, 1.0, NOW_S]),
        updated_at=st.sampled_from([0.0, 1.0, NOW_S]),
        occurred_at=TIMES,
        expires_at=TIMES,
        tier_since=st.just(0.0),
        due_at=st.none(),
        metadata=METADATA,
        tags=st.lists(TEXTS.filter(bool), max_size=4),
        parent_id=IDS,
        session_id=IDS,
        user_id=IDS,
        created_by=TEXTS,
        version=st.sampled_from([1, 2]),
        state=st.sampled_from(STATES),
    ),
    min_size=1,
    max_size=6,
).map(numbered)


def _lists(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=1, max_size=4)


FILLED = st.one_of(st.booleans(), TEXTS, NUMBERS)
ORDERED = st.one_of(TEXTS, NUMBERS)
CLOSED = {"memory_tier": TIERS, "state": STATES, "memory_type": ("a", "b", "session")}


def _operators(kind: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Tests {operator: operand} that a kind of field takes; `values` are never null."""
    nullable = st.one_of(st.none(), values)
    choices: dict[str, st.SearchStrategy[Any]] = {"exists": st.booleans()}
    if kind != "tags":
        choices |= {"eq": nullable, "ne": nullable, "in": _lists(nullable), "nin": _lists(nullable)}
    if kind in ("integer", "real", "metadata"):
        choices |= {op: ORDERED if kind == "metadata" else values for op in ("gt", "gte", "lt", "lte")}
    if kind in ("text", "tags", "metadata"):
        choices["contains"] = values
    if kind in ("tags", "metadata"):
        choices |= {"any": _lists(values), "all": _lists(values)}
    return st.one_of([st.fixed_dictionaries({op: operand}) for op, operand in choices.items()])


def _escaped(key: str) -> str:
    return key.replace("\\", "\\\\").replace(".", "\\.")


def _values(name: str) -> st.SearchStrategy[Any]:
    if name in CLOSED:
        return st.sampled_from(CLOSED[name])
    return NUMBERS if FIELDS[name] in ("real", "integer") else TEXTS


PATHS = st.lists(KEYS, min_size=1, max_size=3).map(lambda path: "metadata." + ".".join(map(_escaped, path)))
METADATA_TESTS = st.dictionaries(PATHS, _operators("metadata", FILLED), min_size=1, max_size=1)
RECORD_TESTS = st.one_of([st.fixed_dictionaries({name: _operators(FIELDS[name], _values(name))}) for name in FIELDS])

FILTERS = st.recursive(
    st.one_of(METADATA_TESTS, RECORD_TESTS),
    lambda inner: st.one_of(
        inner.map(lambda part: {"not": part}),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"or": parts}),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"and": parts}),
    ),
    max_leaves=6,
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(records=MEMORIES, raws=st.lists(FILTERS, min_size=1, max_size=4), ascii_json=st.booleans())
def test_sql_and_reference_let_the_same_records_pass(
    db: sqlite3.Connection, records: list[Memory], raws: list[Any], ascii_json: bool
) -> None:
    store(db, records, ascii_json)
    for raw in raws:
        assert sql_rows(db, raw) == python_rows(records, raw), raw
        assert sql_rows(db, {"not": raw}) == {record.row_id for record in records} - python_rows(records, raw)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(records=MEMORIES, raw=FILTERS, archived=st.booleans(), gone=st.sets(st.integers(1, 8)))
def test_columns_and_sql_let_the_same_records_pass(
    db: sqlite3.Connection, records: list[Memory], raw: Any, archived: bool, gone: set[int]
) -> None:
    keys = ("a", "b", "a.b", "é")
    records = [record for record in records if record.memory_type != "session"]
    columns = Columns(keys)
    for record in records:
        names = ("row_id", "namespace", "memory_type", "memory_tier", "state", "expires_at", "parent_id", "session_id")
        row = Row(*(getattr(record, n) for n in names), record.user_id, digest("x"), record.metadata)
        columns.put(row)
        if record.row_id in gone:
            columns.remove(record.row_id)
    records = [record for record in records if record.row_id not in gone]
    store(db, records, ascii_json=False)
    scope = Scope("n", NOW_S, parse_filter(raw), archived)
    mask = columns.mask(scope)
    if mask is None:
        return
    where, params = scope.where(LIFECYCLE)
    expected = {row_id for (row_id,) in db.execute(f"SELECT m.row_id FROM memories AS m WHERE {where}", params)}
    assert set(columns.row_ids[: columns.top][mask].tolist()) == expected


def test_importance_in_sql_is_the_formula(db: sqlite3.Connection) -> None:
    assert "?" in importance_sql(LIFECYCLE)
    for tier in TIERS:
        for count, days in ((0, 0.0), (0, 3.0), (7, 40.0), (3, -5.0)):
            since_s = NOW_S - days * 86_400.0
            sql = f"SELECT {importance_sql(LIFECYCLE, 'm', ':now')} FROM (SELECT 'x' AS memory_type,"
            sql += " :tier AS memory_tier, 0.8 AS importance, :since AS importance_at, :count AS access_count) AS m"
            (value,) = db.execute(sql, {"now": NOW_S, "tier": tier, "since": since_s, "count": count}).fetchone()
            rate = decay_rate(LIFECYCLE, "x", tier)
            assert value == pytest.approx(importance_at(0.8, since_s, count, rate, NOW_S), rel=1e-12)


def test_sessions_do_not_decay_in_sql(db: sqlite3.Connection) -> None:
    sql = f"SELECT {importance_sql(LIFECYCLE)} FROM (SELECT 'session' AS memory_type, 'short' AS memory_tier,"
    (value,) = db.execute(
        sql + " 0.8 AS importance, 0.0 AS importance_at, 0 AS access_count) AS m", (NOW_S,)
    ).fetchone()
    assert value == 0.8


@pytest.mark.parametrize(
    ("raw", "details"),
    [
        ([], {}),
        ("x", {}),
        ({1: 2}, {}),
        ({"memory_typ": "a"}, {"field": "memory_typ", "suggestion": "memory_type"}),
        ({"row_id": 1}, {"field": "row_id"}),
        ({"metadata": {"eq": "a"}}, {"field": "metadata"}),
        ({"metadata.": "a"}, {"field": "metadata."}),
        ({"metadata.a..b": "a"}, {"field": "metadata.a..b"}),
        ({"metadata.a.": "a"}, {"field": "metadata.a."}),
        ({"metadata.a\\x": "a"}, {"field": "metadata.a\\x"}),
        ({"metadata.\0": "a"}, {}),
        ({"metadata.\ud800": "a"}, {}),
        ({"\ud800": "a"}, {}),
        ({"content": {"contain": "a"}}, {"field": "content", "operator": "contain", "suggestion": "contains"}),
        ({"tags": {"gt": "a"}}, {"field": "tags", "operator": "gt"}),
        ({"tags": "a"}, {"field": "tags", "operator": "eq"}),
        ({"content": {"gt": "a"}}, {"operator": "gt"}),
        ({"importance": {"contains": 1}}, {"operator": "contains"}),
        ({"importance": {"gt": "1"}}, {"operator": "gt"}),
        ({"importance": {"gt": True}}, {"operator": "gt"}),
        ({"importance": {"gt": None}}, {"operator": "gt"}),
        ({"importance": {"gt": float("nan")}}, {"operator": "gt"}),
        ({"created_at": {"lt": float("inf")}}, {"operator": "lt"}),
        ({"version": 2**63}, {"operator": "eq"}),
        ({"metadata.a": {"in": [2**64]}}, {"operator": "in"}),
        ({"metadata.a": {"gt": False}}, {"operator": "gt"}),
        ({"metadata.a": {"eq": {"x": 1}}}, {"operator": "eq"}),
        ({"metadata.a": [1]}, {"operator": "eq"}),
        ({"metadata.a": {"any": [None]}}, {"operator": "any"}),
        ({"metadata.a": {"contains": None}}, {"operator": "contains"}),
        ({"content": "\ud800"}, {"operator": "eq"}),
        ({"content": 1}, {"operator": "eq"}),
        ({"memory_tier": "shrot"}, {"field": "memory_tier"}),
        ({"state": {"in": ["active", "gone"]}}, {"operator": "in"}),
        ({"user_id": {"in": []}}, {"operator": "in"}),
        ({"user_id": {"in": "ab"}}, {"operator": "in"}),
        ({"user_id": {"in": ["a"] * 1001}}, {"operator": "in"}),
        ({"user_id": {"exists": 1}}, {"operator": "exists"}),
        ({"user_id": {}}, {"field": "user_id"}),
        ({"or": []}, {"operator": "or"}),
        ({"and": {"user_id": "a"}}, {"operator": "and"}),
        ({"not": [{}]}, {}),
    ],
)
def test_what_is_refused(raw: Any, details: dict[str, Any]) -> None:
    with pytest.raises(InvalidFilter) as caught:
        parse_filter(raw)
    assert details.items() <= caught.value.details.items()
    json.dumps(caught.value.details)
    str(caught.value).encode()


def test_depth_and_size_are_bounded() -> None:
    deep: dict[str, Any] = {"user_id": "a"}
    for _ in range(MAX_DEPTH - 1):
        deep = {"not": deep}
    parse_filter(deep)
    with pytest.raises(InvalidFilter, match="deep"):
        parse_filter({"not": deep})
    with pytest.raises(InvalidFilter, match="parts"):
        parse_filter({"or": [{"user_id": "a"}] * MAX_NODES})


def test_the_largest_filters_run_in_sqlite(db: sqlite3.Connection) -> None:
    store(db, [], True)
    wide = {"or": [{"metadata.a.é": {"in": [str(n), n]}} for n in range(120)]}
    assert sql_rows(db, wide) == set()
    assert sql_rows(db, {"metadata.a": {"all": [f"v{n}" for n in range(1000)]}}) == set()
    deep: dict[str, Any] = {"metadata.a": {"any": [1, "a", True]}}
    for _ in range(MAX_DEPTH - 2):
        deep = {"not": {"or": [deep]}} if MAX_DEPTH > 100 else {"or": [deep, {"tags": {"contains": "x"}}]}
    assert sql_rows(db, deep) == set()


def test_short_forms() -> None:
    assert parse_filter(None) is MATCH_ALL
    assert parse_filter({}) == MATCH_ALL
    assert parse_filter({"user_id": "a"}) == parse_filter({"user_id": {"eq": "a"}})
    assert parse_filter({"version": {"gte": 1, "lt": 3}}) == parse_filter(
        {"and": [{"version": {"gte": 1}}, {"version": {"lt": 3}}]}
    )


def test_paths() -> None:
    assert parse_path("a.b") == ("a", "b")
    assert parse_path("a\\.b.c\\\\d") == ("a.b", "c\\d")
    assert [parse_path(text) for text in ("", ".", "a.", ".a", "a..b", "a\\")] == [None] * 6


def test_user_text_never_stands_in_the_sql() -> None:
    raw = {"metadata.x') OR 1=1 --": {"in": ["'); DROP"]}, "content": {"contains": "%' OR"}, "tags": {"any": ["'x"]}}
    where, params = compile_filter(parse_filter(raw), now_s=NOW_S, lifecycle=LIFECYCLE)
    assert "DROP" not in where and "1=1" not in where and "OR 1" not in where and where.count("?") == len(params)

"""Selecting what is due: by the index of `due_at`, and nothing else."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.models import Memory
from memory_system.storage import ageing, database
from memory_system.storage.context import WriteContext
from memory_system.storage.rows import RecordView
from tests.integration.test_rebase import DAY_S, NOW_S, OLD, opened, path, stored

__all__ = ["path"]  # the fixture: a store of 400 memories


def context_of(db: object, namespace: str, settings: LifecycleSettings = OLD) -> WriteContext:
    return WriteContext(db, NOW_S, namespace, settings, RecordView(settings))  # type: ignore[arg-type]


def due_ids(path: Path, as_of_s: float, namespace: str) -> list[int]:
    found = [row for row in stored(path) if row.namespace == namespace and row.due_at is not None]
    return [row.row_id for row in found if row.due_at is not None and row.due_at <= as_of_s]


@pytest.mark.parametrize("condition", ["", " AND namespace IN (SELECT value FROM json_each('[]'))"])
def test_the_index_gives_the_range_and_the_order(path: Path, condition: str) -> None:
    with contextlib.closing(database.connect_reader(path)) as db:
        sql = f"EXPLAIN QUERY PLAN {ageing._SELECT}{condition} ORDER BY due_at, row_id LIMIT 200"
        plan = [row[3] for row in db.execute(sql, (NOW_S, NOW_S, 0))]
    assert plan[0] == "SEARCH memories USING INDEX memories_by_due (due_at>? AND due_at<?)"
    assert not any("TEMP B-TREE" in line for line in plan)


def test_doing_it_twice_changes_nothing(path: Path) -> None:
    as_of_s = NOW_S + 8 * DAY_S
    with opened(path) as db:
        first = ageing.apply(context_of(db, "n0"), due_ids(path, as_of_s, "n0"), as_of_s)
        once = stored(path)
        assert {change.kind for change in first} == {"promote", "archive"}
        assert ageing.apply(context_of(db, "n0"), [row.row_id for row in once], as_of_s) == []
        assert stored(path) == once


def test_a_run_in_parts_is_a_run_at_once(path: Path, tmp_path: Path) -> None:
    """What a run does to a memory depends neither on its slice, nor on a stop and a start between two of them."""
    as_of_s = NOW_S + 8 * DAY_S
    ids = due_ids(path, as_of_s, "n1")
    other = tmp_path / "other.db"
    with opened(path) as db:
        db.execute("VACUUM INTO ?", (str(other),))
        whole = ageing.apply(context_of(db, "n1"), ids, as_of_s)
    parts = []
    for row_id in reversed(ids):
        with opened(other) as db:
            parts += ageing.apply(context_of(db, "n1"), [row_id], as_of_s)
    assert len(whole) > 5
    assert sorted(parts, key=lambda change: change.row_id) == sorted(whole, key=lambda change: change.row_id)
    assert stored(other) == stored(path)


def test_only_the_rows_of_the_namespace_are_touched(path: Path) -> None:
    as_of_s = NOW_S + 8 * DAY_S
    before = stored(path)
    with opened(path) as db:
        ageing.apply(context_of(db, "n2"), [row.row_id for row in before], as_of_s)
    for old, new in zip(before, stored(path), strict=True):
        assert new == old or new.namespace == "n2"


def test_what_was_decided_before_a_use_is_decided_anew(path: Path) -> None:
    """Between the selection and the write the memory was used: it is not due any more and stays."""
    as_of_s = NOW_S + 8 * DAY_S
    with opened(path) as db:
        ids = due_ids(path, as_of_s, "n0")
        db.execute("UPDATE memories SET due_at = ? WHERE namespace = 'n0'", (as_of_s + 1.0,))
        before = stored(path)
        assert ageing.apply(context_of(db, "n0"), ids, as_of_s) == []
        assert stored(path) == before


def test_changes_are_logged_for_the_index_and_told_to_the_caches(path: Path) -> None:
    as_of_s = NOW_S + 8 * DAY_S
    with opened(path) as db:
        context = context_of(db, "n0")
        changes = ageing.apply(context, due_ids(path, as_of_s, "n0"), as_of_s)
    assert sorted(row_id for row_id, _ in context.log) == sorted(change.row_id for change in changes)
    assert {op for _, op in context.log} == {"put"}
    told: dict[int, Memory] = {memory.row_id: memory for memory in context.changes.written}
    assert all(told[row.row_id] == row for row in stored(path) if row.row_id in told)
    assert {change.row_id for change in changes} <= set(told)

"""A start: whatever state a store and what was derived of it are in, searches are answered as by an index that has
followed every change from the beginning, and none was derived before."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory_system.errors import StorageFailed
from memory_system.filters import parse_filter
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.search import feed, loading
from memory_system.search.engine import SearchEngine, SearchQuery
from memory_system.search.following import follow
from memory_system.search.index import SearchIndex
from memory_system.search.tokens import Tokenizer
from memory_system.search.view import View, has_vector
from memory_system.settings import SearchSettings
from memory_system.storage.database import lock_store
from memory_system.storage.first_look import FirstLook
from tests.support.search_store import (
    DIMENSION,
    MODEL,
    NOW_S,
    SearchStore,
    digest,
    open_store,
    unit_vectors,
    wait_until,
)

SETTINGS = SearchSettings(filterable_metadata=("colour",))
VECTORS = unit_vectors(64)
WORDS = ("heron", "pier", "tax", "forms", "lantern", "river", "bread", "Zürich")
# What a text may hold and JSON has to escape.
STRANGE = ("", "null", '"quoted"', "back\\slash", "two\nlines\t\x01", "nul\x00inside", "[1, 2]", "\N{SNOWMAN} ümlaut")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SearchStore]:
    yield from open_store(tmp_path / "memory.db")


def fill(store: SearchStore, count: int = 120, seed: int = 3) -> list[int]:
    """Memories with all that the index knows of one, some of them deleted, changed or merged since."""
    rng = random.Random(seed)
    rows = []
    for parent in ("p1", "p2"):
        store.add(parent, memory_id=parent, memory_type="session", created_at=NOW_S - 1000.0)
    for number in range(count):
        fields: dict[str, Any] = {
            "user_id": rng.choice([None, "u1", *STRANGE]),
            "parent_id": rng.choice([None, "p1", "p2"]),
            "memory_type": rng.choice(["turn", "note", STRANGE[2]]),
            "created_at": NOW_S - rng.randrange(50),
            "occurred_at": rng.choice([None, NOW_S - 0.1 - number]),
            "expires_at": rng.choice([None, None, NOW_S + 5.0, NOW_S - 5.0]),
            "metadata": rng.choice([{}, {"colour": "red"}, {"colour": 1}, {"colour": True}, {"colour": None}]),
            "namespace": "default",
        }
        text = f"{' '.join(rng.sample(WORDS, 4))} {number}"
        rows.append(store.add(text, rng.choice([None, VECTORS[number % 60]]), **fields))
    for row in rng.sample(rows, 10):
        store.delete(row)
        rows.remove(row)
    for row in rng.sample(rows, 10):
        store.update(row, content=f"changed {rng.choice(WORDS)} {row}")
    merged = rows[:2]
    for row in merged:
        store.update(row, state="archived")
    into = store.add("heron and bread, merged", VECTORS[61])
    store.db.execute("INSERT INTO consolidations VALUES (?, 'summary', 'test', NULL, ?)", (into, NOW_S))
    for row in merged:
        store.db.execute("INSERT INTO consolidation_members VALUES (?, ?, '{}')", (into, row))
        store.log(row, "put")
    for vector in (np.ones(3), np.full(DIMENSION, np.nan), np.zeros(DIMENSION)):
        store.embed(rows.pop(), vector)  # none of which is a vector
    store.embed(rows.pop(), VECTORS[62], of=digest("another text"))
    store.embed(rows.pop(), VECTORS[63], model="model-b")
    return rows


def answers(store: SearchStore, index: SearchIndex) -> list[Any]:
    """What searches of all kinds say."""
    index.notify()
    wait_until(lambda: index.state == "ready" and index.applied_seq == store.last_seq() and not index.words_lacking)
    engine = SearchEngine(SETTINGS, LifecycleSettings(), store.path, index, store.connect)
    filters: list[dict[str, Any]] = [{}, {"parent_id": "p1"}, {"metadata.colour": 1}, {"expires_at": {"exists": True}}]
    filters += [{"user_id": text} for text in STRANGE]
    found: list[Any] = [index.pending("default")]
    try:
        for mode in ("hybrid", "dense", "keyword"):
            for asked in filters:
                query = SearchQuery(
                    "default", "a heron in Zürich", NOW_S, k=50, mode=mode, vector=VECTORS[5], vector_model=MODEL,
                    filter=parse_filter(asked), include_archived=asked == {}, neighbours=2,
                )  # fmt: skip
                outcome = engine.search(query)
                assert not outcome.degraded, outcome.reason
                found.append([(hit.row_id, round(hit.score, 5)) for hit in outcome.hits])
    finally:
        engine.close()
    return found


def started(store: SearchStore, **options: Any) -> SearchIndex:
    index = SearchIndex(SETTINGS, store.path, store.connect, **options)
    index.set_model(MODEL, DIMENSION)
    index.start()
    return index


def answers_of_a_start(store: SearchStore) -> list[Any]:
    index = started(store)
    try:
        return answers(store, index)
    finally:
        index.close()


def fresh(store: SearchStore) -> list[Any]:
    """Of a start that finds nothing derived."""
    shutil.rmtree(f"{store.path}.index", ignore_errors=True)
    return answers_of_a_start(store)


# ---- what a start reads ----


def test_a_load_is_what_following_every_change_gives(store: SearchStore) -> None:
    index = started(store)  # of an empty store: all comes by the log
    try:
        wait_until(lambda: index.state == "ready")
        fill(store)
        followed = answers(store, index)
    finally:
        index.close()
    assert any(followed[1:]) and fresh(store) == followed


def test_a_load_in_small_batches_is_the_same(store: SearchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    whole = fresh(store)
    for rows, vectors in ((1, 7), (7, 1), (5, 1000), (1000, 5)):
        monkeypatch.setattr(feed, "LOAD_BATCH", rows)
        monkeypatch.setattr(feed, "_VECTORS_BATCH", vectors)
        assert fresh(store) == whole


def test_vectors_read_later_than_their_rows_are_of_no_other_text(store: SearchStore) -> None:
    """The store changes after the rows' state is fixed, and before the vectors' is."""
    kept, changed, gone, bare = (store.add(f"text {number}", VECTORS[number]) for number in range(4))
    store.db.execute("DELETE FROM embeddings WHERE row_id = ?", (bare,))
    store.log(bare, "vector")
    calls: list[int] = []

    def connect() -> sqlite3.Connection:
        calls.append(0)
        if len(calls) == 2:  # that of the vectors
            store.update(changed, content="other text")
            store.embed(changed, VECTORS[9])
            store.delete(gone)
            store.embed(bare, VECTORS[10])
            store.add("new", VECTORS[11])
        return store.connect()

    view = loading.read(connect, SETTINGS, Tokenizer(), (MODEL, DIMENSION), lambda: False)
    assert len(calls) == 2 and view.seq < store.last_seq() and len(view.columns) == 4
    assert has_vector(view, kept) and has_vector(view, bare), "what is of a row's text may be taken early"
    assert not has_vector(view, changed, digest("text 1")) and not has_vector(view, changed), "it is of another text"
    assert not has_vector(view, gone)
    whole = fresh(store)
    with_log = started(store)
    try:
        assert answers(store, with_log) == whole
    finally:
        with_log.close()
    assert of_each_row(store, view) == of_each_row(
        store, loading.read(store.connect, SETTINGS, Tokenizer(), (MODEL, DIMENSION), lambda: False)
    )


def of_each_row(store: SearchStore, view: View) -> dict[int, list[float] | None]:
    """The vector of each row, after following the log to its end."""
    conn = store.connect()
    try:
        while follow(conn, view, threading.Lock(), True)[0]:
            pass
    finally:
        conn.close()
    assert view.vectors is not None
    slots = view.columns.alive().tolist()
    found = {int(view.columns.row_ids[slot]): view.vectors.vector(slot) for slot in slots}
    # Whether one is scaled to length 1 by itself or among others shows in its last digit.
    return {row_id: None if vector is None else vector.round(5).tolist() for row_id, vector in found.items()}


def test_a_failure_to_read_vectors_fails_the_load(store: SearchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    failures = [sqlite3.OperationalError("disk I/O error")]
    read = feed._read_vectors

    def failing(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return read(*arguments)

    monkeypatch.setattr(feed, "_read_vectors", failing)
    index = started(store)
    try:
        wait_until(lambda: index.state == "failed")
        found = answers(store, index)
    finally:
        index.close()
    assert found == fresh(store)


def test_a_load_that_is_of_no_use_any_more_is_broken_off_within_a_statement(
    store: SearchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add("text", VECTORS[0])
    vain = threading.Event()

    def endless(conn: sqlite3.Connection, *_: Any) -> Any:
        vain.set()
        conn.execute("WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) SELECT sum(i) FROM n")

    monkeypatch.setattr(feed, "_read_vectors", endless)
    with pytest.raises(loading.Closing):
        loading.read(store.connect, SETTINGS, Tokenizer(), (MODEL, DIMENSION), vain.is_set)


def test_what_sqlite_puts_together_wrongly_is_not_believed(store: SearchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add("text", VECTORS[0])
    read = feed._read_vectors

    def cut(*arguments: Any) -> Any:
        found = read(*arguments)
        return found and (*found[:2], found[2] * 2)

    monkeypatch.setattr(feed, "_read_vectors", cut)
    with pytest.raises(ValueError, match="put the vectors together"):
        loading.read(store.connect, SETTINGS, Tokenizer(), (MODEL, DIMENSION), lambda: False)


# ---- what a start finds ----


def test_a_start_after_a_clean_stop_is_a_fresh_build(store: SearchStore) -> None:
    fill(store)
    whole = fresh(store)
    assert answers_of_a_start(store) == whole


def test_a_start_from_a_store_that_changed_behind_the_index_is_a_fresh_build(store: SearchStore) -> None:
    rows = fill(store)
    before = fresh(store)
    with_other_text = "a heron and a heron in Zürich"
    fields = (with_other_text, digest(with_other_text), rows[20])
    store.db.execute("UPDATE memories SET content = ?, content_digest = ? WHERE row_id = ?", fields)
    store.db.execute("UPDATE memories SET user_id = 'null', parent_id = 'p2' WHERE row_id = ?", (rows[21],))
    store.db.execute("DELETE FROM memories WHERE row_id = ?", (rows[22],))
    found = answers_of_a_start(store)  # there is no word of it in the log
    assert found == fresh(store) != before


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "gone"])
def test_a_start_with_damaged_derived_files_is_a_fresh_build(store: SearchStore, harm: str) -> None:
    fill(store)
    whole = fresh(store)
    files = sorted(Path(f"{store.path}.index").iterdir())
    assert files
    for file in files:
        data = file.read_bytes()
        middle = len(data) // 2
        changed = {"cut": data[:middle], "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]}
        file.unlink() if harm == "gone" else file.write_bytes(changed.get(harm, b""))
        assert answers_of_a_start(store) == whole
        file.write_bytes(data)


# ---- the model that is expected ----


Loads = list[tuple[str, int] | None]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    """The model of each load that was begun."""
    found: Loads = []
    read = loading.read

    def noted(connect: Any, settings: Any, tokenizer: Any, model: Any, is_closing: Callable[[], bool]) -> View:
        found.append(model)
        return read(connect, settings, tokenizer, model, is_closing)

    monkeypatch.setattr(loading, "read", noted)
    return found


def test_the_vectors_of_the_model_to_come_are_there_before_it(store: SearchStore, loads: Loads) -> None:
    row = store.add("text", VECTORS[0])
    lacking = store.add("without")
    told: Future[list[int]] = Future()
    index = SearchIndex(SETTINGS, store.path, store.connect, expects_model=True, on_backfill=told.set_result)
    index.start()
    try:
        wait_until(lambda: index.state == "ready")
        assert index.model_id is None and index.has_vector(row) and told.result(10.0) == [lacking]
        index.set_model(MODEL, DIMENSION)
        assert index.state == "ready" and index.model_id == MODEL
        assert answers(store, index) and loads == [(MODEL, DIMENSION)]
    finally:
        index.close()


@pytest.mark.parametrize("model", [("model-b", DIMENSION), (MODEL, 8)])
def test_another_model_than_the_expected_one_is_loaded_anew(
    store: SearchStore, loads: Loads, model: tuple[str, int]
) -> None:
    row = store.add("text", VECTORS[0])
    told: list[list[int]] = []
    index = SearchIndex(SETTINGS, store.path, store.connect, expects_model=True, on_backfill=told.append)
    index.start()
    try:
        wait_until(lambda: index.has_vector(row))
        index.set_model(*model)
        assert not index.has_vector(row) and index.state == "loading"
        wait_until(lambda: index.state == "ready" and told == [[row]])
        assert loads == [(MODEL, DIMENSION), model] and index.pending("default") == 1
    finally:
        index.close()


def test_a_load_for_another_model_is_broken_off(store: SearchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    row = store.add("text", VECTORS[0])
    began = threading.Event()
    read = feed._read_vectors

    def slow_of_the_old(conn: sqlite3.Connection, after: int, model_id: str, size: int) -> Any:
        if model_id == MODEL:
            began.set()
            conn.execute("WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) SELECT sum(i) FROM n")
        return read(conn, after, model_id, size)

    monkeypatch.setattr(feed, "_read_vectors", slow_of_the_old)
    told: list[list[int]] = []
    index = SearchIndex(SETTINGS, store.path, store.connect, expects_model=True, on_backfill=told.append)
    index.start()
    try:
        assert began.wait(10.0)
        index.set_model("model-b", DIMENSION)
        wait_until(lambda: index.state == "ready" and told == [[row]])
    finally:
        index.close()


def test_without_an_embedder_no_vectors_are_loaded(store: SearchStore, loads: Loads) -> None:
    row = store.add("text", VECTORS[0])
    index = SearchIndex(SETTINGS, store.path, store.connect)
    index.start()
    try:
        wait_until(lambda: index.state == "ready")
        assert loads == [None] and not index.has_vector(row)
    finally:
        index.close()


# ---- the first look at a store ----


def test_a_store_that_is_looked_at_is_locked_until_it_is_let_go(store: SearchStore) -> None:
    look = FirstLook(store.path)
    look.result()
    with pytest.raises(StorageFailed, match="in use"):
        FirstLook(store.path).result()
    look.close()
    look.close()
    lock_store(store.path).release()


def test_what_a_first_look_finds_is_told_and_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    path.write_bytes(b"SQLite format 3\x00" + json.dumps(list(range(4000))).encode())
    look = FirstLook(path)
    with pytest.raises(StorageFailed, match="cannot be opened as a memory store"):
        look.result()
    look.close()
    lock_store(path).release()

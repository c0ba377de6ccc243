"""The index follows its database: start, replay, restart, model change, failure, and the graph's snapshot."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory_system.search import graph_file
from memory_system.search.graph import Part, empty_graph
from memory_system.search.index import SearchIndex
from memory_system.search.manifest import SnapshotRefused, describe, digest_of
from memory_system.search.scope import Scope
from memory_system.settings import SearchSettings
from tests.support.search_store import DIMENSION, MODEL, NOW_S, SearchStore, open_store, unit_vectors, wait_until

SETTINGS = SearchSettings(exact_max=100, graph_from=200, hnsw_m=8, hnsw_ef_construction=60, hnsw_ef=80)
SCOPE = Scope("default", NOW_S)
IDENTITY = graph_file.Identity("epoch-1", MODEL, DIMENSION, 8, 60)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SearchStore]:
    yield from open_store(tmp_path / "memory.db")


Open = Callable[..., SearchIndex]


@pytest.fixture
def open_index(store: SearchStore) -> Iterator[Open]:
    with ExitStack() as stack:

        def begin(settings: SearchSettings = SETTINGS, model: str = MODEL, **callbacks: Any) -> SearchIndex:
            index = SearchIndex(settings, store.path, store.connect, **callbacks)
            index.set_model(model, DIMENSION)
            stack.callback(index.close)
            index.start()
            caught_up(store, index)
            return index

        yield begin


def caught_up(store: SearchStore, index: SearchIndex) -> None:
    index.notify()
    wait_until(lambda: index.state == "ready" and index.applied_seq == store.last_seq())


def linked(index: SearchIndex) -> int:
    with index.reading() as view:
        return view.vectors.graph.count if view and view.vectors else -1


def nearest(index: SearchIndex, vector: np.ndarray, k: int = 10) -> list[int]:
    with index.reading() as view:
        assert view is not None and view.vectors is not None
        mask = view.columns.mask(SCOPE)
        assert mask is not None
        slots, _ = view.vectors.search(vector, mask, k)
        return [int(row) for row in view.columns.row_ids[slots]]


def exact(rows: list[int], vectors: np.ndarray, vector: np.ndarray, k: int = 10) -> list[int]:
    return [rows[n] for n in np.argsort(-(vectors @ vector), kind="stable")[:k]]


def recall(index: SearchIndex, rows: list[int], vectors: np.ndarray) -> float:
    queries = unit_vectors(50, seed=9)
    return float(np.mean([len(set(nearest(index, q)) & set(exact(rows, vectors, q))) / 10 for q in queries]))


def snapshot_of(store: SearchStore, open_index: Open, count: int = 300) -> tuple[list[int], np.ndarray, Path]:
    """A store with a finished graph, saved."""
    vectors = unit_vectors(count)
    rows = store.add_many([f"text {n}" for n in range(count)], vectors)
    index = open_index()
    wait_until(lambda: linked(index) == count)
    index.close()
    return rows, vectors, Path(f"{store.path}.index")


def graph_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("words"))


def test_what_is_missing_is_reported_once_and_in_order(store: SearchStore, open_index: Open) -> None:
    old = [store.add(f"old {n}") for n in range(3)]
    store.add("has one", unit_vectors(1)[0])
    backfill: list[list[int]] = []
    missing: list[list[int]] = []
    seqs: list[int] = []
    index = open_index(on_backfill=backfill.append, on_missing=missing.append, on_advance=seqs.append)
    wait_until(lambda: bool(backfill))
    assert backfill == [old[::-1]] and missing == []
    new = store.add("new")
    caught_up(store, index)
    assert missing == [[new]] and seqs == sorted(seqs) and seqs[-1] == store.last_seq()
    store.embed(new, unit_vectors(1)[0])
    store.update(new, state="archived")
    caught_up(store, index)
    assert missing == [[new]] and index.has_vector(new) and index.pending("default") == 3
    assert index.pending("nobody") == 0


def test_a_vector_of_another_text_or_model_does_not_count(store: SearchStore, open_index: Open) -> None:
    vector = unit_vectors(1)[0]
    stale = store.add("now")
    store.embed(stale, vector, of=bytes(16))
    foreign = store.add("foreign", vector, model="model-b")
    short = store.add("short", vector[:4])
    broken = store.add("broken", np.full(DIMENSION, np.nan, np.float32))
    index = open_index()
    assert [index.has_vector(row) for row in (stale, foreign, short, broken)] == [False] * 4
    assert index.pending("default") == 4 and nearest(index, vector) == []


def test_random_changes_leave_what_a_fresh_load_would_find(store: SearchStore, open_index: Open) -> None:
    seed = 7
    rng = random.Random(seed)
    vectors = unit_vectors(500, seed=seed)
    index = open_index(replace(SETTINGS, exact_max=50))
    rows: list[int] = []
    for n in range(500):
        action = rng.random()
        if action < 0.6 or not rows:
            rows.append(store.add(f"text {n}", vectors[n], user_id=f"u{n % 7}"))
        elif action < 0.75:
            store.delete(rows.pop(rng.randrange(len(rows))))
        elif action < 0.9:
            row = rng.choice(rows)
            store.update(row, content=f"changed {n}")
            if rng.random() < 0.7:
                store.embed(row, vectors[n])
        else:
            store.update(rng.choice(rows), state=rng.choice(["active", "archived"]))
        index.notify()
    caught_up(store, index)
    fresh = SearchIndex(replace(SETTINGS, exact_max=10_000), store.path, store.connect)
    fresh.set_model(MODEL, DIMENSION)
    fresh.start()
    caught_up(store, fresh)
    for query in unit_vectors(10, seed=3):
        expected = nearest(fresh, query, 500)
        assert set(nearest(index, query, 500)) == set(expected) and len(expected) > 50
        assert len(set(nearest(index, query)) & set(expected[:10])) >= 9
    assert index.pending("default") == fresh.pending("default") > 0
    fresh.close()


def test_a_gap_in_the_log_leads_to_a_full_load(store: SearchStore, open_index: Open) -> None:
    index = open_index()
    first = store.add("one", unit_vectors(1)[0])
    caught_up(store, index)
    store.db.execute("BEGIN")
    second = store.add("two", unit_vectors(1)[0])
    store.db.execute("DELETE FROM index_log")
    store.db.execute("COMMIT")
    index.notify()
    wait_until(lambda: index.has_vector(second))
    assert index.has_vector(first)


def test_pruning_what_is_applied_is_no_gap(store: SearchStore, open_index: Open) -> None:
    loads: list[list[int]] = []
    store.add("bare")
    index = open_index(on_backfill=loads.append)
    store.db.execute("DELETE FROM index_log WHERE seq <= ?", (index.applied_seq,))
    row = store.add("next", unit_vectors(1)[0])
    caught_up(store, index)
    assert index.has_vector(row)
    assert len(loads) == 1


def test_a_rolled_back_write_leaves_no_gap(store: SearchStore, open_index: Open) -> None:
    loads: list[list[int]] = []
    store.add("bare")
    index = open_index(on_backfill=loads.append)
    store.db.execute("BEGIN")
    store.add("kept")
    store.db.execute("SAVEPOINT request")
    store.add("undone")
    store.db.execute("ROLLBACK TO request")
    store.add("kept too")
    store.db.execute("COMMIT")
    caught_up(store, index)
    assert len(loads) == 1 and index.pending("default") == 3


def test_another_model_takes_over_without_mixing(store: SearchStore, open_index: Open) -> None:
    vectors = unit_vectors(3)
    rows = [store.add(f"text {n}", vectors[n]) for n in range(3)]
    backfill: list[list[int]] = []
    index = open_index(on_backfill=backfill.append)
    assert nearest(index, vectors[0], 1) == [rows[0]]
    index.set_model("model-b", 4)
    assert not index.has_vector(rows[0]) and index.pending("default") == 3
    wait_until(lambda: backfill == [rows[::-1]])
    store.embed(rows[1], unit_vectors(1, 4)[0], model="model-b")
    caught_up(store, index)
    assert nearest(index, unit_vectors(1, 4)[0]) == [rows[1]] and index.pending("default") == 2


def test_an_unexpected_error_is_survived(store: SearchStore) -> None:
    failures = [sqlite3.OperationalError("disk I/O error")] * 2

    def connect() -> sqlite3.Connection:
        if failures:
            raise failures.pop()
        return store.connect()

    row = store.add("text", unit_vectors(1)[0])
    index = SearchIndex(SETTINGS, store.path, connect)
    index.set_model(MODEL, DIMENSION)
    index.start()
    wait_until(lambda: index.state == "failed")
    wait_until(lambda: index.has_vector(row))
    assert index.state == "ready"
    index.close()
    index.close()


# ---- the graph ----


def test_a_restart_takes_the_graph_over(store: SearchStore, open_index: Open) -> None:
    rows, vectors, folder = snapshot_of(store, open_index)
    before = graph_files(folder)
    assert len(before) == 4
    kept = unit_vectors(1, seed=77)[0]
    store.delete(rows[0])
    store.update(rows[1], content="changed")
    store.update(rows[2], content="changed and embedded")
    store.embed(rows[2], kept)
    extra = store.add("extra", kept)
    index = open_index()
    assert linked(index) == 297  # nothing had to be added
    assert set(nearest(index, kept, 2)) == {rows[2], extra}
    assert set(nearest(index, vectors[0], 299)) == {*rows[2:], extra}
    assert index.save_soon().result(10) and graph_files(folder) == before, "words alone have changed"


def test_a_part_is_written_once_and_a_new_one_beside_it(store: SearchStore, open_index: Open) -> None:
    rows, vectors, folder = snapshot_of(store, open_index)
    before = {name: (folder / name).stat().st_mtime_ns for name in graph_files(folder) if name.startswith("graph")}
    more = unit_vectors(120, seed=5)
    index = open_index()
    rows += store.add_many([f"more {n}" for n in range(120)], more)
    index.notify()
    wait_until(lambda: linked(index) == 420)
    assert index.save_soon().result(10)
    after = {name: (folder / name).stat().st_mtime_ns for name in graph_files(folder) if name.startswith("graph")}
    assert len(after) == 2 and before.items() <= after.items()
    index.close()
    again = open_index()
    assert linked(again) == 420 and recall(again, rows, np.concatenate([vectors, more])) >= 0.98


def test_a_snapshot_half_written_leaves_the_old_one(
    store: SearchStore, open_index: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vectors, folder = snapshot_of(store, open_index)
    before = graph_files(folder)
    index = open_index()
    more = unit_vectors(120, seed=5)
    rows += store.add_many([f"more {n}" for n in range(120)], more)
    monkeypatch.setattr(graph_file.manifest, "publish", _fails)
    index.notify()
    wait_until(lambda: linked(index) == 420)
    index.save_soon().result(10)
    index.close()
    assert set(before) < set(graph_files(folder)), "the new part is there, and no manifest names it"
    monkeypatch.undo()
    again = open_index()
    assert linked(again) >= 300 and recall(again, rows, np.concatenate([vectors, more])) >= 0.98
    wait_until(lambda: linked(again) == 420)
    assert again.save_soon().result(10)
    assert len([name for name in graph_files(folder) if name.startswith("graph")]) == 2, "what was left is removed"


def _fails(*_: object) -> None:
    raise OSError("no space left on device")


@pytest.mark.parametrize("what", ["epoch", "model", "parameters", "missing", "rows", "newer", "format"])
def test_a_snapshot_that_does_not_fit_is_built_anew(store: SearchStore, open_index: Open, what: str) -> None:
    rows, vectors, folder = snapshot_of(store, open_index)
    settings, model = SETTINGS, MODEL
    if what == "epoch":
        store.db.execute("UPDATE meta SET value = 'epoch-2'")
    elif what == "model":
        model = "model-b"
        store.db.execute("UPDATE embeddings SET model_id = 'model-b'")
    elif what == "parameters":
        settings = replace(SETTINGS, hnsw_m=12)
    elif what == "missing":
        next(folder.glob("graph-*")).unlink()
    elif what == "rows":
        rewrite(folder, rows_bytes=lambda data: data[:-24])
    elif what == "newer":
        rewrite(folder, seq=10**9)
    else:
        rewrite(folder, format=99)
    index = open_index(settings, model)
    wait_until(lambda: linked(index) == len(rows))
    assert recall(index, rows, vectors) >= 0.98


def rewrite(folder: Path, rows_bytes: Callable[[bytes], bytes] | None = None, **changes: Any) -> None:
    """Alter a snapshot so that all of its digests are right."""
    manifest = json.loads((folder / graph_file.MANIFEST).read_text())
    manifest.pop("digest")
    manifest.update(changes)
    for entry in [manifest["axes"], *(entry for part in manifest["parts"] for entry in part.values())]:
        path = folder / entry["name"]
        if rows_bytes is not None and path.name.startswith("rows-"):
            path.write_bytes(rows_bytes(path.read_bytes()))
        entry.update(describe(path))
    digest = digest_of(manifest)
    (folder / graph_file.MANIFEST).write_text(json.dumps({**manifest, "digest": digest}))


def part_of(count: int, length: int = DIMENSION) -> Part:
    graph = empty_graph(length)
    graph.init_index(count, M=8, ef_construction=60, random_seed=100)
    graph.add_items(unit_vectors(count, length), np.arange(count))
    return Part(graph, np.full(count, -1, np.int32), np.arange(count), np.zeros(count, "V16"))


AXES = np.eye(DIMENSION, dtype=np.float32)


def test_every_damaged_byte_is_noticed_before_the_load(tmp_path: Path) -> None:
    graph_file.write(tmp_path, AXES, [part_of(50)], IDENTITY, 5)
    axes, (part,) = graph_file.load(tmp_path, IDENTITY, 5)
    assert part.graph.get_current_count() == 50 and part.row_ids.tolist() == list(range(50))
    assert np.array_equal(axes, AXES)
    for path in sorted(tmp_path.iterdir()):
        good = path.read_bytes()
        spots = range(len(good)) if path.suffix == ".json" else [*range(96), *range(96, len(good), 97)]
        for damaged in (
            *(_flipped(good, at) for at in spots),
            *(good[:n] for n in (0, 1, 95, 96, len(good) - 1)),
            good + b"\0",
        ):
            path.write_bytes(damaged)
            if damaged.strip(b"\0") == good:
                continue
            with pytest.raises(SnapshotRefused):
                graph_file.load(tmp_path, IDENTITY, 5)
        path.write_bytes(good)
    graph_file.load(tmp_path, IDENTITY, 5)
    graph_file.discard(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SnapshotRefused, match="none"):
        graph_file.load(tmp_path, IDENTITY, 5)


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def test_a_wrong_dimension_with_valid_digests_is_refused(tmp_path: Path) -> None:
    graph_file.write(
        tmp_path, AXES, [part_of(20, 8)], IDENTITY, 5
    )  # the axes are for another length than the graph has
    with pytest.raises(SnapshotRefused, match="header"):
        graph_file.load(tmp_path, IDENTITY, 5)


def test_a_header_that_lies_under_valid_digests_is_refused_or_harmless(tmp_path: Path) -> None:
    """In a process of its own, so that a crash inside the library is a failure of this test and not of the run."""
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from memory_system.search import graph_file
        from tests.integration.test_search_index import AXES, IDENTITY, _flipped, part_of, rewrite
        folder = Path(sys.argv[1])
        graph_file.write(folder, AXES, [part_of(50)], IDENTITY, 5)
        path = next(folder.glob("graph-*"))
        good = path.read_bytes()
        for at in range(48):
            path.write_bytes(_flipped(good, at))
            rewrite(folder)
            try:
                graph_file.load(folder, IDENTITY, 5)
            except graph_file.SnapshotRefused:
                continue
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(command, check=True, timeout=60, cwd=Path(__file__).parents[2])


def test_a_folder_that_cannot_be_written_costs_only_the_snapshot(store: SearchStore, open_index: Open) -> None:
    Path(f"{store.path}.index").write_text("in the way")
    vectors = unit_vectors(250)
    rows = store.add_many([f"text {n}" for n in range(250)], vectors)
    index = open_index()
    wait_until(lambda: linked(index) == 250)
    index.close()
    assert nearest(index, vectors[3], 1) == [rows[3]]

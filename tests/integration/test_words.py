"""The words of the index follow the database: snapshot, restart, rebuild, and writes that the index has not seen."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.search import feed, loading, manifest, notes, word_file, word_keeping
from memory_system.search.engine import SearchEngine, SearchOutcome, SearchQuery
from memory_system.search.index import SearchIndex
from memory_system.search.manifest import SnapshotRefused
from memory_system.search.segment import Segment
from memory_system.search.word_file import Identity, Rows
from memory_system.settings import SearchSettings
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

SETTINGS = SearchSettings()
IDENTITY = Identity("epoch-1", "a tokenizer")
VECTORS = unit_vectors(8)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SearchStore]:
    yield from open_store(tmp_path / "memory.db")


Open = Callable[..., tuple[SearchIndex, SearchEngine]]


@pytest.fixture
def begin(store: SearchStore) -> Iterator[Open]:
    with ExitStack() as stack:

        def opened(made: type[SearchIndex] = SearchIndex, **settings: Any) -> tuple[SearchIndex, SearchEngine]:
            index = made(replace(SETTINGS, **settings), store.path, store.connect)
            engine = SearchEngine(SETTINGS, LifecycleSettings(), store.path, index, store.connect)
            stack.callback(engine.close)
            stack.callback(index.close)
            index.start()
            wait_until(lambda: index.state == "ready")
            return index, engine

        yield opened


def search(engine: SearchEngine, text: str, **fields: Any) -> SearchOutcome:
    return engine.search(SearchQuery("default", text, NOW_S, mode="keyword", k=1000, **fields))


def found(engine: SearchEngine, text: str) -> set[int]:
    outcome = search(engine, text)
    assert outcome.reason is None
    return {hit.row_id for hit in outcome.hits}


def caught_up(store: SearchStore, index: SearchIndex) -> None:
    index.notify()
    wait_until(lambda: index.applied_seq == store.last_seq() and not index.words_lacking)


class Reading:
    """Counts the texts that an index reads from the database."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        read = feed.read_texts

        def counted(conn: Any, row_ids: Any) -> Any:
            self.rows += row_ids
            return read(conn, row_ids)

        monkeypatch.setattr(feed, "read_texts", counted)


def saved(store: SearchStore, begin: Open, count: int = 300) -> tuple[list[int], Path]:
    """A store whose words are on disk."""
    rows = [store.add(f"heron number n{n}") for n in range(count)]
    index, _ = begin()
    caught_up(store, index)
    index.close()
    return rows, Path(f"{store.path}.index")


# ---- writes that the index has not seen ----


class Held(SearchIndex):
    """An index whose thread never follows the log: only searches do."""

    def _apply(self, conn: Any, view: Any) -> bool:
        return False


def test_a_search_sees_every_write_though_the_thread_does_nothing(store: SearchStore, begin: Open) -> None:
    index, engine = begin(Held)
    rows = [store.add(f"heron {n}") for n in range(600)]  # more than two batches of the log
    assert found(engine, "heron") == set(rows)
    store.update(rows[0], content="an egret")
    store.delete(rows[1])
    store.update(rows[2], state="archived")
    assert found(engine, "heron") == set(rows[3:])
    assert found(engine, "egret") == {rows[0]}
    assert index.applied_seq == store.last_seq()


def test_everyone_finds_his_own_while_all_write_and_segments_merge(
    store: SearchStore, begin: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory_system.search.postings._AT_ONCE", 8)  # larger ones are merged aside
    index, engine = begin()
    writing, wrong = threading.Lock(), list[str]()

    def write_and_search(name: str) -> None:
        mine: list[int] = []
        for n in range(40):
            with writing:
                mine.append(store.add(f"{name} heron {n}"))
                if n % 4 == 3:
                    store.delete(mine.pop(0))
                if n % 5 == 4:
                    store.update(mine.pop(0), content="something else")
            index.notify()
            if found(engine, name) != set(mine):
                wrong.append(f"{name} after {n}")

    threads = [threading.Thread(target=write_and_search, args=(name,)) for name in ("ada", "bob", "eve")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert not any(thread.is_alive() for thread in threads) and wrong == []
    caught_up(store, index)
    with index.reading() as view:
        assert view is not None
        assert view.words.postings.texts == len(view.columns)


def test_a_search_that_is_too_far_behind_says_so(
    store: SearchStore, begin: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = begin(Held)
    monkeypatch.setattr("memory_system.search.index._CATCH_UP", 1)
    for n in range(feed.LOG_BATCH + 1):
        store.add(f"heron {n}")
    outcome = search(engine, "heron")
    assert outcome.reason == "index_behind" and outcome.pending > 0 and len(outcome.hits) == feed.LOG_BATCH
    assert len(found(engine, "heron")) == feed.LOG_BATCH + 1, "the next one goes on where that one stopped"


def test_a_gap_in_the_log_is_left_to_the_thread(store: SearchStore, begin: Open) -> None:
    index, engine = begin(Held)
    store.add("heron")
    store.db.execute("DELETE FROM index_log")
    assert search(engine, "heron").reason == "index_behind"
    assert index.state == "ready"


def test_without_an_index_the_newest_are_searched(store: SearchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_keeping, "_NEWEST", 3)
    rows = [store.add(f"heron {n}", created_at=NOW_S + n) for n in range(5)]
    store.add("heron", namespace="other")
    index = SearchIndex(SETTINGS, store.path, store.connect)
    engine = SearchEngine(SETTINGS, LifecycleSettings(), store.path, index, store.connect)
    outcome = search(engine, "heron")
    assert {hit.row_id for hit in outcome.hits} == set(rows[2:]) and outcome.reason == "index_loading"
    engine.close()


def test_while_words_are_taken_in_the_newest_are_found_first(
    store: SearchStore, begin: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_AT_ONCE", 0)
    monkeypatch.setattr(word_keeping, "_STEP", 4)
    rows = [store.add(f"heron {n}") for n in range(10)]
    fill, steps = word_keeping.fill, [0]

    def some(*arguments: Any) -> bool:
        if not steps[0]:
            return False
        steps[0] -= 1
        return fill(*arguments)

    monkeypatch.setattr(word_keeping, "fill", some)
    index, engine = begin()
    assert index.words_lacking == 10
    steps[0] = 1
    index.notify()
    wait_until(lambda: index.words_lacking == 6)
    new = store.add("heron new")
    outcome = search(engine, "heron")
    assert {hit.row_id for hit in outcome.hits} == {*rows[6:], new} and outcome.reason == "index_loading"
    store.delete(rows[0])
    store.update(rows[1], content="egret")
    steps[0] = 5
    index.notify()
    wait_until(lambda: not index.words_lacking)
    assert found(engine, "heron") == {*rows[2:], new} and found(engine, "egret") == {rows[1]}


def test_another_model_reads_no_text_again(store: SearchStore, begin: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [store.add(f"heron {n}", VECTORS[n]) for n in range(8)]
    index, engine = begin()
    store.update(rows[0], content="egret")
    caught_up(store, index)
    reading = Reading(monkeypatch)
    index.set_model(MODEL, DIMENSION)
    wait_until(lambda: index.has_vector(rows[1]))
    assert found(engine, "heron") == set(rows[1:]) and reading.rows == []


# ---- on disk ----


def test_a_restart_reads_only_what_has_changed(
    store: SearchStore, begin: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, folder = saved(store, begin)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    store.delete(rows[0])
    store.update(rows[1], content="an egret")
    store.update(rows[2], content="for a while")
    store.update(rows[2], content="heron number n2")
    new = store.add("heron new")
    reading = Reading(monkeypatch)
    index, engine = begin()
    assert sorted(reading.rows) == [rows[1], new]
    assert found(engine, "heron") == {*rows[2:], new} and found(engine, "egret") == {rows[1]}
    assert found(engine, "n2") == {rows[2]}
    with index.reading() as view:
        assert view is not None
        assert view.words.prepare("default", "heron").texts == 300
    index.close()
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    kept = {name for name in before if name in after and name != word_file.MANIFEST}
    assert kept and all(before[name] == after[name] for name in kept), "what is on disk is not written again"
    assert after.keys() != before.keys()


def test_a_text_that_stands_in_two_segments_counts_once(store: SearchStore, begin: Open) -> None:
    """There and back: the older segment on disk has the same row with the same content as the newer one."""
    rows, _ = saved(store, begin)
    for content in ("an egret", "heron number n5"):
        index, _ = begin()
        store.update(rows[5], content=content)
        caught_up(store, index)
        index.close()
    index, engine = begin()
    assert found(engine, "heron") == set(rows)
    with index.reading() as view:
        assert view is not None
        query = view.words.prepare("default", "n5")
        assert (query.texts, query.found_in.tolist()) == (300, [1])


@pytest.mark.parametrize("what", ["epoch", "tokenizer", "notes", "missing", "newer", "format", "manifest", "flipped"])
def test_words_that_cannot_be_used_are_taken_from_the_texts(
    store: SearchStore, begin: Open, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    rows, folder = saved(store, begin)
    path = next(folder.glob("words-*.bin"))
    if what == "epoch":
        store.db.execute("UPDATE meta SET value = 'epoch-2'")
    elif what == "tokenizer":
        rewrite(folder, tokenizer="another")
    elif what == "notes":
        rewrite(folder, notes_version=notes.VERSION + 1)
    elif what == "missing":
        path.unlink()
    elif what == "newer":
        rewrite(folder, seq=10**9)
    elif what == "format":
        rewrite(folder, format=99)
    elif what == "manifest":
        (folder / word_file.MANIFEST).write_text("{")
    else:
        path.write_bytes(flipped(path.read_bytes(), 3000))
    reading = Reading(monkeypatch)
    index, engine = begin()
    assert sorted(reading.rows) == rows
    assert found(engine, "heron") == set(rows)
    index.close()
    reading.rows.clear()
    begin()
    assert reading.rows == [], "the new snapshot is whole"


def test_a_sound_snapshot_is_used(store: SearchStore, begin: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: nothing is read when nothing is wrong."""
    saved(store, begin)
    reading = Reading(monkeypatch)
    begin()
    assert reading.rows == []


def rewrite(folder: Path, **changes: Any) -> None:
    """Alter the manifest so that its digest is right."""
    body = {**manifest.read(folder / word_file.MANIFEST), **changes}
    (folder / word_file.MANIFEST).write_text(json.dumps({**body, "digest": manifest.digest_of(body)}))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def a_segment() -> tuple[Segment, Rows]:
    segment = Segment(
        keys=np.array([5, 9], np.uint64),
        starts=np.array([0, 2, 3], np.int64),
        docs=np.array([0, 1, 1], np.uint32),
        counts=np.array([1, 2, 1], np.uint8),
        lengths=np.array([1, 3], np.int32),
        notes=np.array([7, 8], np.uint64),
        slots=np.array([0, 1], np.int32),
    )
    return segment, Rows(np.array([11, 12]), np.frombuffer(digest("one") + digest("two"), "V16"))


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    segment, rows = a_segment()
    word_file.save(tmp_path, [segment], {id(segment): rows}, IDENTITY, 5)
    ((loaded, table),) = word_file.load(tmp_path, IDENTITY, 5)
    assert loaded.keys.tolist() == [5, 9] and loaded.counts.tolist() == [1, 2, 1] and loaded.slots.tolist() == [-1, -1]
    assert table.row_ids.tolist() == [11, 12] and table.digests[1].tobytes() == digest("two")
    for path in sorted(tmp_path.iterdir()):
        good = path.read_bytes()
        damages = [flipped(good, at) for at in range(len(good))]
        for damaged in (*damages, b"", good[:-1], good + b"x"):
            path.write_bytes(damaged)
            with pytest.raises(SnapshotRefused):
                word_file.load(tmp_path, IDENTITY, 5)
        path.write_bytes(good)
    word_file.load(tmp_path, IDENTITY, 5)
    word_file.discard(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SnapshotRefused, match="none"):
        word_file.load(tmp_path, IDENTITY, 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"docs": np.array([0, 1, 2], np.uint32)},
        {"starts": np.array([0, 2, 4], np.int64)},
        {"starts": np.array([0, 3, 2], np.int64)},
        {"starts": np.array([1, 2, 3], np.int64)},
        {"keys": np.array([9, 5], np.uint64)},
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused_though_the_digests_are_right(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    segment, rows = a_segment()
    for name, value in changes.items():
        setattr(segment, name, value)
    word_file.save(tmp_path, [segment], {id(segment): rows}, IDENTITY, 5)
    with pytest.raises(SnapshotRefused, match="do not fit"):
        word_file.load(tmp_path, IDENTITY, 5)


def test_what_was_deleted_leaves_the_disk_with_a_purge(store: SearchStore, begin: Open) -> None:
    rows, folder = saved(store, begin)
    index, engine = begin()
    store.update(rows[0], content="unmentionable")
    caught_up(store, index)
    assert index.save_soon().result(10)
    with index.reading() as view:
        assert view is not None
        key = view.words.prepare("default", "unmentionable").keys.tobytes()
    on_disk = [path for path in folder.glob("words-*.bin") if key in path.read_bytes()]
    assert len(on_disk) == 1
    store.delete(rows[0])
    caught_up(store, index)
    index._purged_at_s -= 1e6
    index.notify()
    wait_until(lambda: view is not None and not any(segment.gone for segment in view.words.postings.segments))
    assert index.save_soon().result(10)
    assert [path for path in folder.glob("words-*.bin") if key in path.read_bytes()] == []
    assert found(engine, "heron") == set(rows[1:])


def test_what_was_deleted_before_a_stop_is_purged_soon_after_the_next_start(store: SearchStore, begin: Open) -> None:
    """However often a service is restarted: nobody has to wait for an hour without a stop."""
    rows, folder = saved(store, begin)
    files = set(folder.glob("words-*.bin"))
    index, _ = begin()
    store.delete(rows[0])
    caught_up(store, index)
    index.close()
    assert set(folder.glob("words-*.bin")) == files, "a stop keeps the segment, and with it what is gone"
    ahead_s = 0.0
    index = SearchIndex(SETTINGS, store.path, store.connect, clock=lambda: time.monotonic() + ahead_s)
    index.start()
    try:
        caught_up(store, index)
        ahead_s = 120.0
        index.notify()
        wait_until(lambda: (view := index.view) is not None and not any(s.gone for s in view.words.postings.segments))
        assert index.save_soon().result(10)
    finally:
        index.close()
    assert files.isdisjoint(folder.glob("words-*.bin"))


def test_a_file_that_is_gone_is_written_again(store: SearchStore, begin: Open) -> None:
    rows, folder = saved(store, begin)
    index, _ = begin()
    for path in folder.glob("words-*.bin"):
        path.unlink()
    store.add("heron new")
    caught_up(store, index)
    assert index.save_soon().result(10) is False
    assert index.save_soon().result(10) is True
    index.close()
    _, engine = begin()
    assert len(found(engine, "heron")) == len(rows) + 1


def test_a_folder_that_cannot_be_written_costs_only_the_snapshot(store: SearchStore, begin: Open) -> None:
    Path(f"{store.path}.index").write_text("in the way")
    row = store.add("heron")
    index, engine = begin()
    assert index.save_soon().result(10) is False
    assert found(engine, "heron") == {row}

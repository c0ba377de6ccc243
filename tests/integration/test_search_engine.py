"""Searches over a real database file: scope, freshness, fusion, degradation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory_system.filters import parse_filter
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.ranking_settings import RankingSettings
from memory_system.search.engine import SearchEngine, SearchOutcome, SearchQuery
from memory_system.search.index import SearchIndex
from memory_system.settings import SearchSettings
from tests.support.search_store import DIMENSION, MODEL, NOW_S, SearchStore, open_store, unit_vectors, wait_until

SETTINGS = SearchSettings(filterable_metadata=("topic",))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SearchStore]:
    yield from open_store(tmp_path / "memory.db")


Start = Callable[..., tuple[SearchIndex, SearchEngine]]


@pytest.fixture
def start(store: SearchStore) -> Iterator[Start]:
    with ExitStack() as stack:

        def begin(
            settings: SearchSettings = SETTINGS, model: str | None = MODEL, **callbacks: Any
        ) -> tuple[SearchIndex, SearchEngine]:
            index = SearchIndex(settings, store.path, store.connect, **callbacks)
            if model:
                index.set_model(model, DIMENSION)
            engine = SearchEngine(settings, LifecycleSettings(), store.path, index, store.connect)
            stack.callback(index.close)
            stack.callback(engine.close)
            index.start()
            caught_up(store, index)
            return index, engine

        yield begin


def caught_up(store: SearchStore, index: SearchIndex) -> None:
    index.notify()
    wait_until(lambda: index.state == "ready" and index.applied_seq == store.last_seq() and not index.words_lacking)


def query(text: str = "", vector: np.ndarray | None = None, **fields: Any) -> SearchQuery:
    if isinstance(fields.get("filter"), dict):
        fields["filter"] = parse_filter(fields["filter"])
    return SearchQuery("default", text, NOW_S, vector=vector, vector_model=MODEL, **fields)


def ids(outcome: SearchOutcome) -> list[int]:
    return [hit.row_id for hit in outcome.hits]


VECTORS = unit_vectors(64)


def test_hybrid_finds_by_word_and_by_meaning(store: SearchStore, start: Start) -> None:
    word = store.add("the heron landed on the pier", VECTORS[0])
    meaning = store.add("a bird by the water", VECTORS[1])
    store.add("tax forms for the year", VECTORS[2])
    _, engine = start()
    outcome = engine.search(query("where is the heron", VECTORS[1], k=2, explain=True))
    assert set(ids(outcome)) == {word, meaning} and not outcome.degraded and outcome.pending == 0
    by_id = {hit.row_id: hit for hit in outcome.hits}
    assert by_id[meaning].similarity == pytest.approx(1.0, abs=1e-5) and by_id[meaning].keyword == 0.0
    assert by_id[word].similarity == pytest.approx(float(VECTORS[0] @ VECTORS[1]), abs=1e-5)
    assert by_id[word].keyword == pytest.approx(1.0)
    assert set(by_id[word].parts or {}) == {"dense", "keyword", "bm25", "parent", "date", "turn"}


@pytest.mark.parametrize("mode", ["hybrid", "dense", "keyword"])
def test_a_store_without_a_memory_is_searched(store: SearchStore, start: Start, mode: str) -> None:
    _, engine = start()
    outcome = engine.search(query("where is the heron", VECTORS[1], mode=mode))
    assert (outcome.hits, outcome.pending) == ([], 0)


def test_keyword_share_is_of_the_query_idf(store: SearchStore, start: Start) -> None:
    for n in range(20):
        store.add(f"common thing {n}", VECTORS[n])
    rare = store.add("zebra", VECTORS[20])
    both = store.add("common Zèbras", VECTORS[21])
    _, engine = start()
    outcome = engine.search(query("common zebra", mode="keyword", k=30))
    shares = {hit.row_id: hit.keyword or 0.0 for hit in outcome.hits}
    assert shares[both] == pytest.approx(1.0)
    assert 0.7 < shares[rare] < 1.0 and shares[1] == pytest.approx(1.0 - shares[rare])
    assert not outcome.degraded and {hit.similarity is None for hit in outcome.hits} == {True}


@pytest.mark.parametrize(
    "text",
    [
        '"',
        'a" OR "b',
        "NEAR(heron)",
        "heron AND NOT pier",
        "content:heron",
        "heron*",
        "^heron",
        "-",
        "",
        "\0 x",
        "日本",
    ],
)
def test_query_text_is_never_syntax(store: SearchStore, start: Start, text: str) -> None:
    heron = store.add("heron", VECTORS[0])
    _, engine = start()
    outcome = engine.search(query(text, mode="keyword"))
    assert ids(outcome) in ([], [heron])


def test_stop_words_count_when_there_is_nothing_else(store: SearchStore, start: Start) -> None:
    to_be = store.add("to be or not to be", VECTORS[0])
    store.add("heron", VECTORS[1])
    _, engine = start()
    assert ids(engine.search(query("to be", mode="keyword"))) == [to_be]
    assert ids(engine.search(query("is the heron not to be", mode="keyword"))) != [to_be]


def test_keyword_search_sees_a_write_at_once(store: SearchStore, start: Start) -> None:
    index, engine = start()
    row = store.add("fresh heron")
    outcome = engine.search(query("heron", VECTORS[0]))
    assert ids(outcome) == [row] and outcome.hits[0].similarity is None and outcome.pending == 1
    store.embed(row, VECTORS[0])
    caught_up(store, index)
    outcome = engine.search(query("heron", VECTORS[0]))
    assert outcome.hits[0].similarity == pytest.approx(1.0, abs=1e-5) and outcome.pending == 0


class Paused(SearchIndex):
    """An index whose thread is held back on demand: the database runs ahead of it."""

    paused = False

    def _apply(self, conn: Any, view: Any) -> bool:
        return False if self.paused else super()._apply(conn, view)


def test_what_is_like_a_memory_that_the_index_has_not_seen_is_found(store: SearchStore) -> None:
    row = store.add("text", VECTORS[1])
    index = Paused(SETTINGS, store.path, store.connect)
    index.set_model(MODEL, DIMENSION)
    engine = SearchEngine(SETTINGS, LifecycleSettings(), store.path, index, store.connect)
    index.start()
    try:
        caught_up(store, index)
        index.paused = True
        new = store.add("new", VECTORS[0])
        assert not index.has_vector(new)
        assert ids(engine.similar(query(), new)) == [row]
        assert engine.similar(query(), store.add("without")).reason == "no_vector"
    finally:
        engine.close()
        index.close()


def test_changes_that_the_index_has_not_seen_are_respected(store: SearchStore) -> None:
    rows = [store.add(f"text {n}", VECTORS[n]) for n in range(6)]
    index = Paused(SETTINGS, store.path, store.connect)
    index.set_model(MODEL, DIMENSION)
    engine = SearchEngine(SETTINGS, LifecycleSettings(), store.path, index, store.connect)
    index.start()
    try:
        caught_up(store, index)
        index.paused = True
        store.delete(rows[0])
        store.update(rows[1], state="archived")
        store.update(rows[2], content="entirely new")  # its vector is of the old text
        store.update(rows[3], expires_at=NOW_S - 1)
        store.update(rows[4], memory_type="episode")
        dense = query("", VECTORS[0], mode="dense", k=6)
        assert set(ids(engine.search(dense))) == {rows[4], rows[5]}
        assert engine.search(dense).pending == 1
        assert ids(engine.search(replace(dense, filter=parse_filter({"memory_type": "episode"})))) == [rows[4]]
        hybrid = engine.search(query("entirely new", VECTORS[2], k=6))
        assert hybrid.hits[0].row_id == rows[2] and hybrid.hits[0].similarity is None
    finally:
        engine.close()
        index.close()


class Replaced(SearchIndex):
    """An index that is loaded anew between the moment a search follows the log and the moment it looks."""

    older: Any = None

    @contextmanager
    def reading(self) -> Iterator[Any]:
        with super().reading() as view:
            yield self.older or view


def test_a_view_that_was_replaced_meanwhile_is_not_taken_for_current(store: SearchStore) -> None:
    store.add("heron", VECTORS[0])
    index = Replaced(SETTINGS, store.path, store.connect)
    engine = SearchEngine(SETTINGS, LifecycleSettings(), store.path, index, store.connect)
    other = SearchIndex(SETTINGS, store.path, store.connect)
    try:
        for each in (index, other):
            each.set_model(MODEL, DIMENSION)
            each.start()
            caught_up(store, each)
        assert engine.search(query("heron", mode="keyword")).reason is None
        other.close()  # its view stays as it is
        late = store.add("a late heron", VECTORS[1])
        index.older = other.view
        outcome = engine.search(query("late heron", mode="keyword"))
        assert late not in ids(outcome) and outcome.degraded and outcome.pending > 0
        index.older = None
        assert late in ids(engine.search(query("late heron", mode="keyword")))
    finally:
        engine.close()
        index.close()
        other.close()


class Behind(SearchIndex):
    """An index that cannot follow the log."""

    def catch_up(self, conn: Any, target: int) -> bool:
        return False


def test_a_text_that_the_index_still_has_otherwise_is_not_shown(store: SearchStore) -> None:
    changed, kept = store.add("a heron", VECTORS[0]), store.add("another heron", VECTORS[1])
    index = Behind(SETTINGS, store.path, store.connect)
    engine = SearchEngine(SETTINGS, LifecycleSettings(), store.path, index, store.connect)
    try:
        index.start()
        caught_up(store, index)
        index.close()
        assert set(ids(engine.search(query("heron", mode="keyword")))) == {changed, kept}
        store.update(changed, content="an egret")
        assert ids(engine.search(query("heron", mode="keyword"))) == [kept]
    finally:
        engine.close()
        index.close()


@pytest.mark.parametrize("more", [{}, {"offset": 1}, {"diversity": 0.5}])
def test_the_records_of_the_hits_are_those_that_were_judged(
    store: SearchStore, start: Start, more: dict[str, Any]
) -> None:
    """They are read in the state that was searched, so each has the content that its hit was found by."""
    rows = [store.add(f"heron {n}", VECTORS[n]) for n in range(4)]
    store.add("heron", VECTORS[0], namespace="other")
    _, engine = start()
    store.update(rows[0], content="an egret among herons")
    outcome = engine.search(query("heron", VECTORS[0], mode="keyword", **more))
    assert len(ids(outcome)) == 4 - more.get("offset", 0)
    assert [*outcome.records] == ids(outcome)
    for hit in outcome.hits:
        assert outcome.records[hit.row_id].content_digest == hit.digest
    assert "an egret among herons" in {record.content for record in outcome.records.values()}


def test_deleting_updating_archiving_expiring(store: SearchStore, start: Start) -> None:
    rows = [store.add(f"heron {n}", VECTORS[n]) for n in range(5)]
    index, engine = start()
    store.delete(rows[0])
    store.update(rows[1], state="archived")
    store.update(rows[2], expires_at=NOW_S)
    store.update(rows[3], content="egret")
    caught_up(store, index)
    for mode in ("hybrid", "dense", "keyword"):
        expected = {rows[4]}
        assert set(ids(engine.search(query("heron", VECTORS[0], mode=mode)))) == expected
        archived = engine.search(query("heron", VECTORS[0], mode=mode, include_archived=True))
        assert set(ids(archived)) == expected | {rows[1]}
    assert index.pending("default") == 1 and not index.has_vector(rows[3]) and index.has_vector(rows[4])
    store.embed(rows[3], VECTORS[3])
    caught_up(store, index)
    assert rows[3] in ids(engine.search(query("", VECTORS[3], mode="dense")))


def test_namespaces_and_sessions_stay_apart(store: SearchStore, start: Start) -> None:
    mine = store.add("heron", VECTORS[0])
    store.add("heron", VECTORS[0], namespace="other")
    store.add("heron", VECTORS[0], memory_type="session")
    _, engine = start()
    for mode in ("hybrid", "dense", "keyword"):
        assert ids(engine.search(query("heron", VECTORS[0], mode=mode))) == [mine]


FILTERS: list[dict[str, Any]] = [
    {"memory_type": "even"},
    {"not": {"memory_type": "even"}},
    {"user_id": {"in": ["u1", None]}},
    {"user_id": {"contains": "2"}},
    {"metadata.topic": {"in": ["birds", 3]}},
    {"metadata.topic": {"exists": False}},
    {"metadata.topic": {"contains": "bird"}},
    {"metadata.other.deep": {"gt": 10}},  # not held in memory: by SQL
    {"or": [{"metadata.other.deep": 3}, {"user_id": "u0"}]},
    {"tags": {"any": ["t1"]}},
    {"importance": {"gte": 0.5}},
    {"expires_at": {"gt": NOW_S + 5}},
    {"expires_at": {"in": [NOW_S + 10, None]}},
    {"expires_at": {"nin": [NOW_S + 10]}},
    {"expires_at": {"ne": None}},
    {"session_id": "nobody"},
]


def test_a_filter_means_the_same_set_on_both_sides(store: SearchStore, start: Start) -> None:
    topics = ["birds", "a bird", 3, 3.0, None, ["birds"], ["bird"], {"x": 1}]
    for n in range(60):
        metadata: dict[str, Any] = {"topic": topics[n % 8], "other": {"deep": n}} if n % 9 else {}
        store.add(
            f"heron {n}", VECTORS[n], memory_type="even" if n % 2 == 0 else "odd", metadata=metadata,
            user_id=None if n % 5 == 0 else f"u{n % 3}", tags=[f"t{n % 4}"], importance=(n % 10) / 10,
            expires_at=None if n % 3 else NOW_S + n - 6,
        )  # fmt: skip
    _, engine = start()
    sizes = set()
    for raw in FILTERS:
        found = [
            set(ids(engine.search(query("heron", VECTORS[0], mode=m, k=60, filter=raw)))) for m in ("dense", "keyword")
        ]
        assert found[0] == found[1], raw
        sizes.add(len(found[0]))
    assert len(sizes) > 5  # the filters tell rows apart


def test_a_filter_that_lets_few_pass_never_starves(store: SearchStore, start: Start) -> None:
    vectors = unit_vectors(30_000)
    rows = store.add_many([f"heron {n}" for n in range(30_000)], vectors)
    worst = np.argsort(vectors @ vectors[0])[:5]
    wanted = {rows[n] for n in worst}
    for row in wanted:
        store.update(row, memory_type="rare", metadata='{"kind": "rare"}')
    _, engine = start(replace(SETTINGS, exact_max=1000, hnsw_m=8, hnsw_ef_construction=20))
    for raw in ({"memory_type": "rare"}, {"metadata.kind": "rare"}):
        for mode in ("hybrid", "dense", "keyword"):
            assert set(ids(engine.search(query("heron", vectors[0], mode=mode, filter=raw)))) == wanted


def test_floors_apply_to_absolute_figures(store: SearchStore, start: Start) -> None:
    near = store.add("heron on the pier", VECTORS[0])
    word = store.add("heron", VECTORS[1])
    store.add("unrelated", VECTORS[2])
    _, engine = start()
    assert ids(engine.search(query("heron", VECTORS[0], mode="dense", min_score=0.9))) == [near]
    assert set(ids(engine.search(query("heron", VECTORS[0], min_score=0.9)))) == {near, word}
    assert ids(engine.search(query("heron", VECTORS[0], min_score=0.9, k=1, offset=1))) in ([near], [word])
    assert ids(engine.search(query("heron egret", VECTORS[2], mode="keyword", min_score=0.99))) == []


def test_pages_join_without_gap(store: SearchStore, start: Start) -> None:
    for n in range(40):
        store.add(f"heron {'pier ' * (n % 7)}", VECTORS[n])
    _, engine = start()
    whole = ids(engine.search(query("heron pier", VECTORS[3], k=40)))
    paged = [
        row for at in range(0, 40, 7) for row in ids(engine.search(query("heron pier", VECTORS[3], k=7, offset=at)))
    ]
    assert paged == whole and len(set(whole)) == 40


def test_while_there_is_no_index_filters_of_any_field_hold(store: SearchStore) -> None:
    red = store.add("heron", metadata={"colour": "red", "topic": "birds"})
    store.add("another heron", metadata={"colour": "blue", "topic": "coasts"})
    index = SearchIndex(SETTINGS, store.path, store.connect)  # and it is never started
    engine = SearchEngine(SETTINGS, LifecycleSettings(), store.path, index, store.connect)
    try:
        for raw in ({"metadata.colour": "red"}, {"metadata.topic": "birds"}, {"created_by": "agent"}):
            outcome = engine.search(query("heron", mode="keyword", filter=raw))
            assert outcome.reason == "index_loading" and red in ids(outcome)
            assert len(outcome.hits) == (2 if "created_by" in raw else 1)
    finally:
        engine.close()
        index.close()


def test_without_a_vector_the_words_answer(store: SearchStore, start: Start) -> None:
    row = store.add("heron", VECTORS[0])
    index, engine = start(model=None)
    outcome = engine.search(query("heron"))
    assert ids(outcome) == [row] and outcome.reason == "no_query_vector" and outcome.pending == 1
    assert engine.search(query("heron", VECTORS[0])).reason == "index_loading"
    index.set_model(MODEL, DIMENSION)
    wait_until(lambda: index.has_vector(row))
    assert engine.search(query("heron", VECTORS[0])).reason is None
    other = replace(query("heron", VECTORS[0]), vector_model="model-b")
    assert engine.search(other).reason == "other_model"
    assert engine.search(query("heron", unit_vectors(1, 8)[0])).reason == "other_model"
    assert engine.search(query("heron", np.zeros(DIMENSION, np.float32))).reason == "no_query_vector"


def test_an_index_that_has_not_started_is_no_obstacle(store: SearchStore) -> None:
    row = store.add("heron", VECTORS[0])
    index = SearchIndex(SETTINGS, store.path, store.connect)
    index.set_model(MODEL, DIMENSION)
    engine = SearchEngine(SETTINGS, LifecycleSettings(), store.path, index, store.connect)
    outcome = engine.submit(query("heron", VECTORS[0])).result(10)
    assert ids(outcome) == [row] and outcome.degraded and outcome.pending == 0
    engine.close()


def test_similar_leaves_the_memory_itself_out(store: SearchStore, start: Start) -> None:
    rows = [store.add(f"text {n}", VECTORS[n]) for n in range(8)]
    bare = store.add("no vector")
    _, engine = start()
    outcome = engine.submit_similar(query(k=3), rows[2]).result(10)
    order = [rows[n] for n in np.argsort(-(VECTORS[:8] @ VECTORS[2])) if n != 2]
    assert ids(outcome) == order[:3] and outcome.hits[0].keyword is None
    missing = engine.similar(query(k=3), bare)
    assert missing.reason == "no_vector" and missing.hits == []


def conversation(store: SearchStore, *texts: str, **fields: Any) -> list[int]:
    """Turns below one parent, whose vectors are all the same; their row ids in order."""
    store.add("a talk", memory_type="session", memory_id=f"ses-{texts[0]}")
    rows = []
    for turn, text in enumerate(texts):
        given = {"parent_id": f"ses-{texts[0]}", "occurred_at": NOW_S + turn} | fields
        rows.append(store.add(text, VECTORS[0], **given))
    return rows


TALK = ("hello there", "where did you put the kettle?", "below the stairs", "fine", "well then", "see you", "bye")


def test_an_answer_is_found_with_the_words_of_its_question(store: SearchStore, start: Start) -> None:
    rows = conversation(store, *TALK)
    index, engine = start()
    asked = query("kettle", VECTORS[40], k=2, explain=True)
    outcome = engine.search(asked)
    assert ids(outcome)[:2] == [rows[1], rows[2]]
    answer = outcome.hits[1]
    assert answer.keyword == 0.0 and (answer.parts or {})["keyword"] > 0.0 and (answer.parts or {})["bm25"] == 0.0
    narrow = RankingSettings(window_before=0.0, window_after=0.0, parent_weight=0.0)
    alone = SearchEngine(SETTINGS, LifecycleSettings(), store.path, index, store.connect, weights=narrow)
    try:
        parts = {hit.row_id: hit.parts or {} for hit in alone.search(replace(asked, k=20)).hits}
    finally:
        alone.close()
    assert parts[rows[1]]["keyword"] == 1.0 and parts[rows[2]]["keyword"] == 0.0


def test_memories_without_parents_are_ranked_by_themselves_alone(store: SearchStore, start: Start) -> None:
    """A flat corpus, one half of it put below a parent afterwards: only then others count."""
    rng = np.random.default_rng(5)
    words = ["heron", "pier", "gull", "boat", "rope", "tide", "sand", "salt", "wave", "reef", "where?", "how?"]
    rows = store.add_many([" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(60)], VECTORS[:60])
    index, engine = start()
    weights = RankingSettings()

    def is_by_itself(parts: dict[str, float]) -> bool:
        evidence = weights.keyword_weight * parts["keyword"] + weights.dense_weight * parts["dense"]
        return parts["turn"] == 0.0 and parts["parent"] == pytest.approx(weights.parent_weight * evidence)

    def by_themselves() -> list[bool]:
        found = (engine.search(query("gull tide reef", VECTORS[at], k=60, explain=True)) for at in (60, 61, 62))
        return [is_by_itself(hit.parts or {}) for outcome in found for hit in outcome.hits]

    alone = by_themselves()
    assert len(alone) > 100 and all(alone)
    store.add("a talk", memory_type="session", memory_id="ses-talk")
    for row in rows[::2]:
        store.update(row, parent_id="ses-talk")
    caught_up(store, index)
    together = by_themselves()
    assert len(alone) // 3 < together.count(False) < len(together)


def test_a_filter_hides_results_and_not_what_stands_around_them(store: SearchStore, start: Start) -> None:
    rows = conversation(store, *TALK)
    store.update(rows[2], user_id="ben")
    _, engine = start()
    outcome = engine.search(query("kettle", VECTORS[40], explain=True, filter={"user_id": "ben"}))
    assert ids(outcome) == [rows[2]] and (outcome.hits[0].parts or {})["keyword"] > 0.0


@pytest.mark.parametrize("hidden", [{"state": "archived", "archived_at": NOW_S}, {"expires_at": NOW_S - 1.0}])
def test_what_is_archived_or_expired_gives_no_evidence(
    store: SearchStore, start: Start, hidden: dict[str, Any]
) -> None:
    rows = conversation(store, *TALK)
    store.update(rows[1], **hidden)
    _, engine = start()
    outcome = engine.search(query("kettle", VECTORS[40], k=20, explain=True))
    assert rows[1] not in ids(outcome)
    assert all((hit.parts or {})["keyword"] == 0.0 for hit in outcome.hits)


def test_a_summary_has_around_it_what_its_originals_had(store: SearchStore, start: Start) -> None:
    """What was merged into it gives its place away: an answer after the summary of a question, and one before."""
    told = ("hello there", "where is it?", "one moment", "what?", "where did you put the kettle?", "below the stairs")
    rows = conversation(store, *told)
    index, engine = start()
    for row in rows[2:5]:
        store.update(row, state="archived", archived_at=NOW_S)
    given = {"parent_id": f"ses-{told[0]}", "occurred_at": NOW_S + 2}
    summary = store.add("one moment. where did you put the kettle?", VECTORS[0], memory_type="consolidated", **given)
    caught_up(store, index)
    found = engine.search(query("kettle", VECTORS[40], k=20, explain=True, neighbours=2)).hits
    parts = {hit.row_id: hit.parts or {} for hit in found}
    assert set(parts) == {rows[0], rows[1], summary, rows[5]}
    assert parts[summary]["keyword"] == 1.0 and all(part["keyword"] > 0.0 for part in parts.values())
    # After a question, and one itself: with its neighbours out of sight it would be no turn at all.
    assert parts[rows[5]]["turn"] > parts[summary]["turn"] != 0.0
    beside = {hit.row_id: (hit.before, hit.after) for hit in found}
    assert beside[summary] == ((rows[0], rows[1]), (rows[5],)) and beside[rows[5]] == ((rows[1], summary), ())


def merged(store: SearchStore, originals: list[int], content: str, **fields: Any) -> int:
    """The row of a consolidated memory that these became."""
    row = store.add(content, VECTORS[1], memory_type="consolidated", parent_id=f"ses-{TALK[0]}", **fields)
    store.db.execute("INSERT INTO consolidations VALUES (?, 'summary', 'extractive', NULL, ?)", (row, NOW_S))
    for original in originals:
        store.db.execute("INSERT INTO consolidation_members VALUES (?, ?, '{}')", (row, original))
        store.update(original, state="archived", archived_at=NOW_S)
    return row


def test_originals_speak_for_the_memory_that_they_became(store: SearchStore, start: Start) -> None:
    """It is found by what they said, and stands where they stood; they themselves stay out of sight."""
    rows = conversation(store, *TALK)
    index, engine = start()
    asked = query("kettle", VECTORS[0], k=20, explain=True)
    alone = {hit.row_id: hit.parts or {} for hit in engine.search(asked).hits}
    summary = merged(store, rows[1:3], "it is downstairs", occurred_at=NOW_S + 1, user_id="ada")
    caught_up(store, index)
    hits = engine.search(asked).hits
    parts = {hit.row_id: hit.parts or {} for hit in hits}
    assert hits[0].row_id == summary and set(parts) == {rows[0], summary, *rows[3:]}
    # Every other turn has the evidence that it had, but for what one more text adds to the average length, and the
    # summary has that of the better of the two.
    for row in (rows[0], *rows[3:]):
        assert parts[row]["keyword"] == pytest.approx(alone[row]["keyword"], rel=0.1)
    assert parts[summary]["keyword"] == pytest.approx(alone[rows[1]]["keyword"]) == 1.0
    # What is absolute is of its own text.
    assert hits[0].keyword == 0.0 and hits[0].similarity == pytest.approx(float(VECTORS[0] @ VECTORS[1]), abs=1e-5)
    assert ids(engine.search(replace(asked, offset=1))) == ids(engine.search(asked))[1:]
    assert ids(engine.search(query("kettle", VECTORS[0], filter={"user_id": "ada"}))) == [summary]
    assert ids(engine.search(query("kettle", VECTORS[0], filter={"user_id": "ben"}))) == []
    assert set(ids(engine.search(replace(asked, include_archived=True)))) == {*rows, summary}
    assert ids(engine.search(query("kettle", mode="keyword"))) == []
    reloaded, other = start()
    caught_up(store, reloaded)
    assert [(hit.row_id, hit.score) for hit in other.search(asked).hits] == [(hit.row_id, hit.score) for hit in hits]


def test_what_was_merged_again_speaks_for_what_it_became(store: SearchStore, start: Start) -> None:
    """Neither words nor a vector of its own lead to it."""
    first = store.add("the heron landed on the pier", VECTORS[0])
    between = store.add("birds by the pier", VECTORS[1])
    other = store.add("tax forms", VECTORS[2])
    last = store.add("things of the coast")
    for became, original in ((between, first), (last, between)):
        store.db.execute("INSERT INTO consolidations VALUES (?, 'summary', 'extractive', NULL, ?)", (became, NOW_S))
        store.db.execute("INSERT INTO consolidation_members VALUES (?, ?, '{}')", (became, original))
        store.update(original, state="archived", archived_at=NOW_S)
    index, engine = start()
    caught_up(store, index)
    assert ids(engine.search(query("pier", VECTORS[1]))) == [last, other]


@pytest.mark.parametrize(
    "change",
    ["the original is deleted", "the original expired", "the summary is archived", "the summary is deleted"],
)
def test_who_speaks_for_nothing_is_not_heard(store: SearchStore, start: Start, change: str) -> None:
    rows = conversation(store, *TALK)
    summary = merged(store, rows[1:3], "it is downstairs", occurred_at=NOW_S + 1)
    index, engine = start()
    caught_up(store, index)
    asked = query("kettle", VECTORS[0], k=20, explain=True)
    assert any((hit.parts or {})["keyword"] > 0.0 for hit in engine.search(asked).hits)
    if change == "the original is deleted":
        store.delete(rows[1])
    elif change == "the original expired":
        store.update(rows[1], expires_at=NOW_S - 1)
    elif change == "the summary is archived":
        store.update(summary, state="archived", archived_at=NOW_S)
    else:
        store.delete(summary)
    found = engine.search(asked).hits
    assert {hit.row_id for hit in found} >= {rows[0], *rows[3:]} and rows[1] not in {hit.row_id for hit in found}
    assert all((hit.parts or {})["keyword"] == 0.0 for hit in found)


def test_a_day_in_the_question_finds_what_occurred_then(store: SearchStore, start: Start) -> None:
    day_s = 86_400.0
    rows = [store.add("we met", VECTORS[0], occurred_at=NOW_S - days * day_s) for days in (0, 100, 200)]
    _, engine = start()
    outcome = engine.search(query("who met on 6 August 2023", VECTORS[0], explain=True))  # NOW_S is 14 November 2023
    assert ids(outcome)[0] == rows[1] and (outcome.hits[0].parts or {})["date"] == 1.0

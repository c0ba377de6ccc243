"""What a caller may add to a search, in pure functions: boosts, diversity, highlights, the page, validation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_system.decoding import MSGPACK
from memory_system.errors import InvalidField
from memory_system.ranking_settings import RankingSettings
from memory_system.search import boosting, diversity, ranking
from memory_system.search.boosting import Boost
from memory_system.search.diversity import Comparison
from memory_system.search.highlights import MAX_SPANS, highlights
from memory_system.search.page import Pool, page
from memory_system.search.query import SearchQuery
from memory_system.search.tokens import Tokenizer, query_words
from memory_system.search_models import SearchMemory, SearchSimilar, SemanticSearch

DAY_S = 86_400.0
NOW_S = 1_700_000_000.0
NAN = float("nan")
NO_WORDS = np.zeros(0, np.uint64), np.zeros(0, np.int64)

quick = settings(max_examples=50, deadline=None)


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    tokenizer = Tokenizer()
    yield tokenizer
    tokenizer.close()


# ---- boosts ----


def test_recency_halves_with_each_half_life_and_never_exceeds_one() -> None:
    ages = np.array([-5.0, 0.0, 10.0, 20.0, 1e9]) * DAY_S
    assert boosting.recency(NOW_S - ages, NOW_S, 10.0) == pytest.approx([1.0, 1.0, 0.5, 0.25, 0.0])


def test_only_what_was_asked_for_is_added() -> None:
    happened, importance = np.array([NOW_S, NOW_S - 30 * DAY_S]), np.array([0.2, 0.8])
    assert boosting.added(Boost(), NOW_S, happened, importance) == {}
    added = boosting.added(Boost(recency=2.0, importance=0.5), NOW_S, happened, importance)
    assert {name: part.tolist() for name, part in added.items()} == {
        "recency": pytest.approx([2.0, 1.0]),
        "importance": pytest.approx([0.1, 0.4]),
    }


@pytest.mark.parametrize("mode", ["hybrid", "dense", "keyword"])
def test_boosts_are_the_last_part_of_the_score_in_every_mode(mode: str) -> None:
    pool = np.array([1, 2]), np.array([0.5, 0.4]), np.array([2.0, 1.0]), RankingSettings()
    plain = ranking.rank(mode, *pool)
    boosted = ranking.rank(mode, *pool, None, {"recency": np.array([0.0, 5.0])})
    assert plain.row_ids.tolist() == [1, 2] and boosted.row_ids.tolist() == [2, 1]
    assert boosted.score == pytest.approx(plain.score[[1, 0]] + [5.0, 0.0])
    assert boosted.parts["recency"].tolist() == [5.0, 0.0] and "recency" not in plain.parts


# ---- diversity ----


def matrix(*rows: list[float]) -> diversity.Likeness:
    return lambda at: np.array(rows)[at]


def test_mmr_puts_a_near_copy_behind_what_is_new() -> None:
    likeness = matrix([1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0])
    places, value, off = diversity.order(np.array([1.0, 0.8, 0.5]), likeness, 0.5, 3)
    assert places.tolist() == [0, 2, 1]
    assert value == pytest.approx([0.5, 0.25, 0.4 - 0.45])
    assert off == pytest.approx([0.0, 0.0, 0.45])
    assert diversity.order(np.array([1.0, 0.8, 0.5]), likeness, 0.1, 3)[0].tolist() == [0, 1, 2]


@quick
@given(
    scores=st.lists(st.floats(-5, 5), min_size=1, max_size=30),
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0.01, 1.0),
)
def test_mmr_is_a_permutation_in_falling_value_whose_beginning_is_that_of_a_shorter_one(
    scores: list[float], seed: int, share: float
) -> None:
    relevant = diversity.relevance(np.sort(np.array(scores))[::-1])
    vectors = np.abs(np.random.default_rng(seed).standard_normal((len(scores), 4))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = Comparison(vectors, np.ones(len(scores), np.bool_), *NO_WORDS).likeness
    places, value, off = diversity.order(relevant, likeness, share, len(scores))
    assert sorted(places.tolist()) == list(range(len(scores)))
    assert np.all(np.diff(value) <= 1e-9) and np.all(off >= 0.0) and np.all(off <= share + 1e-6)
    half = diversity.order(relevant, likeness, share, len(scores) // 2)
    assert half[0].tolist() == places[: len(scores) // 2].tolist()


def test_what_is_not_compared_follows_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "MAX_COMPARED", 2)
    relevant = np.array([1.0, 0.9, 0.8, 0.7])
    places, value, _ = diversity.order(relevant, matrix([1.0, 0.2], [0.2, 1.0]), 0.5, 4)
    assert places.tolist() == [0, 1, 2, 3] and np.all(np.diff(value) <= 0.0)
    assert len(diversity.order(relevant, matrix([1.0, 0.2], [0.2, 1.0]), 0.5, 3)[0]) == 3


def test_likeness_is_by_vectors_and_by_words_where_one_is_lacking(tokenizer: Tokenizer) -> None:
    vectors = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]], np.float32)
    held = np.array([True, True, False, True])
    words = tokenizer.hashes(["green tea", "black tea", "green green tea", "rooks"])
    comparison = Comparison(vectors, held, *words)
    assert comparison.likeness(0) == pytest.approx([1.0, 0.6, 1.0, 0.0])  # a cosine below 0 is no likeness
    assert comparison.likeness(2) == pytest.approx([1.0, 0.5, 1.0, 0.0])
    nothing = Comparison(np.zeros((2, 1), np.float32), np.zeros(2, np.bool_), *tokenizer.hashes(["...", "tea"]))
    assert nothing.likeness(0).tolist() == [0.0, 0.0] and nothing.likeness(1).tolist() == [0.0, 1.0]


# ---- highlights ----


def marked(tokenizer: Tokenizer, query: str, text: str) -> list[str]:
    (spans,) = highlights(tokenizer, query, [text])
    assert spans == sorted(spans)
    return [text[begin:end] for begin, end in spans]


@pytest.mark.parametrize(
    ("query", "text", "expected"),
    [
        ("swimming", "She swims; he swam. Swim-suits!", ["swims", "Swim"]),
        ("what is the cafe", "What a café. The CAFÉS close.", ["café", "CAFÉS"]),
        ("cafe", "cafe\u0301 noir", ["cafe\u0301"]),
        ("tea", "\u201ctea\u201d\u2014tea\u2026", ["tea", "tea"]),
        ("tea", "\U0001f375tea\U0001f375 teapot", ["tea"]),
        ("rook", "a crow", []),
        ("the and", "the end and the rest", ["the", "and", "the"]),  # nothing but stop words: then they count
        ("\u0447\u0430\u0439", "\u0427\u0430\u0439, \u0447\u0430\u0439.", ["\u0427\u0430\u0439", "\u0447\u0430\u0439"]),
        ("...", "nothing to see...", []),
        ("tea", "", []),
    ],
)
def test_the_words_that_the_index_would_match_are_marked(
    tokenizer: Tokenizer, query: str, text: str, expected: list[str]
) -> None:
    assert marked(tokenizer, query, text) == expected


def test_highlights_are_bounded(tokenizer: Tokenizer) -> None:
    assert len(marked(tokenizer, "tea", "tea " * (MAX_SPANS + 50))) == MAX_SPANS


@quick
@given(text=st.text(max_size=60), query=st.text(min_size=1, max_size=20))
def test_every_span_is_a_word_of_the_query_by_the_indexs_own_terms(tokenizer: Tokenizer, text: str, query: str) -> None:
    (spans,) = highlights(tokenizer, query, [text])
    hashes = {one for terms in tokenizer.terms(query_words(query)).values() for one in terms.hashes}
    for begin, end in spans:
        assert 0 <= begin < end <= len(text)
        assert hashes & {int(one) for one in tokenizer.hashes([text[begin:end]])[0]}
    ends = [place for span in spans for place in span]
    assert ends == sorted(ends)


@quick
@given(words=st.lists(st.sampled_from(["tea", "teas", "caf\u00e9", "x1", "\u2014", "\u4e2d\u6587"]), max_size=8))
def test_whatever_the_index_finds_is_marked(tokenizer: Tokenizer, words: list[str]) -> None:
    text = " ".join(words)
    (spans,) = highlights(tokenizer, "tea cafe x1 \u4e2d\u6587", [text])
    assert [text[begin:end] for begin, end in spans] == [word for word in words if word != "\u2014"]


# ---- the page ----


def pool(similarity: list[float], share: list[float]) -> Pool:
    count = len(share)
    figures = np.array(similarity), np.array(share), np.array(share), np.zeros(count)
    return Pool(np.arange(count, 0, -1), np.zeros(count, "V16"), *figures, None, None, 0, True)


def hits(pool: Pool, likeness: diversity.Likeness | None = None, **fields: Any) -> list[tuple[int, float]]:
    query = SearchQuery("default", "x", NOW_S, **fields)
    ranked = ranking.rank(query.mode, pool.row_ids, pool.similarity, pool.bm25, RankingSettings(dense_weight=1.0))
    found = page(query, ranked, pool, lambda row_ids: likeness or matrix(*np.eye(len(row_ids)).tolist()))
    return [(hit.row_id, hit.score) for hit in found]


def test_the_floor_comes_before_the_cut() -> None:
    some = pool([0.1, 0.9, NAN, 0.5], [0.9, 0.0, 0.6, 0.1])  # rows 4, 3, 2, 1
    assert [row for row, _ in hits(some, k=2, min_score=0.5)] == [2, 3]
    assert [row for row, _ in hits(some, k=2, offset=2, min_score=0.5)] == [4, 1]
    assert [row for row, _ in hits(some, mode="keyword", min_score=0.5)] == [4, 2]
    assert [row for row, _ in hits(some, mode="dense", min_score=0.95)] == []


def test_diversity_orders_what_reached_the_floor_page_by_page() -> None:
    some = pool([0.9, 0.8, 0.5, 0.2], [1.0, 0.9, 0.5, 0.0])  # rows 4, 3, 2, 1
    copies = matrix([1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0])
    whole = hits(some, copies, diversity=0.6, min_score=0.4)
    assert [row for row, _ in whole] == [4, 2, 3]
    assert [score for _, score in whole] == sorted((score for _, score in whole), reverse=True)
    assert [hits(some, copies, diversity=0.6, min_score=0.4, k=1, offset=at)[0] for at in range(3)] == whole
    assert hits(some, copies, diversity=0.6, min_score=0.4, k=1, offset=3) == []
    assert [row for row, _ in hits(some, copies, min_score=0.4)] == [4, 3, 2]  # without it, the copy stands second


def test_nothing_and_one_result_have_no_diversity() -> None:
    assert hits(pool([], []), diversity=1.0) == []
    assert [row for row, _ in hits(pool([0.5], [0.5]), diversity=1.0)] == [1]


# ---- validation ----


@pytest.mark.parametrize(
    ("data", "field", "text"),
    [
        ({"occurred_after": 5.0, "occurred_before": 5.0}, "occurred_before", "must be later than occurred_after"),
        ({"occurred_after": math.inf}, "occurred_after", "expected float <="),
        ({"occurred_before": "2023"}, "occurred_before", "got str"),
        ({"boost": {"recency": -0.1}}, "boost.recency", "expected float >= 0.0"),
        ({"boost": {"importance": 11}}, "boost.importance", "expected float <= 10.0"),
        ({"boost": {"half_life_days": 5.0}}, "boost", "half_life_days does nothing without recency"),
        ({"boost": {"recency": 1, "half_life_days": 0}}, "boost.half_life_days", "expected float >= 0.001"),
        ({"boost": {"recncy": 1}}, "boost.recncy", "did you mean recency?"),
        ({"boost": 1.0}, "boost", "expected object"),
        ({"diversity": 1.01}, "diversity", "expected float <= 1.0"),
        ({"diversity": NAN}, "diversity", "expected float"),
        ({"expand": "children"}, "expand", "choose one of parent, neighbours"),
        ({"min_score": 1.5}, "min_score", "expected float <= 1.0"),
        ({"highlite": True}, "highlite", "did you mean highlight?"),
    ],
)
def test_a_bad_option_is_named(data: dict[str, Any], field: str, text: str) -> None:
    for cls, needed in ((SemanticSearch, {"query": "x"}), (SearchMemory, {"query": "x"})):
        with pytest.raises(InvalidField) as caught:
            MSGPACK.decode(cls, msgpack.packb(needed | data))
        assert caught.value.details["field"] == field
        assert text in caught.value.message


def test_a_search_without_a_text_has_nothing_to_highlight() -> None:
    with pytest.raises(InvalidField, match="unknown field highlight"):
        MSGPACK.decode(SearchSimilar, msgpack.packb({"memory_id": "m", "highlight": True}))

"""Fusion of two sides' scores: pure functions."""

from __future__ import annotations

import numpy as np
import pytest

from memory_system.search import ranking

NAN = float("nan")


def ranked(mode: str, similarity: list[float], bm25: list[float], ids: list[int] | None = None) -> ranking.Ranked:
    row_ids = np.array(ids or range(1, len(bm25) + 1), np.int64)
    return ranking.rank(mode, row_ids, np.array(similarity), np.array(bm25), dense_weight=0.5, keyword_weight=0.5)


def test_hybrid_is_the_weighted_sum_of_scaled_scores() -> None:
    result = ranked("hybrid", [0.2, 0.6, 0.4], [4.0, 0.0, 2.0])
    assert result.row_ids.tolist() == [1, 2, 3]
    assert result.score == pytest.approx([0.5, 0.5, 0.5])
    assert result.dense_part == pytest.approx([0.0, 1.0, 0.5])
    assert result.keyword_part == pytest.approx([1.0, 0.0, 0.5])


def test_a_row_without_a_vector_still_ranks_by_its_words() -> None:
    result = ranked("hybrid", [NAN, 0.9, 0.1], [8.0, 1.0, 0.0])
    assert result.row_ids.tolist() == [2, 1, 3]
    assert np.isnan(result.similarity[1])


def test_equal_scores_stand_in_the_order_of_row_ids() -> None:
    assert ranked("keyword", [NAN] * 3, [1.0, 1.0, 1.0], [9, 3, 5]).row_ids.tolist() == [3, 5, 9]


def test_dense_score_is_the_cosine() -> None:
    result = ranked("dense", [-0.5, 0.25], [9.0, 0.0])
    assert result.row_ids.tolist() == [2, 1]
    assert result.score.tolist() == [0.25, -0.5]


def test_one_candidate_and_none() -> None:
    assert ranked("hybrid", [0.3], [2.0]).score.tolist() == [1.0]
    assert len(ranked("hybrid", [], []).row_ids) == 0


def test_no_keyword_hit_leaves_the_dense_order() -> None:
    assert ranked("hybrid", [0.1, 0.3, 0.2], [0.0, 0.0, 0.0]).row_ids.tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("mode", "similarity", "keyword", "floor", "expected"),
    [
        ("hybrid", 0.5, 0.1, 0.4, True),
        ("hybrid", 0.1, 0.5, 0.4, True),
        ("hybrid", 0.1, 0.1, 0.4, False),
        ("hybrid", None, 0.5, 0.4, True),
        ("hybrid", None, None, None, True),
        ("dense", 0.5, 0.0, 0.4, True),
        ("dense", 0.3, 1.0, 0.4, False),
        ("dense", -0.5, None, -0.6, True),
        ("keyword", 0.9, 0.3, 0.4, False),
        ("keyword", None, 0.4, 0.4, True),
    ],
)
def test_the_floor_applies_to_absolute_figures(
    mode: str, similarity: float | None, keyword: float | None, floor: float | None, expected: bool
) -> None:
    assert ranking.passes(mode, similarity, keyword, floor) is expected

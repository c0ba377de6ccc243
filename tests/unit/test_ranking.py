"""Fusion of two sides' scores and of what stands around a memory: pure functions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memory_system.ranking_settings import RankingSettings
from memory_system.search import ranking
from memory_system.search.dates import Date
from memory_system.search.ranking import Surroundings

NAN = float("nan")
DEFAULTS = RankingSettings()
HALF = RankingSettings(keyword_weight=0.5, dense_weight=0.5)
BARE = RankingSettings(
    window_before=0.0,
    window_after=0.0,
    parent_weight=0.0,
    date_weight=0.0,
    answer_weight=0.0,
    question_weight=0.0,
    length_weight=0.0,
)


def ranked(mode: str, similarity: list[float], bm25: list[float], ids: list[int] | None = None) -> ranking.Ranked:
    row_ids = np.array(ids or range(1, len(bm25) + 1), np.int64)
    return ranking.rank(mode, row_ids, np.array(similarity), np.array(bm25), HALF)


def test_hybrid_is_the_weighted_sum_of_scaled_scores() -> None:
    result = ranked("hybrid", [0.2, 0.6, 0.4], [4.0, 0.0, 2.0])
    assert result.row_ids.tolist() == [1, 2, 3]
    assert result.score == pytest.approx([0.5, 0.5, 0.5])
    assert result.parts["dense"] == pytest.approx([0.0, 1.0, 0.5])
    assert result.parts["keyword"] == pytest.approx([1.0, 0.0, 0.5])


def test_a_row_without_a_vector_still_ranks_by_its_words() -> None:
    """As if it were as near as the others are in the mean: not behind one that has a few words and the only vector."""
    result = ranked("hybrid", [NAN, 0.9, 0.1], [8.0, 1.0, 0.0])
    assert result.row_ids.tolist() == [1, 2, 3]
    assert result.parts["dense"].tolist() == [0.5, 1.0, 0.0]
    result = ranked("hybrid", [0.1, NAN, 0.9], [8.0, 8.0, 8.0])
    assert result.row_ids.tolist() == [3, 2, 1]
    assert result.at.tolist() == [2, 1, 0]


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
        ("hybrid", None, 0.3, 0.4, False),
        ("dense", 0.5, 0.0, 0.4, True),
        ("dense", 0.3, 1.0, 0.4, False),
        ("dense", -0.5, None, -0.6, True),
        ("keyword", 0.9, 0.3, 0.4, False),
        ("keyword", None, 0.4, 0.4, True),
    ],
)
def test_the_floor_applies_to_absolute_figures(
    mode: str, similarity: float | None, keyword: float | None, floor: float, expected: bool
) -> None:
    figures = (np.array([NAN if figure is None else figure]) for figure in (similarity, keyword))
    assert ranking.reaches(mode, *figures, floor).tolist() == [expected]


def conversation(
    words: list[list[float]], asks: list[int] | None = None, parents: list[int] | None = None, **more: object
) -> Surroundings:
    """Turns below one parent, or each below its own number in `parents`; `words`: [turns][terms]."""
    turns = len(words)
    families = parents or [7] * turns
    around = np.full((len(ranking.AROUND), turns), turns)
    for row, offset in enumerate(ranking.AROUND):
        for turn in range(turns):
            other = turn + offset
            same = 0 <= other < turns and families[other] == families[turn] >= 0
            around[row, turn] = other if same or offset == 0 else turns
    given = Surroundings(
        around=around,
        frequencies=np.array([*words, [0.0] * len(words[0])], np.float32).T,
        lengths=np.array([10.0] * turns + [0.0], np.float32),
        asks=np.array([turn in (asks or ()) for turn in range(turns + 1)]),
        parents=np.array(families),
        occurred_at=np.full(turns, np.nan),
        idf=np.ones(len(words[0]), np.float32),
        average_length=10.0,
    )
    return replace(given, **more)


def ordered(near: Surroundings, settings: RankingSettings = DEFAULTS) -> ranking.Ranked:
    count = near.around.shape[1]
    similarity = np.full(count, NAN)
    return ranking.rank("hybrid", np.arange(1, count + 1), similarity, np.zeros(count), settings, near)


def test_an_answer_is_found_by_the_words_of_its_question() -> None:
    near = conversation([[0, 0], [1, 1], [0, 0], [0, 0], [0, 0], [0, 0]], asks=[1])
    assert ordered(near).row_ids.tolist()[:2] == [2, 3]
    alone = ordered(near, BARE)
    assert alone.parts["keyword"].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_the_window_ends_with_its_parent() -> None:
    near = conversation([[1.0], [0.0]], parents=[1, 2])
    assert ordered(near).parts["keyword"].tolist() == [1.0, 0.0]


def test_window_of_one_text_is_bm25_of_it() -> None:
    near = conversation([[2.0, 0.0], [1.0, 1.0]], parents=[-1, -1])
    settings = replace(BARE, saturation=1.2, length_norm=0.75)
    assert ranking.window_bm25(near, settings) == pytest.approx([2.0 / 3.2, 2.0 / 2.2])


def test_words_around_count_by_their_weights_before_they_saturate() -> None:
    near = conversation([[1.0], [1.0], [1.0]])
    settings = replace(BARE, window_before=0.5, window_after=0.2, saturation=1.0, length_norm=0.0)
    total = 1.0 + 2 * 0.5 + 2 * 0.2
    expected = [1.4 / (1.4 + total), 1.7 / (1.7 + total), 2.0 / (2.0 + total)]
    assert ranking.window_bm25(near, settings) == pytest.approx(expected)


def test_a_parent_helps_by_its_best_evidence() -> None:
    evidence = np.array([0.1, 0.9, 0.2, 0.3, 0.4])
    assert ranking.best_below(np.array([4, 4, 2, -1, -1]), evidence).tolist() == [0.9, 0.9, 0.2, 0.3, 0.4]
    assert len(ranking.best_below(np.zeros(0, np.int64), np.zeros(0))) == 0


def test_the_terms_of_a_turn_leave_a_memory_without_siblings_alone() -> None:
    near = conversation([[0.0]] * 4, asks=[0, 3], parents=[5, 5, 5, -1])
    part = ranking.turn(near, RankingSettings())
    assert part[3] == 0.0 and part[:3].sum() == pytest.approx(0.0)
    assert part[1] > part[2] > part[0]
    assert ranking.turn(conversation([[0.0]], parents=[-1]), RankingSettings()).tolist() == [0.0]


def test_a_longer_turn_says_more_up_to_a_length() -> None:
    near = conversation([[0.0]] * 3, lengths=np.array([5.0, 80.0, 500.0, 0.0], np.float32))
    part = ranking.turn(near, RankingSettings())
    assert part[0] < part[1] == part[2]


def test_a_date_in_the_query_prefers_what_occurred_then() -> None:
    day_s = 86_400.0
    near = conversation(
        [[1.0], [1.0], [1.0]],
        parents=[-1, -1, -1],
        occurred_at=np.array([NAN, 127 * day_s, 300 * day_s]),  # 8 May 1970 is day 127
        dates=(Date(5, 8, 1970),),
    )
    result = ordered(near)
    assert result.row_ids.tolist() == [2, 1, 3]
    assert result.parts["date"].tolist() == [1.0, 0.0, 0.0]


def test_the_parts_of_a_result_sum_up_to_its_score() -> None:
    near = conversation([[1, 0], [0, 1], [1, 1], [0, 0]], asks=[1])
    settings = RankingSettings()
    result = ranking.rank("hybrid", np.arange(4), np.array([0.1, 0.5, NAN, 0.2]), np.arange(4.0), settings, near)
    parts = result.parts
    weighted = settings.keyword_weight * parts["keyword"] + settings.dense_weight * parts["dense"]
    assert result.score == pytest.approx(weighted + parts["parent"] + parts["date"] + parts["turn"])
    assert set(parts) == {"dense", "keyword", "bm25", "parent", "date", "turn"}


def test_with_every_part_off_it_is_the_plain_sum() -> None:
    near = conversation([[1, 0], [0, 1], [1, 1]], asks=[0])
    result = ordered(near, BARE)
    assert result.score == pytest.approx(result.parts["keyword"])


def test_a_pool_of_memories_without_parents_ranks_as_without_surroundings() -> None:
    words = [[3, 0], [1, 1], [0, 2], [0, 0]]
    near = conversation(words, parents=[-1] * 4)
    settings = RankingSettings()
    similarity = np.array([0.3, 0.2, 0.4, 0.1])
    bm25 = ranking.window_bm25(near, settings)
    flat = ranking.rank("hybrid", np.arange(4), similarity, bm25, settings)
    assert (
        ranking.rank("hybrid", np.arange(4), similarity, bm25, settings, near).row_ids.tolist() == flat.row_ids.tolist()
    )


def test_some_of_the_memories_keep_their_texts() -> None:
    near = conversation([[1.0], [0.0], [0.0]])
    chosen = near.of(np.array([False, True, True]))
    assert ranking.window_bm25(chosen, RankingSettings()) == pytest.approx(
        ranking.window_bm25(near, RankingSettings())[1:]
    )


def test_no_candidate_is_no_result() -> None:
    near = conversation([[1.0]]).of(np.array([False]))
    assert len(ordered(near).row_ids) == 0

"""The settings of the order of search results. Each weight is a part of the score, and 0 turns it off.

Measured by recall@10 over 997 questions on five long conversations; with all defaults it is .850. Without

| part | recall@10 | part | recall@10 |
| --- | --- | --- | --- |
| keyword_weight | .561 | date_weight | .831 |
| dense_weight | .832 | answer_weight | .845 |
| window_before | .804 | question_weight | .847 |
| window_after | .845 | length_weight | .845 |
| parent_weight | .839 | all but the first two | .676 |

Halving or doubling one value loses at most .012: round ones were taken. docs/decisions.md tells how they were chosen,
and what was left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from memory_system.config_loader import key


@dataclass(frozen=True, slots=True)
class RankingSettings:
    keyword_weight: float = key(1.0, "Weight of shared words in the score.", span=(0, 10))
    dense_weight: float = key(0.5, "Weight of meaning in the score.", span=(0, 10))
    window_before: float = key(
        0.5, "Weight of the words of each of the two memories before, below the same parent.", span=(0, 1)
    )
    window_after: float = key(0.2, "Weight of the words of each of the two memories after it.", span=(0, 1))
    saturation: float = key(0.3, "How slowly further occurrences of a word count less (k1 of BM25).", span=(0, 10))
    length_norm: float = key(0.75, "How much a long text counts less for the same words (b of BM25).", span=(0, 1))
    parent_weight: float = key(0.4, "Weight of the best evidence below the same parent.", span=(0, 10))
    date_weight: float = key(1.0, "Weight of having occurred near a date in the query.", span=(0, 10))
    answer_weight: float = key(0.15, "Weight of standing after a question.", span=(0, 10))
    question_weight: float = key(0.1, "Weight that a question of a conversation itself loses.", span=(0, 10))
    length_weight: float = key(0.5, "Weight of a turn's length.", span=(0, 10))
    recency_half_life_days: float = key(
        30.0, "Age at which recency counts half, in a search that asks for it.", unit="days", span=(0.001, 36_500)
    )

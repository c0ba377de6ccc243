"""Which turns of a session go into a context: the newest that fit, and older ones that are about the question.

Pure: what to fetch and what to answer is the agent's business. A turn is taken whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from agents.turns import Turn

# The tokens of a turn.
Cost = Callable[[Turn], int]


@dataclass(frozen=True, slots=True)
class Selection:
    """Turns in the order of the conversation; `relevant` are the ids of those that are there for the question."""

    turns: tuple[Turn, ...]
    tokens: int
    relevant: frozenset[str]


def newest_that_fit(newest_first: Sequence[Turn], budget: int, cost: Cost) -> int:
    """How many of the newest turns fit together: the first that does not fit ends it, so that no gap is left."""
    used = 0
    for number, turn in enumerate(newest_first):
        used += cost(turn)
        if used > budget:
            return number
    return len(newest_first)


def select(newest_first: Sequence[Turn], relevant: Sequence[Turn], budget: int, share: float, cost: Cost) -> Selection:
    """Fill `budget` tokens.

    `newest_first`: the newest turns without a gap, as many as could fit. `relevant`: the best first; `share` of the
    budget is kept for those that are not among the newest anyway, and what they leave goes to the newest again.
    """
    kept = list(newest_first[: newest_that_fit(newest_first, budget - int(budget * share), cost)])
    used = sum(map(cost, kept))
    there = {turn.interaction_id for turn in kept}
    asked_for: dict[str, Turn] = {}
    for turn in relevant:
        if turn.interaction_id not in there and used + cost(turn) <= budget:
            asked_for[turn.interaction_id] = turn
            used += cost(turn)
    for turn in newest_first[len(kept) :]:
        if asked_for.pop(turn.interaction_id, None) is None:
            if used + cost(turn) > budget:
                break
            used += cost(turn)
        kept.append(turn)
    return Selection(_in_order(kept, asked_for.values()), used, frozenset(asked_for))


def beside(newest_first: Sequence[Turn], relevant: Sequence[Turn], cost: Cost) -> Selection:
    """All of the newest, and of the relevant those that are not among them."""
    there = {turn.interaction_id for turn in newest_first}
    older = {turn.interaction_id: turn for turn in relevant if turn.interaction_id not in there}
    turns = _in_order(newest_first, older.values())
    return Selection(turns, sum(map(cost, turns)), frozenset(older))


def _in_order(newest_first: Sequence[Turn], older: Iterable[Turn]) -> tuple[Turn, ...]:
    """In the order in which they were added. Of the newest, turns of one instant keep the order they came in."""
    by_id = sorted(older, key=lambda turn: turn.interaction_id)
    return tuple(sorted([*by_id, *reversed(newest_first)], key=lambda turn: turn.created_at))

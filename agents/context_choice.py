"""Which of the candidates a context has: they are scored, and the budget is filled by score. Pure functions.

    score = relevance                                      the search's score, its best being 1
          + neighbour_weight * relevance of the candidates said just before and after it, in the same session
          + session_weight * mean relevance of the three best candidates of its session
          + speaker_weight, if the query names its speaker
          + importance_weight * importance                 0 to 1, as of now
          + recency_weight * 0.5 ** (age / half life)

A turn says little alone: what was asked before it and answered after it belongs to it, and a session that was about
the question's subject has more to tell of it. The search's score has both in it already, so their weights here are 0
unless a search does without.

Without a query, relevance is 0 for all, and importance and recency decide.

Tokens are what a context is short of, so a candidate's worth is its score for what it takes of them, where the power
says how much that counts (H. Lin and J. Bilmes, Multi-document Summarization via Budgeted Maximization of Submodular
Functions, NAACL 2010):

    worth = score / tokens ** brevity

The budget is filled by maximal marginal relevance (J. Carbonell and J. Goldstein, SIGIR 1998): each time with the
candidate that has the greatest

    (1 - diversity) * worth / best worth - diversity * greatest likeness to one that is chosen

where the likeness of two texts is the cosine of their sets of words. One that repeats what is chosen, word by word, is
left out.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from agents.context_items import Item
from agents.phrases import words_of
from memory_system.agent_settings import ContextManagerSettings

DAY_S: Final = 86_400.0
# How many of a session's best speak for it.
_BEST: Final = 3
# Only so many of the best are compared with what is chosen, for each that may be chosen.
_POOL: Final = 4
_REPEATED_WORDS: Final = 3

REASONS: Final = ("relevance", "neighbours", "session", "speaker", "importance", "recency")


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate with its score and the parts that add up to it, by name as in REASONS."""

    item: Item
    score: float
    parts: Mapping[str, float]

    @property
    def reason(self) -> str:
        """Why it is there: `pinned`, or the greatest part of its score."""
        return "pinned" if self.item.pinned else max(REASONS, key=lambda name: self.parts.get(name, 0.0))


@dataclass(frozen=True, slots=True)
class Choice:
    """What is chosen, best first, with its tokens; `left_out`: how many for which reason (duplicate, budget, limit)."""

    chosen: tuple[Scored, ...]
    tokens: int
    left_out: Mapping[str, int]


def score(
    found: Iterable[tuple[Item, float]],
    rules: ContextManagerSettings,
    now_s: float,
    query: str | None = None,
    *,
    plain: bool = False,
) -> list[Scored]:
    """The candidates, each given with its relevance (0 to 1), best first. `plain`: relevance is the score."""
    asked = _names_in(query or "")
    relevance = {item: value for item, value in found}
    neighbours, sessions = ({}, {}) if plain else _support(relevance)
    scored = []
    for item, value in relevance.items():
        parts = {"relevance": value}
        if not plain:
            age_days = max(0.0, now_s - item.said_at) / DAY_S
            parts |= {
                "neighbours": rules.neighbour_weight * neighbours.get(item, 0.0),
                "session": rules.session_weight * sessions.get(item.parent_id, 0.0),
                "speaker": rules.speaker_weight * _is_named(item.speaker, asked),
                "importance": rules.importance_weight * item.importance,
                "recency": rules.recency_weight * 0.5 ** (age_days / rules.recency_half_life_days),
            }
        scored.append(Scored(item, sum(parts.values()), parts))
    return sorted(scored, key=lambda each: (-each.score, each.item.memory_id))


def _names_in(query: str) -> frozenset[str]:
    """The words that may be somebody's name, in small letters: of `Ada's trains`, `ada` and `trains`."""
    return frozenset(word.lower().removesuffix("'s") for word in words_of(query))


def _is_named(speaker: str | None, asked: frozenset[str]) -> bool:
    """Whether a word of the speaker's name is among those asked about."""
    return not asked.isdisjoint(word.lower() for word in words_of(speaker or ""))


def _support(relevance: Mapping[Item, float]) -> tuple[dict[Item, float], dict[str | None, float]]:
    """What the candidates of one session do for each other: for each item that of its neighbours, for each session
    that of its best."""
    together: dict[str, list[Item]] = defaultdict(list)
    for item in relevance:
        if item.parent_id is not None:
            together[item.parent_id].append(item)
    neighbours: dict[Item, float] = defaultdict(float)
    sessions: dict[str | None, float] = {}
    for parent_id, items in together.items():
        items.sort(key=lambda item: (item.said_at, item.memory_id))
        for before, after in itertools.pairwise(items):
            neighbours[after] += relevance[before]
            neighbours[before] += relevance[after]
        best = sorted((relevance[item] for item in items), reverse=True)[:_BEST]
        sessions[parent_id] = sum(best) / _BEST
    return neighbours, sessions


class Budget:
    """Tokens that are left, where each heading is paid for once."""

    def __init__(self, tokens: int, heading_cost: Callable[[str], int]) -> None:
        self.left = tokens
        self._heading_cost = heading_cost
        self._paid: set[str] = set()

    def cost(self, item: Item) -> int:
        return item.tokens + (0 if item.heading in self._paid else self._heading_cost(item.heading))

    def pay(self, item: Item) -> None:
        self.left -= self.cost(item)
        self._paid.add(item.heading)


def choose(
    candidates: Sequence[Scored],
    budget: Budget,
    max_items: int,
    diversity: float,
    *,
    brevity: float = 0.0,
    repeats: bool = False,
) -> Choice:
    """Fill the budget from candidates that stand best first; pinned ones, in their order, before all others.

    `diversity`, `brevity`: see above. `repeats`: take what says the same as well.
    """
    available = budget.left
    pins = [each for each in candidates if each.item.pinned]
    others = [each for each in candidates if not each.item.pinned]
    filling = _Filling(budget, max_items, repeats)
    for pin in pins:
        filling.offer(pin)
    while filling.open and others:
        # Of what may fit at all: the best may be too long, every one of them.
        fitting = [each for each in others if each.item.tokens <= budget.left]
        filling.left_out["budget"] += len(others) - len(fitting)
        pool = _Pool(fitting[: _POOL * max_items], diversity, brevity, [each.item for each in filling.chosen])
        filling.fill(pool)
        filling.left_out["limit"] += len(pool)
        others = fitting[_POOL * max_items :]
    filling.left_out["limit"] += len(others)
    return Choice(tuple(filling.chosen), available - budget.left, +filling.left_out)


class _Filling:
    """What is chosen so far."""

    def __init__(self, budget: Budget, max_items: int, repeats: bool) -> None:
        self.chosen: list[Scored] = []
        self.left_out: Counter[str] = Counter()
        self._budget = budget
        self._max_items = max_items
        self._repeats = repeats

    @property
    def open(self) -> bool:
        return len(self.chosen) < self._max_items

    def fill(self, pool: _Pool) -> None:
        """Take from the pool until it is empty, or there is no room."""
        while pool and self.open:
            best = pool.take()
            if self.offer(best):
                self.left_out["budget"] += pool.drop_above(self._budget.left)
                pool.chosen(best.item)

    def offer(self, each: Scored) -> bool:
        """Take it, if there is room and it says something new."""
        if not self.open:
            self.left_out["limit"] += 1
        elif self._budget.cost(each.item) > self._budget.left:
            self.left_out["budget"] += 1
        elif not self._repeats and any(says_again(each.item, other.item) for other in self.chosen):
            self.left_out["duplicate"] += 1
        else:
            self._budget.pay(each.item)
            self.chosen.append(each)
            return True
        return False


class _Pool:
    """Candidates that may still be chosen, each with its likeness to what is chosen.

    A set of words is an integer with a bit for each of them: thousands of pairs are compared for each context.
    """

    def __init__(self, candidates: Sequence[Scored], diversity: float, brevity: float, chosen: Sequence[Item]) -> None:
        self._diversity = diversity
        self._left = dict(enumerate(candidates))
        self._worths = {place: _worth(each, brevity) for place, each in self._left.items()}
        self._best = max(self._worths.values(), default=0.0) or 1.0
        self._bits: dict[str, int] = {}
        self._words = {place: self._set(each.item) for place, each in self._left.items()}
        self._roots = {place: math.sqrt(words.bit_count()) for place, words in self._words.items()}
        self._likeness = dict.fromkeys(self._left, 0.0)
        for item in chosen:
            self.chosen(item)

    def __len__(self) -> int:
        return len(self._left)

    def drop_above(self, tokens: int) -> int:
        """Drop what has more tokens than this, which will never fit again; how many those were."""
        dropped = [place for place, each in self._left.items() if each.item.tokens > tokens]
        for place in dropped:
            del self._left[place]
        return len(dropped)

    def take(self) -> Scored:
        return self._left.pop(max(self._left, key=self._adds))

    def chosen(self, item: Item) -> None:
        """Something was chosen: what is like it is worth less from now on."""
        if self._diversity <= 0.0:
            return
        words = self._set(item)
        root = math.sqrt(words.bit_count())
        for place in self._left:
            if common := (words & self._words[place]).bit_count():
                alike = common / (root * self._roots[place])  # as likeness() has it
                self._likeness[place] = max(self._likeness[place], alike)

    def _set(self, item: Item) -> int:
        found = 0
        for word in item.words:
            found |= self._bits.setdefault(word, 1 << len(self._bits))
        return found

    def _adds(self, place: int) -> float:
        worth = self._worths[place] / self._best
        return (1.0 - self._diversity) * worth - self._diversity * self._likeness[place]


def _worth(each: Scored, brevity: float) -> float:
    """What it is worth for the tokens that it takes."""
    return each.score / math.pow(max(1, each.item.tokens), brevity)


def likeness(some: frozenset[str], others: frozenset[str]) -> float:
    """The cosine of two sets of words: 1 for equal ones, 0 where there is nothing in common."""
    if not some or not others:
        return 0.0
    return len(some & others) / math.sqrt(len(some) * len(others))


def says_again(item: Item, other: Item) -> bool:
    """Whether the other one, of the same speaker, has all of this one's words in a row."""
    if item.speaker is not None and other.speaker is not None and item.speaker != other.speaker:
        return False
    words, others = item.words, other.words
    if len(words) < _REPEATED_WORDS or len(words) > len(others):
        return item.text == other.text
    return any(others[at : at + len(words)] == words for at in range(len(others) - len(words) + 1))

"""A short text of what a context says, made of its own sentences: no language model, nothing that nobody said.

The sentences of the chosen memories are scored by their memory's score, by what they tell (see utterances.py), and by
the words that they share with the query; the budget is filled with the best of them that do not repeat each other.
What tells nothing and shares nothing is left out. What is chosen is told in the order in which it was said, with who
said it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from agents.context_choice import Budget, Scored, choose, likeness
from agents.context_items import Item, Writer, text_of
from agents.phrases import sentences_of, words_of
from agents.utterances import BASE, Judge

# How much it counts what a sentence tells, and what it shares with the query, beside how well its memory fits.
_TELLING: Final = 0.5
_SHARED: Final = 1.0
_QUERY_CHARS: Final = 4  # shorter words say nothing of what is asked
_DIVERSITY: Final = 0.3
_MAX_SENTENCES: Final = 1000


@dataclass(frozen=True, slots=True)
class Summary:
    """The text, its tokens, and the ids of the memories that its sentences are from."""

    text: str
    tokens: int
    memory_ids: tuple[str, ...]


def summarise(chosen: Sequence[Scored], query: str | None, budget: int, judge: Judge, writer: Writer) -> Summary:
    """A summary of at most `budget` tokens of a context's memories, given best first."""
    best = max((each.score for each in chosen), default=0.0) or 1.0
    asked = frozenset(word.lower() for word in words_of(query or "") if len(word) >= _QUERY_CHARS)
    sentences = []
    for each in chosen:
        for sentence in _sentences(each.item, writer):
            telling, shared = judge.importance(sentence.text), likeness(asked, frozenset(sentence.words))
            if telling > BASE or shared > 0.0:
                sentences.append(Scored(sentence, each.score / best + _TELLING * telling + _SHARED * shared, {}))
    sentences.sort(key=lambda each: -each.score)
    choice = choose(sentences, Budget(budget, writer.heading_cost), _MAX_SENTENCES, _DIVERSITY)
    items = [each.item for each in choice.chosen]
    return Summary(text_of(items), choice.tokens, tuple(dict.fromkeys(item.memory_id for item in items)))


def _sentences(item: Item, writer: Writer) -> list[Item]:
    """The memory's sentences as items of their own."""
    who = item.speaker or item.role
    found = []
    for text in sentences_of(item.text):
        line = f"{who}: {text}" if who else text
        words = tuple(word.lower() for word in words_of(text))
        found.append(replace(item, text=text, line=line, tokens=writer.cost(line), words=words, pinned=False))
    return found

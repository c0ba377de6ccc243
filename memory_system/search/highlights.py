"""Where the words of a query stand in texts, by the tokenizer of the index: a stem marks the whole word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

from memory_system.search.tokens import RUN, Tokenizer, query_words

Span = tuple[int, int]
"""Begin and end in characters (Unicode code points); the end is not part of it."""

MAX_SPANS: Final = 200


def highlights(tokenizer: Tokenizer, query: str, texts: Sequence[str]) -> list[list[Span]]:
    """For each text the first MAX_SPANS places, in order, of words that the query has, too; stop words do not count."""
    known = tokenizer.terms(query_words(query))
    wanted = frozenset(term for terms in known.values() for term in terms.texts)
    return [list(_spans(tokenizer, wanted, text)) for text in texts]


def _spans(tokenizer: Tokenizer, wanted: frozenset[str], text: str) -> Iterator[Span]:
    runs = list(RUN.finditer(text))
    known = tokenizer.terms(run[0] for run in runs)
    left = MAX_SPANS
    for run in runs:
        if wanted.isdisjoint(known[run[0]].texts):
            continue
        for begin, end in _words(tokenizer, run[0], run.start()):
            if left and not wanted.isdisjoint(tokenizer.terms([text[begin:end]])[text[begin:end]].texts):
                left -= 1
                yield begin, end


def _words(tokenizer: Tokenizer, run: str, start: int) -> list[Span]:
    """The words of a run of ASCII letters, digits and anything beyond ASCII."""
    if run.isascii():
        return [(start, start + len(run))]
    # What separates words is the tokenizer's to know: a character that does leaves two words of a pair around it.
    pairs = tokenizer.terms(f"a{character}a" for character in set(run))
    words = groupby(range(len(run)), key=lambda at: len(pairs[f"a{run[at]}a"].texts) == 1)
    spans = [list(places) for joined, places in words if joined]
    return [(start + places[0], start + places[-1] + 1) for places in spans]

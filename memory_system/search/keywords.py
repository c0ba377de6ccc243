"""The keyword side: which memories have the query's words, how often, and how much of the query a text has.

Everything is by slot of the columns, and figures of terms are those of the query's namespace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from memory_system.search.columns import Ids, Mask
from memory_system.search.notes import note
from memory_system.search.places import Places
from memory_system.search.postings import Postings
from memory_system.search.pruning import Formula, likely
from memory_system.search.segment import Floats, key_of
from memory_system.search.tokens import Hashes, Tokenizer, query_words
from memory_system.search.vectors import best

# More words than this make a query slower, not better: the rarest stay.
MAX_WORDS: Final = 64
# BM25: S. Robertson, H. Zaragoza, The Probabilistic Relevance Framework, 2009; the constants are those of FTS5.
K1: Final = 1.2
B: Final = 0.75
# So few texts are looked up one by one; of more, postings are read.
_FEW: Final = 1024
_TINY: Final = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class Words:
    """Texts as an index takes them in: the hashes of their terms, text after text, how many each has, and notes."""

    hashes: Hashes
    counts: npt.NDArray[np.int64]
    notes: Hashes

    def part(self, wanted: Mask) -> Words:
        """Those of the texts."""
        return Words(self.hashes[np.repeat(wanted, self.counts)], self.counts[wanted], self.notes[wanted])


NOWHERE: Final = Places([])


@dataclass(frozen=True, slots=True)
class KeywordQuery:
    """A prepared query, good for as long as the index is held still. Arrays have the length of `terms`; all figures are
    of the query's namespace.

    `texts`: how many there are; `average_length`: of a text, in terms; `found_in`: how many texts have each term;
    `idf`: ln(1 + (texts - found_in + 0.5) / (found_in + 0.5)); `places`: where the terms stand.
    """

    terms: tuple[str, ...]
    keys: Hashes
    texts: int
    average_length: float
    found_in: npt.NDArray[np.int64]
    idf: Floats
    places: Places = NOWHERE


NO_QUERY: Final = KeywordQuery((), np.zeros(0, np.uint64), 0, 0.0, np.zeros(0, np.int64), np.zeros(0, np.float32))


def bm25(query: KeywordQuery, frequencies: Floats, lengths: Floats) -> Floats:
    """BM25 of texts, from how often they have each term ([terms, texts]) and their lengths."""
    norm = K1 * (1.0 - B + B * lengths / max(1.0, query.average_length))
    score: Floats = (query.idf @ (frequencies * np.float32(K1 + 1.0) / (frequencies + norm))).astype(np.float32)
    return score


def _formula(query: KeywordQuery) -> Formula:
    """What the terms add to BM25."""
    weights = ((K1 + 1.0) * query.idf.astype(np.float64)).astype(np.float32)
    return Formula(weights, np.float32(K1 * (1.0 - B)), np.float32(K1 * B / max(1.0, query.average_length)))


def shares(query: KeywordQuery, frequencies: Floats) -> npt.NDArray[np.float64]:
    """For each text, the share (0..1) of the query's idf whose terms occur in it."""
    idf = query.idf.astype(np.float64)
    found: npt.NDArray[np.float64] = idf @ (frequencies > 0)
    return np.minimum(1.0, found / max(float(idf.sum()), _TINY))


class WordIndex:
    """The keyword side in memory: FTS5's tokenizer and our own postings.

    `analyse` is for any thread, as is what says so; the owner's lock is held around all else.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.postings = Postings()

    def __repr__(self) -> str:
        return f"<WordIndex {self.postings!r}>"

    def analyse(self, texts: Sequence[str]) -> Words:
        """Texts as `add` takes them."""
        return Words(*self.tokenizer.hashes(texts), np.array([note(text) for text in texts], np.uint64))

    def add(self, slots: Sequence[int], namespaces: Sequence[str], words: Words) -> None:
        """Texts of slots that have none."""
        self.postings.add(slots, namespaces, words.hashes, words.counts, words.notes)

    def remove(self, slot: int) -> None:
        """Forget the text of a slot, if it has one."""
        self.postings.remove(slot)

    def disagreement(
        self, slots: Sequence[int], namespaces: Sequence[str], words: Words
    ) -> Callable[[], npt.NDArray[np.bool_]]:
        """Finds out, without the lock, which of the slots had other words than these when it was called."""
        return self.postings.disagreement(slots, namespaces, words.hashes, words.counts)

    def merge_step(self, lock: AbstractContextManager[object], purge: bool = False) -> bool:
        """Make one merge of segments that is due, if any; to be called without the lock."""
        return self.postings.merge_step(lock, purge)

    def prepare(self, namespace: str, text: str) -> KeywordQuery:
        """The terms of a query text, and how common they are in the namespace."""
        words = query_words(text)
        known = self.tokenizer.terms(words)
        terms = {term: key for word in words for term, key in zip(*known[word], strict=True)}
        whole = self._query(namespace, terms)
        if len(words) <= MAX_WORDS:
            return whole
        idf = dict(zip(whole.terms, whole.idf.tolist(), strict=True))
        words.sort(key=lambda word: (-max((idf[term] for term in known[word].texts), default=0.0), word))
        kept = {term for word in words[:MAX_WORDS] for term in known[word].texts}
        return self._query(namespace, {term: key for term, key in terms.items() if term in kept})

    def _query(self, namespace: str, terms: dict[str, int]) -> KeywordQuery:
        """`terms`: each with its hash."""
        counts = self.postings.namespace(namespace)
        keys = key_of(np.array(list(terms.values()), np.uint64), counts.hash)
        found_in = np.zeros(len(terms), np.int64)
        places = self.postings.find(keys)
        for segment, spans in places.each:
            for term, begin, end in spans:
                found_in[term] += segment.count(begin, end)
        idf = np.log1p((counts.texts - found_in + 0.5) / (found_in + 0.5)).astype(np.float32)
        average = counts.terms / max(1, counts.texts)
        return KeywordQuery(tuple(terms), keys, counts.texts, average, found_in, idf, places)

    def candidates(self, query: KeywordQuery, mask: Mask, row_ids: Ids, k: int) -> tuple[Ids, Floats]:
        """Up to k slots with any of the terms that the mask allows, and their BM25, best first, equal ones by row."""
        if not query.terms or k <= 0:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        if int(np.count_nonzero(mask)) <= _FEW:
            slots = np.flatnonzero(mask)
            scores = bm25(query, self.frequencies(query, slots), self.lengths(slots))
            slots, scores = slots[scores > 0.0], scores[scores > 0.0]
        else:
            slots, scores = likely(self.postings, query.places, _formula(query), mask, k)
        order = best(scores, row_ids[slots], k)
        return slots[order], scores[order]

    def frequencies(self, query: KeywordQuery, slots: Ids, distinct: bool = False) -> Floats:
        """How often each term stands in each slot's text: [terms, slots]; 0 for a slot without text, such as -1.
        `distinct`: no slot is named twice."""
        if distinct:
            return self.postings.frequencies(query.places, len(query.terms), slots)
        different, places = np.unique(slots, return_inverse=True)
        return self.postings.frequencies(query.places, len(query.terms), different)[:, places]

    def lengths(self, slots: Ids) -> Floats:
        """The length of each slot's text in terms; 0 for a slot without text, such as -1."""
        return _by_slot(self.postings.lengths, slots).astype(np.float32)

    def notes(self, slots: Ids) -> Hashes:
        """The notes of each slot's text; 0 for a slot without text, such as -1."""
        return _by_slot(self.postings.notes, slots)


def _by_slot(values: npt.NDArray[Any], slots: Ids) -> npt.NDArray[Any]:
    """The slots' values, 0 for those that have none."""
    known = slots.view(np.uint64) < len(values)  # what is negative becomes very great
    found: npt.NDArray[Any] = values.take(slots, mode="clip") * known
    return found

"""A summary of sentences that are there already: those nearest to what all have in common, none said twice.

Sentences are taken one by one, each time the one with the highest

    relevance * cos(sentence, centroid) - (1 - relevance) * greatest cos(sentence, one that is taken)

as long as the budget lasts: maximal marginal relevance (J. Carbonell and J. Goldstein, SIGIR 1998), with the centroid
of all sentences, weighted by their words, as the query (D. Radev et al., Centroid-based summarization, 2004). Each
text is heard once before any is heard twice, so that a summary stands for every text that it was made of; what has no
three words ("Thanks, Ada!") is heard of none, unless there is nothing else. What was taken is told in its old order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

RELEVANCE: Final = 0.7
# Two sentences this near to each other say the same.
REPETITION: Final = 0.9
MIN_WORDS: Final = 3
# Cosines are compared in steps of this size: the last bits differ with the batch that a sentence was embedded in.
_STEP: Final = 1e-3

# After . ! ? and what closes a quotation, before what can begin a sentence; every line is a sentence of its own.
_CLOSING, _OPENING = "\"')\\]\u201d\u2019", "\"'(\\[\u201c\u2018"
_BOUNDARY: Final = re.compile(rf"(?:(?<=[.!?…])|(?<=[.!?…][{_CLOSING}]))\s+(?=[{_OPENING}]?[^\W_a-zß-ÿ])|\s*\n\s*")
_ABBREVIATION: Final = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No)|\b[A-HJ-Z])\.$")
_WORD: Final = re.compile(r"\w+")
_LABEL: Final = re.compile(r"([^\W\d_][^:.!?\n]{0,39}):\s+(?=\S)")


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence, and the place of its text among those that are summarised."""

    source: int
    text: str


def sentences(text: str) -> list[str]:
    """The sentences of a text, stripped, none empty; together they have all of its words."""
    parts: list[str] = []
    for part in _BOUNDARY.split(text):
        if not part.strip():
            continue
        if parts and _ABBREVIATION.search(parts[-1]):
            parts[-1] = f"{parts[-1]} {part.strip()}"
        else:
            parts.append(part.strip())
    return parts


def label(text: str) -> str | None:
    """Who says it, where a text begins with that, as in `Ada: I saw it.`; None otherwise."""
    match = _LABEL.match(text)
    return match[1] if match else None


def split(texts: Sequence[str]) -> list[Sentence]:
    """The sentences of all texts, in order."""
    return [Sentence(source, sentence) for source, text in enumerate(texts) for sentence in sentences(text)]


def choose(found: Sequence[Sentence], vectors: Vectors, budget_chars: int) -> list[int]:
    """The positions of the sentences that make the summary, in order; at least one, if there is any.

    `vectors`: of the sentences, of unit length, shape (len(found), dimension).
    """
    if not found:
        return []
    pick = _Picker(found, vectors, budget_chars)
    for spoken in (False, True):
        while pick.take(spoken=spoken):
            pass
    return sorted(pick.taken) or [pick.best()]


class _Picker:
    """The state of a choice: what is taken, what is left of the budget."""

    def __init__(self, found: Sequence[Sentence], vectors: Vectors, budget_chars: int) -> None:
        words = np.array([_words(sentence.text) for sentence in found], np.float32)
        centroid = (vectors * words[:, np.newaxis]).sum(axis=0)
        norm = float(np.linalg.norm(centroid))
        self._central = _stepped(vectors @ (centroid / norm if norm > 0.0 else centroid))
        self._alike = _stepped(vectors @ vectors.T)
        self._repeated = np.full(len(found), -1.0)
        self._sizes = np.array([len(sentence.text) + 1 for sentence in found])
        self._sources = np.array([sentence.source for sentence in found])
        self._left = budget_chars + 1
        self._open = words >= min(MIN_WORDS, words.max())
        self.taken: list[int] = []

    def best(self) -> int:
        return int(np.argmax(self._central))

    def take(self, *, spoken: bool) -> bool:
        """Take the best one, of texts that have been heard already or of those that have not; False if none is left."""
        heard = np.isin(self._sources, self._sources[self.taken])
        fits = self._open & (self._sizes <= self._left) & (self._repeated < REPETITION) & (heard == spoken)
        if not fits.any():
            return False
        worth = RELEVANCE * self._central - (1.0 - RELEVANCE) * np.maximum(self._repeated, 0.0)
        at = int(np.argmax(np.where(fits, worth, -np.inf)))
        self.taken.append(at)
        self._open[at] = False
        self._left -= int(self._sizes[at])
        self._repeated = np.maximum(self._repeated, self._alike[at])
        return True


def _words(text: str) -> int:
    """How many words a sentence has, who says it not counted."""
    return len(_WORD.findall(text[match.end() :] if (match := _LABEL.match(text)) else text))


def _stepped(cosines: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.round(cosines.astype(np.float64) / _STEP) * _STEP

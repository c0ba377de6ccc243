"""Where the terms of a query stand, and what of it was read.

Reading a term means taking all its postings: for a common one these are a third of all texts. Where only few texts are
asked about, a term is looked up in each instead.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from memory_system.search.segment import Floats, Segment, Spans

Numbers = npt.NDArray[np.int64]

# Looking a term up takes as long as reading so many postings, and as many more for each text.
_SHORT: Final = 2048
_LOOK_UP: Final = 12
# Of so many postings for each text all terms are looked up, if none was read.
_ALONE: Final = 32


@dataclass(frozen=True, slots=True)
class Occurrences:
    """Postings of some terms: the slots of the texts, the number of the term, and how often it stands in each."""

    slots: Numbers
    which: Numbers
    counts: Floats

    def of(self, at: Numbers) -> Occurrences:
        """Those of the postings."""
        return Occurrences(self.slots[at], self.which[at], self.counts[at])


class Places:
    """Where terms stand: in `each` segment that has any of them. Good for as long as the index is held still.

    `sizes`: how many postings each term has; `unread`: the terms that were not read yet; `read`: what was.
    """

    def __init__(self, each: list[tuple[Segment, Spans]]) -> None:
        self.each = each
        self.sizes: dict[int, int] = {}
        for _, spans in each:
            for term, begin, end in spans:
                self.sizes[term] = self.sizes.get(term, 0) + end - begin
        self.unread = set(self.sizes)
        self.read: list[Occurrences] = []
        self._alone: dict[int, Occurrences] = {}

    def __repr__(self) -> str:
        return f"<Places postings={sum(self.sizes.values())} segments={len(self.each)} unread={len(self.unread)}>"

    def take(self, terms: Iterable[int]) -> Occurrences:
        """Read terms that were not read yet: their postings, of texts that still are."""
        wanted = set(terms)
        slots, counts, spans = [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)], []
        for segment, here in self.spans(wanted):
            docs = np.concatenate([segment.docs[begin:end] for _, begin, end in here], dtype=np.int64)
            slots.append(segment.slots.take(docs))
            counts += [segment.counts[begin:end] for _, begin, end in here]
            spans += here
        self.unread -= wanted
        which = np.array([term for term, _, _ in spans], np.int64).repeat([end - begin for _, begin, end in spans])
        taken = Occurrences(np.concatenate(slots, dtype=np.int64), which, np.concatenate(counts, dtype=np.float32))
        if any(segment.gone for segment, _ in self.each):
            taken = taken.of((taken.slots >= 0).nonzero()[0])
        self.read.append(taken)
        return taken

    def read_short(self, texts: int) -> None:
        """Read the terms that take less time so than to be looked up in so many texts; none where only few are asked
        about at all, for doing both takes longer."""
        if not self.read and sum(self.sizes.values()) > _ALONE * texts:
            return
        short = [term for term in self.unread if self.sizes[term] <= _SHORT + _LOOK_UP * texts]
        if short:
            self.take(short)

    def read_for(self, texts: int, term: int) -> Occurrences | None:
        """A term that was not read but for this, if that takes less time than to look it up in so many texts."""
        if term in self.unread and self.sizes[term] <= _SHORT + _LOOK_UP * texts:
            self._alone[term] = self.take((term,))
        return self._alone.get(term)

    def spans(self, terms: Container[int]) -> list[tuple[Segment, Spans]]:
        """Where those of the terms stand, in each segment that has any of them."""
        each = ((segment, [span for span in spans if span[0] in terms]) for segment, spans in self.each)
        return [(segment, spans) for segment, spans in each if spans]

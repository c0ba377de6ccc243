"""A segment of the keyword index: for each term, the texts that have it and how often. Nothing in it ever changes, but
that texts are gone.

A term is a key of 64 bits (`key_of`); those of one namespace have nothing to do with those of another. Texts are
numbered within the segment. A posting is the text's number, and how often the term stands in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from memory_system.search.tokens import Hashes

Floats = npt.NDArray[np.float32]
Slots = npt.NDArray[np.int32]
Spans = list[tuple[int, int, int]]
"""Where terms stand in a segment: (number of the term in the query, begin, end) of its postings."""

MAX_FREQUENCY: Final = 255
# So many terms' numbers of texts are kept.
_COUNTED: Final = 4096
# Postings handled at once by a merge, so that it needs little memory beside what it makes.
_MERGE_POSTINGS: Final = 2_000_000


@dataclass(slots=True, eq=False)
class Segment:
    """Postings of `lengths.size` texts. `slots`: where each text's row stands in the columns, -1 once it is gone."""

    keys: Hashes  # sorted
    starts: npt.NDArray[np.int64]  # of each key's postings, and their number
    docs: npt.NDArray[np.uint32]  # ascending below each key
    counts: npt.NDArray[np.uint8]  # how often the term stands in the text, at most MAX_FREQUENCY
    lengths: npt.NDArray[np.int32]  # of the texts, in terms
    notes: Hashes  # of the texts: 64 bits each, see notes.py
    slots: Slots
    first: int = 0  # the number of its first text in the whole index
    gone: int = 0  # how many of its texts are
    file: str | None = None  # its name on disk
    _dropped: list[int] = field(default_factory=list)  # its texts that were, in order
    _counted: dict[int, tuple[int, int]] = field(default_factory=dict)  # by where postings begin: see `count`

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def postings(self) -> int:
        return len(self.docs)

    @property
    def size_bytes(self) -> int:
        parts = (self.keys, self.starts, self.docs, self.counts, self.lengths, self.notes, self.slots)
        return sum(part.nbytes for part in parts)

    def spans(self, keys: Hashes) -> Spans:
        """Where the terms of these keys stand, for those that occur."""
        if not len(self.keys) or not len(keys):
            return []
        places = self.keys.searchsorted(keys)
        known = (self.keys.take(places, mode="clip") == keys).nonzero()[0]
        places = places[known]
        begins, ends = self.starts[places], self.starts[places + 1]
        return list(zip(known.tolist(), begins.tolist(), ends.tolist(), strict=True))

    def frequencies(
        self, spans: Spans, docs: npt.NDArray[np.int64], out: Floats | dict[int, Floats], columns: npt.NDArray[np.int64]
    ) -> None:
        """Write how often each term stands in the texts `docs` into these columns of out[term]; for few texts."""
        wanted = docs.astype(np.uint32)
        for term, begin, end in spans:
            there = self.docs[begin:end]
            at = there.searchsorted(wanted)
            has = (there.take(at, mode="clip") == wanted).nonzero()[0]
            out[term][columns[has]] = self.counts[begin:end][at[has]]

    def disagrees(self, expected: Segment, docs: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """For each text of another segment, whether it is here, as the text `docs` says, with other counts."""
        wrong = np.zeros(len(docs), np.bool_)
        here = (docs >= 0) & (docs < len(self))
        found = {term: (begin, end) for term, begin, end in self.spans(expected.keys)} if here.any() else {}
        for term, (first, last) in enumerate(pairwise(expected.starts.tolist() if here.any() else [])):
            texts, counts = expected.docs[first:last], expected.counts[first:last]
            texts, counts = texts[here[texts]], counts[here[texts]]
            begin, end = found.get(term, (0, 0))
            at = np.searchsorted(self.docs[begin:end], docs[texts]) + begin
            same = at < end
            same[same] = (self.docs[at[same]] == docs[texts[same]]) & (self.counts[at[same]] == counts[same])
            wrong[texts[~same]] = True
        return wrong

    def drop(self, doc: int) -> None:
        """This text is gone from now on."""
        self.slots[doc] = -1
        self.gone += 1
        self._dropped.append(doc)

    def count(self, begin: int, end: int) -> int:
        """How many of the texts of these postings still are. Kept, with how many texts were dropped by then: only what
        was dropped since has to be looked up again."""
        if not self.gone:
            return end - begin
        docs = self.docs[begin:end]
        seen, count = self._counted.get(begin) or (0, -1)
        if count < 0:
            count = int(np.count_nonzero(self.slots.take(docs) >= 0))
        elif seen < len(self._dropped):
            since = np.array(self._dropped[seen:], np.uint32)
            count -= int(np.count_nonzero(docs.take(docs.searchsorted(since), mode="clip") == since))
        if len(self._counted) >= _COUNTED:
            self._counted.clear()
        self._counted[begin] = len(self._dropped), count
        return count


def key_of(hashes: Hashes, namespace: int | npt.NDArray[np.uint64]) -> Hashes:
    """The keys of terms in a namespace, given by its hash. Both are mixed as in the SplitMix64 generator
    (G. Steele et al., Fast Splittable Pseudorandom Number Generators, 2014)."""
    mixed = hashes + np.multiply(np.asarray(namespace, np.uint64), np.uint64(0x9E3779B97F4A7C15))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def build(keys: Hashes, counts: npt.NDArray[np.int64], notes: Hashes, slots: Slots) -> Segment:
    """The segment of some texts: their terms' keys, one text after the other, how many each has, and their notes."""
    docs = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    order = np.argsort(keys, kind="stable")
    keys, docs = keys[order], docs[order]
    begins = np.flatnonzero(_differs(keys) | _differs(docs))
    frequency = np.minimum(np.diff(begins, append=len(keys)), MAX_FREQUENCY)
    lengths = counts.astype(np.int32)
    return _grouped(keys[begins], docs[begins], frequency.astype(np.uint8), lengths, notes, slots)


def merged(segments: Sequence[Segment], kept: Sequence[npt.NDArray[np.bool_]]) -> Segment:
    """One segment of the texts of several that `kept` names, in their order."""
    offsets = np.cumsum([0, *(int(np.count_nonzero(keep)) for keep in kept)])
    numbers = [np.cumsum(keep) - 1 + offset for keep, offset in zip(kept, offsets.tolist(), strict=False)]
    parts = [_merged_range(segments, kept, numbers, ranges) for ranges in _ranges(segments)]
    lengths = np.concatenate([s.lengths[keep] for s, keep in zip(segments, kept, strict=True)])
    notes = np.concatenate([s.notes[keep] for s, keep in zip(segments, kept, strict=True)])
    slots = np.concatenate([s.slots[keep] for s, keep in zip(segments, kept, strict=True)])
    starts = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part.starts) for part in parts]))])
    return Segment(
        np.concatenate([part.keys for part in parts]),
        starts.astype(np.int64),
        np.concatenate([part.docs for part in parts]),
        np.concatenate([part.counts for part in parts]),
        lengths,
        notes,
        slots,
    )


def _ranges(segments: Sequence[Segment]) -> Iterator[list[slice]]:
    """Ranges of keys that hold not much more than _MERGE_POSTINGS postings: the slice of each segment's keys."""
    largest = max(segments, key=lambda segment: segment.postings)
    steps = 1 + sum(segment.postings for segment in segments) // _MERGE_POSTINGS
    marks = np.searchsorted(largest.starts, np.linspace(0, largest.postings, steps + 1)[1:-1].astype(np.int64))
    bounds = largest.keys[np.minimum(marks, max(0, len(largest.keys) - 1))] if len(largest.keys) else largest.keys
    cuts = [[0, *np.searchsorted(s.keys, bounds).tolist(), len(s.keys)] for s in segments]
    for step in range(len(cuts[0]) - 1):
        yield [slice(cut[step], cut[step + 1]) for cut in cuts]


def _merged_range(
    segments: Sequence[Segment],
    kept: Sequence[npt.NDArray[np.bool_]],
    numbers: Sequence[npt.NDArray[np.int64]],
    ranges: Sequence[slice],
) -> Segment:
    keys, docs, counts = [], [], []
    for segment, keep, number, part in zip(segments, kept, numbers, ranges, strict=True):
        starts = segment.starts[part.start : part.stop + 1]
        span = slice(int(starts[0]), int(starts[-1]))
        stays = keep[segment.docs[span]]
        keys.append(np.repeat(segment.keys[part], np.diff(starts))[stays])
        docs.append(number[segment.docs[span][stays]].astype(np.uint32))
        counts.append(segment.counts[span][stays])
    every = np.concatenate(keys)
    order = np.argsort(every, kind="stable")
    of_texts = np.zeros(0, np.int32), np.zeros(0, np.uint64), np.zeros(0, np.int32)  # for the whole to have
    return _grouped(every[order], np.concatenate(docs)[order], np.concatenate(counts)[order], *of_texts)


def _grouped(
    keys: Hashes,
    docs: npt.NDArray[np.uint32],
    counts: npt.NDArray[np.uint8],
    lengths: npt.NDArray[np.int32],
    notes: Hashes,
    slots: Slots,
) -> Segment:
    """A segment of postings that stand in the order of their keys."""
    begins = np.flatnonzero(_differs(keys))
    return Segment(keys[begins], np.append(begins, len(keys)).astype(np.int64), docs, counts, lengths, notes, slots)


def _differs(values: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Whether each value is another than the one before it."""
    first = np.ones(len(values), np.bool_)
    first[1:] = values[1:] != values[:-1]
    return first

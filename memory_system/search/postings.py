"""All texts' postings: segments that are added to, and merged as they become many.

Sizes of segments fall by about the same factor from one to the next, so a text is copied a few times only, and a query
looks into few segments. Small merges are made at once; large ones are made aside by whoever calls `merge_step`, while
searches go on. What is gone stays in its segment, unseen, until that is merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from memory_system.search.places import Numbers, Places
from memory_system.search.scratch import Scratch
from memory_system.search.segment import Floats, Segment, Spans, build, key_of, merged
from memory_system.search.tokens import Hashes, term_hash

_RATIO: Final = 4
_AT_ONCE: Final = 4096  # texts: a merge of so many takes some milliseconds
_GONE_SHARE: Final = 0.2
_START: Final = 1024


@dataclass(slots=True)
class NamespaceTexts:
    """How many texts a namespace has, and how many terms these have together."""

    number: int
    hash: int
    texts: int = 0
    terms: int = 0


class Postings:
    """Texts by slot. Not thread-safe: the owner holds a lock around every call but `merge_step`."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []  # the oldest first
        self.lengths: npt.NDArray[np.int32] = np.zeros(_START, np.int32)  # by slot, in terms
        self.notes: Hashes = np.zeros(_START, np.uint64)  # by slot
        self._docs: Numbers = np.full(_START, -1, np.int64)  # by slot: the text's number in the whole index
        self._owners: npt.NDArray[np.int32] = np.zeros(_START, np.int32)  # by slot
        self.scratch = Scratch(_START)
        self._namespaces: dict[str, NamespaceTexts] = {}
        self._by_number: list[NamespaceTexts] = []
        self._next = 0
        self._top = 0  # the greatest slot, and one
        self._held: frozenset[int] = frozenset()  # ids of segments that are being merged aside
        self._firsts: Numbers = np.zeros(0, np.int64)
        self._by_first: list[Segment] = []
        self.changes = 0
        self.saved_changes = 0

    def __repr__(self) -> str:
        return f"<Postings texts={self.texts} segments={[len(segment) for segment in self.segments]}>"

    @property
    def texts(self) -> int:
        return sum(len(segment) - segment.gone for segment in self.segments)

    @property
    def size_bytes(self) -> int:
        by_slot = self.lengths.nbytes + self.notes.nbytes + self._docs.nbytes + self._owners.nbytes
        return by_slot + self.scratch.size_bytes + sum(segment.size_bytes for segment in self.segments)

    def has(self, slot: int) -> bool:
        return slot < len(self._docs) and bool(self._docs[slot] >= 0)

    def has_each(self, slots: Numbers) -> npt.NDArray[np.bool_]:
        """For each slot, whether its text is here."""
        held = np.zeros(len(slots), np.bool_)
        known = slots < len(self._docs)
        held[known] = self._docs[slots[known]] >= 0
        return held

    def namespace(self, name: str) -> NamespaceTexts:
        """What is counted of a namespace. Of one without texts nothing is kept: anybody may ask for any name."""
        return self._namespaces.get(name) or NamespaceTexts(-1, term_hash(name))

    def _owner(self, name: str) -> NamespaceTexts:
        """The namespace that is to have texts."""
        found = self._namespaces.get(name)
        if found is None:
            found = self._namespaces[name] = NamespaceTexts(len(self._by_number), term_hash(name))
            self._by_number.append(found)
        return found

    # ---- changes ----

    def add(
        self, slots: Sequence[int], namespaces: Sequence[str], hashes: Hashes, counts: Numbers, notes: Hashes
    ) -> None:
        """Texts of slots that have none: the hashes of all their terms, text after text, how many each has, notes."""
        if len(slots):
            names = list(dict.fromkeys(namespaces))
            places = {name: at for at, name in enumerate(names)}
            which = np.array([places[name] for name in namespaces], np.int64)
            keys = self._keys(namespaces, hashes, counts)
            self.adopt(build(keys, counts, notes, np.array(slots, np.int32)), names, which)
            self._merge_small()

    def _keys(self, namespaces: Sequence[str], hashes: Hashes, counts: Numbers) -> Hashes:
        of_name = {name: self.namespace(name).hash for name in dict.fromkeys(namespaces)}
        of_text = np.array([of_name[name] for name in namespaces], np.uint64)
        return key_of(hashes, np.repeat(of_text, counts))

    def adopt(
        self, segment: Segment, names: Sequence[str], which: npt.NDArray[np.integer], oldest: bool = False
    ) -> None:
        """Take a segment over, whose texts that are not gone are of slots that have none here. The namespace of the
        i-th of these is names[which[i]]."""
        live = np.flatnonzero(segment.slots >= 0)
        slots = segment.slots[live]
        self._reserve(int(slots.max(initial=-1)))
        self._number(segment, live, slots)
        self.lengths[slots], self.notes[slots] = segment.lengths[live], segment.notes[live]
        texts = np.bincount(which, minlength=len(names))
        terms = np.bincount(which, segment.lengths[live], len(names))
        numbers = np.zeros(len(names), np.int32)
        for at in np.flatnonzero(texts).tolist():
            namespace = self._owner(names[at])
            numbers[at] = namespace.number
            namespace.texts += int(texts[at])
            namespace.terms += int(terms[at])
        self._owners[slots] = numbers[which]
        segment.gone = len(segment) - len(live)
        self._set([segment, *self.segments] if oldest else [*self.segments, segment])

    def remove(self, slot: int) -> None:
        """Forget a slot's text, if it has one."""
        if not self.has(slot):
            return
        doc = int(self._docs[slot])
        segment = self._by_first[int(np.searchsorted(self._firsts, doc, "right")) - 1]
        segment.drop(doc - segment.first)
        owner = self._by_number[int(self._owners[slot])]
        owner.texts -= 1
        owner.terms -= int(self.lengths[slot])
        self._docs[slot] = -1
        self.lengths[slot] = self.notes[slot] = 0
        self.changes += 1

    def clear(self) -> None:
        """Forget all texts."""
        self._set([])
        self._held = frozenset()
        self._docs[:] = -1
        self.lengths[:] = 0
        self.notes[:] = 0
        for namespace in self._by_number:
            namespace.texts = namespace.terms = 0

    def merge_step(self, lock: AbstractContextManager[object], purge: bool = False) -> bool:
        """Make one merge that is due, and whether there was one; to be called without the lock, by one thread.
        `purge`: of every segment with a text that is gone."""
        with lock:
            group = self._due(purge)
            self._held = frozenset(map(id, group))
            kept = [segment.slots >= 0 for segment in group]
        if not group:
            return False
        made = merged(group, kept)
        with lock:
            if self._held:  # not cleared meanwhile
                self._replace(group, kept, made)
            self._held = frozenset()
        return True

    def _merge_small(self) -> None:
        held = [at for at, segment in enumerate(self.segments) if id(segment) in self._held]
        group = _tail(self.segments[held[-1] + 1 if held else 0 :], _AT_ONCE)
        if len(group) > 1:
            kept = [segment.slots >= 0 for segment in group]
            self._replace(group, kept, merged(group, kept))

    def _due(self, purge: bool) -> list[Segment]:
        for segment in self.segments:
            if segment.gone > _GONE_SHARE * len(segment) or (purge and segment.gone):
                return [segment]
        group = _tail(self.segments, None)
        return group if len(group) > 1 else []

    def _replace(self, group: list[Segment], kept: list[npt.NDArray[np.bool_]], made: Segment) -> None:
        made.slots = np.concatenate([segment.slots[keep] for segment, keep in zip(group, kept, strict=True)])
        live = np.flatnonzero(made.slots >= 0)
        made.gone = len(made) - len(live)
        self._number(made, live, made.slots[live])
        at = self.segments.index(group[0])
        rest = [segment for segment in self.segments if segment not in group]
        self._set([*rest[:at], *([made] if len(made) else []), *rest[at:]])

    def _number(self, segment: Segment, live: Numbers, slots: npt.NDArray[np.int32]) -> None:
        segment.first = self._next
        self._next += len(segment)
        self._docs[slots] = segment.first + live

    def _set(self, segments: list[Segment]) -> None:
        self.segments = segments
        self._by_first = sorted(segments, key=lambda segment: segment.first)
        self._firsts = np.array([segment.first for segment in self._by_first], np.int64)
        self.changes += 1

    def _reserve(self, slot: int) -> None:
        self._top = max(self._top, slot + 1)
        lack = slot + 1 - len(self._docs)
        if lack > 0:
            more = max(lack, len(self._docs))
            self._docs = np.concatenate([self._docs, np.full(more, -1, np.int64)])
            self.lengths = np.concatenate([self.lengths, np.zeros(more, np.int32)])
            self.notes = np.concatenate([self.notes, np.zeros(more, np.uint64)])
            self._owners = np.concatenate([self._owners, np.zeros(more, np.int32)])
            self.scratch = Scratch(len(self._docs))

    # ---- questions ----

    def find(self, keys: Hashes) -> Places:
        """Where these keys stand."""
        found = ((segment, segment.spans(keys)) for segment in self.segments)
        return Places([(segment, spans) for segment, spans in found if spans])

    def frequencies(self, found: Places, terms: int, slots: Numbers) -> Floats:
        """How often each of the terms that were looked for stands in the text of each slot, 0 where there is no text:
        [terms, slots]. No slot is to be named twice."""
        out = np.zeros((terms, len(slots)), np.float32)
        columns = ((slots >= 0) & (slots < len(self._docs))).nonzero()[0]
        found.read_short(len(columns))
        held = slots[columns]
        if found.read:
            self.scratch.read_off(found.read, held, columns, out)
        if found.unread:
            self._look_up(found.spans(found.unread), held, columns, out)
        return out

    def often(self, found: Places, term: int, slots: Numbers) -> Floats:
        """How often a term stands in texts that are all here."""
        out = np.zeros(len(slots), np.float32)
        every = found.read_for(len(slots), term)
        if every is not None:
            at, columns = self.scratch.among(every.slots, slots)
            out[columns] = every.counts[at]
        else:
            self._look_up(found.spans((term,)), slots, np.arange(len(slots)), {term: out})
        return out

    def allowed(self, mask: npt.NDArray[np.bool_], slots: Numbers) -> Numbers | None:
        """Where those of the slots stand that the mask allows; None for all of them."""
        if len(mask) >= self._top and mask.all():
            return None
        allowed = mask.take(slots, mode="clip")
        if len(mask) < self._top:
            allowed &= slots < len(mask)
        return None if allowed.all() else allowed.nonzero()[0]

    def _look_up(
        self, each: Sequence[tuple[Segment, Spans]], slots: Numbers, columns: Numbers, out: Floats | dict[int, Floats]
    ) -> None:
        """Write how often each term stands in the texts into these columns of out[term, text]; for few texts."""
        docs = self._docs[slots]
        for segment, spans in each:
            here = ((docs >= segment.first) & (docs < segment.first + len(segment))).nonzero()[0]
            if len(here):
                segment.frequencies(spans, docs[here] - segment.first, out, columns[here])

    def disagreement(
        self, slots: Sequence[int], namespaces: Sequence[str], hashes: Hashes, counts: Numbers
    ) -> Callable[[], npt.NDArray[np.bool_]]:
        """Finds out, without the lock, which of the slots' texts had other terms than these when it was called."""
        segments = list(self.segments)
        at = np.array(slots, np.int64)
        known = at < len(self._docs)
        docs, lengths = np.full(len(at), -1, np.int64), np.zeros(len(at), np.int64)
        docs[known], lengths[known] = self._docs[at[known]], self.lengths[at[known]]
        keys = self._keys(namespaces, hashes, counts)

        def find_out() -> npt.NDArray[np.bool_]:
            expected = build(keys, counts, np.zeros(len(at), np.uint64), at.astype(np.int32))
            wrong: npt.NDArray[np.bool_] = (docs < 0) | (lengths != counts)
            for segment in segments:
                wrong |= segment.disagrees(expected, docs - segment.first)
            return wrong

        return find_out


def _tail(segments: Sequence[Segment], most: int | None) -> list[Segment]:
    """The last segments that are to be one: each less than _RATIO times what follows it, and `most` texts together."""
    size, count = 0, 0
    for segment in reversed(segments):
        if count and (len(segment) >= _RATIO * size or (most is not None and size + len(segment) > most)):
            break
        size += len(segment)
        count += 1
    return list(segments[len(segments) - count :])

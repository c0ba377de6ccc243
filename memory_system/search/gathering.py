"""What a search has to know of memories and those around them, gathered from the index while it is held still."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from memory_system.search import notes
from memory_system.search.columns import Columns, Ids, Mask
from memory_system.search.dates import dates
from memory_system.search.keywords import KeywordQuery
from memory_system.search.query import Hit, SearchQuery
from memory_system.search.ranking import AROUND, Surroundings
from memory_system.search.scope import Scope
from memory_system.search.siblings import NONE, Links
from memory_system.search.view import View

_REACH: Final = max(AROUND)
# Neighbours are looked for behind so many in a row that are archived or have expired.
_FAR: Final = 14

Passes = Callable[[Columns, Ids, Scope], Mask]


def with_siblings(columns: Columns, query: SearchQuery, slots: Ids, mask: Mask) -> Ids:
    """The slots and those around each that the mask allows: an answer need not have a word of its question. What a slot
    speaks for is among them."""
    around = nearest(columns, query.scope, slots, _REACH, _heard).ravel()
    around = around[(around >= 0) & (around < len(mask))]
    slots = np.concatenate([slots, around[mask[around]]])
    return np.unique(np.concatenate([slots, columns.speakers.shown(slots)]) if columns.speakers.count else slots)


def surroundings(view: View, query: SearchQuery, words: KeywordQuery, slots: Ids) -> Surroundings:
    """The texts around each of the ascending slots', as far as the query's scope lets them be heard, whatever its
    filter."""
    columns = view.columns
    near = nearest(columns, query.scope, slots, _REACH, _heard)
    if columns.speakers.count and not query.include_archived:
        # Beside it stand its own originals: its words would count twice, once more with each of them.
        spoken_for = np.flatnonzero(columns.speakers.voices[slots])
        near[np.ix_(np.arange(len(near)) != _REACH, spoken_for)] = NONE
    texts, numbers = _numbered(near)
    shown = np.append(texts[texts >= 0], -1)
    # What is none comes first in the order of slots, and last among the texts.
    place = np.arange(len(texts)) - (len(texts) - len(shown) + 1)
    return Surroundings(
        around=np.where(place < 0, len(shown) - 1, place)[numbers],
        frequencies=view.words.frequencies(words, shown, distinct=True),
        lengths=view.words.lengths(shown),
        asks=(view.words.notes(shown) & np.uint64(notes.ASKS)) > 0,
        parents=columns.parents(slots),
        occurred_at=columns.occurred_at[slots],
        idf=words.idf,
        average_length=words.average_length,
        dates=dates(query.text),
    )


def nearest(columns: Columns, scope: Scope, slots: Ids, reach: int, passes: Passes = Columns.visible) -> Ids:
    """As `Columns.around`, of the memories that the scope lets be seen, whatever its filter: so a summary has those
    beside it that its archived originals had, and they have it."""
    before, after = [slots], [slots]
    for chain, links in ((before, columns.siblings.before), (after, columns.siblings.after)):
        for _ in range(reach):
            chain.append(_next(columns, scope, chain[-1], links, passes))
    return np.array([*reversed(before), *after[1:]], np.int64)


def _heard(columns: Columns, slots: Ids, scope: Scope) -> Mask:
    """Whose text counts as evidence: of what may be seen, but that of the originals in place of a consolidated one's:
    it stands for several turns, which each had their own place."""
    seen = columns.visible(slots, scope)
    if scope.include_archived or not columns.speakers.count:
        return seen
    speakers = columns.speakers
    speaks = (slots >= 0) & columns.visible(speakers.into[slots].astype(np.int64), scope)
    heard: Mask = speaks | (seen & (speakers.voices[slots] == 0))
    return heard


def _next(columns: Columns, scope: Scope, slots: Ids, links: Links, passes: Passes) -> Ids:
    """What follows each of the slots by the links and passes, -1 where nothing does."""
    found = np.where(slots >= 0, links[slots], NONE).astype(np.int64)
    hidden = np.flatnonzero(found >= 0)
    for _ in range(_FAR + 1):
        hidden = hidden[~passes(columns, found[hidden], scope)]
        if not len(hidden):
            return found
        found[hidden] = links[found[hidden]]
        hidden = hidden[found[hidden] >= 0]
    found[hidden] = NONE
    return found


def _numbered(around: Ids) -> tuple[Ids, Ids]:
    """The distinct slots in order, and for each slot which of them it is. numpy's own `unique` takes twice as long."""
    flat = around.ravel()
    order = flat.argsort()
    ordered = flat[order]
    first = np.empty(len(flat), np.bool_)
    first[:1] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    numbers = np.empty(len(flat), np.int64)
    numbers[order] = np.cumsum(first) - 1
    return ordered[first], numbers.reshape(around.shape)


def vectors(view: View | None, row_ids: Ids) -> tuple[npt.NDArray[np.float32], Mask]:
    """The rows' vectors, [rows, dimension], and which of the rows have one; the others' are of zeros."""
    held = view.vectors if view is not None else None
    found = np.zeros((len(row_ids), 1 if held is None else held.dimension), np.float32)
    has = np.zeros(len(row_ids), np.bool_)
    if view is None or held is None:
        return found, has
    for place, row_id in enumerate(row_ids.tolist()):
        slot = view.columns.slot(row_id)
        vector = None if slot is None else held.vector(slot)
        if vector is not None:
            found[place], has[place] = vector, True
    return found, has


def with_neighbours(columns: Columns, query: SearchQuery, hits: list[Hit]) -> list[Hit]:
    """The hits, each with the nearest memories before and after it below the same parent, whatever the filter."""
    slots = [columns.slot(hit.row_id) for hit in hits]
    known = np.array([-1 if slot is None else slot for slot in slots], np.int64)
    around = nearest(columns, query.scope, known, query.neighbours)
    found = []
    for hit, before, after in zip(hits, around[: query.neighbours].T, around[query.neighbours + 1 :].T, strict=True):
        beside = [tuple(columns.row_ids[side[side >= 0]].tolist()) for side in (before, after)]
        found.append(replace(hit, before=beside[0], after=beside[1]))
    return found

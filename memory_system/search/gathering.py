"""What a search has to know of memories and those around them, gathered from the index while it is held still."""

from __future__ import annotations

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
from memory_system.search.view import View

_REACH: Final = max(AROUND)
# Neighbours are looked for behind those that are archived or have expired, and so far.
_FAR: Final = 16


def with_siblings(columns: Columns, slots: Ids, mask: Mask) -> Ids:
    """The slots and those around each that the mask allows: an answer need not have a word of its question."""
    around = columns.around(slots, _REACH).ravel()
    around = around[(around >= 0) & (around < len(mask))]
    return np.unique(np.concatenate([slots, around[mask[around]]]))


def surroundings(view: View, query: SearchQuery, words: KeywordQuery, slots: Ids) -> Surroundings:
    """The texts around each of the ascending slots', as far as the query's scope lets them be seen, whatever its
    filter."""
    columns = view.columns
    around = columns.around(slots, _REACH)
    texts, numbers = _numbered(around)
    seen = columns.visible(texts, query.scope)
    seen[np.searchsorted(texts, slots)] = True
    shown = np.append(texts[seen], -1)
    place = np.full(len(texts), len(shown) - 1)
    place[seen] = np.arange(len(shown) - 1)
    return Surroundings(
        around=place[numbers],
        frequencies=view.words.frequencies(words, shown, distinct=True),
        lengths=view.words.lengths(shown),
        asks=(view.words.notes(shown) & np.uint64(notes.ASKS)) > 0,
        parents=columns.parents(slots),
        occurred_at=columns.occurred_at[slots],
        idf=words.idf,
        average_length=words.average_length,
        dates=dates(query.text),
    )


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
    around = columns.around(np.array([-1 if slot is None else slot for slot in slots], np.int64), _FAR)
    seen = columns.visible(around.ravel(), query.scope).reshape(around.shape)
    row_ids = columns.row_ids[around]
    found = []
    for at, hit in enumerate(hits):
        before = row_ids[:_FAR, at][seen[:_FAR, at]][-query.neighbours :]
        after = row_ids[_FAR + 1 :, at][seen[_FAR + 1 :, at]][: query.neighbours]
        found.append(replace(hit, before=tuple(before.tolist()), after=tuple(after.tolist())))
    return found

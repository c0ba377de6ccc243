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
_NONE: Final = np.array([NONE])
# Neighbours are looked for behind so many in a row that are archived or have expired.
_FAR: Final = 14

Passes = Callable[[Columns, Ids, Scope], Mask]


def evidence(
    view: View, query: SearchQuery, words: KeywordQuery, found: Ids, mask: Mask
) -> tuple[Ids, Surroundings | None, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The slots to be ranked, what stands around them in hybrid mode, and how often each query term is in each of them
    ([terms, slots]), with their lengths in words."""
    if query.mode != "hybrid" or not len(found):
        return found, None, view.words.frequencies(words, found), view.words.lengths(found)
    slots, near = gather(view, query, words, np.sort(found), mask)
    return slots, near, *near.own()


def gather(view: View, query: SearchQuery, words: KeywordQuery, found: Ids, mask: Mask) -> tuple[Ids, Surroundings]:
    """The ascending slots found and those beside each that the mask allows, for an answer need not have a word of its
    question; and the texts around all of these, as far as the query's scope lets them be heard, whatever its filter.
    What one of them speaks for is among them."""
    columns = view.columns
    chains = _chains(columns, query.scope, found, mask)
    shown, numbers = _numbered(chains)
    members = _members(numbers, shown, mask)
    slots = shown[members]
    at = np.empty(len(shown), np.int64)
    inner = numbers[_REACH:-_REACH].ravel()
    at[inner] = np.arange(len(inner))
    rows, places = np.divmod(at[members], chains.shape[1])
    return slots, Surroundings(
        around=numbers[rows + np.arange(len(AROUND))[:, None], places],
        frequencies=view.words.frequencies(words, shown, distinct=True),
        lengths=view.words.lengths(shown),
        asks=(view.words.notes(shown) & np.uint64(notes.ASKS)) > 0,
        parents=columns.parents(slots),
        occurred_at=columns.occurred_at[slots],
        idf=words.idf,
        average_length=words.average_length,
        dates=dates(query.text),
    )


def _chains(columns: Columns, scope: Scope, found: Ids, mask: Mask) -> Ids:
    """As `nearest`, so far that what is beside one of them has its own surroundings in the same chain. A consolidated
    memory for which originals speak stands apart: around it they would say the same again, each once more in its own
    place."""
    speakers = columns.speakers
    if scope.include_archived or not speakers.count:
        return nearest(columns, scope, found, 2 * _REACH)
    spoken_for = speakers.voices[found] > 0
    chains = nearest(columns, scope, found[~spoken_for], 2 * _REACH, _heard)
    beside = chains[_REACH:-_REACH].ravel()
    beside = beside[(beside >= 0) & (beside < len(mask))]
    # What is spoken for may speak in turn: it was merged again.
    into = speakers.into[np.concatenate([beside[mask[beside]], found[spoken_for]])]
    apart = np.unique(np.concatenate([found[spoken_for], into[into != NONE]]))
    alone = np.full((len(chains), len(apart)), NONE, np.int64)
    alone[2 * _REACH] = apart
    return np.hstack([chains, alone])


def _members(numbers: Ids, texts: Ids, mask: Mask) -> Ids:
    """Which of the texts (the last is none) stand in the middle row of the numbers, or beside it and in the mask."""
    chosen = np.zeros(len(texts), np.bool_)
    chosen[numbers[_REACH:-_REACH]] = True
    chosen &= (texts < len(mask)) & mask.take(texts, mode="clip")
    chosen[numbers[2 * _REACH]] = True
    chosen[-1] = False
    return np.flatnonzero(chosen)


def nearest(columns: Columns, scope: Scope, slots: Ids, reach: int, passes: Passes = Columns.visible) -> Ids:
    """As `Columns.around`, of the memories that the scope lets be seen, whatever its filter: so a summary has those
    beside it that its archived originals had, and they have it."""
    around = columns.around(slots, reach)
    if passes(columns, around[around >= 0], scope).all():
        return around
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
    into = speakers.into[slots].astype(np.int64)
    speaks = (slots >= 0) & columns.visible(into, scope) & (columns.expires[slots] > scope.now_s)
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
    """The distinct slots in order and behind them NONE, and for each slot which of these it is. numpy's own `unique`
    takes twice as long."""
    flat = np.concatenate((around.ravel(), _NONE)).view(np.uint64)  # it becomes the greatest number
    order = flat.argsort(kind="stable")  # which profits from what is in order already
    ordered = flat[order]
    first = np.ones(len(flat), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    numbers = np.empty(len(flat), np.int64)
    numbers[order] = first.cumsum() - 1
    return ordered[first].view(np.int64), numbers[:-1].reshape(around.shape)


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

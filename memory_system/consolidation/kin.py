"""Which fading memories belong together: near-duplicates, and neighbours in time that speak of the same.

All functions take memories in the order of time, with one unit vector each, and answer with positions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memory_system.consolidation.rules import Kind
from memory_system.consolidation_settings import ConsolidationSettings

Vectors = NDArray[np.float32]

_WORD: Final = re.compile(r"\w+")
_SECONDS_PER_HOUR: Final = 3600.0


# Of one text no more copies are folded at once, so that a merge stays a short write; the next run takes more.
MOST_COPIES: Final = 50


@dataclass(frozen=True, slots=True)
class Texts:
    """Memories in the order of time: normalised texts, lengths, times in epoch seconds, unit vectors (n, dimension).

    A row of zeros stands for a vector that is not there; `vectors` is None where there are none at all. `sections`:
    between two memories of one section nothing else was said. `usual_chars`: the average length of a memory there.
    """

    normalised: Sequence[str]
    chars: Sequence[int]
    at_s: Sequence[float]
    vectors: Vectors | None
    sections: Sequence[int]
    usual_chars: float


def families(found: Texts, settings: ConsolidationSettings) -> list[tuple[Kind, list[int]]]:
    """The sets of memories that are to become one each, among the children of one parent.

    Duplicates stand together as one memory would. Those that stand alone in the end are `duplicates`, the others are
    merged by a `summary`. Memories that are left alone are left out.
    """
    sets = duplicates(found, settings)
    if found.vectors is None:
        return [("duplicates", same) for same in sets if len(same) > 1]
    made: list[tuple[Kind, list[int]]] = []
    for run in runs(found, [same[0] for same in sets], settings):
        members = sorted(at for place in run for at in sets[place])
        if settings.min_related_memories <= len(run) and len(members) <= MOST_COPIES:
            made.append(("summary", members))
        else:
            made += [("duplicates", sets[place]) for place in run if len(sets[place]) > 1]
    return made


def normalised(text: str) -> str:
    """The words of a text without case, punctuation and spacing: equal for texts that read the same."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def duplicates(found: Texts, settings: ConsolidationSettings) -> list[list[int]]:
    """Sets of memories that say the same, in order; one that has no duplicate is a set of its own.

    A memory joins the first set whose first member has its text, unless that is empty, or is as near to it as
    `duplicate_similarity`: so sets do not drift away from what they began with.
    """
    sets: dict[int, list[int]] = {}  # by its first member
    by_text: dict[str, int] = {}
    alike = _alike(found.vectors, settings.duplicate_similarity)
    for at, text in enumerate(found.normalised):
        heads = [by_text[text]] if text and text in by_text else []
        if alike is not None:
            heads += np.flatnonzero(alike[at, :at]).tolist()
        head = next((head for head in heads if len(sets.get(head, ())) in range(1, MOST_COPIES)), at)
        sets.setdefault(head, []).append(at)
        by_text[text] = head
    return list(sets.values())


def _alike(vectors: Vectors | None, similarity: float) -> NDArray[np.bool_] | None:
    return None if vectors is None else np.greater_equal(vectors @ vectors.T, similarity)


def most_chars(found: Texts, settings: ConsolidationSettings) -> float:
    """How much text may become one memory: what the settings say, or two memories of the usual length."""
    return max(float(settings.max_chars), 2.0 * found.usual_chars)


def runs(found: Texts, heads: Sequence[int], settings: ConsolidationSettings) -> list[list[int]]:
    """Runs of neighbours among `heads` that speak of the same, as places in `heads`; together all of them, in order.

    The two neighbouring runs that are most alike become one, again and again, while the mean cosine between their
    members is at least `similarity_threshold` and one memory may hold both (`_may_join`): average linkage, restricted
    to neighbours as in the segmentation of texts.
    """
    assert found.vectors is not None
    vectors = found.vectors[list(heads)]
    cosines = vectors @ vectors.T
    made = [[place] for place in range(len(heads))]

    def link(left: int) -> float:
        """How alike a run and the next one are; -1 if they cannot be one."""
        if left + 1 >= len(made):
            return -1.0
        one, other = made[left], made[left + 1]
        if not _may_join(found, [heads[place] for place in (*one, *other)], settings):
            return -1.0
        return float(cosines[one[0] : one[-1] + 1, other[0] : other[-1] + 1].mean())

    links = [link(left) for left in range(len(made))]
    while links and (best := max(links)) >= settings.similarity_threshold:
        left = links.index(best)
        made[left] += made.pop(left + 1)
        del links[left + 1]
        links[left] = link(left)
        if left > 0:
            links[left - 1] = link(left - 1)
    return made


def _may_join(found: Texts, members: Sequence[int], settings: ConsolidationSettings) -> bool:
    """Whether these are few and short enough, lie near enough in time, and nothing else was said between them."""
    first, last = members[0], members[-1]
    return (
        len(members) <= settings.max_related_memories
        and found.sections[first] == found.sections[last]
        and found.at_s[last] - found.at_s[first] <= settings.window_h * _SECONDS_PER_HOUR
        and sum(found.chars[at] for at in members) <= most_chars(found, settings)
    )


def around(found: Texts, settings: ConsolidationSettings) -> list[int]:
    """The first memory with the most alike of the others, which it is related to; in the order given."""
    if found.vectors is None:
        return [0]
    cosines = found.vectors @ found.vectors[0]
    window_s = settings.window_h * _SECONDS_PER_HOUR
    near = [
        at
        for at in range(1, len(found.at_s))
        if cosines[at] >= settings.similarity_threshold and abs(found.at_s[at] - found.at_s[0]) <= window_s
    ]
    chosen, room = [0], most_chars(found, settings) - found.chars[0]
    for at in sorted(near, key=lambda at: (-float(cosines[at]), at)):
        if len(chosen) < settings.max_related_memories and found.chars[at] <= room:
            chosen.append(at)
            room -= found.chars[at]
    return sorted(chosen)

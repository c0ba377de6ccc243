"""Which of the memories that are due are to become one: by their parent, by relationships, and by what they say."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Final, TypeVar

import numpy as np

from memory_system.consolidation import kin, rules
from memory_system.consolidation.rules import Kind
from memory_system.embedding import Embedder
from memory_system.errors import StorageFailed, VectorsUnavailable
from memory_system.filters import And, Condition
from memory_system.models import Memory
from memory_system.search.engine import SearchEngine, SearchOutcome, SearchQuery
from memory_system.settings import Settings
from memory_system.storage import kindred
from memory_system.storage.ageing import DueRow
from memory_system.storage.readers import Readers

# Children of one parent that are looked at together; where there are more at once, they are in parts.
_POOL: Final = 400
# The nearest memories among which duplicates of one without a parent are looked for, and how near they have to be to
# have their words compared.
_NEIGHBOURS: Final = 50
_NEAR: Final = 0.9
# So many memories are compared within some milliseconds.
_AT_ONCE: Final = 64

T = TypeVar("T")
Parent = tuple[str, str | None]  # namespace, parent_id


@dataclass(slots=True)
class Taken:
    """What the plans of one walk have taken already: a later slice must not plan with it again."""

    _row_ids: set[int] = field(default_factory=set)
    without_parent: int = 0

    def __contains__(self, row_id: object) -> bool:
        return row_id in self._row_ids

    def add(self, memories: Sequence[Memory]) -> None:
        self._row_ids.update(memory.row_id for memory in memories)
        self.without_parent += sum(memory.parent_id is None for memory in memories)


@dataclass(frozen=True, slots=True)
class Family:
    """Memories that are to become one, in the order of time."""

    kind: Kind
    originals: tuple[Memory, ...]


class Kindred:
    """Finds families. `as_of_s` is the instant as of which memories fade."""

    def __init__(self, settings: Settings, readers: Readers, engine: SearchEngine, embedder: Embedder) -> None:
        self._settings = settings.consolidation
        self._lifecycle = settings.lifecycle
        self._readers = readers
        self._engine = engine
        self._embedder = embedder

    async def families(self, due: Sequence[DueRow], as_of_s: float, taken: Taken) -> list[Family]:
        """The families of these fading memories, each with at least one of them; what they hold is then taken.

        Children of a parent first, then what relationships tie together, then what has no parent and says the same.
        Raises VectorsUnavailable while the model or the index loads, StorageFailed.
        """
        self._require_vectors()
        found = await kindred.possible(self._readers, [row.row_id for row in due])
        fading = [memory for memory in rules.in_order(found) if self._fades(memory, as_of_s, taken)]
        families: list[Family] = []
        for (namespace, parent_id), group in _by_parent(fading).items():
            if parent_id is not None:
                families += await self._of_parent(namespace, parent_id, group, as_of_s, taken)
        families += await self._of_relationships(fading, as_of_s, taken)
        families += await self._of_same_words(fading, as_of_s, taken)
        return families

    def _require_vectors(self) -> None:
        if self._embedder.state not in ("ready", "off"):
            raise VectorsUnavailable(f"no embedding now: {self._embedder.reason or self._embedder.state}")

    def _fades(self, memory: Memory, as_of_s: float, taken: Taken) -> bool:
        return memory.row_id not in taken and rules.may_merge(self._lifecycle, memory, as_of_s)

    # -- children of one parent ---------------------------------------------------------------------------------------

    async def _of_parent(
        self, namespace: str, parent_id: str, due: Sequence[Memory], as_of_s: float, taken: Taken
    ) -> list[Family]:
        window_s = self._settings.window_h * 3600.0
        families = []
        left = sorted(due, key=_made)
        while left:
            span_s = (left[0].created_at - window_s, left[-1].created_at + window_s)
            siblings = await kindred.siblings(self._readers, namespace, parent_id, _made(left[0]), span_s, _POOL)
            reach = max((_made(memory) for memory, _ in siblings), default=_made(left[-1]))
            part = [memory for memory in left if _made(memory) <= reach] or left
            families += await self._of_part(siblings, part, as_of_s, taken)
            left = left[len(part) :]
        return families

    async def _of_part(
        self, siblings: Sequence[tuple[Memory, bool]], due: Sequence[Memory], as_of_s: float, taken: Taken
    ) -> list[Family]:
        """The families of these fading memories and their siblings."""
        possible = {memory.row_id for memory, can_merge in siblings if can_merge} | {memory.row_id for memory in due}
        pool = {memory.row_id: memory for memory in [*(memory for memory, _ in siblings), *due]}
        asked = {memory.row_id for memory in due}
        families = []
        for same in _by_owner(rules.in_order(list(pool.values()))):
            fading = [memory.row_id in possible and self._fades(memory, as_of_s, taken) for memory in same]
            for family in await self._sorted_out(same, fading):
                if any(memory.row_id in asked for memory in family.originals):
                    families.append(family)
                    taken.add(family.originals)
        return families

    async def _sorted_out(self, siblings: Sequence[Memory], fading: Sequence[bool]) -> list[Family]:
        """The families among the fading of these children of one parent, of one type and user, in the order of time."""
        memories = [memory for memory, fades in zip(siblings, fading, strict=True) if fades]
        if len(memories) < 2:
            return []
        texts = await self._texts(memories, _sections(fading), _usual_chars(siblings))
        found = await _off_the_loop(len(memories), partial(kin.families, texts, self._settings))
        return [Family(kind, tuple(memories[at] for at in members)) for kind, members in found]

    # -- relationships ------------------------------------------------------------------------------------------------

    async def _of_relationships(self, fading: Sequence[Memory], as_of_s: float, taken: Taken) -> list[Family]:
        left = [memory for memory in fading if memory.row_id not in taken]
        families = []
        for namespace in dict.fromkeys(memory.namespace for memory in left):
            theirs = [memory for memory in left if memory.namespace == namespace]
            related = await kindred.related(self._readers, namespace, [memory.row_id for memory in theirs], _POOL)
            for memory in theirs:
                family = await self._around(memory, related.get(memory.row_id, []), as_of_s, taken)
                if family is not None:
                    families.append(family)
                    taken.add(family.originals)
        return families

    async def _around(self, memory: Memory, related: Sequence[Memory], as_of_s: float, taken: Taken) -> Family | None:
        others = [other for other in related if _owner(other) == _owner(memory) and self._fades(other, as_of_s, taken)]
        if not others or memory.row_id in taken:
            return None
        pool = [memory, *rules.in_order(others)]
        chosen = kin.around(await self._texts(pool), self._settings)
        if len(chosen) < self._settings.min_related_memories:
            return None
        return Family("summary", tuple(rules.in_order([pool[at] for at in chosen])))

    # -- duplicates without a parent ----------------------------------------------------------------------------------

    async def _of_same_words(self, fading: Sequence[Memory], as_of_s: float, taken: Taken) -> list[Family]:
        left = [memory for memory in fading if memory.parent_id is None and memory.row_id not in taken]
        families = []
        for same in _by_owner(left):
            pool = {memory.row_id: memory for memory in same}
            for memory in same:
                near = await self._neighbours(memory, as_of_s, taken)
                pool.update((other.row_id, other) for other in near)
            families += await self._folded(same, rules.in_order(list(pool.values())))
        for family in families:
            taken.add(family.originals)
        return families

    async def _folded(self, due: Sequence[Memory], pool: Sequence[Memory]) -> list[Family]:
        """The sets of duplicates in a pool that have one of those that are due."""
        texts = await self._texts(pool)
        sets = await _off_the_loop(len(pool), partial(kin.duplicates, texts, self._settings))
        asked = {memory.row_id for memory in due}
        found = [tuple(pool[at] for at in same) for same in sets if len(same) > 1]
        return [Family("duplicates", same) for same in found if any(memory.row_id in asked for memory in same)]

    async def _neighbours(self, memory: Memory, as_of_s: float, taken: Taken) -> list[Memory]:
        """Fading memories without a parent, of the same type and user, that are near to this one."""
        if self._embedder.state == "off":
            return []
        owner = Condition("user_id", (), "exists", False)
        if memory.user_id is not None:
            owner = Condition("user_id", (), "eq", memory.user_id)
        parts = (
            Condition("memory_type", (), "eq", memory.memory_type),
            Condition("parent_id", (), "exists", False),
            owner,
        )
        # What earlier plans have taken is found in a dry run, and until the index has followed: it takes no place.
        most = _NEIGHBOURS + taken.without_parent
        query = SearchQuery(memory.namespace, "", as_of_s, "dense", most, filter=And(parts), min_score=_NEAR)
        outcome = await self._similar(query, memory)
        near = [hit.row_id for hit in outcome.hits if hit.row_id not in taken]
        found = await kindred.possible(self._readers, near[:_NEIGHBOURS])
        return [other for other in found if self._fades(other, as_of_s, taken)]

    async def _similar(self, query: SearchQuery, memory: Memory) -> SearchOutcome:
        try:
            outcome = await asyncio.wrap_future(
                self._engine.submit_similar(query, memory.row_id, memory.content_digest)
            )
        except sqlite3.Error as error:
            raise StorageFailed(f"the database cannot be read: {error}") from error
        if outcome.reason not in (None, "no_vector"):
            raise VectorsUnavailable(f"the search index cannot answer now: {outcome.reason}")
        return outcome

    # -- what is compared ---------------------------------------------------------------------------------------------

    async def _texts(
        self, memories: Sequence[Memory], sections: Sequence[int] | None = None, usual_chars: float | None = None
    ) -> kin.Texts:
        return kin.Texts(
            normalised=[kin.normalised(memory.content) for memory in memories],
            chars=[len(memory.content) for memory in memories],
            at_s=[rules.time_of(memory) for memory in memories],
            vectors=await self._vectors([memory.row_id for memory in memories]),
            sections=[0] * len(memories) if sections is None else sections,
            usual_chars=_usual_chars(memories) if usual_chars is None else usual_chars,
        )

    async def _vectors(self, row_ids: Sequence[int]) -> kin.Vectors | None:
        """One row for each, zeros where there is no vector; None without a model."""
        model_id, dimension = self._embedder.model_id, self._embedder.dimension
        if model_id is None or dimension is None:
            return None
        found = await kindred.vectors(self._readers, model_id, row_ids)
        vectors = np.zeros((len(row_ids), dimension), np.float32)
        for at, row_id in enumerate(row_ids):
            vector = found.get(row_id)
            if vector is not None and vector.shape == (dimension,):
                vectors[at] = vector
        return vectors


async def _off_the_loop(count: int, work: Callable[[], T]) -> T:
    """The result of work over so many memories, in a thread where it takes longer than a request may wait."""
    return work() if count <= _AT_ONCE else await asyncio.to_thread(work)


def _sections(fading: Sequence[bool]) -> list[int]:
    """For each that fades, how many before it do not: so neighbours in time have the same number."""
    before = accumulate((not fades for fades in fading), initial=0)
    return [count for fades, count in zip(fading, before, strict=False) if fades]


def _usual_chars(memories: Sequence[Memory]) -> float:
    return sum(len(memory.content) for memory in memories) / len(memories)


def _made(memory: Memory) -> kindred.Made:
    return memory.created_at, memory.row_id


def _owner(memory: Memory) -> tuple[str, str | None]:
    return memory.memory_type, memory.user_id


def _by_parent(memories: Sequence[Memory]) -> dict[Parent, list[Memory]]:
    found: dict[Parent, list[Memory]] = {}
    for memory in memories:
        found.setdefault((memory.namespace, memory.parent_id), []).append(memory)
    return found


def _by_owner(memories: Sequence[Memory]) -> list[list[Memory]]:
    """Those of one namespace, type and user together, in the order given."""
    found: dict[tuple[str, str, str | None], list[Memory]] = {}
    for memory in memories:
        found.setdefault((memory.namespace, *_owner(memory)), []).append(memory)
    return list(found.values())

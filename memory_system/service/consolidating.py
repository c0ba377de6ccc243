"""Consolidation: what fades becomes one memory with its kin, and can be taken apart again.

Planning only reads, and embeds sentences; a plan is then carried out as one write, which looks again at everything
that the plan rests on. So a plan can be shown, kept, or be out of date, and nothing happens by it that was not planned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from memory_system.consolidation import rules, summarisers
from memory_system.consolidation.plan import Pieces, Plan, compose
from memory_system.consolidation.summarisers import Original
from memory_system.embedding import Embedder, Vectors
from memory_system.errors import MemorySystemError, VectorsUnavailable
from memory_system.log import get_logger
from memory_system.models import Memory
from memory_system.search.engine import SearchEngine
from memory_system.service import Reply
from memory_system.service.kindred import Family, Kindred, Taken
from memory_system.settings import Settings
from memory_system.storage import ageing, consolidations, kindred
from memory_system.storage.context import WriteContext
from memory_system.storage.jobs import WriteJob
from memory_system.storage.readers import Readers
from memory_system.storage.writer import Writer

log = get_logger("service.consolidating")

_LANE: Final = b"maintenance"
# Sentences embedded at once: a query that comes meanwhile waits for no more than these.
_SENTENCES: Final = 16


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a walk over what is due has come, and what its plans have taken. To be handed back as it is."""

    position: ageing.Position
    taken: Taken


@dataclass(frozen=True, slots=True)
class Planned:
    """A slice of a walk. `alone`: fading memories without kin; `seen`: how many were due; `after`: None if no more."""

    plans: list[Plan]
    alone: list[ageing.DueRow]
    seen: int
    after: Cursor | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """`reason`: the plan's kind, `changed`, `undone`. `members`: memory ids of the originals."""

    done: bool
    reason: str
    memory_id: str | None
    members: list[str]


class Consolidating:
    """Plans merges, carries them out, and undoes them. Raises ConfigError for a summariser that cannot be loaded."""

    def __init__(
        self, settings: Settings, writer: Writer, readers: Readers, engine: SearchEngine, embedder: Embedder
    ) -> None:
        self._settings = settings.consolidation
        self._lifecycle = settings.lifecycle
        self._writer = writer
        self._readers = readers
        self._embedder = embedder
        self._kindred = Kindred(settings, readers, engine, embedder)
        self._summariser = summarisers.load(self._settings.summariser)

    async def plan(
        self, as_of_s: float, namespaces: Collection[str] | None = None, limit: int = 200, after: Cursor | None = None
    ) -> Planned:
        """What is to be merged among the next `limit` memories that are due as of `as_of_s`.

        The same store and instant give the same plans. Raises VectorsUnavailable, StorageFailed.
        """
        position, taken = (None, Taken()) if after is None else (after.position, after.taken)
        due = await self._next_due(as_of_s, namespaces, limit, position, taken)
        decided = ageing.decisions(self._lifecycle, due, as_of_s)
        fading = [row for row, decision in decided if decision.kind == "consolidate"]
        families = await self._kindred.families(fading, as_of_s, taken) if fading else []
        plans = [plan for family in families if (plan := await self._tell(family, as_of_s)) is not None]
        elsewhere = {row_id for plan in plans for row_id in plan.row_ids}
        alone = [row for row in fading if row.row_id not in elsewhere]
        return Planned(plans, alone, len(due), Cursor(due[-1].position, taken) if due else None)

    async def _next_due(
        self,
        as_of_s: float,
        namespaces: Collection[str] | None,
        limit: int,
        position: ageing.Position | None,
        taken: Taken,
    ) -> list[ageing.DueRow]:
        """The next `limit` due memories without those of earlier slices' plans. After a plan was carried out these are
        not due any more, in a dry run they still are: both have to walk over the same rows."""
        kept: list[ageing.DueRow] = []
        while len(kept) < limit:
            found = await ageing.due_rows(self._readers, as_of_s, after=position, limit=limit, namespaces=namespaces)
            if not found:
                break
            position = found[-1].position
            kept += [row for row in found if row.row_id not in taken]
        return kept[:limit]

    def job(self, plan: Plan) -> Callable[[WriteContext], Reply]:
        """What carries a plan out inside the writer: done, reason, memory_id, members."""
        return partial(consolidations.apply, plan=plan)

    async def apply(self, plan: Plan) -> Outcome:
        """Carry a plan out in one write; an original that has changed since leaves everything as it is."""
        return await self._write(self.job(plan), plan.namespace, plan.rows)

    async def undo(self, namespace: str, memory_id: str, dry_run: bool = False) -> Outcome:
        """Bring back the originals of a consolidated memory, and remove it. A dry run says which would come back.

        Raises MemoryNotFound, InvalidField for a memory that was not made by consolidation.
        """
        members = await kindred.originals(self._readers, namespace, memory_id)
        if dry_run:
            return Outcome(True, "undone", memory_id, members)
        run = partial(consolidations.undo, memory_id=memory_id)
        return await self._write(run, namespace, 2 + 2 * len(members))

    async def _write(self, run: Callable[[WriteContext], Reply], namespace: str, rows: int) -> Outcome:
        reply = await self._writer.submit(WriteJob(run, namespace, rows=rows, client=_LANE))
        return Outcome(reply["done"], reply["reason"], reply["memory_id"], reply["members"])

    # -- what the merged memory says ----------------------------------------------------------------------------------

    async def _tell(self, family: Family, as_of_s: float) -> Plan | None:
        """The plan for a family; None if its summariser fails, which the log tells."""
        if family.kind == "duplicates":
            chosen = rules.spokesman(family.originals)
            return self._plan(family, chosen.content, ((chosen.row_id, chosen.content),), "", as_of_s)
        try:
            content, pieces = await self._summary(family.originals)
        except MemorySystemError:
            raise
        except Exception as error:  # a summariser of somebody else may fail in any way; its originals fade on
            log.exception("summariser_failed", summariser=self._settings.summariser, error=type(error).__name__)
            return None
        return self._plan(family, content, pieces, self._settings.summariser, as_of_s)

    def _plan(self, family: Family, content: str, pieces: Pieces | None, summariser: str, as_of_s: float) -> Plan:
        return Plan(
            kind=family.kind,
            namespace=family.originals[0].namespace,
            as_of_s=as_of_s,
            originals=family.originals,
            content=content,
            pieces=pieces,
            summariser=summariser,
            fields=rules.merged(self._lifecycle, family.originals, family.kind, as_of_s),
        )

    async def _summary(self, originals: Sequence[Memory]) -> tuple[str, Pieces | None]:
        texts = [Original(memory.memory_id, memory.content, rules.time_of(memory)) for memory in originals]
        length = sum(len(memory.content) + 1 for memory in originals)
        budget = min(self._settings.summary_max_chars, max(1, round(self._settings.summary_share * length)))
        async with asyncio.timeout(self._settings.summariser_timeout_s):
            text, found = await summarisers.summarise(self._summariser, texts, budget, self._embed)
        if found is None:
            return text, None
        pieces = tuple((originals[source].row_id, part) for source, part in found)
        return compose(pieces), pieces

    async def _embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts that are of no use afterwards: not cached, and in small parts, so that queries get in."""
        if self._embedder.dimension is None:
            raise VectorsUnavailable("there is no model")
        parts = [
            await self._embedder.encode(texts[start : start + _SENTENCES]) for start in range(0, len(texts), _SENTENCES)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self._embedder.dimension), np.float32)

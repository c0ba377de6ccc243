"""Looking at and ageing the memories of a running service without the actions of maintenance."""

from __future__ import annotations

from functools import partial
from typing import Any

from memory_system.storage import ageing
from memory_system.storage.ageing import Change, DueRow
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.jobs import WriteJob
from tests.support.service import Service

DAY_S = 86_400.0


async def due(service: Service, as_of_s: float, **options: Any) -> list[DueRow]:
    return await ageing.due_rows(service.runtime._readers, as_of_s, **options)


async def age(service: Service, as_of_s: float, namespace: str = "default", **options: Any) -> list[Change]:
    """One decay of what is due in the namespace, as of an instant; what it changed."""
    rows = await due(service, as_of_s, namespaces=[namespace], limit=10_000)
    changes: list[Change] = []

    def run(context: WriteContext, row_ids: list[int]) -> Reply:
        changes.extend(ageing.apply(context, row_ids, as_of_s, **options))
        return {}

    job = WriteJob(partial(run, row_ids=[row.row_id for row in rows]), namespace, client=b"maintenance")
    await service.runtime._writer.submit(job)
    return changes


def stored(service: Service, memory_id: str, *columns: str) -> tuple[Any, ...]:
    return service.rows(f"SELECT {', '.join(columns)} FROM memories WHERE memory_id = ?", memory_id)[0]

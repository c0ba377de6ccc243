"""Helps tests of maintenance: memories that are due, and runs that are held in the middle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

from memory_system.service.run import Run
from tests.support.service import Service, eventually

DAY_S = 86_400.0
# A clock that a test sets does not count as one that was set.
STEADY = {"clock__jump_s": 1e9}
# At the end of their stay memories of importance 1.0 are promoted, of 0.5 fade, and of 0.15 are archived before it.
PROMOTED, FADING, ARCHIVED = 1.0, 0.5, 0.15
DECAY = {**STEADY, "lifecycle__short__promote_importance": 0.4}


async def old_memories(service: Service, importances: list[float], namespace: str = "default") -> list[str]:
    """Memories of these importances, eight days old by the service's clock, which is moved."""
    batch = [{"content": f"memory {number}", "importance": each} for number, each in enumerate(importances)]
    added = await service.ok("batch_add_memories", {"namespace": namespace}, memories=batch)
    service.clock.ahead_s += 8 * DAY_S
    memory_ids: list[str] = added["memory_ids"]
    return memory_ids


def reported(reply: dict[str, Any]) -> dict[str, Any]:
    """What a run did, or would do, without which run it was and when it was made."""
    left_out = {"request_id", "commit_seq", "run_id", "dry_run", "started_at", "finished_at", "replayed", "joined"}
    return {name: value for name, value in reply.items() if name not in left_out}


class Held:
    """A job's work that waits inside its run until `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.runs: list[Run] = []

    async def work(self, _namespaces: Any, run: Run) -> None:
        self.runs.append(run)
        run.progress("waiting", 1, 2)
        await self.go.wait()
        run.change("mem-1", "default", "active", "archived", "held")


@contextlib.asynccontextmanager
async def held(service: Service, job: str = "decay") -> AsyncIterator[Held]:
    """The job `decay` or `cleanup` of this service, held."""
    found = Held()
    with mock.patch.object(service.runtime._maintaining._sweeps, job, found.work):
        yield found
        found.go.set()


async def is_held(found: Held, runs: int = 1) -> None:
    """Return when so many runs have begun."""

    async def begun() -> bool:
        return len(found.runs) == runs

    await eventually(begun)

"""The states of the store that exports read, held open between their pages."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from memory_system.errors import Busy, InvalidCursor
from memory_system.storage.dump import Dump

# A state that is held keeps the write-ahead log from starting over, so it is not held for long without a reader.
IDLE_S: Final = 60.0
MAX_OPEN: Final = 4
_RETRY_MS: Final = 1000

T = TypeVar("T")


@dataclass(slots=True)
class _Held:
    dump: Dump
    alarm: asyncio.TimerHandle
    readers: int = 0


class Exports:
    """Open dumps by name. Lives on one event loop; what they read is read in threads."""

    def __init__(self, database: Path, idle_s: float = IDLE_S) -> None:
        self._database = database
        self._idle_s = idle_s
        self._held: dict[str, _Held] = {}
        self._opening = 0
        self._closing: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Exports {len(self._held)} of {MAX_OPEN} open>"

    async def open(self, namespaces: list[str] | None, now_s: float, *, vectors: bool) -> str:
        """The name of a new dump. Raises Busy when too many are read at once, sqlite3.Error."""
        if len(self._held) + self._opening >= MAX_OPEN:
            self._make_room()
        name = secrets.token_hex(8)
        self._opening += 1
        try:
            dump = await asyncio.to_thread(Dump, self._database, namespaces, now_s, vectors=vectors)
        finally:
            self._opening -= 1
        self._held[name] = _Held(dump, self._alarm(name))
        return name

    async def use(self, name: str, work: Callable[[Dump], T]) -> T:
        """Run `work` on a dump, in a thread. Raises InvalidCursor for one that is gone."""
        held = self._held.get(name)
        if held is None:
            raise InvalidCursor("the state of the store that this export began with is no longer held; start again")
        held.alarm.cancel()
        held.readers += 1
        try:
            return await asyncio.to_thread(work, held.dump)
        finally:
            held.readers -= 1
            if name in self._held and not held.readers:
                held.alarm = self._alarm(name)

    async def close(self) -> None:
        """Let all of them go."""
        for name in list(self._held):
            self._let_go(name)
        await asyncio.gather(*self._closing)

    def _make_room(self) -> None:
        """Let the dump go that has waited longest for its next page: it may be one that was read to its end."""
        idle = [name for name, held in self._held.items() if not held.readers]
        if not idle:
            raise Busy(f"{MAX_OPEN} exports are under way", retry_after_ms=_RETRY_MS)
        self._let_go(min(idle, key=lambda name: self._held[name].alarm.when()))

    def _alarm(self, name: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._idle_s, self._let_go, name)

    def _let_go(self, name: str) -> None:
        held = self._held.pop(name)
        held.alarm.cancel()
        task = asyncio.create_task(asyncio.to_thread(held.dump.close), name="export-close")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

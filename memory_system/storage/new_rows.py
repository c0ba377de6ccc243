"""Memories of a group that are inserted together, sixteen in one step."""

from __future__ import annotations

import sqlite3

import msgspec

from memory_system.models import Memory
from memory_system.storage import rows


class NewRows:
    """Gives new memories their row_ids at once, and inserts them when there are enough, or somebody looks at the table.

    `waits`: False inserts each at once. `changes`: how many rows its inserts changed, those of triggers too; `given`:
    how many memories it took; `failed`: an insert was refused, so that what was given is not to be relied on.
    """

    def __init__(self, db: sqlite3.Connection, *, waits: bool = True) -> None:
        self._db = db
        self._waiting: dict[tuple[str, str], Memory] = {}
        self._next_row_id: int | None = None
        self.waits = waits
        self.changes = self.given = 0
        self.failed = False

    def add(self, memory: Memory) -> Memory:
        """The memory with its row_id. Raises sqlite3.Error when others that waited cannot be inserted."""
        if (memory.namespace, memory.memory_id) in self._waiting:
            self.write()  # so that the table refuses the second
        if self._next_row_id is None:
            self._next_row_id = self._after_last()
        memory = msgspec.structs.replace(memory, row_id=self._next_row_id)
        self._waiting[memory.namespace, memory.memory_id] = memory
        self._next_row_id += 1
        self.given += 1
        if not self.waits or len(self._waiting) == rows.AT_ONCE:
            self.write()
        return memory

    def has(self, namespace: str, memory_id: str) -> bool:
        """Whether this memory waits to be inserted."""
        return (namespace, memory_id) in self._waiting

    def write(self) -> None:
        """Insert what waits. Raises sqlite3.Error."""
        if not self._waiting:
            return
        waiting, self._waiting = list(self._waiting.values()), {}
        before = self._db.total_changes
        try:
            rows.insert_all(self._db, waiting)
        except BaseException:
            self.failed = True
            raise
        self.changes += self._db.total_changes - before

    def begin(self, *, waits: bool) -> None:
        """Forget what waits, and how far the numbers are: a transaction begins, or others insert rows themselves."""
        self._waiting.clear()
        self._next_row_id = None
        self.waits, self.failed = waits, False

    def _after_last(self) -> int:
        # As AUTOINCREMENT has it: no number twice, also after a rollback, and beyond all that are there.
        last: int | None = self._db.execute(
            "SELECT max(seq) FROM (SELECT seq FROM sqlite_sequence WHERE name = 'memories' "
            "UNION ALL SELECT max(row_id) FROM memories)"
        ).fetchone()[0]
        return 1 if last is None else last + 1

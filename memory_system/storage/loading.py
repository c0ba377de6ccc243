"""What putting in lines of any kind shares: the order, the tally, and looking up what is there."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from memory_system.errors import InvalidField
from memory_system.models import Memory
from memory_system.storage import rows
from memory_system.storage.context import Reply, WriteContext

_SHOWN_CONFLICTS: Final = 100


@dataclass(frozen=True, slots=True)
class Order:
    """How lines are to be put in. `model`: id and dimension of the vectors that the service can use, None: of none."""

    overwrite: bool = False
    dry_run: bool = False
    model: tuple[str, int] | None = None


@dataclass(slots=True)
class Tally:
    """What became of the lines, by kind; `conflicts` are the first of them in full."""

    added: Counter[str] = field(default_factory=Counter)
    unchanged: Counter[str] = field(default_factory=Counter)
    overwritten: Counter[str] = field(default_factory=Counter)
    conflicting: Counter[str] = field(default_factory=Counter)
    conflicts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def changes(self) -> int:
        return self.added.total() + self.overwritten.total()

    def reply(self) -> Reply:
        return {
            "added": dict(self.added),
            "unchanged": dict(self.unchanged),
            "overwritten": dict(self.overwritten),
            "conflicts": dict(self.conflicting),
            "results": self.conflicts,
            "count": len(self.conflicts),
        }


class Loading:
    """Lines of one request on their way into one namespace.

    A dry run writes nothing, and takes what is not there for what is still to come.
    """

    def __init__(self, context: WriteContext, order: Order) -> None:
        self.context = context
        self.order = order
        self.index = 0  # of the line
        self.tally = Tally()

    @property
    def db(self) -> sqlite3.Connection:
        return self.context.db

    def stored(self, memory_id: str) -> Memory | None:
        """The memory of this id, expired or not."""
        row = (
            self.context.db_with(memory_id)
            .execute(
                f"SELECT {rows.COLUMNS} FROM memories WHERE namespace = ? AND memory_id = ?",
                (self.context.namespace, memory_id),
            )
            .fetchone()
        )
        return None if row is None else rows.memory_from_row(row)

    def row_id(self, memory_id: str, name: str) -> int | None:
        """Raises InvalidField naming the field for a memory that is not there; None in a dry run."""
        row = (
            self.context.db_with(memory_id)
            .execute(
                "SELECT row_id FROM memories WHERE namespace = ? AND memory_id = ?", (self.context.namespace, memory_id)
            )
            .fetchone()
        )
        if row is None and not self.order.dry_run:
            raise InvalidField(name, f"{name}: no memory {memory_id} in this namespace, nor above in the import")
        return None if row is None else int(row[0])

    def add(self, kind: str, sql: str, parameters: Sequence[Any]) -> None:
        self.tally.added[kind] += 1
        if not self.order.dry_run:
            self.db.execute(sql, parameters)

    def unchanged(self, kind: str) -> None:
        self.tally.unchanged[kind] += 1

    def overwrites(self, kind: str, fields: Sequence[str], **names: Any) -> bool:
        """Whether the line is to take the place of what is stored and differs in these fields; else it is reported."""
        if self.order.overwrite:
            self.tally.overwritten[kind] += 1
            return not self.order.dry_run
        self.conflict(kind, fields, **names)
        return False

    def conflict(self, kind: str, fields: Sequence[str], **names: Any) -> None:
        self.tally.conflicting[kind] += 1
        if len(self.tally.conflicts) < _SHOWN_CONFLICTS:
            self.tally.conflicts.append({"index": self.index, "kind": kind, **names, "fields": list(fields)})

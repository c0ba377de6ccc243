"""What consolidation is about to do, before anything is done: which memories become one, and what it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import msgspec

from memory_system.consolidation import summary
from memory_system.consolidation.rules import CONSOLIDATED, Kind, Merged
from memory_system.models import Memory

Pieces = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Plan:
    """The originals, in the order of time, and the memory that they become as of `as_of_s`.

    `pieces`: the parts of the content, each with the row_id of the original that it was taken from; None where the
    summariser did not say.
    """

    kind: Kind
    namespace: str
    as_of_s: float
    originals: tuple[Memory, ...]
    content: str
    pieces: Pieces | None
    summariser: str
    fields: Merged

    @property
    def members(self) -> tuple[str, ...]:
        """The memory ids of the originals."""
        return tuple(memory.memory_id for memory in self.originals)

    @property
    def row_ids(self) -> tuple[int, ...]:
        return tuple(memory.row_id for memory in self.originals)

    @property
    def rows(self) -> int:
        """About how many rows it writes: the merged memory, and each original with its relationship and note."""
        return 2 + 3 * len(self.originals)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that differ when anything of the plan does."""
        versions = [memory.version for memory in self.originals]
        text = json.dumps([self.as_dict(), versions, self.as_of_s], sort_keys=True)
        return blake2b(text.encode(), digest_size=16).digest()

    def as_dict(self) -> dict[str, Any]:
        """For a reply: namespace, kind, members (memory ids), summariser, content and the other fields."""
        return {
            "namespace": self.namespace,
            "kind": self.kind,
            "members": list(self.members),
            "summariser": self.summariser,
            "content": self.content,
            "fields": {"memory_type": CONSOLIDATED, **msgspec.structs.asdict(self.fields)},
        }


def compose(pieces: Sequence[tuple[int, str]]) -> str:
    """The text of pieces in order. Who says it (`Ada: `) is told where the speaker changes."""
    parts: list[str] = []
    speaker: str | None = None
    for _, text in pieces:
        says = summary.label(text)
        parts.append(text[len(says) + 1 :].lstrip() if says is not None and says == speaker else text)
        speaker = says
    return " ".join(parts)

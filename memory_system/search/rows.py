"""What the index needs of memories: one of them, or many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """What the index needs of a memory. `digest`: 16 bytes of its content; times are epoch seconds.

    `merged_into`: the row of the consolidated memory that an archived one became.
    """

    row_id: int
    namespace: str
    memory_type: str
    memory_tier: str
    state: str
    expires_at: float | None
    parent_id: str | None
    session_id: str | None
    user_id: str | None
    digest: bytes
    metadata: dict[str, Any] | None = None
    occurred_at: float | None = None
    created_at: float = 0.0
    merged_into: int | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """Many rows, a list for each field of Row."""

    row_id: Sequence[int]
    namespace: Sequence[str]
    memory_type: Sequence[str]
    memory_tier: Sequence[str]
    state: Sequence[str]
    expires_at: Sequence[float | None]
    parent_id: Sequence[str | None]
    session_id: Sequence[str | None]
    user_id: Sequence[str | None]
    digest: Sequence[bytes]
    metadata: Sequence[dict[str, Any] | None]
    occurred_at: Sequence[float | None]
    created_at: Sequence[float]
    merged_into: Sequence[int | None]

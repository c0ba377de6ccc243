"""What the index needs of memories: one of them, or many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

CODED: Final = ("namespace", "memory_type", "memory_tier", "state", "parent_id", "session_id", "user_id")
"""The fields of Row that are texts, few or many of them different"""


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
    """Many rows, a list for each field of Row; but those of CODED are one, of JSON arrays: mostly rows have the same
    values as others, and then one string stands for them."""

    row_id: Sequence[int]
    coded: Sequence[str]
    expires_at: Sequence[float | None]
    digest: Sequence[bytes]
    occurred_at: Sequence[float | None]
    created_at: Sequence[float]
    merged_into: Sequence[int | None]
    metadata: Sequence[dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Embedded:
    """The vectors of many rows, in the order of row ids: [rows, dimension]; `digests`: of the contents that they are
    of."""

    row_ids: npt.NDArray[np.int64]
    digests: npt.NDArray[np.void]
    vectors: npt.NDArray[np.float32]

"""What a merged memory is like: each of its fields follows from its originals by a rule of its own.

| field | rule |
| --- | --- |
| memory_type | `consolidated` |
| memory_tier | the tier above the originals' highest: it begins the next stage of what they began |
| importance | 1 - (1 - a)(1 - b)..., of the originals' importance as of the merge: that one of them still matters |
| access_count, last_accessed_at | the sum; the latest |
| occurred_at | the earliest time of an original: when it occurred, else when it was created |
| tags | all, each once, in the order of time, as many as a memory may have |
| metadata | a value that all share who have the key stays, others become a list; `consolidation` tells the rest |
| parent_id, session_id, user_id | what all originals share, else none |
| expires_at | none: what expires is not merged |

The importance is the noisy-or of independent causes (J. Pearl, Probabilistic Reasoning in Intelligent Systems, 1988).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Final, Literal

from msgspec import Struct

from memory_system import lifecycle
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.models import Memory
from memory_system.protocol import MAX_METADATA_BYTES, MAX_TAGS

Kind = Literal["summary", "duplicates"]

CONSOLIDATED: Final = "consolidated"
INTO: Final = "consolidated_into"
ABOUT: Final = "consolidation"  # the metadata key

_TIERS: Final = ("short", "medium", "long")


class Merged(Struct, frozen=True, kw_only=True):
    """The fields of a merged memory, but for its content. `importance` is as of the merge."""

    memory_tier: str
    importance: float
    access_count: int
    last_accessed_at: float | None
    occurred_at: float
    metadata: dict[str, Any]
    tags: list[str]
    parent_id: str | None
    session_id: str | None
    user_id: str | None


def time_of(memory: Memory) -> float:
    """When what a memory tells took place, as far as it is known."""
    return memory.created_at if memory.occurred_at is None else memory.occurred_at


def in_order(memories: Sequence[Memory]) -> list[Memory]:
    """In the order of time, equal times in the order of storing."""
    return sorted(memories, key=lambda memory: (time_of(memory), memory.row_id))


def may_merge(settings: LifecycleSettings, memory: Memory, as_of_s: float) -> bool:
    """Whether the memory fades as of then: at the end of its stay it was not important enough for another.

    What expires has an end of its own, and what was consolidated is not consolidated again.
    """
    if memory.state != "active" or memory.expires_at is not None or memory.memory_type == CONSOLIDATED:
        return False
    return lifecycle.decide(settings, memory, as_of_s).kind == "consolidate"


def merged(settings: LifecycleSettings, originals: Sequence[Memory], kind: Kind, as_of_s: float) -> Merged:
    """The fields of the memory that these become, by the rules above."""
    ordered = in_order(originals)
    accessed = [memory.last_accessed_at for memory in ordered if memory.last_accessed_at is not None]
    tier = max((memory.memory_tier for memory in ordered), key=_TIERS.index)
    return Merged(
        memory_tier=lifecycle.NEXT_TIER.get(tier, tier),
        importance=_together([lifecycle.importance_now(settings, memory, as_of_s) for memory in ordered]),
        access_count=sum(memory.access_count for memory in ordered),
        last_accessed_at=max(accessed, default=None),
        occurred_at=time_of(ordered[0]),
        metadata=metadata_of(ordered, kind),
        tags=tags_of(ordered),
        parent_id=_shared([memory.parent_id for memory in ordered]),
        session_id=_shared([memory.session_id for memory in ordered]),
        user_id=_shared([memory.user_id for memory in ordered]),
    )


def spokesman(duplicates: Sequence[Memory]) -> Memory:
    """Whose content stands for all that say the same: the longest, the oldest among equals."""
    return max(in_order(duplicates), key=lambda memory: len(memory.content))


def tags_of(ordered: Sequence[Memory]) -> list[str]:
    return list(dict.fromkeys(tag for memory in ordered for tag in memory.tags))[:MAX_TAGS]


def metadata_of(ordered: Sequence[Memory], kind: Kind) -> dict[str, Any]:
    """The originals' metadata in one; what would make it too large is left to them."""
    times = [time_of(memory) for memory in ordered]
    about = {"kind": kind, "count": len(ordered), "first_at": min(times), "last_at": max(times)}
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for memory in ordered for key in memory.metadata if key != ABOUT):
        values = _distinct([memory.metadata[key] for memory in ordered if key in memory.metadata])
        found[key] = values[0] if len(values) == 1 else [part for value in values for part in _parts(value)]
    found[ABOUT] = about
    while len(json.dumps(found, ensure_ascii=False).encode()) > MAX_METADATA_BYTES:
        largest = max((key for key in found if key != ABOUT), key=lambda key: len(json.dumps(found[key])))
        del found[largest]
    return found


def _together(importances: Sequence[float]) -> float:
    return min(1.0, max(*importances, 1.0 - math.prod(1.0 - importance for importance in importances)))


def _shared(values: Sequence[str | None]) -> str | None:
    return values[0] if len(set(values)) == 1 else None


def _distinct(values: Sequence[Any]) -> list[Any]:
    """Each value once, in order; 1, 1.0 and true are three values."""
    found: dict[str, Any] = {}
    for value in values:
        found.setdefault(json.dumps(value, sort_keys=True), value)
    return list(found.values())


def _parts(value: Any) -> list[Any]:
    """What a value adds to a list: the elements of a list, a scalar itself; maps are left to the originals."""
    if isinstance(value, list):
        return value
    return [] if isinstance(value, dict) else [value]

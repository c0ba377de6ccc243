"""The lines of an export: one typed map for each kind, checked the same way on the wire and in a file.

Memories are named by their memory_id and groups by their name, so that a file means the same in every store. Times are
epoch seconds, UTC. `namespace` may be left out, and is then that of the call.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Raw, UnsetType

from memory_system import protocol as p
from memory_system.params import (
    ABSENT,
    Content,
    Count,
    Id,
    Integer,
    Name,
    Params,
    State,
    Tags,
    Text,
    Tier,
    Time,
    Timeout,
    Unit,
    check_content,
)

FORMAT = "memory-export"
FORMAT_VERSION = 1

# Callers need not say who they are.
By = Annotated[str, Meta(max_length=p.MAX_NAME_CHARS)]
# A name of a key, or an agent_id with the address that it came from.
Owner = Annotated[str, Meta(max_length=2 * p.MAX_NAME_CHARS)]
Version = Annotated[int, Meta(ge=1, le=2**63 - 1)]
MAX_VECTOR_CHARS = 64 * 1024
MAX_PIECES = 10_000


class GroupLine(Params, frozen=True, kw_only=True):
    """A context group. `group_id` is kept where it is free."""

    kind: Literal["group"]
    namespace: Name | None = None
    group_id: Integer | None = None
    name: Name
    description: Text | None = None
    created_at: Time


class SessionPart(Params, frozen=True, kw_only=True):
    """What a memory of type session has beyond a memory."""

    session_type: Name = "conversation"
    ended_at: Time | None = None
    summary: Text | None = None
    idle_timeout_s: Timeout | None = None
    resumed_at: Time | None = None


class VectorPart(Params, frozen=True, kw_only=True):
    """The vector of the content: float32 little-endian in base64, of unit length."""

    model_id: Annotated[str, Meta(min_length=1, max_length=512)]
    data: Annotated[str, Meta(min_length=4, max_length=MAX_VECTOR_CHARS)]


class MemoryLine(Params, frozen=True, kw_only=True):
    """A memory as it is stored: `importance` as of `importance_at`, and all that its ageing depends on.

    `parent_follows`: the parent stands further down, and a line of kind parent will make the tie. `undone_at`: when it
    was brought back from a consolidation, and is not to be consolidated again.
    """

    kind: Literal["memory"]
    namespace: Name | None = None
    memory_id: Id
    content: Content
    memory_type: Name = "general"
    memory_tier: Tier = "short"
    importance: Unit = 0.5
    importance_at: Time | None = None  # absent: created_at, as the two below
    access_count: Count = 0
    last_accessed_at: Time | None = None
    created_at: Time
    updated_at: Time | None = None
    occurred_at: Time | None = None
    expires_at: Time | None = None
    tier_since: Time | None = None
    tier_accesses: Count = 0
    promote_at: Time | None = None
    metadata: Raw = ABSENT
    tags: Tags | None = None
    parent_id: Id | None = None
    parent_follows: bool = False
    session_id: Id | None = None
    user_id: Name | None = None
    created_by: By = ""
    version: Version = 1
    state: State = "active"
    archived_at: Time | None = None
    owner: Owner = ""
    undone_at: Time | None = None
    session: SessionPart | None = None
    vector: VectorPart | None = None

    def __post_init__(self) -> None:
        check_content(self.content)


class ParentLine(Params, frozen=True, kw_only=True):
    """The tie of a memory to a parent that stands below it in the file."""

    kind: Literal["parent"]
    namespace: Name | None = None
    memory_id: Id
    parent_id: Id


class HistoryRecord(Params, frozen=True, kw_only=True):
    """A version that an update replaced: the memory record of docs/protocol.md as it was then."""

    memory_id: Id
    content: Content
    memory_type: Name | UnsetType = UNSET
    memory_tier: Tier | UnsetType = UNSET
    importance: Unit | UnsetType = UNSET
    access_count: Count | UnsetType = UNSET
    last_accessed_at: Time | UnsetType | None = UNSET
    created_at: Time | UnsetType = UNSET
    updated_at: Time | UnsetType = UNSET
    occurred_at: Time | UnsetType | None = UNSET
    expires_at: Time | UnsetType | None = UNSET
    metadata: Raw = ABSENT
    tags: Tags | UnsetType = UNSET
    parent_id: Id | UnsetType | None = UNSET
    session_id: Id | UnsetType | None = UNSET
    user_id: Name | UnsetType | None = UNSET
    created_by: By | UnsetType = UNSET
    version: Version | UnsetType = UNSET
    state: State | UnsetType = UNSET

    def __post_init__(self) -> None:
        check_content(self.content)


class HistoryLine(Params, frozen=True, kw_only=True):
    """An earlier version of a memory, when an update replaced it, and whose."""

    kind: Literal["history"]
    namespace: Name | None = None
    memory_id: Id
    version: Version
    record: HistoryRecord
    replaced_at: Time
    replaced_by: By = ""


class RelationshipLine(Params, frozen=True, kw_only=True):
    """A relationship from `source_id` to `target_id`."""

    kind: Literal["relationship"]
    namespace: Name | None = None
    source_id: Id
    target_id: Id
    relationship_type: Name
    strength: Unit = 1.0
    created_at: Time


class MemberLine(Params, frozen=True, kw_only=True):
    """A memory's place in a context group."""

    kind: Literal["member"]
    namespace: Name | None = None
    group: Name
    memory_id: Id
    added_at: Time


class MemberBefore(Params, frozen=True, kw_only=True):
    """An original of a consolidated memory, and the fields that archiving it changed."""

    memory_id: Id
    before: Raw = ABSENT


class ConsolidationLine(Params, frozen=True, kw_only=True):
    """What a consolidated memory was made of. `pieces`: the parts of its content with the memory each comes from."""

    kind: Literal["consolidation"]
    namespace: Name | None = None
    memory_id: Id
    consolidation_kind: Literal["summary", "duplicates"]
    summariser: By = ""
    created_at: Time
    pieces: Annotated[list[tuple[Id, str]], Meta(max_length=MAX_PIECES)] | None = None
    members: Annotated[list[MemberBefore], Meta(min_length=1, max_length=MAX_PIECES)]


# In the order in which an export has them: each names only what stands before it.
LINES: dict[str, type[Params]] = {
    "group": GroupLine,
    "memory": MemoryLine,
    "parent": ParentLine,
    "history": HistoryLine,
    "relationship": RelationshipLine,
    "member": MemberLine,
    "consolidation": ConsolidationLine,
}


class AnyLine(Params, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """As much of a line as tells what it is."""

    kind: Annotated[str, Meta(max_length=p.MAX_NAME_CHARS)]
    namespace: Name | None = None

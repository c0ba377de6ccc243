"""Typed requests and records: where dicts stop.

A request's `data` is decoded straight into one of these structs, which checks types, ranges and lengths. Free-form
parts (`metadata`, `filters`, batch items) stay raw bytes here; `decoding.py` opens them once their length is checked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from memory_system import protocol as p
from memory_system.admin_models import ADMIN_PARAMS
from memory_system.params import (
    ABSENT,
    Chain,
    Content,
    Count,
    Cursor,
    Id,
    Integer,
    Limit,
    Name,
    Params,
    SortField,
    SortOrder,
    State,
    Tags,
    Text,
    Tier,
    Time,
    Timeout,
    Unit,
    check_content,
)
from memory_system.search_models import SEARCH_PARAMS


class Envelope(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands around an operation's `data`. `v` absent marks a legacy caller."""

    action: Annotated[str, Meta(max_length=p.MAX_NAME_CHARS)]
    v: int | None = None
    data: Raw = ABSENT
    request_id: Id | None = None
    agent_id: Name | None = None
    session_id: Id | None = None
    namespace: Name | None = None
    on_behalf_of: Chain | None = None
    deadline_ms: Annotated[float, Meta(ge=0.0, le=86_400_000.0)] | None = None


class NoParams(Params, frozen=True, kw_only=True):
    """For actions without data."""


class CreateSession(Params, frozen=True, kw_only=True):
    user_id: Name
    session_type: Name = "conversation"
    session_metadata: Raw = ABSENT
    metadata: Raw = ABSENT  # the name that the mesh's older agents use
    idle_timeout_s: Timeout | None = None
    created_by: Name | None = None


class EndSession(Params, frozen=True, kw_only=True):
    session_id: Id | None = None
    summary: Text | None = None


class ResumeSession(Params, frozen=True, kw_only=True):
    session_id: Id | None = None


class GetSession(Params, frozen=True, kw_only=True):
    session_id: Id | None = None


class ListSessions(Params, frozen=True, kw_only=True):
    user_id: Name | None = None
    session_state: Literal["open", "ended"] | None = None
    limit: Limit = 50
    cursor: Cursor | None = None


class AddMemory(Params, frozen=True, kw_only=True):
    content: Content
    memory_type: Name = "general"
    memory_tier: Tier | UnsetType = UNSET  # absent: as the settings say of its type
    importance: Unit | UnsetType = UNSET
    metadata: Raw = ABSENT
    tags: Tags | None = None
    parent_id: Id | UnsetType | None = UNSET  # absent: the session, null: none
    user_id: Name | None = None
    occurred_at: Time | None = None
    expires_at: Time | None = None
    created_by: Name | None = None

    def __post_init__(self) -> None:
        check_content(self.content)


class BatchAddMemories(Params, frozen=True, kw_only=True):
    memories: Annotated[list[Raw], Meta(min_length=1, max_length=p.MAX_BATCH_ITEMS)]


class GetMemory(Params, frozen=True, kw_only=True):
    memory_id: Id
    touch: bool = True


class BatchGetMemories(Params, frozen=True, kw_only=True):
    memory_ids: Annotated[list[Id], Meta(max_length=p.MAX_BATCH_ITEMS)]
    touch: bool = True
    cursor: Cursor | None = None


class UpdatePayload(Params, frozen=True, kw_only=True):
    """Only given fields change; null clears where it is allowed."""

    content: Content | UnsetType = UNSET
    memory_type: Name | UnsetType = UNSET
    memory_tier: Tier | UnsetType = UNSET
    importance: Unit | UnsetType = UNSET
    metadata: Raw = ABSENT
    tags: Tags | UnsetType | None = UNSET
    parent_id: Id | UnsetType | None = UNSET
    user_id: Name | UnsetType | None = UNSET
    occurred_at: Time | UnsetType | None = UNSET
    expires_at: Time | UnsetType | None = UNSET
    state: State | UnsetType = UNSET

    def __post_init__(self) -> None:
        check_content(self.content)


class UpdateMemory(Params, frozen=True, kw_only=True):
    memory_id: Id
    update_payload: Raw = ABSENT
    update_data: Raw = ABSENT  # the name that the mesh's older agents use
    metadata_mode: Literal["merge", "replace"] = "merge"
    expected_version: Count | None = None


class DeleteMemory(Params, frozen=True, kw_only=True):
    memory_id: Id
    cascade: bool = True


class Forget(Params, frozen=True, kw_only=True):
    user_id: Name | None = None
    session_id: Id | None = None


class GetChildren(Params, frozen=True, kw_only=True):
    parent_id: Id
    limit: Limit = 50
    sort_field: SortField = "created_at"
    sort_order: SortOrder = "desc"
    include_archived: bool = False
    cursor: Cursor | None = None


class ListMemories(Params, frozen=True, kw_only=True):
    filters: Raw = ABSENT
    sort_field: SortField = "created_at"
    sort_order: SortOrder = "desc"
    limit: Limit = 50
    include_archived: bool = False
    include_sessions: bool = False
    cursor: Cursor | None = None


class GetMemoryHistory(Params, frozen=True, kw_only=True):
    memory_id: Id
    limit: Limit = 50
    cursor: Cursor | None = None


class AddRelationship(Params, frozen=True, kw_only=True):
    source_id: Id
    target_id: Id
    relationship_type: Name
    strength: Unit = 1.0


class RemoveRelationship(Params, frozen=True, kw_only=True):
    source_id: Id
    target_id: Id
    relationship_type: Name | None = None


class GetRelatedMemories(Params, frozen=True, kw_only=True):
    memory_id: Id
    relationship_type: Name | None = None
    direction: Literal["outgoing", "incoming", "both"] = "both"
    limit: Limit = 100
    cursor: Cursor | None = None


class ReinforceMemory(Params, frozen=True, kw_only=True):
    memory_id: Id
    reinforcement_factor: Annotated[float, Meta(gt=0.0, le=100.0)] | UnsetType = UNSET  # absent: that of its type


class CreateContextGroup(Params, frozen=True, kw_only=True):
    name: Name
    description: Text | None = None


class ListContextGroups(Params, frozen=True, kw_only=True):
    limit: Limit = 100
    cursor: Cursor | None = None


class GroupMember(Params, frozen=True, kw_only=True):
    """Data of add_to_group and remove_from_group."""

    memory_id: Id
    group_id: Integer


class GetMemoriesByGroup(Params, frozen=True, kw_only=True):
    group_id: Integer
    limit: Limit = 100
    include_archived: bool = False
    cursor: Cursor | None = None


class GetRequestStatus(Params, frozen=True, kw_only=True):
    request_id: Id


PARAMS: dict[str, type[Params]] = {
    "create_session": CreateSession,
    "end_session": EndSession,
    "resume_session": ResumeSession,
    "get_session": GetSession,
    "list_sessions": ListSessions,
    "add_memory": AddMemory,
    "get_memory": GetMemory,
    "update_memory": UpdateMemory,
    "delete_memory": DeleteMemory,
    "get_children": GetChildren,
    "add_relationship": AddRelationship,
    "remove_relationship": RemoveRelationship,
    "get_related_memories": GetRelatedMemories,
    "reinforce_memory": ReinforceMemory,
    "batch_add_memories": BatchAddMemories,
    "batch_get_memories": BatchGetMemories,
    "create_context_group": CreateContextGroup,
    "list_context_groups": ListContextGroups,
    "add_to_group": GroupMember,
    "remove_from_group": GroupMember,
    "get_memories_by_group": GetMemoriesByGroup,
    "list_memories": ListMemories,
    "get_memory_history": GetMemoryHistory,
    "forget": Forget,
    "stats": NoParams,
    "get_commit_seq": NoParams,
    "health_check": NoParams,
    "get_request_status": GetRequestStatus,
    **SEARCH_PARAMS,
    **ADMIN_PARAMS,
}


class Memory(Struct, frozen=True, kw_only=True):
    """A memory as stored; `importance` is as of `importance_at`. Times are epoch seconds, UTC."""

    row_id: int
    namespace: str
    memory_id: str
    content: str
    content_digest: bytes
    memory_type: str
    memory_tier: str
    importance: float
    importance_at: float
    access_count: int
    last_accessed_at: float | None
    created_at: float
    updated_at: float
    occurred_at: float | None
    expires_at: float | None
    tier_since: float
    due_at: float | None
    metadata: dict[str, Any]
    tags: list[str]
    parent_id: str | None
    session_id: str | None
    user_id: str | None
    created_by: str
    version: int
    state: str
    archived_at: float | None = None
    tier_accesses: int = 0
    promote_at: float | None = None
    owner: str = ""

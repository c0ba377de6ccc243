"""The client's methods whose names, order and defaults never change; `client_api.py` has the others and explains
all of them."""

from __future__ import annotations

from memory_system.client_core import R
from memory_system.client_search import Fields, SearchMethods, given


class FixedMethods(SearchMethods[R]):
    """The methods whose names, order and defaults never change; new arguments are keyword-only."""

    def create_session(
        self,
        user_id: str,
        session_type: str = "conversation",
        session_metadata: Fields | None = None,
        *,
        idle_timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> R:
        """Open a session and remember it: later calls carry it. Reply: session_id, session.

        `idle_timeout_s`: it ends by itself when so long nothing was added to it.
        """
        data = given(
            user_id=user_id,
            session_type=session_type,
            session_metadata=session_metadata,
            idle_timeout_s=idle_timeout_s,
        )
        return self.call("create_session", data, request_id=request_id)

    def add_memory(
        self,
        content: str,
        memory_type: str = "general",
        memory_tier: str = "short",
        importance: float = 0.5,
        metadata: Fields | None = None,
        tags: list[str] | None = None,
        parent_id: str | None = None,
        *,
        top_level: bool = False,
        user_id: str | None = None,
        occurred_at: float | None = None,
        expires_at: float | None = None,
        request_id: str | None = None,
    ) -> R:
        """Store a memory. Reply: memory_id, version, created_at.

        A tier or an importance equal to its default here is left to the service, which may know one of the type.
        The parent is `parent_id`, else the client's session; `top_level=True`: none. Times are epoch seconds, UTC.
        """
        data = given(
            content=content,
            memory_type=memory_type,
            memory_tier=None if memory_tier == "short" else memory_tier,
            importance=None if importance == 0.5 else importance,
            metadata=metadata,
            tags=tags,
            parent_id=parent_id,
            user_id=user_id,
            occurred_at=occurred_at,
            expires_at=expires_at,
        )
        if top_level:
            data["parent_id"] = None
        return self.call("add_memory", data, request_id=request_id)

    def get_memory(self, memory_id: str, *, touch: bool = True) -> R:
        """Reply: memory. `touch=False`: the read is not counted as an access."""
        return self.call("get_memory", {"memory_id": memory_id, "touch": touch})

    def update_memory(
        self,
        memory_id: str,
        update_payload: Fields,
        *,
        expected_version: int | None = None,
        metadata_mode: str = "merge",
        request_id: str | None = None,
    ) -> R:
        """Change the fields given in `update_payload`; None clears one. Reply: memory.

        `expected_version`: refuse with version_conflict if the memory has another. `metadata_mode`: merge or replace.
        """
        data = given(
            memory_id=memory_id,
            update_payload=update_payload,
            metadata_mode=metadata_mode,
            expected_version=expected_version,
        )
        return self.call("update_memory", data, request_id=request_id)

    def delete_memory(self, memory_id: str, cascade: bool = True, *, request_id: str | None = None) -> R:
        """Delete it with its subtree; `cascade=False` hands its children to its parent. Reply: deleted (how many)."""
        return self.call("delete_memory", {"memory_id": memory_id, "cascade": cascade}, request_id=request_id)

    def get_children(
        self,
        parent_id: str,
        limit: int = 50,
        sort_field: str = "created_at",
        sort_order: str = "desc",
        *,
        include_archived: bool = False,
        cursor: str | None = None,
    ) -> R:
        """Reply: results, count, next_cursor."""
        data = given(
            parent_id=parent_id,
            limit=limit,
            sort_field=sort_field,
            sort_order=sort_order,
            include_archived=include_archived,
            cursor=cursor,
        )
        return self.call("get_children", data)

    def add_relationship(
        self,
        source_id: str,
        target_id: str,
        relationship_type: str,
        strength: float = 1.0,
        *,
        request_id: str | None = None,
    ) -> R:
        """Relate two memories, or change the strength of that relation. Reply: created."""
        data = {
            "source_id": source_id,
            "target_id": target_id,
            "relationship_type": relationship_type,
            "strength": strength,
        }
        return self.call("add_relationship", data, request_id=request_id)

    def get_related_memories(
        self,
        memory_id: str,
        relationship_type: str | None = None,
        *,
        direction: str = "both",
        limit: int = 100,
        cursor: str | None = None,
    ) -> R:
        """direction: outgoing, incoming, both. Results have memory, relationship_type, strength, direction."""
        data = given(
            memory_id=memory_id,
            relationship_type=relationship_type,
            direction=direction,
            limit=limit,
            cursor=cursor,
        )
        return self.call("get_related_memories", data)

    def reinforce_memory(
        self, memory_id: str, reinforcement_factor: float = 1.2, *, request_id: str | None = None
    ) -> R:
        """Multiply its importance now, at most to 1 (1.2: by its type's factor). Reply: memory_id, new_importance."""
        factor = None if reinforcement_factor == 1.2 else reinforcement_factor
        data = given(memory_id=memory_id, reinforcement_factor=factor)
        return self.call("reinforce_memory", data, request_id=request_id)

    def batch_add_memories(self, memories: list[Fields], *, request_id: str | None = None) -> R:
        """Store up to 1,000 memories, all or none; each a dict of add_memory's fields. Reply: memory_ids, count."""
        return self.call("batch_add_memories", {"memories": memories}, request_id=request_id)

    def batch_get_memories(self, memory_ids: list[str], *, touch: bool = True, cursor: str | None = None) -> R:
        """Reply: results, count, missing, next_cursor."""
        return self.call("batch_get_memories", given(memory_ids=memory_ids, touch=touch, cursor=cursor))

    def create_context_group(self, name: str, description: str | None = None, *, request_id: str | None = None) -> R:
        """Reply: group_id (integer)."""
        return self.call("create_context_group", given(name=name, description=description), request_id=request_id)

    def add_to_group(self, memory_id: str, group_id: int, *, request_id: str | None = None) -> R:
        """Reply: added."""
        return self.call("add_to_group", {"memory_id": memory_id, "group_id": group_id}, request_id=request_id)

    def get_memories_by_group(
        self, group_id: int, *, limit: int = 100, include_archived: bool = False, cursor: str | None = None
    ) -> R:
        """Reply: results, count, next_cursor."""
        data = given(group_id=group_id, limit=limit, include_archived=include_archived, cursor=cursor)
        return self.call("get_memories_by_group", data)

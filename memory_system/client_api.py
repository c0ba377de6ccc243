"""The methods of both clients, written once: each names its action and the fields of its `data`.

`MemoryClient` returns the reply dict, `AsyncMemoryClient` a coroutine of it. No method raises for a failure unless the
client was made with `raise_on_error`: look at `reply["status"]`. Arguments are checked by the service alone.

`request_id` of a method that changes something is the idempotency key, at least 16 characters: a call repeated with
the same key and arguments is done once. Left out, each call gets a new one.
"""

from __future__ import annotations

from memory_system.client_core import R
from memory_system.client_fixed import FixedMethods
from memory_system.client_search import Fields, given

__all__ = ["ClientMethods", "FixedMethods"]


class ClientMethods(FixedMethods[R]):
    """All methods: the fixed ones and those of the remaining actions."""

    def end_session(
        self, session_id: str | None = None, *, summary: str | None = None, request_id: str | None = None
    ) -> R:
        """End a session, the client's own unless named. The client goes on carrying it: see set_session_id."""
        return self.call("end_session", given(session_id=session_id, summary=summary), request_id=request_id)

    def resume_session(self, session_id: str | None = None, *, request_id: str | None = None) -> R:
        """Open a session again, the client's own unless named; its idle time starts anew. Reply: resumed, session."""
        return self.call("resume_session", given(session_id=session_id), request_id=request_id)

    def get_session(self, session_id: str | None = None) -> R:
        """A session, the client's own unless named. Reply: session."""
        return self.call("get_session", given(session_id=session_id))

    def list_sessions(
        self,
        user_id: str | None = None,
        *,
        session_state: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> R:
        """session_state: open or ended; None: both. Reply: results, count, next_cursor."""
        data = given(user_id=user_id, session_state=session_state, limit=limit, cursor=cursor)
        return self.call("list_sessions", data)

    def remove_relationship(
        self,
        source_id: str,
        target_id: str,
        relationship_type: str | None = None,
        *,
        request_id: str | None = None,
    ) -> R:
        """Remove the relation of that type; None: of every type."""
        data = given(source_id=source_id, target_id=target_id, relationship_type=relationship_type)
        return self.call("remove_relationship", data, request_id=request_id)

    def list_context_groups(self, limit: int = 100, *, cursor: str | None = None) -> R:
        """Reply: results, count, next_cursor."""
        return self.call("list_context_groups", given(limit=limit, cursor=cursor))

    def remove_from_group(self, memory_id: str, group_id: int, *, request_id: str | None = None) -> R:
        """Take a memory out of a group."""
        return self.call("remove_from_group", {"memory_id": memory_id, "group_id": group_id}, request_id=request_id)

    def list_memories(
        self,
        filters: Fields | None = None,
        sort_field: str = "created_at",
        sort_order: str = "desc",
        limit: int = 50,
        *,
        include_archived: bool = False,
        include_sessions: bool = False,
        cursor: str | None = None,
    ) -> R:
        """Reply: results, count, next_cursor."""
        data = given(
            filters=filters,
            sort_field=sort_field,
            sort_order=sort_order,
            limit=limit,
            include_archived=include_archived,
            include_sessions=include_sessions,
            cursor=cursor,
        )
        return self.call("list_memories", data)

    def get_memory_history(self, memory_id: str, limit: int = 50, *, cursor: str | None = None) -> R:
        """Earlier versions of a memory. Reply: results, count, next_cursor."""
        return self.call("get_memory_history", given(memory_id=memory_id, limit=limit, cursor=cursor))

    def forget(self, *, user_id: str | None = None, session_id: str | None = None, request_id: str | None = None) -> R:
        """Delete everything of one user or one session, for good."""
        return self.call("forget", given(user_id=user_id, session_id=session_id), request_id=request_id)

    def stats(self) -> R:
        """Counts and sizes of this namespace."""
        return self.call("stats")

    def get_commit_seq(self) -> R:
        """Reply: commit_seq, the namespace's last change."""
        return self.call("get_commit_seq")

    def health_check(self) -> R:
        """Reply: state, pid and the state of each part."""
        return self.call("health_check")

    def get_request_status(self, request_id: str) -> R:
        """What became of a call whose outcome was unknown. Reply: state."""
        return self.call("get_request_status", {"request_id": request_id})

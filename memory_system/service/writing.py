"""Operations that change the store: each is one function for the writer, run in a savepoint of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from msgspec import UNSET

from memory_system import models as m
from memory_system import protocol
from memory_system.calls import Call, session_of
from memory_system.decoding import count_values
from memory_system.digest import content_digest
from memory_system.errors import InvalidField, MemorySystemError
from memory_system.lifecycle import SESSION_TYPE
from memory_system.service import Reply, Result
from memory_system.storage import accesses, memories, relations, removal, sessions
from memory_system.storage.context import WriteContext
from memory_system.storage.idempotency import Key
from memory_system.storage.jobs import WriteJob
from memory_system.storage.queries import Queries
from memory_system.storage.rows import RecordView
from memory_system.storage.writer import Writer


class WritingService:
    """Memories, sessions, relationships and groups: making, changing, removing."""

    def __init__(self, writer: Writer, queries: Queries, view: RecordView, *, idempotency: bool) -> None:
        self._writer = writer
        self._queries = queries
        self._view = view
        self._idempotency = idempotency

    def _write(self, call: Call, run: Callable[[WriteContext], Reply], rows: int = 1) -> Awaitable[Reply]:
        key = None
        if call.request_id is not None and self._idempotency:
            key = Key(call.who.scope, call.request_id, call.fingerprint)
        job = WriteJob(
            run,
            call.namespace,
            call.who.own,
            key,
            rows,
            deadline_s=call.deadline_s,
            client=call.peer,
            owner=call.who.principal,
        )
        return self._writer.submit(job)

    def create_session(self, call: Call, p: m.CreateSession) -> Result:
        metadata = call.metadata(p.session_metadata, "session_metadata")
        if metadata is UNSET:
            metadata = call.metadata(p.metadata)
        run = partial(
            sessions.create,
            user_id=p.user_id,
            session_type=p.session_type,
            metadata=metadata or {},
            created_by=p.created_by or call.caller,
            idle_timeout_s=p.idle_timeout_s,
        )
        return self._with_session(call, self._write(call, run))

    def end_session(self, call: Call, p: m.EndSession) -> Result:
        session_id = session_of(call, p.session_id)
        run = partial(sessions.end, session_id=session_id, summary=p.summary)
        return self._with_session(call, self._write(call, run))

    def resume_session(self, call: Call, p: m.ResumeSession) -> Result:
        session_id = session_of(call, p.session_id)
        return self._with_session(call, self._write(call, partial(sessions.resume, session_id=session_id)))

    async def _with_session(self, call: Call, written: Awaitable[Reply]) -> Reply:
        """A replayed reply was stored without the session's content: read it anew."""
        reply = await written
        if "session" not in reply:
            reply["session"] = await self._queries.session(call.namespace, reply["session_id"], call.now_s)
        return reply

    def add_memory(self, call: Call, p: m.AddMemory) -> Result:
        return self._write(call, partial(memories.add, new=self._new(call, p)))

    def batch_add_memories(self, call: Call, p: m.BatchAddMemories) -> Result:
        batch: list[memories.NewMemory] = []
        values = 0
        for index, raw in enumerate(p.memories):
            where = f"memories[{index}]"
            try:
                item = call.decode(m.AddMemory, raw, where)
                batch.append(self._new(call, item, f"{where}."))
                values += count_values(batch[-1].metadata)
                if values > protocol.MAX_BATCH_VALUES:
                    limit = f"a batch has at most {protocol.MAX_BATCH_VALUES} values in its metadata; send smaller ones"
                    raise InvalidField(f"{where}.metadata", limit)
            except MemorySystemError as error:
                error.details["index"] = index
                raise
        return self._write(call, partial(memories.add_many, batch=batch), rows=len(batch))

    def _new(self, call: Call, p: m.AddMemory, where: str = "") -> memories.NewMemory:
        if p.memory_type == SESSION_TYPE:
            raise InvalidField(f"{where}memory_type", f"memories of type {SESSION_TYPE} are made by create_session")
        return memories.NewMemory(
            content=p.content,
            content_digest=content_digest(p.content),
            memory_type=p.memory_type,
            memory_tier=None if p.memory_tier is UNSET else p.memory_tier,
            importance=None if p.importance is UNSET else p.importance,
            metadata=call.metadata(p.metadata, f"{where}metadata") or {},
            tags=list(dict.fromkeys(p.tags or ())),
            parent_id=p.parent_id,
            session_id=call.session_id,
            user_id=p.user_id,
            occurred_at=p.occurred_at,
            expires_at=p.expires_at,
            created_by=p.created_by or call.caller,
        )

    def update_memory(self, call: Call, p: m.UpdateMemory) -> Result:
        raw, field = (p.update_payload, "update_payload") if bytes(p.update_payload) else (p.update_data, "update_data")
        if not bytes(raw):
            raise InvalidField("update_payload", "update_payload is required: a map of the fields to change")
        payload = call.decode(m.UpdatePayload, raw, field)
        metadata = call.metadata(payload.metadata, f"{field}.metadata")
        fields = (getattr(payload, name) for name in payload.__struct_fields__ if name != "metadata")
        if metadata is UNSET and all(value is UNSET for value in fields):
            raise InvalidField(field, f"{field} names no field to change")
        change = memories.Update(
            memory_id=p.memory_id,
            payload=payload,
            metadata=metadata,
            replace_metadata=p.metadata_mode == "replace",
            content_digest=content_digest(payload.content) if isinstance(payload.content, str) else None,
            expected_version=p.expected_version,
            updated_by=call.caller,
        )
        return self._with_memory(call, self._write(call, partial(memories.update, change=change)))

    async def _with_memory(self, call: Call, written: Awaitable[Reply]) -> Reply:
        reply = await written
        if "memory" not in reply:
            memory = await self._queries.memory(call.namespace, reply["memory_id"])
            reply["memory"] = None if memory is None else self._view.record(memory, call.now_s)
        return reply

    def delete_memory(self, call: Call, p: m.DeleteMemory) -> Result:
        return self._write(call, partial(removal.delete, memory_id=p.memory_id, cascade=p.cascade))

    def forget(self, call: Call, p: m.Forget) -> Result:
        if (p.user_id is None) == (p.session_id is None):
            raise InvalidField("user_id", "name either user_id or session_id: whose memories are to be forgotten")
        return self._write(call, partial(removal.forget, user_id=p.user_id, session_id=p.session_id))

    def reinforce_memory(self, call: Call, p: m.ReinforceMemory) -> Result:
        factor = None if p.reinforcement_factor is UNSET else p.reinforcement_factor
        return self._write(call, partial(accesses.reinforce, memory_id=p.memory_id, factor=factor))

    def add_relationship(self, call: Call, p: m.AddRelationship) -> Result:
        if p.source_id == p.target_id:
            raise InvalidField("target_id", "a memory cannot be related to itself")
        run = partial(
            relations.relate,
            source_id=p.source_id,
            target_id=p.target_id,
            relationship_type=p.relationship_type,
            strength=p.strength,
        )
        return self._write(call, run)

    def remove_relationship(self, call: Call, p: m.RemoveRelationship) -> Result:
        run = partial(
            relations.unrelate, source_id=p.source_id, target_id=p.target_id, relationship_type=p.relationship_type
        )
        return self._write(call, run)

    def create_context_group(self, call: Call, p: m.CreateContextGroup) -> Result:
        return self._write(call, partial(relations.create_group, name=p.name, description=p.description))

    def add_to_group(self, call: Call, p: m.GroupMember) -> Result:
        return self._write(call, partial(relations.add_member, group_id=p.group_id, memory_id=p.memory_id))

    def remove_from_group(self, call: Call, p: m.GroupMember) -> Result:
        return self._write(call, partial(relations.remove_member, group_id=p.group_id, memory_id=p.memory_id))

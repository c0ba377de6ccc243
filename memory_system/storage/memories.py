"""Writing memories: add and update. Each function runs inside a request's savepoint."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct, UnsetType

from memory_system import lifecycle
from memory_system.errors import (
    Cycle,
    InvalidField,
    MemoryNotFound,
    MemorySystemError,
    QuotaExceeded,
    SessionNotFound,
    VersionConflict,
)
from memory_system.lifecycle import SESSION_TYPE
from memory_system.models import Memory, UpdatePayload
from memory_system.protocol import MAX_METADATA_BYTES
from memory_system.storage import ageing, rows, usage
from memory_system.storage.context import Removed, Reply, WriteContext

_counter = itertools.count(int.from_bytes(os.urandom(2)))
_DECAY_FIELDS: Final = ("memory_type", "memory_tier", "importance", "expires_at")


class NewMemory(Struct, frozen=True, kw_only=True):
    """A checked request to add a memory; `parent_id` UNSET means the session, None means none.

    `memory_tier` and `importance` None: what the settings say of its type.
    """

    content: str
    content_digest: bytes
    memory_type: str
    memory_tier: str | None
    importance: float | None
    metadata: dict[str, Any]
    tags: list[str]
    parent_id: str | UnsetType | None
    session_id: str | None
    user_id: str | None
    occurred_at: float | None
    expires_at: float | None
    created_by: str


class Update(Struct, frozen=True, kw_only=True):
    """A checked request to update: `payload` with `metadata` opened (UNSET: not given, None: cleared)."""

    memory_id: str
    payload: UpdatePayload
    metadata: dict[str, Any] | UnsetType | None
    replace_metadata: bool
    content_digest: bytes | None
    expected_version: int | None
    updated_by: str


def new_memory_id() -> str:
    """`mem-`, then 48 bits of milliseconds, 16 bits that count, 48 random bits: ids sort by creation."""
    millis = int(time.time() * 1000) & 0xFFFFFFFFFFFF
    return f"mem-{millis:012x}{next(_counter) & 0xFFFF:04x}{os.urandom(6).hex()}"


def add(context: WriteContext, new: NewMemory) -> Reply:
    memory = insert(context, new)
    return {"memory_id": memory.memory_id, "version": memory.version, "created_at": memory.created_at}


def add_many(context: WriteContext, batch: list[NewMemory]) -> Reply:
    """All or nothing; the error of a bad item names its index."""
    if context.quota is not None:  # all of them before the first is written
        size = sum(usage.size_of(new.content, new.metadata, new.tags) for new in batch)
        usage.check(context.db, context.quota, context.owner, memories=len(batch), size=size)
    memory_ids = []
    for index, new in enumerate(batch):
        try:
            memory_ids.append(insert(context, new).memory_id)
        except MemorySystemError as error:
            error.details["index"] = index
            error.message = f"item {index}: {error.message}"
            raise
    return {"memory_ids": memory_ids, "count": len(memory_ids)}


def insert(context: WriteContext, new: NewMemory, memory_id: str | None = None) -> Memory:
    """Insert one memory with its parent, session and user resolved.

    Raises MemoryNotFound, SessionNotFound, QuotaExceeded.
    """
    if new.expires_at is not None and new.expires_at <= context.now_s:
        raise InvalidField("expires_at", "expires_at has passed: nobody could read this memory")
    if context.quota is not None:
        size = usage.size_of(new.content, new.metadata, new.tags)
        usage.check(context.db, context.quota, context.owner, memories=1, size=size)
    memory = _fresh(context, new, memory_id or new_memory_id())
    memory = context.insert(msgspec.structs.replace(memory, due_at=due_at(context, memory)))
    if memory.memory_type != SESSION_TYPE:
        context.log_change(memory.row_id, "put")
        context.changes.new_texts[memory.row_id] = memory.content_digest
    context.changes.written.append(memory)
    return memory


def _fresh(context: WriteContext, new: NewMemory, memory_id: str) -> Memory:
    parent_id, session_id, user_id = _place(context, new)
    memory_tier, importance = lifecycle.start_of(context.lifecycle, new.memory_type)
    now_s = context.now_s
    return Memory(
        row_id=0,
        namespace=context.namespace,
        memory_id=memory_id,
        content=new.content,
        content_digest=new.content_digest,
        memory_type=new.memory_type,
        memory_tier=memory_tier if new.memory_tier is None else new.memory_tier,
        importance=importance if new.importance is None else new.importance,
        importance_at=now_s,
        access_count=0,
        last_accessed_at=None,
        created_at=now_s,
        updated_at=now_s,
        occurred_at=new.occurred_at,
        expires_at=new.expires_at,
        tier_since=now_s,
        due_at=None,
        metadata=new.metadata,
        tags=new.tags,
        parent_id=parent_id,
        session_id=session_id,
        user_id=user_id,
        created_by=new.created_by,
        version=1,
        state="active",
        owner=context.owner,
    )


def _place(context: WriteContext, new: NewMemory) -> tuple[str | None, str | None, str | None]:
    """Parent, session and user of a new memory: what it does not name it has from its session or parent."""
    session_user = None
    if new.session_id is not None:
        session_user = _session_user(context, new.session_id)
    parent_id = new.session_id if new.parent_id is UNSET else new.parent_id
    session_id, user_id = new.session_id, new.user_id or session_user
    if parent_id is None or parent_id == new.session_id:
        return parent_id, session_id, user_id
    parent = _parent(context, parent_id)
    if session_id is None:
        session_id = parent.memory_id if parent.memory_type == SESSION_TYPE else parent.session_id
    return parent_id, session_id, user_id or parent.user_id


def _session_user(context: WriteContext, session_id: str) -> str | None:
    row = (
        context.db_with(session_id)
        .execute(
            f"SELECT user_id FROM memories WHERE namespace = ? AND memory_id = ? AND memory_type = '{SESSION_TYPE}' "
            f"AND {rows.ALIVE}",
            (context.namespace, session_id, context.now_s),
        )
        .fetchone()
    )
    if row is None:
        raise SessionNotFound(f"no session {session_id} in this namespace", session_id=session_id)
    user_id: str | None = row[0]
    return user_id


def _parent(context: WriteContext, parent_id: str) -> Memory:
    try:
        return rows.fetch(context.db_with(parent_id), context.namespace, parent_id, context.now_s)
    except MemoryNotFound:
        raise MemoryNotFound(
            f"the parent {parent_id} is not in this namespace", memory_id=parent_id, field="parent_id"
        ) from None


def due_at(context: WriteContext, memory: Memory) -> float | None:
    """When the lifecycle has to decide about the memory; see lifecycle.due_at."""
    return lifecycle.due_at(context.lifecycle, memory)


def update(context: WriteContext, change: Update) -> Reply:
    """Apply an update and keep the version it replaces.

    Raises MemoryNotFound, VersionConflict (with the current record), Cycle, InvalidField, QuotaExceeded.
    """
    old = rows.fetch(context.db, context.namespace, change.memory_id, context.now_s)
    if change.expected_version is not None and change.expected_version != old.version:
        raise VersionConflict(
            f"{old.memory_id} has version {old.version}, not {change.expected_version}; read it and try again",
            expected_version=change.expected_version,
            current=context.view.record(old, context.now_s),
        )
    memory = _changed(context, old, change)
    if context.quota is not None:
        _check_growth(context, old, memory)
    keep_history(context, old, change.updated_by)
    _write(context, memory)
    context.log_change(memory.row_id, "put")
    if memory.content_digest != old.content_digest:
        context.changes.removed.append(Removed(old.row_id, old.namespace, old.memory_id, old.content_digest))
        if memory.memory_type != SESSION_TYPE:
            context.changes.new_texts[memory.row_id] = memory.content_digest
    context.changes.written.append(memory)
    return {
        "memory_id": memory.memory_id,
        "version": memory.version,
        "memory": context.view.record(memory, context.now_s),
    }


def _check_growth(context: WriteContext, old: Memory, memory: Memory) -> None:
    """An update keeps the version before, so that a shorter text may need more room too. Raises QuotaExceeded."""
    before, after = (usage.size_of(each.content, each.metadata, each.tags) for each in (old, memory))
    kept = len(rows.to_json(context.view.record(old, context.now_s)).encode())
    try:
        usage.check(context.db, context.quota, old.owner, memories=0, size=after - before + kept)
    except QuotaExceeded:
        if old.owner == context.owner:
            raise
        # How much another keeps, in whatever namespaces, is nobody else's business.
        raise QuotaExceeded("the quota of the caller who added this memory is used up", quota="bytes") from None


def _changed(context: WriteContext, old: Memory, change: Update) -> Memory:
    given = _given(context, old, change)
    state = given.pop("state", old.state)
    if state != old.state:
        # An importance that is given stands as it is; otherwise what is brought back gets a least one.
        old = _in_state(context, old, state)
    if not given.keys().isdisjoint(_DECAY_FIELDS):
        given.setdefault("importance", context.view.importance(old, context.now_s))
        given["importance_at"] = context.now_s
    if given.get("memory_tier", old.memory_tier) != old.memory_tier:
        given |= {"tier_since": context.now_s, "tier_accesses": 0, "promote_at": None}
    memory = msgspec.structs.replace(old, **given, version=old.version + 1, updated_at=context.now_s)
    return msgspec.structs.replace(memory, due_at=due_at(context, memory))


def _in_state(context: WriteContext, memory: Memory, state: str) -> Memory:
    if state == "archived":
        return ageing.archived(context.lifecycle, memory, context.now_s)
    return ageing.restored(context.lifecycle, memory, context.view.importance(memory, context.now_s), context.now_s)


def _given(context: WriteContext, old: Memory, change: Update) -> dict[str, Any]:
    """The fields that the update names, checked against what is stored, with what follows from them alone."""
    payload = change.payload
    given = {name: value for name in payload.__struct_fields__ if (value := getattr(payload, name)) is not UNSET}
    given.pop("metadata")
    if change.metadata is not UNSET:
        given["metadata"] = _merged(old, change)
    if "tags" in given:
        given["tags"] = list(dict.fromkeys(given["tags"] or ()))
    if given.get("parent_id") is not None:
        _parent(context, given["parent_id"])
        check_cycle(context, old, given["parent_id"])
    new_type = given.get("memory_type", old.memory_type)
    if new_type != old.memory_type and SESSION_TYPE in (old.memory_type, new_type):
        raise InvalidField(
            "update_payload.memory_type", f"the type {SESSION_TYPE} cannot be given or taken by an update"
        )
    if "content" in given:
        given["content_digest"] = change.content_digest
    return given


def _merged(old: Memory, change: Update) -> dict[str, Any]:
    if change.metadata is None or change.metadata is UNSET:
        return {}
    if change.replace_metadata:
        return change.metadata
    merged = {**old.metadata, **change.metadata}
    merged = {key: value for key, value in merged.items() if value is not None or key not in change.metadata}
    size = len(rows.to_json(merged).encode())
    if size > MAX_METADATA_BYTES:
        raise InvalidField(
            "update_payload.metadata",
            f"metadata would have {size} bytes after the merge, the limit is {MAX_METADATA_BYTES}",
        )
    return merged


def check_cycle(context: WriteContext, memory: Memory, parent_id: str) -> None:
    """Raise Cycle when `parent_id` is the memory or below it."""
    above = context.db.execute(
        "WITH RECURSIVE above (memory_id) AS (SELECT ? UNION SELECT m.parent_id FROM memories m JOIN above a "
        "ON m.namespace = ? AND m.memory_id = a.memory_id WHERE m.parent_id IS NOT NULL) "
        "SELECT 1 FROM above WHERE memory_id = ?",
        (parent_id, context.namespace, memory.memory_id),
    ).fetchone()
    if above is not None:
        raise Cycle(
            f"{parent_id} is {memory.memory_id} itself or below it", memory_id=memory.memory_id, parent_id=parent_id
        )


def keep_history(context: WriteContext, old: Memory, replaced_by: str) -> None:
    """Keep the version that is about to be replaced."""
    context.db.execute(
        "INSERT INTO memory_history (row_id, version, record, replaced_at, replaced_by) VALUES (?, ?, ?, ?, ?)",
        (old.row_id, old.version, rows.to_json(context.view.record(old, context.now_s)), context.now_s, replaced_by),
    )


_UPDATED: Final = tuple(name for name in rows.FIELDS if name not in ("row_id", "namespace", "memory_id", "created_at"))
_UPDATE: Final = f"UPDATE memories SET {', '.join(f'{name} = ?' for name in _UPDATED)} WHERE row_id = ?"


def _write(context: WriteContext, memory: Memory) -> None:
    values = dict(zip(rows.FIELDS[1:], rows.row_from_memory(memory), strict=True))
    context.db.execute(_UPDATE, [values[name] for name in _UPDATED] + [memory.row_id])

"""Doing a retried write once: the key, the effect and the reply are in one transaction.

Only successes are stored: a call that failed changed nothing and may be tried again under the same key.
The rules follow the IETF draft of an Idempotency-Key header (draft-ietf-httpapi-idempotency-key-header): the same
key with the same payload gets the first reply again, with another payload an error.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from memory_system.errors import IdempotencyMismatch
from memory_system.storage import rows
from memory_system.storage.context import Reply, WriteContext

# Fields of a reply that hold content; a replay reads them anew from the record that is there now.
_CONTENT_FIELDS = ("memory", "session")


@dataclass(frozen=True, slots=True)
class Key:
    """Who asked, under which id, for what. `fingerprint`: 16 bytes over the action and its data."""

    caller: str
    request_id: str
    fingerprint: bytes


def fingerprint(action: str, data: bytes) -> bytes:
    """16 bytes that tell two calls apart."""
    return hashlib.blake2b(action.encode() + b"\0" + data, digest_size=16).digest()


def replay(context: WriteContext, key: Key) -> Reply | None:
    """The stored reply of this key, None when it is new. Raises IdempotencyMismatch for another payload."""
    row = context.db.execute(
        "SELECT fingerprint, reply FROM idempotency WHERE namespace = ? AND caller = ? AND request_id = ?",
        (context.namespace, key.caller, key.request_id),
    ).fetchone()
    if row is None:
        return None
    if row[0] != key.fingerprint:
        raise IdempotencyMismatch(
            "this request_id was used for another call; make a new one for each call", request_id=key.request_id
        )
    reply: Reply = msgspec.json.decode(row[1])
    reply["replayed"] = True
    return reply


def store(context: WriteContext, key: Key, reply: Reply) -> None:
    kept = {name: value for name, value in reply.items() if name not in _CONTENT_FIELDS}
    context.db.execute(
        "INSERT INTO idempotency (namespace, caller, request_id, fingerprint, reply, created_at) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (context.namespace, key.caller, key.request_id, key.fingerprint, rows.to_json(kept), context.now_s),
    )


def prune(context: WriteContext, before_s: float, limit: int = 1000) -> Reply:
    """Drop at most `limit` of the oldest keys that were stored before `before_s`."""
    cursor = context.db.execute(
        "DELETE FROM idempotency WHERE entry IN "
        "(SELECT entry FROM (SELECT entry, created_at FROM idempotency ORDER BY entry LIMIT ?) WHERE created_at < ?)",
        (limit, before_s),
    )
    return {"pruned": cursor.rowcount}

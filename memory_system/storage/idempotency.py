"""Doing a retried write once: the key, the effect and the reply are in one transaction.

Only successes are stored: a call that failed changed nothing and may be tried again under the same key.
The rules follow the IETF draft of an Idempotency-Key header (draft-ietf-httpapi-idempotency-key-header): the same
key with the same payload gets the first reply again, with another payload an error.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import msgspec

from memory_system.errors import IdempotencyMismatch
from memory_system.storage import rows
from memory_system.storage.context import Reply, WriteContext

# Fields of a reply that hold content; a replay reads them anew from the record that is there now.
_CONTENT_FIELDS = ("memory", "session")


Identity = tuple[str, str, str]  # namespace, caller, request_id
_Stored = tuple[bytes, str]  # fingerprint, reply in JSON


@dataclass(frozen=True, slots=True)
class Key:
    """Who asked, under which id, for what. `fingerprint`: 16 bytes over the action and its data."""

    caller: str
    request_id: str
    fingerprint: bytes


def fingerprint(action: str, data: bytes) -> bytes:
    """16 bytes that tell two calls apart."""
    return hashlib.blake2b(action.encode() + b"\0" + data, digest_size=16).digest()


class Keys:
    """The keys of one transaction: those of requests that are to run are looked up together, and those of requests
    that were done are kept together, sixteen in one step. Until then they are known here."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._found: dict[Identity, _Stored | None] = {}
        self._unwritten: dict[Identity, tuple[_Stored, float]] = {}

    def begin(self) -> None:
        """Forget everything: a transaction begins."""
        self._found.clear()
        self._unwritten.clear()

    def knows(self, identity: Identity) -> bool:
        """Whether it was looked up, or kept, in this transaction."""
        return identity in self._found

    def look_up(self, identities: Sequence[Identity]) -> None:
        """Find out what is stored under these."""
        for part in rows.parts(identities):
            row = self._db.execute(_find_some(len(part)), [value for identity in part for value in identity]).fetchone()
            for number, identity in enumerate(part):
                digest, reply = row[2 * number : 2 * number + 2]
                self._found[identity] = None if digest is None else (digest, reply)

    def replay(self, namespace: str, key: Key) -> Reply | None:
        """The stored reply of this key, None when it is new. Raises IdempotencyMismatch for another payload."""
        identity = (namespace, key.caller, key.request_id)
        if identity not in self._found:
            self.look_up([identity])
        stored = self._found[identity]
        if stored is None:
            return None
        if stored[0] != key.fingerprint:
            raise IdempotencyMismatch(
                "this request_id was used for another call; make a new one for each call", request_id=key.request_id
            )
        reply: Reply = msgspec.json.decode(stored[1])
        reply["replayed"] = True
        return reply

    def keep(self, namespace: str, key: Key, reply: Reply, now_s: float) -> None:
        """Keep the reply of a request that was done; it is stored by `write`."""
        kept = {name: value for name, value in reply.items() if name not in _CONTENT_FIELDS}
        identity, stored = (namespace, key.caller, key.request_id), (key.fingerprint, rows.to_json(kept))
        self._found[identity] = stored
        self._unwritten[identity] = stored, now_s

    def write(self) -> None:
        """Store what was kept."""
        unwritten, self._unwritten = list(self._unwritten.items()), {}
        for part in rows.parts(unwritten):
            self._db.execute(
                _store_some(len(part)), [v for identity, (stored, now_s) in part for v in (*identity, *stored, now_s)]
            )


@cache
def _find_some(count: int) -> str:
    aliases = [f"i{number}" for number in range(count)]
    joined = " ".join(
        f"LEFT JOIN idempotency AS {alias} ON {alias}.namespace = ? AND {alias}.caller = ? AND {alias}.request_id = ?"
        for alias in aliases
    )
    return f"SELECT {', '.join(f'{alias}.fingerprint, {alias}.reply' for alias in aliases)} FROM (SELECT 1) {joined}"


@cache
def _store_some(count: int) -> str:
    names = "namespace, caller, request_id, fingerprint, reply, created_at"
    return f"INSERT INTO idempotency ({names}) VALUES {rows.values(count, 6)}"


def prune(context: WriteContext, before_s: float, limit: int = 1000) -> Reply:
    """Drop at most `limit` of the oldest keys that were stored before `before_s`."""
    cursor = context.db.execute(
        "DELETE FROM idempotency WHERE entry IN "
        "(SELECT entry FROM (SELECT entry, created_at FROM idempotency ORDER BY entry LIMIT ?) WHERE created_at < ?)",
        (limit, before_s),
    )
    return {"pruned": cursor.rowcount}

"""Memory records of one process, as stored. The hot path of the service ends here.

Eviction is second chance (CLOCK): a hit sets a flag instead of moving the entry, which is the cheapest hit that still
tells used records from unused ones. Not safe for threads: it belongs to the event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from sys import getsizeof
from typing import Any, Final

from memory_system.models import Memory

Key = tuple[str, str]  # namespace, memory_id

# What a record costs beside content, metadata and tags: the struct, its strings and numbers, the entry (measured).
RECORD_BYTES: Final = 1_400
# An eviction looks at no more entries than this, so that a put never stalls the loop while all entries are in use.
MAX_SECOND_CHANCES: Final = 64
# A load takes milliseconds, and 8,192 keys took 3 MiB.
MAX_RECENT_CHANGES: Final = 1_024


@dataclass(frozen=True, slots=True)
class RecordStats:
    hits: int
    misses: int
    size: int
    bytes: int


class _Entry:
    __slots__ = ("cost_bytes", "memory", "used")

    def __init__(self, memory: Memory, cost_bytes: int) -> None:
        self.memory = memory
        self.cost_bytes = cost_bytes
        self.used = False


class RecordCache:
    """At most `max_records` memories and about `max_mb` MiB, by (namespace, memory_id).

    Whoever commits a change of a memory calls `put` or `invalidate` before acknowledging it. Whoever fills the cache
    from a read brackets the read:

        token = records.begin_load()
        memory = await read(...)                  # may return a row that a commit has replaced meanwhile
        if memory is not None:
            records.finish_load(token, memory)    # does nothing if the key was put or invalidated since the token

    A token is a number and covers any number of keys; a load that fails or is cancelled leaves nothing behind.
    The metadata and tags of a cached memory are shared: callers must not change them.
    """

    __slots__ = ("_bytes", "_changes", "_entries", "_max_bytes", "_max_records", "hits", "misses")

    def __init__(self, max_records: int, max_mb: float) -> None:
        self._max_records = max_records
        self._max_bytes = int(max_mb * 1024 * 1024)
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._bytes = 0
        self._changes = RecentChanges(MAX_RECENT_CHANGES)
        self.hits = 0
        self.misses = 0

    def get(self, namespace: str, memory_id: str) -> Memory | None:
        entry = self._entries.get((namespace, memory_id))
        if entry is None:
            self.misses += 1
            return None
        entry.used = True
        self.hits += 1
        return entry.memory

    def put(self, memory: Memory) -> None:
        """Keep a memory as its commit left it; loads that began before this call will not replace it."""
        key = (memory.namespace, memory.memory_id)
        self._changes.note(key)
        self._insert(key, memory)

    def refresh(self, memory: Memory) -> None:
        """The same as `put` for a memory that is held; another one is only noted as changed."""
        key = (memory.namespace, memory.memory_id)
        self._changes.note(key)
        if key in self._entries:
            self._insert(key, memory)

    def invalidate(self, namespace: str, memory_id: str) -> None:
        """Drop a memory that a commit changed or deleted; loads that began before this call will not bring it back."""
        key = (namespace, memory_id)
        self._changes.note(key)
        self._drop(key)

    def begin_load(self) -> int:
        """Return a token to hand to `finish_load`; take it before the read begins."""
        return self._changes.token()

    def finish_load(self, token: int, memory: Memory) -> None:
        """Keep what a read returned, unless the memory may have changed since `begin_load`."""
        key = (memory.namespace, memory.memory_id)
        if not self._changes.changed_since(token, key):
            self._insert(key, memory)

    def clear(self) -> None:
        """Drop everything, and what loads in flight would bring."""
        self._entries.clear()
        self._bytes = 0
        self._changes.note_all()

    def stats(self) -> RecordStats:
        return RecordStats(hits=self.hits, misses=self.misses, size=len(self._entries), bytes=self._bytes)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<RecordCache {len(self._entries)}/{self._max_records} records, {self._bytes}/{self._max_bytes} bytes>"

    def _insert(self, key: Key, memory: Memory) -> None:
        self._drop(key)
        cost_bytes = _cost_bytes(memory)
        if cost_bytes > self._max_bytes or self._max_records < 1:
            return
        # Room is made before the newcomer is in: it has no flag yet and would be the first to go.
        self._make_room(cost_bytes)
        self._entries[key] = _Entry(memory, cost_bytes)
        self._bytes += cost_bytes

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.cost_bytes

    def _make_room(self, cost_bytes: int) -> None:
        chances = MAX_SECOND_CHANCES
        while len(self._entries) >= self._max_records or self._bytes + cost_bytes > self._max_bytes:
            key, entry = self._entries.popitem(last=False)
            if entry.used and chances > 0:
                chances -= 1
                entry.used = False
                self._entries[key] = entry
            else:
                self._bytes -= entry.cost_bytes


class RecentChanges:
    """Which keys changed since a token was taken; remembers `limit` keys and then starts anew.

    At that moment it no longer knows, and says "changed" for every token taken before: a load in flight is not
    cached, which is safe and happens once in `limit` changes.
    """

    __slots__ = ("_floor", "_limit", "_seq", "_seq_of")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seq = 0
        self._floor = 0
        self._seq_of: dict[Key, int] = {}

    def token(self) -> int:
        return self._seq

    def note(self, key: Key) -> None:
        self._seq += 1
        self._seq_of[key] = self._seq
        if len(self._seq_of) > self._limit:
            self._forget()

    def note_all(self) -> None:
        self._seq += 1
        self._forget()

    def changed_since(self, token: int, key: Key) -> bool:
        return token < self._floor or self._seq_of.get(key, 0) > token

    def _forget(self) -> None:
        self._floor = self._seq
        self._seq_of.clear()


def _cost_bytes(memory: Memory) -> int:
    cost = RECORD_BYTES + getsizeof(memory.content)
    if memory.tags:
        cost += _value_bytes(memory.tags)
    if memory.metadata:
        cost += _value_bytes(memory.metadata)
    return cost


def _value_bytes(root: Any) -> int:
    """Bytes of a decoded JSON-like value with all it holds; shared objects count each time."""
    total = 0
    stack = [root]
    while stack:
        value = stack.pop()
        total += getsizeof(value)
        if isinstance(value, dict):
            stack.extend(value)
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
    return total

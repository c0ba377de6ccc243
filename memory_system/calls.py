"""One call as the service sees it, and the building of list replies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from msgspec import UNSET, Raw, Struct, UnsetType

from memory_system import protocol
from memory_system.decoding import JSON, Encoding
from memory_system.errors import InvalidField
from memory_system.filters import Filter, conditions, parse_filter
from memory_system.security.guard import Caller

T = TypeVar("T", bound=Struct)


class Call(Struct, frozen=True, kw_only=True):
    """Who asks, where and by when. `now_s` is wall time, `started_s` and `deadline_s` are monotonic.

    `caller` is a name to be shown; what belongs to whom goes by `who`.
    """

    action: str
    peer: bytes  # the connection
    namespace: str
    caller: str
    who: Caller
    session_id: str | None
    request_id: str | None  # the idempotency key, None for legacy callers
    fingerprint: bytes
    encoding: Encoding
    legacy: bool
    now_s: float
    started_s: float
    deadline_s: float | None
    note_ignored: Callable[[], None]

    def decode(self, cls: type[T], raw: Raw, where: str) -> T:
        """Decode a part of the data that has a type of its own. Raises InvalidField."""
        part, unknown = self.encoding.decode(cls, raw, lax=self.legacy, where=where)
        if unknown is not None:
            self.note_ignored()
        return part

    def metadata(self, raw: Raw, field: str = "metadata") -> dict[str, Any] | UnsetType | None:
        """The opened map; UNSET when absent, None when null. Raises InvalidField."""
        if not bytes(raw):
            return UNSET
        value = self.encoding.free_form(raw, field, protocol.MAX_METADATA_BYTES)
        if value is not None and not isinstance(value, dict):
            raise InvalidField(field, f"{field} is a map, not a {type(value).__name__}")
        # The limit holds for the stored form too, in which text of control characters is six times as long.
        limit = protocol.MAX_METADATA_BYTES
        if len(bytes(raw)) > limit // 6 and len(JSON.encode(value)) > limit:
            raise InvalidField(field, f"{field} has more than {limit} bytes as JSON", limit=limit)
        return value

    def filters(self, raw: Raw) -> Filter:
        """The parsed filter; everything matches when absent. Raises InvalidField, InvalidFilter."""
        return parse_filter(self.encoding.free_form(raw, "filters", protocol.MAX_FILTER_BYTES))


class ResultList:
    """The `results` of a list reply: each item is encoded once, and no more are taken than the reply may hold."""

    def __init__(self, encoding: Encoding, limit: int, room: int = protocol.MAX_LIST_REPLY_BYTES) -> None:
        self._encode = encoding.encode
        self._limit = limit
        self.room = room  # bytes that are left
        self.items: list[Raw] = []

    def add(self, item: dict[str, Any]) -> bool:
        """Take an item; False when the list is full and it was left out."""
        if len(self.items) >= self._limit:
            return False
        encoded = self._encode(item)
        if len(encoded) > self.room:
            return False
        self.room -= len(encoded)
        self.items.append(Raw(encoded))
        return True

    def reply(self, **fields: Any) -> dict[str, Any]:
        return {"results": self.items, "count": len(self.items), **fields}


def names_state(node: Filter) -> bool:
    """Whether a filter says itself which states are wanted, so that archived memories are not left out beforehand."""
    return any(condition.field == "state" for condition in conditions(node))


def session_of(call: Call, session_id: str | None) -> str:
    """The session that an operation is about: named in its data, or the one the call carries. Raises InvalidField."""
    found = session_id or call.session_id
    if found is None:
        raise InvalidField("session_id", "session_id is required, in data or beside it")
    return found

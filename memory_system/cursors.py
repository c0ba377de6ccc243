"""Cursors: where a list goes on. Opaque to callers, checked when they come back."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import msgspec
from msgspec import Struct

from memory_system.errors import InvalidCursor


class Position(Struct, frozen=True, array_like=True):
    """`scope` ties the cursor to its operation and arguments; `as_of` is the instant of the first page."""

    scope: str
    as_of: float
    key: list[Any]


_decoder = msgspec.json.Decoder(Position)


def scope(*parts: Any) -> str:
    """A short digest of the operation and the arguments that must not change between pages."""
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=9).hexdigest()


def encode(position: Position) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(position)).decode().rstrip("=")


def decode(cursor: str, expected_scope: str) -> Position:
    """Raises InvalidCursor for one that was not made by this operation with these arguments."""
    try:
        position = _decoder.decode(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, msgspec.MsgspecError):
        raise InvalidCursor("the cursor is damaged; start again without one") from None
    if position.scope != expected_scope:
        raise InvalidCursor("the cursor belongs to another call; pass the same arguments on every page")
    return position


def offset_of(cursor: str | None, expected_scope: str) -> int:
    """The offset in a cursor that counts; 0 for None."""
    if cursor is None:
        return 0
    key = decode(cursor, expected_scope).key
    if len(key) != 1 or type(key[0]) is not int or not 0 <= key[0] < 2**31:
        raise InvalidCursor("the cursor is damaged; start again without one")
    return key[0]


def at_offset(offset: int, expected_scope: str, as_of: float) -> str:
    return encode(Position(expected_scope, as_of, [offset]))

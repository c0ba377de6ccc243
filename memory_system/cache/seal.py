"""Values that prove what they are: a digest over the identity and the payload stands before the payload.

It finds corruption, truncation and values filed under another key. It has no secret: whoever may write to the server
can also forge a value, so access to Redis is a matter of its password and network.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

SEAL_BYTES: Final = 16


def seal(identity: tuple[bytes, ...], payload: bytes) -> bytes:
    return _digest(identity, payload) + payload


def unseal(identity: tuple[bytes, ...], value: bytes) -> memoryview | None:
    """Return the payload (a view of `value`), or None if this is not what `seal` made for this identity."""
    payload = memoryview(value)[SEAL_BYTES:]
    return payload if value[:SEAL_BYTES] == _digest(identity, payload) else None


def _digest(identity: tuple[bytes, ...], payload: bytes | memoryview) -> bytes:
    state = blake2b(digest_size=SEAL_BYTES)
    for part in identity:
        # The length goes first: without it ("ab", "c") and ("a", "bc") would be one identity.
        state.update(len(part).to_bytes(4, "little"))
        state.update(part)
    state.update(payload)
    return state.digest()

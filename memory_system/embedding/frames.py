"""The pipe between the service and its embedding worker: a length of 4 bytes, big endian, then a msgpack map."""

from __future__ import annotations

import struct
from typing import Any, Final

import msgpack

HEADER: Final = struct.Struct(">I")
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024


def pack(message: dict[str, Any]) -> bytes:
    """Encode one message; lone surrogates become "?", so that no text can break the pipe."""
    body: bytes = msgpack.packb(message, use_bin_type=True, unicode_errors="replace")
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + body


def body_length(header: bytes) -> int:
    """Decode a header. Raises ValueError for a length that no frame has (something else wrote to the pipe)."""
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame announces {length} bytes, over the limit of {MAX_FRAME_BYTES}")
    return int(length)


def unpack(body: bytes) -> dict[str, Any]:
    """Decode one message. Raises ValueError when it is not a map."""
    message = msgpack.unpackb(body, raw=False, strict_map_key=True)
    if not isinstance(message, dict):
        raise ValueError("a frame is not a map")
    return message

"""Requests and replies as a test writes them, and the settings of a service under test."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import msgpack

from memory_system import protocol

ENCODINGS = ("msgpack", "json")
ERROR_FIELDS = {"status", "error_code", "message", "retryable", "details"}

Reply = dict[str, Any]
_ids = itertools.count(1)


def request_id() -> str:
    """A request_id that no other test of this process uses."""
    return f"request-{os.getpid()}-{next(_ids):012d}"


def encode(request: Any, encoding: str) -> bytes:
    if encoding == "json":
        return json.dumps(request, ensure_ascii=False).encode()
    body: bytes = msgpack.packb(request, use_bin_type=True)
    return body


def decode(body: bytes, encoding: str) -> Reply:
    """The reply; fails when it is not in this encoding, or not of the one shape that the service's replies have."""
    reply = decode_reply(body, encoding)
    check_shape(reply)
    return reply


def decode_reply(body: bytes, encoding: str) -> Reply:
    """The reply of any program; fails when it is not in this encoding, or not of the one shape that replies have."""
    reply = json.loads(body) if encoding == "json" else msgpack.unpackb(body, strict_map_key=True)
    check_reply(reply)
    return reply


def check_shape(reply: Any) -> None:
    """Fails unless this is a reply of the memory service."""
    check_reply(reply)
    assert reply["status"] == "error" or isinstance(reply["commit_seq"], int)


def check_reply(reply: Any) -> None:
    assert isinstance(reply, dict), reply
    if reply["status"] == "success":
        assert not reply.keys() & (ERROR_FIELDS - {"status"})
        if "results" in reply:
            assert reply["count"] == len(reply["results"])
        return
    assert reply["status"] == "error", reply
    assert set(reply) - {"request_id"} == ERROR_FIELDS
    assert reply["error_code"] in protocol.ERROR_CODES
    assert isinstance(reply["message"], str)
    assert reply["message"]
    assert isinstance(reply["retryable"], bool)
    assert isinstance(reply["details"], dict)


def envelope(action: Any, data: Any, **around: Any) -> dict[str, Any]:
    """A `v: 1` request; `around` overrides what stands beside the data, None leaves it out."""
    request = {"v": 1, "action": action, "data": data, "request_id": request_id(), **around}
    return {name: value for name, value in request.items() if value is not None}


def environment(tmp_path: Path, overrides: dict[str, Any]) -> dict[str, str]:
    """MEMORY__SECTION__KEY variables for a store below `tmp_path`; `overrides` are named section__key."""
    values: dict[str, Any] = {
        "storage__path": tmp_path / "memory.db",
        "storage__synchronous": "normal",
        "log__dir": tmp_path / "logs",
        "embedding__provider": "stub",
        "security__keys_dir": tmp_path / "keys",  # of no deployment that this checkout may have
        "error_bus__enabled": False,  # a test that wants the bus says where it is
        **overrides,
    }
    return {f"MEMORY__{name.upper()}": str(value) for name, value in values.items()}

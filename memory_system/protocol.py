"""The wire: version, limits, names, and the caller's half of the codec. docs/protocol.md describes it.

Only msgpack and the standard library are used here, so that an agent host needs nothing more.
The service decodes with msgspec, straight into typed requests (`decoding.py`).
"""

from __future__ import annotations

import json
import os
import time
from typing import Any, Final

import msgpack

from memory_system.errors import BY_CODE, InvalidReply, InvalidRequest, RequestTooLarge

VERSION: Final = 1

DEFAULT_PORT: Final = 7140
DEFAULT_ENDPOINT: Final = f"tcp://127.0.0.1:{DEFAULT_PORT}"
ENDPOINT_VARIABLE: Final = "MEMORY_ORCHESTRATOR_ADDR"

MAX_MESSAGE_BYTES: Final = 8 * 1024 * 1024
# Twice the limit, so that an oversized request still arrives and gets an answer instead of a closed connection.
SOCKET_MAX_MESSAGE_BYTES: Final = 2 * MAX_MESSAGE_BYTES
MAX_LIST_REPLY_BYTES: Final = 4 * 1024 * 1024
# JSON lists are built before their length can be checked (8 MiB of `{},{},...` are 200 MB of objects), so they are
# bounded by what separates their items. Prose has about one comma in 60 characters.
MAX_JSON_COMMAS: Final = 400_000
MAX_CONTENT_BYTES: Final = 64 * 1024
MAX_METADATA_BYTES: Final = 32 * 1024
# Small values cost far more in memory than on the wire: an empty map is one byte there and 64 here.
MAX_METADATA_VALUES: Final = 4096
MAX_BATCH_VALUES: Final = 200_000
MAX_FILTER_BYTES: Final = 32 * 1024
MAX_DEPTH: Final = 16
MAX_TAGS: Final = 64
MAX_TAG_CHARS: Final = 128
MAX_NAME_CHARS: Final = 128
MAX_ID_CHARS: Final = 128
MAX_CHAIN_CHARS: Final = 260  # four names of keys, and what stands between them
MAX_QUERY_CHARS: Final = 8192
MAX_BATCH_ITEMS: Final = 1000
MAX_BATCH_QUERIES: Final = 100
MAX_RESULTS: Final = 1000
MIN_REQUEST_ID_CHARS: Final = 16

READ_ACTIONS: Final = frozenset(
    {
        "get_session",
        "list_sessions",
        "get_memory",
        "get_children",
        "search_memory",
        "semantic_search",
        "search_similar",
        "batch_search",
        "get_related_memories",
        "batch_get_memories",
        "list_context_groups",
        "get_memories_by_group",
        "list_memories",
        "get_memory_history",
        "stats",
        "get_commit_seq",
        "health_check",
        "get_request_status",
    }
)
WRITE_ACTIONS: Final = frozenset(
    {
        "create_session",
        "end_session",
        "resume_session",
        "add_memory",
        "update_memory",
        "delete_memory",
        "add_relationship",
        "remove_relationship",
        "reinforce_memory",
        "batch_add_memories",
        "create_context_group",
        "add_to_group",
        "remove_from_group",
        "forget",
    }
)
# Upkeep of the store, for callers of this machine.
ADMIN_ACTIONS: Final = frozenset(
    {
        "run_decay",
        "run_consolidation",
        "undo_consolidation",
        "run_cleanup",
        "run_snapshot",
        "run_checkpoint",
        "run_integrity_check",
        "list_runs",
        "reindex",
        "backup",
        "export_memories",
        "import_memories",
    }
)
ACTIONS: Final = READ_ACTIONS | WRITE_ACTIONS | ADMIN_ACTIONS
ACTION_ALIASES: Final = {"get_related": "get_related_memories"}

ERROR_CODES: Final = frozenset(BY_CODE)

# No field of an operation may have one of these names: they stand at the top level of every reply.
RESERVED_REPLY_FIELDS: Final = frozenset({"status", "message", "error_code", "retryable", "details", "request_id"})


_BLANKS: Final = b" \t\r\n"


def new_request_id() -> str:
    """A time-ordered random id (48 bits of milliseconds, 80 random bits), 32 hex digits.

    The order keeps the service's index of ids appending at its end; the random part is what makes it unique.
    """
    return f"{int(time.time() * 1000) & 0xFFFFFFFFFFFF:012x}{os.urandom(10).hex()}"


def is_json(body: bytes) -> bool:
    """Whether the first byte other than white space is `{`; everything else is taken for msgpack."""
    return body[:1] == b"{" or (body[:1] in _BLANKS and body.lstrip(_BLANKS)[:1] == b"{")


def encode_request(request: dict[str, Any]) -> bytes:
    """Encode a request as msgpack.

    Raises InvalidRequest for a value that msgpack has no form for, RequestTooLarge above MAX_MESSAGE_BYTES.
    """
    try:
        body: bytes = msgpack.packb(request, use_bin_type=True)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequest(f"the request cannot be encoded: {error}") from error
    if len(body) > MAX_MESSAGE_BYTES:
        raise RequestTooLarge(
            f"the request has {len(body)} bytes, the limit is {MAX_MESSAGE_BYTES}; send it in smaller batches",
            size=len(body),
            limit=MAX_MESSAGE_BYTES,
        )
    return body


def decode_reply(body: bytes) -> dict[str, Any]:
    """Decode a reply, msgpack or JSON. Raises InvalidReply when it is neither or has no `status`."""
    try:
        reply = json.loads(body) if is_json(body) else msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise InvalidReply(f"the reply is neither msgpack nor JSON: {error}") from error
    if not isinstance(reply, dict) or reply.get("status") not in ("success", "error"):
        raise InvalidReply("the reply is not a map with a status")
    return reply


def error_reply(
    code: str, message: str, retryable: bool, details: dict[str, Any], request_id: str | None
) -> dict[str, Any]:
    """The one shape of an error reply, made by the service and by the client alike."""
    reply: dict[str, Any] = {
        "status": "error",
        "error_code": code,
        "message": message,
        "retryable": retryable,
        "details": details,
    }
    if request_id is not None:
        reply["request_id"] = request_id
    return reply

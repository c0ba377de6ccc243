"""A request as an agent receives it: bytes from anybody -> `Request`, and replies back to bytes, in the same encoding.

Bodies are read by msgpack and the standard library's json. They build the whole tree before it can be looked at, so
what a body may hold is bounded before or while it is built: 8 MiB of empty maps would be half a gigabyte of objects.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from memory_system import protocol
from memory_system.errors import (
    DeadlineExceeded,
    InvalidField,
    InvalidRequest,
    RequestTooLarge,
    UnsupportedVersion,
)
from memory_system.grants import Identity

MAX_VALUES: Final = protocol.MAX_BATCH_VALUES  # in one request
MAX_ITEMS: Final = 10_000  # in one list or map; msgpack makes room for as many as a header of 5 bytes announces
MAX_DEPTH: Final = protocol.MAX_DEPTH
MAX_DEADLINE_MS: Final = 86_400_000.0

FIELDS: Final = (
    "action", "v", "data", "request_id", "agent_id", "session_id", "namespace", "deadline_ms", "on_behalf_of"
)  # fmt: skip
# A string that is never closed reaches to the end, and nothing is tried twice: linear for whatever comes.
_STRINGS: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Request:
    """What stands around the `data` of a request. `deadline_s` is monotonic; `legacy` callers send no `v`.

    `peer` names the connection; `address` is the caller's IP address, empty where all callers are of this machine;
    `identity` whose key it came with and for whom it speaks, None where there are no keys.
    `beside` has what a flat request gives beside its action instead of in `data`; `flat`: it has no `data` at all.
    """

    action: str
    data: Mapping[str, Any] = field(repr=False)
    request_id: str | None
    agent_id: str | None
    session_id: str | None
    namespace: str
    deadline_s: float | None
    legacy: bool
    as_json: bool
    peer: bytes
    address: str = ""
    beside: Mapping[str, Any] = field(default_factory=dict, repr=False)
    flat: bool = False
    identity: Identity | None = None


def read_request(
    body: bytes,
    peer: bytes = b"",
    address: str = "",
    *,
    flat: bool = False,
    identify: Callable[[str | None], Identity] | None = None,
) -> Request:
    """Decode and check a request, all but the fields of its action. `flat`: those may stand beside the action.

    `identify(on_behalf_of)` is the identity of the key that it came with, where there are keys.
    Raises InvalidRequest, InvalidField, RequestTooLarge, UnsupportedVersion, DeadlineExceeded, AccessDenied.
    """
    raw = decode(body)
    version = raw.get("v")
    legacy = version is None
    if not legacy and (version != protocol.VERSION or isinstance(version, bool)):
        shown = version if isinstance(version, int) else "of this type"
        raise UnsupportedVersion(f"protocol version {shown} is not known; this program speaks {protocol.VERSION}")
    beside = {name: value for name, value in raw.items() if name not in FIELDS}
    if beside and not legacy and not flat:
        raise unknown_field(next(iter(beside)), FIELDS)
    return Request(
        action=_action(raw),
        data=_data(raw),
        request_id=_request_id(raw, legacy),
        agent_id=_name(raw, "agent_id"),
        session_id=_name(raw, "session_id"),
        namespace=_name(raw, "namespace") or "default",
        deadline_s=_deadline(raw),
        legacy=legacy,
        as_json=protocol.is_json(body),
        peer=peer,
        address=address,
        beside=beside if flat else {},
        flat=flat and raw.get("data") is None,
        identity=_identity(raw, identify),
    )


def _action(raw: Mapping[str, Any]) -> str:
    action = raw.get("action")
    if not isinstance(action, str) or not action:
        raise InvalidField("action", "action is required, as text")
    return action


def echo_id(body: bytes) -> str | None:
    """The request_id of a request that is refused, if it can be read."""
    try:
        found = _tree(body).get("request_id")
    except InvalidRequest:
        return None
    if not isinstance(found, str) or len(found) > protocol.MAX_ID_CHARS or _is_broken(found):
        return None
    return found


def decode(body: bytes) -> dict[str, Any]:
    """The map that a body holds, as plain values of JSON's types.

    Raises InvalidRequest, InvalidField for what could not be stored or sent on, RequestTooLarge.
    """
    if len(body) > protocol.MAX_MESSAGE_BYTES:
        raise RequestTooLarge(
            f"the request has {len(body)} bytes, the limit is {protocol.MAX_MESSAGE_BYTES}",
            size=len(body),
            limit=protocol.MAX_MESSAGE_BYTES,
        )
    found = _tree(body)
    _check(found)
    return found


def encode(reply: Mapping[str, Any], *, as_json: bool) -> bytes:
    """Raises ValueError or TypeError for what the encoding has no form for."""
    if as_json:
        return json.dumps(reply, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    body: bytes = msgpack.packb(reply, use_bin_type=True)
    return body


def noun(value: object) -> str:
    """What a decoded value is, in words."""
    nouns = {bool: "a boolean", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a map"}
    return nouns.get(type(value), "null" if value is None else type(value).__name__)


def unknown_field(name: str, known: Iterable[str], where: str = "") -> InvalidField:
    near = difflib.get_close_matches(name[:80], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    path = f"{where}.{name}" if where else name
    return InvalidField(path[:200], f"unknown field {name[:80]}{hint}", **({"suggestion": near[0]} if near else {}))


def _tree(body: bytes) -> dict[str, Any]:
    try:
        value = _from_json(body) if protocol.is_json(body) else _from_msgpack(body)
    except (ValueError, RecursionError, OverflowError, msgpack.exceptions.UnpackException) as error:
        text = "nested too deeply" if isinstance(error, RecursionError | msgpack.exceptions.StackError) else str(error)
        raise InvalidRequest(f"the body is not a msgpack map or JSON object: {text or 'it ends too early'}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body is not a msgpack map or JSON object: it is {noun(value)}")
    return value


def _from_json(body: bytes) -> Any:
    if _opened(body) > MAX_VALUES and _opened(_STRINGS.sub(b"", body)) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES} values")
    return json.loads(body.decode("utf-8"), parse_constant=_no_number)


def _opened(body: bytes) -> int:
    """At least as many as there are values, but for one."""
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _from_msgpack(body: bytes) -> Any:
    left = MAX_VALUES

    def count(container: Any) -> Any:
        nonlocal left
        left -= len(container) + 1
        if left < 0:
            raise ValueError(f"it has more than {MAX_VALUES} values")
        return container

    return msgpack.unpackb(
        body,
        raw=False,
        strict_map_key=True,
        object_hook=count,
        list_hook=count,
        max_array_len=MAX_ITEMS,
        max_map_len=MAX_ITEMS,
    )


def _check(body: dict[str, Any]) -> None:
    """Raise InvalidField unless everything can be kept and sent on exactly: JSON's types, not too deep."""
    stack: list[tuple[Any, int, str]] = [(body, -1, "")]
    while stack:
        node, depth, name = stack.pop()
        if isinstance(node, dict | list):
            if depth > MAX_DEPTH:
                raise InvalidField(name, f"{name} is nested deeper than {MAX_DEPTH} levels")
            if len(node) > MAX_ITEMS:
                raise InvalidField(name, f"{name} has {len(node)} items in one list or map, the limit is {MAX_ITEMS}")
            if isinstance(node, dict):
                for key in node:
                    _check_scalar(key if isinstance(key, str) else object(), name or "the request")
                stack.extend((child, depth + 1, _top(name, key, depth)) for key, child in node.items())
            else:
                stack.extend((child, depth + 1, name) for child in node)
        else:
            _check_scalar(node, name)


def _top(name: str, key: str, depth: int) -> str:
    """The field that a value belongs to: that of the action's data, or that beside it."""
    return key[:80] if depth == -1 or (depth == 0 and name == "data") else name


def _check_scalar(value: Any, name: str) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise InvalidField(name, f"{name} has a NUL character in a string")
        if not value.isascii() and _is_broken(value):
            raise InvalidField(name, f"{name} has half of a surrogate pair, which is no text")
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InvalidField(name, f"{name} has an integer outside of 64 bits; send it as a string")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidField(name, f"{name} has a number that is not finite")
    else:
        raise InvalidField(name, f"{name} may hold maps with text keys, lists, text, numbers, booleans and null only")


def _is_broken(text: str) -> bool:
    """Whether it holds what JSON can write and UTF-8 cannot: it would fail later, in a reply or a database."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _data(raw: Mapping[str, Any]) -> dict[str, Any]:
    data = raw.get("data")
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InvalidField("data", f"data is a map, not {noun(data)}")
    return data


def _name(raw: Mapping[str, Any], name: str, limit: int = protocol.MAX_NAME_CHARS) -> str | None:
    value = raw.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not 1 <= len(value) <= limit or _CONTROL.search(value):
        raise InvalidField(name, f"{name} is text of 1 to {limit} characters without control characters")
    return value


def _identity(raw: Mapping[str, Any], identify: Callable[[str | None], Identity] | None) -> Identity | None:
    on_behalf_of = _name(raw, "on_behalf_of", protocol.MAX_CHAIN_CHARS)
    if identify is not None:
        return identify(on_behalf_of)
    if on_behalf_of is not None:
        raise InvalidField("on_behalf_of", "on_behalf_of names a key, and callers have none here")
    return None


def _request_id(raw: Mapping[str, Any], legacy: bool) -> str | None:
    request_id = _name(raw, "request_id")
    if request_id is not None and not legacy and len(request_id) < protocol.MIN_REQUEST_ID_CHARS:
        shortest = protocol.MIN_REQUEST_ID_CHARS
        raise InvalidField("request_id", f"request_id is a random key of at least {shortest} characters")
    return request_id


def _deadline(raw: Mapping[str, Any]) -> float | None:
    deadline_ms = raw.get("deadline_ms")
    if deadline_ms is None:
        return None
    if isinstance(deadline_ms, bool) or not isinstance(deadline_ms, int | float):
        raise InvalidField("deadline_ms", f"deadline_ms is a number of milliseconds, not {noun(deadline_ms)}")
    if not 0 <= deadline_ms <= MAX_DEADLINE_MS:
        raise InvalidField("deadline_ms", f"deadline_ms is from 0 to {MAX_DEADLINE_MS:.0f}")
    if deadline_ms == 0:
        raise DeadlineExceeded("deadline_ms is 0: the caller had stopped waiting; nothing was done")
    return time.monotonic() + deadline_ms / 1000.0

"""The service's half of the codec: bytes -> typed request, reply -> bytes, in msgpack and in JSON.

Each request type has two decoders: a strict one, and one that ignores unknown fields for callers that do not
speak `v: 1`. Free-form parts are opened by `free_form` only after their length is checked, so that a small
body cannot become a large tree (1 MiB of empty maps is 74 MiB of Python objects).
"""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct

from memory_system import protocol
from memory_system.errors import InvalidField, InvalidRequest, MemorySystemError, RequestTooLarge, UnsupportedVersion
from memory_system.models import Envelope

T = TypeVar("T", bound=Struct)

_PATH = re.compile(r" - at `(?:key` in `)?\$\.?([^`]*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(.*)`")
_NAMED = re.compile(r"^`(\w+)` ")
_REGEX = re.compile(r" matching regex .*$", re.DOTALL)

# One that is never closed reaches to the end, and nothing is tried twice: otherwise a body of quotes takes hours.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_LARGE_JSON = 1024 * 1024


@cache
def _lax(cls: type[Struct]) -> type[Struct]:
    """The same type, which ignores fields that it does not know."""
    name = f"Lax{cls.__name__}"
    return msgspec.defstruct(name, [], bases=(cls,), frozen=True, kw_only=True, forbid_unknown_fields=False)


class Encoding:
    """One encoding of the wire. Instances: MSGPACK and JSON."""

    def __init__(self, name: str, decoder: Callable[[Any], Any], decode: Callable[[Any], Any], encoder: Any) -> None:
        self.name = name
        self.null = encoder.encode(None)
        self.encode: Callable[[Any], bytes] = encoder.encode
        self._decode = decode
        # Made when a type first comes: making all would be a fifth of what importing the service takes.
        self._strict = cache(lambda cls: decoder(cls).decode)
        self._lax = cache(lambda cls: decoder(_lax(cls)).decode)
        self._items = decoder(list[Raw]).decode

    def __repr__(self) -> str:
        return f"Encoding({self.name})"

    def decode(self, cls: type[T], raw: bytes | Raw, *, lax: bool = False, where: str = "") -> tuple[T, str | None]:
        """Decode `raw` into `cls`; also the first unknown field that was ignored, if `lax` allowed one.

        Raises InvalidField with the path of the field below `where`, InvalidRequest when the bytes are malformed.
        """
        try:
            return self._strict(cls)(raw), None
        except msgspec.ValidationError as error:
            unknown = _UNKNOWN.match(str(error))
            if unknown is None or not lax:
                raise _field_error(error, cls, where) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _malformed(error, where) from None
        try:
            return self._lax(cls)(raw), unknown.group(1)
        except msgspec.ValidationError as error:
            raise _field_error(error, cls, where) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _malformed(error, where) from None

    def free_form(self, raw: Raw, field: str, limit: int) -> Any:
        """Open a free-form part: None when absent or null, else plain dicts, lists and scalars.

        Raises InvalidField when it has more than `limit` bytes, is nested deeper than MAX_DEPTH or holds
        something that the store cannot keep exactly.
        """
        body = bytes(raw)
        if not body or body == self.null:
            return None
        if len(body) > limit:
            raise InvalidField(field, f"{field} has {len(body)} bytes, the limit is {limit}", limit=limit)
        try:
            value = self._decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise _malformed(error, field) from None
        check_free_form(value, field)
        return value


def check_free_form(value: Any, field: str) -> None:
    """Raise InvalidField unless `value` is a tree of JSON types, of bounded size, that the store keeps exactly."""
    stack: list[tuple[Any, int]] = [(value, 1)]
    count = 0
    while stack:
        node, depth = stack.pop()
        count += 1
        if count > protocol.MAX_METADATA_VALUES:
            raise InvalidField(field, f"{field} has more than {protocol.MAX_METADATA_VALUES} values")
        if isinstance(node, dict | list):
            if depth > protocol.MAX_DEPTH:
                raise InvalidField(field, f"{field} is nested deeper than {protocol.MAX_DEPTH} levels")
            if isinstance(node, dict):
                for key in node:
                    _check_scalar(key if isinstance(key, str) else object(), field)
                node = node.values()
            stack.extend((child, depth + 1) for child in node)
        else:
            _check_scalar(node, field)


def count_values(value: Any) -> int:
    """How many values a checked tree has, containers included."""
    if isinstance(value, dict):
        return 1 + sum(map(count_values, value.values()))
    return 1 + sum(map(count_values, value)) if isinstance(value, list) else 1


def _check_scalar(value: Any, field: str) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        if "\0" in value:
            raise InvalidField(field, f"{field} has a NUL character in a string")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InvalidField(field, f"{field} has an integer outside of 64 bits; send it as a string")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidField(field, f"{field} has a number that is not finite")
    else:
        raise InvalidField(field, f"{field} may hold maps with text keys, lists, text, numbers, booleans and null only")


def _field_error(error: msgspec.ValidationError, cls: type[Struct], where: str) -> MemorySystemError:
    text = str(error)
    path = _PATH.search(text)
    below = path.group(1) if path else ""
    text = _REGEX.sub(" without control characters", _PATH.sub("", text))
    details: dict[str, Any] = {}
    if unknown := _UNKNOWN.match(text):
        name = unknown.group(1)
        near = difflib.get_close_matches(name, _fields(cls, below), n=1)
        text = f"unknown field {name}" + (f"; did you mean {near[0]}?" if near else "")
        details = {"suggestion": near[0]} if near else {}
        below = _join(below, name)
    elif missing := _MISSING.match(text):
        below = _join(below, missing.group(1))
        text = f"{below} is required"
    elif named := _NAMED.match(text):
        below = named.group(1)
        text = text.replace("`", "")
    else:
        choices = _choices(cls, below) if text.startswith("Invalid enum value") else ""
        text = f"{below or where or 'the request'}: {text[:1].lower()}{text[1:]}{choices}".replace("`", "")
    field = _join(where, below)
    if not field:
        text = text.partition(": ")[2]
        if cls is not Envelope:
            return InvalidField("data", f"data is a map: {text}")
        return InvalidRequest(f"the body is not a msgpack map or JSON object: {text}")
    return InvalidField(field, text, **details)


def _fields(cls: type[Struct], below: str) -> tuple[str, ...]:
    """The fields of the map at a path of a request."""
    for name in filter(None, below.split(".")):
        hint = typing.get_type_hints(cls).get(name)
        maps = [part for part in typing.get_args(hint) if isinstance(part, type) and issubclass(part, Struct)]
        if not maps:
            return ()
        cls = maps[0]
    return cls.__struct_fields__


def _choices(cls: type[Struct], field: str) -> str:
    """`; choose one of ...` for a field of fixed values."""
    hint = typing.get_type_hints(cls).get(field)
    values = [value for part in (hint, *typing.get_args(hint)) for value in typing.get_args(part)]
    names = [value for value in dict.fromkeys([*typing.get_args(hint), *values]) if isinstance(value, str)]
    return f"; choose one of {', '.join(names)}" if names else ""


def _malformed(error: Exception, where: str) -> MemorySystemError:
    if isinstance(error, RecursionError):
        text = "nested too deeply"
    elif isinstance(error, UnicodeDecodeError):
        text = "text that is not UTF-8"
    else:
        text = str(error)
    if where:
        return InvalidField(where, f"{where} is malformed: {text}")
    return InvalidRequest(f"the body is not a msgpack map or JSON object: {text}")


def _join(first: str, second: str) -> str:
    return f"{first}.{second}" if first and second else first or second


MSGPACK = Encoding("msgpack", msgspec.msgpack.Decoder, msgspec.msgpack.decode, msgspec.msgpack.Encoder())
JSON = Encoding("json", msgspec.json.Decoder, msgspec.json.decode, msgspec.json.Encoder())


def encoding_of(body: bytes) -> Encoding:
    """The encoding of a request; its reply is sent in the same."""
    return JSON if protocol.is_json(body) else MSGPACK


class Decoded(Struct, frozen=True):
    """An envelope, with the fields that a legacy caller sent and that were ignored."""

    envelope: Envelope
    ignored: int


def _has_too_many_values(body: bytes) -> bool:
    """Whether more commas stand between values than are allowed; text is looked through only if there are so many."""
    if body.count(b",") <= protocol.MAX_JSON_COMMAS:
        return False
    outside, end = 0, 0
    for text in _STRINGS.finditer(body):
        outside += body.count(b",", end, text.start())
        end = text.end()
        if outside > protocol.MAX_JSON_COMMAS:
            return True
    return outside + body.count(b",", end) > protocol.MAX_JSON_COMMAS


def decode_envelope(body: bytes, encoding: Encoding) -> Decoded:
    """Decode what stands around `data`. Raises InvalidRequest, InvalidField, RequestTooLarge, UnsupportedVersion."""
    if len(body) > protocol.MAX_MESSAGE_BYTES:
        raise RequestTooLarge(
            f"the request has {len(body)} bytes, the limit is {protocol.MAX_MESSAGE_BYTES}",
            size=len(body),
            limit=protocol.MAX_MESSAGE_BYTES,
        )
    if encoding is JSON and len(body) > _LARGE_JSON and _has_too_many_values(body):
        raise InvalidRequest(f"a JSON request holds at most {protocol.MAX_JSON_COMMAS} values; use smaller batches")
    envelope, unknown = encoding.decode(Envelope, body, lax=True)
    if envelope.v is None:
        return Decoded(envelope, 0 if unknown is None else 1)
    if envelope.v != protocol.VERSION:
        raise UnsupportedVersion(f"protocol version {envelope.v} is not known; this service speaks {protocol.VERSION}")
    if unknown is not None:
        encoding.decode(Envelope, body)
    request_id = envelope.request_id
    if request_id is not None and len(request_id) < protocol.MIN_REQUEST_ID_CHARS:
        raise InvalidField(
            "request_id", f"request_id is a random key of at least {protocol.MIN_REQUEST_ID_CHARS} characters"
        )
    return Decoded(envelope, 0)

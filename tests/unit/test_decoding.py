"""The codec as a pure function: what goes in comes out, in both encodings, and nothing else raises but our errors."""

from __future__ import annotations

import json
import math
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect as shape

from memory_system import protocol
from memory_system.decoding import JSON, MSGPACK, Encoding, check_free_form, decode_envelope, encoding_of
from memory_system.errors import InvalidField, InvalidRequest, MemorySystemError, RequestTooLarge, UnsupportedVersion
from memory_system.models import PARAMS, Envelope, UpdatePayload

ENCODINGS = [MSGPACK, JSON]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
thorough = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# No surrogates (neither encoding has them), no control characters (names refuse them).
characters = st.characters(exclude_categories=["Cs", "Cc"])
integers = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
scalars = st.none() | st.booleans() | integers | floats | texts
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)
maps = st.dictionaries(texts, trees, max_size=5)
anything = st.recursive(
    scalars | st.binary(max_size=10) | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(-5, 5) | st.binary(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


def values_of(kind: shape.Type) -> st.SearchStrategy[Any]:
    """Every value that a field of this type takes."""
    match kind:
        case shape.UnionType():
            return st.one_of([values_of(part) for part in kind.types])
        case shape.StrType():
            return st.text(characters, min_size=kind.min_length or 0, max_size=min(kind.max_length or 30, 30))
        case shape.IntType():
            return st.integers(kind.ge, kind.le)
        case shape.FloatType():
            return st.floats(kind.ge if kind.gt is None else kind.gt, kind.le, exclude_min=kind.gt is not None)
        case shape.ListType():
            return st.lists(values_of(kind.item_type), min_size=kind.min_length or 0, max_size=5)
        case shape.LiteralType():
            return st.sampled_from(kind.values)
        case shape.StructType():
            return data_of(kind.cls)
    return {shape.BoolType: st.booleans(), shape.NoneType: st.none(), shape.RawType: maps}[type(kind)]


def data_of(cls: type[msgspec.Struct]) -> st.SearchStrategy[dict[str, Any]]:
    fields = shape.type_info(cls).fields  # type: ignore[attr-defined]
    return st.fixed_dictionaries(
        {field.encode_name: values_of(field.type) for field in fields if field.required},
        optional={field.encode_name: values_of(field.type) for field in fields if not field.required},
    ).map(consistent)


def consistent(data: dict[str, Any]) -> dict[str, Any]:
    """The data without those fields that others forbid."""
    since_s, until_s = data.get("occurred_after"), data.get("occurred_before")
    if since_s is not None and until_s is not None and since_s >= until_s:
        data.pop("occurred_before")
    if data.get("half_life_days") is not None and not data.get("recency"):
        data.pop("half_life_days")
    return data


def opened(encoding: Encoding, value: Any) -> Any:
    """A decoded field with its raw parts opened."""
    if isinstance(value, msgspec.Raw):
        return encoding.free_form(value, "field", protocol.MAX_MESSAGE_BYTES)
    if isinstance(value, list):
        return [opened(encoding, item) for item in value]
    return value


def partly(value: Any, data: Any) -> Any:
    """A decoded map as far as it was given, anything else as it is."""
    if isinstance(value, msgspec.Struct):
        return {name: partly(getattr(value, name), part) for name, part in data.items()}
    return value


@pytest.mark.parametrize("cls", [*dict.fromkeys(PARAMS.values()), UpdatePayload], ids=lambda cls: cls.__name__)
@quick
@given(choice=st.data())
def test_every_request_comes_out_as_it_went_in(cls: type[msgspec.Struct], choice: st.DataObject) -> None:
    data = choice.draw(data_of(cls))
    for encoding, body in ((MSGPACK, msgpack.packb(data)), (JSON, json.dumps(data).encode())):
        for lax in (False, True):
            decoded, ignored = encoding.decode(cls, body, lax=lax)
            assert ignored is None
            values = {name: opened(encoding, getattr(decoded, name)) for name in data}
            assert {name: partly(value, data[name]) for name, value in values.items()} == data


@quick
@given(data=data_of(Envelope))
def test_envelopes(data: dict[str, Any]) -> None:
    data |= {"v": 1, "request_id": "x" * 16}
    for body in (msgpack.packb(data), json.dumps(data).encode()):
        envelope = decode_envelope(body, encoding_of(body)).envelope
        assert envelope.action == data["action"]
        assert envelope.namespace == data.get("namespace")
        assert envelope.deadline_ms == data.get("deadline_ms")


def decode_all(body: bytes) -> None:
    """Everything that may be made of a body; only errors of ours may come of it."""
    encoding = encoding_of(body)
    for decode in (
        lambda: decode_envelope(body, encoding),
        *(lambda cls=cls: encoding.decode(cls, body, lax=True, where="x") for cls in PARAMS.values()),
        *(lambda cls=cls: encoding.decode(cls, body) for cls in PARAMS.values()),
        lambda: encoding.free_form(msgspec.Raw(body), "metadata", protocol.MAX_METADATA_BYTES),
    ):
        try:
            decode()
        except MemorySystemError as error:
            assert error.code in protocol.ERROR_CODES
            for other in ENCODINGS:
                other.encode(protocol.error_reply(error.code, error.message, error.retryable, error.details, None))


@thorough
@given(body=st.binary(max_size=200))
def test_any_bytes(body: bytes) -> None:
    decode_all(body)


@thorough
@given(value=anything, cut=st.integers(0, 40), flip=st.integers(0, 2**16))
def test_damaged_values(value: Any, cut: int, flip: int) -> None:
    bodies = [msgpack.packb({"action": "stats", "x": value}, unicode_errors="surrogatepass")]
    bodies.append(json.dumps({"action": "stats", "x": repr(value)}).encode())
    for body in bodies:
        decode_all(body[: max(1, len(body) - cut)])
        damaged = bytearray(body)
        damaged[flip % len(damaged)] ^= 1 << flip % 8
        decode_all(bytes(damaged))


@thorough
@given(tree=maps)
def test_metadata_comes_out_as_it_went_in(tree: dict[str, Any]) -> None:
    for encoding, body in ((MSGPACK, msgpack.packb(tree)), (JSON, json.dumps(tree).encode())):
        value = encoding.free_form(msgspec.Raw(body), "metadata", protocol.MAX_METADATA_BYTES)
        assert value == tree
        assert encoding.free_form(msgspec.Raw(encoding.encode(value)), "metadata", 2**20) == tree


def kept_exactly(value: Any) -> bool:
    """The rule of check_free_form, said another way."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and kept_exactly(key) for key in value) and all(
            kept_exactly(child) for child in value.values()
        )
    if isinstance(value, list):
        return all(kept_exactly(child) for child in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return -(2**63) <= value < 2**63
    return value is None or isinstance(value, bool) or (isinstance(value, str) and "\0" not in value)


@thorough
@given(value=anything)
def test_free_form_values_are_those_that_the_store_keeps(value: Any) -> None:
    try:
        check_free_form(value, "metadata")
    except InvalidField as error:
        assert error.field == "metadata"
        assert not kept_exactly(value)
    else:
        assert kept_exactly(value)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_size_and_depth_of_free_form_parts(encoding: Encoding) -> None:
    def tree(levels: int) -> Any:
        return [tree(levels - 1)] if levels else 1

    deepest = msgspec.Raw(encoding.encode(tree(protocol.MAX_DEPTH)))
    assert encoding.free_form(deepest, "f", 100) == tree(protocol.MAX_DEPTH)
    for raw, limit in ((encoding.encode(tree(protocol.MAX_DEPTH + 1)), 100), (bytes(deepest), len(bytes(deepest)) - 1)):
        with pytest.raises(InvalidField) as refused:
            encoding.free_form(msgspec.Raw(raw), "f", limit)
        assert refused.value.field == "f"
    assert encoding.free_form(deepest, "f", len(bytes(deepest))) is not None
    for nothing in (b"", encoding.null):
        assert encoding.free_form(msgspec.Raw(nothing), "f", 100) is None


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_error_paths(encoding: Encoding) -> None:
    for cls, data, where, field in (
        (PARAMS["add_memory"], {}, "", "content"),
        (PARAMS["add_memory"], {}, "memories[3]", "memories[3].content"),
        (PARAMS["add_memory"], {"content": 1}, "", "content"),
        (PARAMS["add_memory"], {"content": "é" * 40_000}, "", "content"),
        (PARAMS["add_memory"], {"content": "é" * 40_000}, "memories[0]", "memories[0].content"),
        (PARAMS["add_memory"], {"content": "x", "tags": ["a", 1]}, "", "tags[1]"),
        (PARAMS["add_memory"], {"content": "x", "tags": ["a\n"]}, "m", "m.tags[0]"),
        (UpdatePayload, {"importance": 2}, "update_payload", "update_payload.importance"),
        (UpdatePayload, {"colour": 2}, "update_payload", "update_payload.colour"),
        (PARAMS["stats"], {"a` - at `$.b`": 1}, "", None),
        (PARAMS["stats"], [], "", "data"),
        (PARAMS["stats"], [], "data", "data"),
    ):
        with pytest.raises(InvalidField) as refused:
            encoding.decode(cls, encoding.encode(data), where=where)
        assert field is None or refused.value.field == field
        assert refused.value.details["field"] == refused.value.field
        assert "`" not in refused.value.message or field is None


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_lax_decoding_ignores_what_it_does_not_know_only(encoding: Encoding) -> None:
    cls = PARAMS["get_memory"]
    decoded, ignored = encoding.decode(cls, encoding.encode({"x": [1], "memory_id": "m", "y": None}), lax=True)
    assert (decoded.memory_id, ignored) == ("m", "x")  # type: ignore[attr-defined]
    for data, field in (({"x": 1}, "memory_id"), ({"x": 1, "memory_id": 1}, "memory_id")):
        with pytest.raises(InvalidField) as refused:
            encoding.decode(cls, encoding.encode(data), lax=True)
        assert refused.value.field == field
    body = encoding.encode({"x": 1, "memory_id": "m"})
    with pytest.raises(InvalidRequest):
        encoding.decode(cls, body[:-2], lax=True)
    with pytest.raises(InvalidField, match="data"):
        encoding.decode(cls, body[:-2], lax=True, where="data")


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_envelope_rules(encoding: Encoding) -> None:
    def decode(**request: Any) -> Any:
        return decode_envelope(encoding.encode(request), encoding)

    assert decode(action="x").ignored == 0
    assert decode(action="x", y=1).ignored == 1
    with pytest.raises(InvalidField, match="y"):
        decode(v=1, action="x", y=1)
    with pytest.raises(UnsupportedVersion, match="2"):
        decode(v=2, action="x")
    with pytest.raises(InvalidField, match="request_id"):
        decode(v=1, action="x", request_id="x" * 15)
    assert decode(action="x", request_id="1").envelope.request_id == "1"
    with pytest.raises(RequestTooLarge):
        decode_envelope(b" " * (protocol.MAX_MESSAGE_BYTES + 1), encoding)


@quick
@given(body=st.binary(max_size=100))
def test_the_client_and_the_service_agree_on_the_encoding(body: bytes) -> None:
    assert (encoding_of(body) is JSON) == protocol.is_json(body)
    assert not protocol.is_json(msgpack.packb({"action": "x"}))


@quick
@given(tree=maps)
def test_the_client_reads_what_the_service_writes(tree: dict[str, Any]) -> None:
    reply = {"status": "success", "commit_seq": 1, "memory": tree}
    for encoding in ENCODINGS:
        assert protocol.decode_reply(encoding.encode(reply)) == reply


def test_a_string_that_is_never_closed_is_looked_through_once() -> None:
    """Tried anew at each of its quotes, this body would take hours; the deadline of the test is what fails."""
    body = b'{"action":"stats","x":[' + b"1," * 600_000 + b'"' + b'\\"' * 1_000_000
    with pytest.raises(InvalidRequest):
        decode_envelope(body, JSON)

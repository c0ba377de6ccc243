"""Bytes in, bytes out: whatever comes in, the reply is one well-formed map in the encoding of the request."""

from __future__ import annotations

import json
import math
import resource
import struct
import time
from typing import Any

import msgpack
import msgspec
import pytest

from memory_system import protocol
from memory_system.decoding import JSON
from memory_system.models import PARAMS
from tests.support.service import Service, service_test
from tests.support.wire import check_shape, encode, envelope

MSGPACK_GARBAGE = [
    b"", b"\x00", b"\xc0", b"\xc1", b"\xff", b"\x80", b"\x90", b"hello", b"\xa5hello", b"GET / HTTP/1.1\r\n\r\n",
    b"\x81", b"\x81\xa6action", b"\x81\xa6action\xa5stat", b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\x91" * 100_000, b"\x81\xa1a" * 100_000,
    b"\x81\xa6action" + b"\x91" * 100_000, b"\x82\xa6action\xa5stats\xa2zz", b"\x00" * 1_000_000,
    b"\x82\xa6action\xa5stats\xa1z" + b"\x91" * 100_000, b"\x81\x01\x02", b"\x81\xc0\xc0", b"\x81\x90\xa5stats",
    b"\x81\xc4\x06action\xa5stats", b"\x81\xa6action\xc4\x05stats", b"\x81\xa6action\xa2\xff\xfe",
    b"\x82\xa6action\xa5stats\xa2\xff\xfe\xc0", b"\x81\xa6action\xd6\xff\x00\x00\x00\x00", b"\xd6\xff\x00\x00\x00\x00",
    b"\x82\xa6action\xa5stats\xa4data\xd6\xff\x00\x00\x00\x00", b"\x81\xa6action\xa5stats trailing",
    b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00",
]  # fmt: skip
JSON_GARBAGE = [
    b"{", b"{}", b"{]", b"{\"action\"", b'{"action":', b'{"action":"stats"', b'{"action":"stats"}}', b'{"action":1}',
    b'{"action":"stats","zz":1,', b'{"action":"stats","zz":{', b'{"action":"stats",}', b"{'action':'stats'}",
    b'{"action":"stats" "data":{}}', b'{"action":"\\ud800"}', b'{"action":"\\udc00\\ud800"}', b'{"action":"\xff\xfe"}',
    b'{"action":"stats\\u0000"}', b'{"action":"stats","data":{"a":NaN}}', b'{"action":NaN}', b'{"\\ud800":1}',
    b'{"action":"stats","\\ud800":1}', b'{"action":"stats","v":1e999}', b'{"action":"stats","v":' + b"9" * 9999 + b"}",
    b"{" * 100_000, b'{"a":' * 100_000, b'{"action":' + b"[" * 100_000, b'{"action":"stats","z":' + b"[" * 100_000,
    b'  {"action":', b"\r\n\t {", b'{"action":"stats"}\x00', b"{\x00", b'{"a":"' + b"\\" * 99_999,
    b'{"action":"stats"} {"action":"stats"}', b'{"action":"stats","deadline_ms":1e400}',
]  # fmt: skip


@service_test()
async def test_garbage_is_answered(service: Service) -> None:
    bodies = MSGPACK_GARBAGE if service.encoding == "msgpack" else JSON_GARBAGE
    for body in bodies:
        answer = await service(body)
        reply = json.loads(answer) if service.encoding == "json" else msgpack.unpackb(answer, strict_map_key=True)
        check_shape(reply)
        assert reply["status"] == "error", body[:80]
        assert reply["error_code"] in {"invalid_request", "invalid_field", "unknown_action"}, (body[:80], reply)
    assert (await service.ok("stats"))["memories"] == 0


@service_test()
async def test_white_space_before_json(service: Service) -> None:
    body = encode({"action": "stats"}, "json")
    for blank in (b" ", b"\r\n\t ", b" " * 1000):
        reply = json.loads(await service(blank + body))
        assert reply["status"] == "success"
    assert json.loads(await service(body + b" \r\n"))["status"] == "success"


@service_test()
async def test_the_order_of_keys_and_duplicates_do_not_matter(service: Service) -> None:
    if service.encoding == "json":
        body = b'{"data":{"content":"first","content":"last"},"action":"none","action":"add_memory"}'
    else:
        data = b"\x82\xa7content\xa5first\xa7content\xa4last"
        body = b"\x83\xa4data" + data + b"\xa6action\xa4none\xa6action\xaaadd_memory"
    answer = await service(body)
    reply = json.loads(answer) if service.encoding == "json" else msgpack.unpackb(answer)
    assert reply["status"] == "success"
    assert (await service.record(reply["memory_id"]))["content"] == "last"


@service_test()
async def test_the_largest_request(service: Service) -> None:
    room = protocol.MAX_MESSAGE_BYTES - len(encode(envelope("stats", {"x": ""}, v=None), service.encoding)) - 4
    for size, code in ((room, None), (protocol.MAX_MESSAGE_BYTES, "request_too_large")):
        request = envelope("stats", {"x": "a" * size}, v=None)
        reply = await service.send(request)
        assert reply.get("error_code") == code
        assert reply["request_id"] == request["request_id"]
    assert reply["details"]["limit"] == protocol.MAX_MESSAGE_BYTES


def lists_of(item: bytes, encoding: str, action: str, field: str) -> bytes:
    """A request as large as they come, with as many items as fit."""
    count = (protocol.MAX_MESSAGE_BYTES - 200) // (len(item) + (encoding == "json"))
    if encoding == "json":
        items = b"[" + item + (b"," + item) * (count - 1) + b"]"
        return b'{"v":1,"action":"%s","data":{"%s":%s}}' % (action.encode(), field.encode(), items)
    packed = b"\xdd" + struct.pack(">I", count) + item * count
    head = b"\x83\xa1v\x01\xa6action" + msgpack.packb(action) + b"\xa4data\x81"
    return head + bytes(msgpack.packb(field)) + packed


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


@service_test()
async def test_millions_of_small_values_cost_bounded_memory(service: Service) -> None:
    json_ = service.encoding == "json"
    small_map, small_text = (b"{}", b'"a"') if json_ else (b"\x80", b"\xa1a")
    before_mb = peak_mb()
    for action, field, item in (
        ("batch_add_memories", "memories", small_map),
        ("batch_search", "queries", small_map),
        ("batch_get_memories", "memory_ids", small_text),
        ("add_memory", "tags", small_text),
        ("add_memory", "metadata", small_map),
        ("list_memories", "filters", small_map),
        ("stats", "unknown", small_map),
    ):
        answer = await service(lists_of(item, service.encoding, action, field))
        reply = json.loads(answer) if json_ else msgpack.unpackb(answer)
        check_shape(reply)
        assert reply["error_code"] in {"invalid_field", "invalid_request"}
        if reply["error_code"] == "invalid_field":
            assert reply["details"]["field"] in (field, "content")
    assert peak_mb() - before_mb < 320
    assert service.count("memories") == 0


@service_test()
async def test_commas_in_text_are_no_list(service: Service) -> None:
    content = "1," * (32 * 1024)
    reply = await service.ok("batch_add_memories", memories=[{"content": content}] * 120)
    assert reply["count"] == 120


def number(text: str, encoding: str) -> bytes:
    """A number that the libraries refuse to encode."""
    if encoding == "json":
        return text.encode()
    return b"\xcb" + struct.pack(">d", float(text.replace("1e999", "inf").replace("Infinity", "inf")))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
@service_test()
async def test_numbers_that_are_none(service: Service, text: str) -> None:
    marker, relation = 0.123456789, {"source_id": "a", "target_id": "b", "relationship_type": "r"}
    for action, data, field in (
        ("add_memory", {"content": "x", "importance": marker}, "importance"),
        ("add_memory", {"content": "x", "expires_at": marker}, "expires_at"),
        ("add_memory", {"content": "x", "occurred_at": marker}, "occurred_at"),
        ("add_memory", {"content": "x", "metadata": {"a": [marker]}}, "metadata"),
        ("batch_add_memories", {"memories": [{"content": "x", "importance": marker}]}, "memories[0].importance"),
        ("add_relationship", {**relation, "strength": marker}, "strength"),
        ("reinforce_memory", {"memory_id": "a", "reinforcement_factor": marker}, "reinforcement_factor"),
        ("update_memory", {"memory_id": "a", "update_payload": {"importance": marker}}, "update_payload.importance"),
        ("semantic_search", {"query": "x", "min_score": marker}, "min_score"),
        ("list_memories", {"filters": {"importance": {"gte": marker}}}, "filters"),
        ("get_children", {"parent_id": "a", "limit": marker}, "limit"),
    ):  # fmt: skip
        request = encode({"v": 1, "action": action, "data": data}, service.encoding)
        plain = str(marker).encode() if service.encoding == "json" else b"\xcb" + struct.pack(">d", marker)
        body = request.replace(plain, number(text, service.encoding))
        assert body != request
        answer = await service(body)
        reply = json.loads(answer) if service.encoding == "json" else msgpack.unpackb(answer)
        check_shape(reply)
        # JSON has no such numbers: there the body is malformed as a whole.
        codes = {"invalid_field", "invalid_request"} if service.encoding == "json" else {"invalid_field"}
        assert reply["error_code"] in codes, (action, reply)
        if reply["error_code"] == "invalid_field":
            assert reply["details"]["field"] == field, reply
    assert service.count("memories") == 0


STRINGS = {
    "content": "add_memory", "user_id": "create_session", "query": "search_memory", "name": "create_context_group",
    "memory_id": "get_memory", "summary": "end_session", "request_id": "get_request_status",
}  # fmt: skip


@pytest.mark.parametrize("field", STRINGS)
@service_test()
async def test_text_that_is_none(service: Service, field: str) -> None:
    action, marker = STRINGS[field], "MARKER"
    if service.encoding == "json":
        bad = [
            b'"\\ud800"',
            b'"a\\udfffb"',
            b'"\\ude00\\ud83d"',
            b'"\xff"',
            b'"\xed\xa0\x80"',
            b'"\\u0000"',
            b'"\xc0\x80"',
            b"1",
            b"[]",
        ]
    else:
        texts = [b"\xed\xa0\x80", b"\xff", b"\xc3", b"a\x00b", b"\xc0\x80", b"\xf4\x90\x80\x80"]
        bad = [bytes([0xA0 | len(text)]) + text for text in texts]
        bad += [b"\xc4\x01a", b"\xd4\x05a", b"\xd6\xff\x00\x00\x00\x00", b"\x01", b"\x80", b"\xc2"]
    plain = encode(marker, service.encoding)
    request = encode({"v": 1, "action": action, "data": {field: marker}}, service.encoding)
    for text in bad:
        answer = await service(request.replace(plain, text))
        reply = json.loads(answer) if service.encoding == "json" else msgpack.unpackb(answer)
        check_shape(reply)
        assert reply["error_code"] in {"invalid_field", "invalid_request"}, (text, reply)
    assert service.count("memories") == service.count("context_groups") == 0


@service_test()
async def test_metadata_holds_json_types_only(service: Service) -> None:
    marker = "MARKER"
    request = encode(
        {"v": 1, "action": "add_memory", "data": {"content": "x", "metadata": {"k": marker}}}, service.encoding
    )
    if service.encoding == "json":
        bad = [b'"\\ud800"', b'"\\u0000"', b'{"\\u0000":1}', b"18446744073709551616", b"9223372036854775808", b"NaN",
               b"-9223372036854775809", b"1e999", b"9" * 1000]  # fmt: skip
    else:
        bad = [b"\xc4\x01a", b"\xd6\xff\x00\x00\x00\x00", b"\xd4\x05a", b"\x81\x01\x02", b"\x81\xc0\x02",
               b"\x81\xc4\x01a\x02", b"\xcf" + b"\xff" * 8, b"\xcf\x80" + b"\x00" * 7, b"\xcb\x7f\xf8" + b"\x00" * 6,
               b"\xa3\xed\xa0\x80",
               b"\xa1\x00", b"\x81\xa1\x00\xc0", b"\xc1", b"\xc7\x0c\xff" + b"\xff" * 12]  # fmt: skip
    for value in bad:
        body = request.replace(encode(marker, service.encoding), value)
        answer = await service(body)
        reply = json.loads(answer) if service.encoding == "json" else msgpack.unpackb(answer)
        check_shape(reply)
        assert reply["error_code"] in {"invalid_field", "invalid_request"}, (value, reply)
        if service.encoding == "msgpack" and reply["error_code"] == "invalid_field":
            assert reply["details"]["field"] == "metadata", (value, reply)
    assert service.count("memories") == 0


WRONG: dict[str, list[Any]] = {
    "str": [1, 1.5, True, [], {}, None], "int": ["1", 1.5, True, [], {}, 2**64 - 1],
    "float": ["1", True, [], {}, 1e300], "bool": ["true", 1, 0, [], {}, None], "list": ["x", 1, {}, [1], [None], [[]]],
    "raw": ["x", 1, True, [], [1]],
}  # fmt: skip


def kind_of(annotation: Any) -> str:
    """What a field takes: the first key of WRONG that its type names."""
    text = repr(msgspec.inspect.type_info(annotation))
    for kind, mark in (
        ("raw", "RawType"),
        ("list", "ListType"),
        ("raw", "StructType"),
        ("bool", "BoolType"),
        ("float", "FloatType"),
        ("int", "IntType"),
    ):
        if mark in text:
            return kind
    return "str"


def nullable(annotation: Any) -> bool:
    return "NoneType" in repr(msgspec.inspect.type_info(annotation))


GOOD: dict[str, Any] = {
    "user_id": "u", "content": "c", "memory_id": "m", "parent_id": "p", "source_id": "a", "target_id": "b",
    "relationship_type": "r", "name": "n", "group_id": 1, "query": "q", "request_id": "x" * 16,
    "memories": [{"content": "c"}], "memory_ids": ["m"], "queries": [{"query": "q"}],
    "update_payload": {"content": "c"}, "records": [{"kind": "group", "name": "g", "created_at": 1.0}],
}  # fmt: skip


@pytest.mark.parametrize("action", sorted(PARAMS))
@service_test()
async def test_wrong_types_are_named_and_nothing_is_stored(service: Service, action: str) -> None:
    fields = {field.encode_name: field for field in msgspec.structs.fields(PARAMS[action])}
    required = {name: GOOD[name] for name, field in fields.items() if field.required}
    if action == "update_memory":
        required["update_payload"] = GOOD["update_payload"]
    for name, field in fields.items():
        wrong = WRONG[kind_of(field.type)]
        for value in wrong:
            if value is None and nullable(field.type):
                continue
            data = {**required, name: value}
            if name == "update_data":
                data.pop("update_payload")
            reply = await service.ask(action, **data)
            if name == "filters" and reply.get("error_code") == "invalid_filter":
                continue
            assert reply.get("error_code") == "invalid_field", (name, value, reply)
            assert reply["details"]["field"].startswith(name), (name, value, reply)
    for table in ("memories", "context_groups", "relationships", "idempotency", "namespaces"):
        assert service.count(table) == 0, table


@service_test()
async def test_every_error_reply_can_be_encoded(service: Service) -> None:
    """Error texts quote what the caller sent; they must survive both encodings."""
    for text in ("\u2028", "🗝", "\x7f", '"', "\\", "`", "`x`", "a" * 5000, "\n", "$", " - at `$.x`"):
        for request in (
            {"action": text},
            {"v": 1, "action": "stats", text: 1},
            {"v": 1, "action": "stats", "data": {text: 1}},
            {"v": 1, "action": "list_memories", "data": {"filters": {text: 1}}},
            {"v": 1, "action": "list_memories", "data": {"filters": {"content": {text: 1}}}},
            {"v": 1, "action": "list_memories", "data": {"sort_field": text}},
            {"v": 1, "action": "get_memory", "data": {"memory_id": text}},
            {"v": 1, "action": "list_memories", "data": {"cursor": text}},
            {"v": 1, "action": "stats", "request_id": text},
            {"v": 1, "action": "stats", "namespace": text, "data": 1},
        ):
            reply = await service.send(request)
            assert len(reply.get("message", "")) < 12_000


@service_test()
async def test_floats_survive_exactly(service: Service) -> None:
    values = [0.1, 1e-308, 5e-324, 1.7976931348623157e308, -0.0, 2.0**53 + 1, 1 / 3]
    record = await service.record(await service.add(metadata={"values": values}))
    assert record["metadata"]["values"] == values
    assert math.copysign(1.0, record["metadata"]["values"][4]) == -1.0


@service_test()
async def test_a_deeply_nested_body_is_refused_quickly(service: Service) -> None:
    began_s = time.process_time()
    for levels in (17, 100, 1000, 10_000):
        opened, closed = (
            (b"[" * levels, b"]" * levels) if service.encoding == "json" else (b"\x91" * levels + b"\xc0", b"")
        )
        for field, action in (("metadata", "add_memory"), ("filters", "list_memories"), ("x", "stats")):
            if service.encoding == "json":
                body = b'{"v":1,"action":"%s","data":{"%s":%s%s}}' % (action.encode(), field.encode(), opened, closed)
            else:
                head = b"\x83\xa1v\x01\xa6action" + bytes(msgpack.packb(action)) + b"\xa4data\x81"
                body = head + bytes(msgpack.packb(field)) + opened
            answer = await service(body)
            reply = json.loads(answer) if service.encoding == "json" else msgpack.unpackb(answer)
            check_shape(reply)
            assert reply["error_code"] in {"invalid_field", "invalid_request"}
    assert time.process_time() - began_s < 10


def test_an_empty_body_is_msgpack() -> None:
    assert not protocol.is_json(b"")
    assert not protocol.is_json(b" " * 100)
    assert protocol.is_json(b" " * 100 + b"{")
    assert protocol.is_json(b"\t{")
    assert JSON.name == "json"

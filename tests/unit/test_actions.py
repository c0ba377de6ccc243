"""Functions as actions: what their annotations admit, what is answered, and that nothing crashes it."""

from __future__ import annotations

import asyncio
import json
import math
import resource
import struct
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_system import protocol
from memory_system.actions import Actions, Request, Span
from memory_system.envelope import MAX_ITEMS, MAX_VALUES, read_request
from memory_system.errors import Busy, ConfigError, InvalidField, InvalidRequest, MemoryNotFound
from memory_system.fields import Fields, expected, reader_of
from tests.support.wire import ENCODINGS, ERROR_FIELDS, encode

PEER = b"peer"


@dataclass(frozen=True)
class Step:
    text: str
    minutes: Annotated[int, Span(1, 60)] = 5
    tags: list[str] = field(default_factory=list)


async def plan(
    *,
    goal: Annotated[str, Span(1, 20)],
    steps: list[Step] | None = None,
    kind: Literal["walk", "ride"] = "walk",
    share: Annotated[float, Span(0, 1)] = 0.5,
    limit: Annotated[int, Span(1, 1000)] = 10,
    deep: bool = False,
    extra: dict[str, Any] | None = None,
    either: str | list[int] = "",
) -> dict[str, Any]:
    return {"got": repr((goal, steps, kind, share, limit, deep, extra, either))}


def make_actions(**handlers: Callable[..., Any]) -> Actions:
    return Actions({"plan": plan, **handlers})


def ask(actions: Actions, body: bytes, encoding: str = "msgpack") -> dict[str, Any]:
    reply = asyncio.run(actions.answer(body, PEER))
    decoded = json.loads(reply) if encoding == "json" else msgpack.unpackb(reply)
    if decoded["status"] == "error":
        assert set(decoded) - {"request_id"} == ERROR_FIELDS
        assert decoded["error_code"] in protocol.ERROR_CODES
    else:
        assert decoded["status"] == "success"
        assert not decoded.keys() & (ERROR_FIELDS - {"status"})
    return decoded


def send(actions: Actions, action: str, data: Any = None, encoding: str = "msgpack", **around: Any) -> dict[str, Any]:
    request = {"v": 1, "action": action, "data": data, **around}
    return ask(
        actions, encode({name: value for name, value in request.items() if value is not None}, encoding), encoding
    )


# -- fields -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_fields_become_arguments_of_their_types(encoding: str) -> None:
    steps = [{"text": "out"}, {"text": "home", "minutes": 9, "tags": ["late"]}]
    data = {"goal": "sea", "steps": steps, "kind": "ride", "share": 1, "limit": 3, "deep": True, "either": [1, 2]}
    reply = send(make_actions(), "plan", data, encoding)
    made = [Step("out"), Step("home", 9, ["late"])]
    assert reply["got"] == repr(("sea", made, "ride", 1.0, 3, True, None, [1, 2]))
    assert send(make_actions(), "plan", {"goal": "x"})["got"] == repr(("x", None, "walk", 0.5, 10, False, None, ""))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("data", "path", "words"),
    [
        ({}, "goal", "goal is required"),
        ({"goal": 1}, "goal", "expected text of 1 to 20 characters, got an integer"),
        ({"goal": ""}, "goal", "expected text of 1 to 20 characters"),
        ({"goal": "x" * 21}, "goal", "of 1 to 20 characters"),
        ({"goal": None}, "goal", "expected text of 1 to 20 characters, got null"),
        ({"limit": 0}, "limit", "expected an integer from 1 to 1000"),
        ({"limit": 1001}, "limit", "from 1 to 1000"),
        ({"limit": "5"}, "limit", "got text"),
        ({"limit": True}, "limit", "got a boolean"),
        ({"limit": 1.0}, "limit", "got a number"),
        ({"limit": None}, "limit", "got null"),
        ({"share": 1.01}, "share", "expected a number from 0 to 1"),
        ({"share": "1"}, "share", "got text"),
        ({"share": True}, "share", "got a boolean"),
        ({"deep": 1}, "deep", "expected true or false, got an integer"),
        ({"kind": "rid"}, "kind", "expected one of walk, ride; did you mean ride?"),
        ({"kind": 1}, "kind", "expected one of walk, ride"),
        ({"extra": []}, "extra", "expected a map, got a list"),
        ({"either": 1}, "either", "expected text or a list, got an integer"),
        ({"either": [1, "x"]}, "either[1]", "expected an integer, got text"),
        ({"steps": {}}, "steps", "expected a list, got a map"),
        ({"steps": [{}]}, "steps[0].text", "steps[0].text is required"),
        ({"steps": [{"text": "a"}, {"text": 1}]}, "steps[1].text", "expected text, got an integer"),
        ({"steps": [{"text": "a", "minutes": 61}]}, "steps[0].minutes", "expected an integer from 1 to 60"),
        ({"steps": [{"text": "a", "tags": ["a", 1]}]}, "steps[0].tags[1]", "expected text"),
        ({"steps": [{"text": "a", "minuts": 1}]}, "steps[0].minuts", "did you mean minutes?"),
        ({"steps": ["a"]}, "steps[0]", "expected a map, got text"),
        ({"gaol": "x"}, "gaol", "unknown field gaol; did you mean goal?"),
        ({"qqqqqq": 1}, "qqqqqq", "unknown field qqqqqq"),
    ],
)
def test_what_is_wrong_is_named(encoding: str, data: dict[str, Any], path: str, words: str) -> None:
    reply = send(make_actions(), "plan", data if data == {} or "goal" in data else {"goal": "x", **data}, encoding)
    assert (reply["error_code"], reply["retryable"]) == ("invalid_field", False)
    assert reply["details"]["field"] == path
    assert words in reply["message"], reply["message"]


def test_a_suggestion_is_there_for_machines_too() -> None:
    assert send(make_actions(), "plan", {"goal": "x", "limt": 5})["details"] == {"field": "limt", "suggestion": "limit"}
    assert send(make_actions(), "plan", {"goal": "x", "kind": "wak"})["details"]["suggestion"] == "walk"


def test_a_choice_is_of_one_type() -> None:
    def pick(*, level: Literal[1, 2]) -> dict[str, Any]:
        return {"level": level}

    assert send(make_actions(pick=pick), "pick", {"level": 1})["level"] == 1
    for value in (True, 1.0, "1", 3):
        reply = send(make_actions(pick=pick), "pick", {"level": value})
        assert reply["message"] == "level: expected one of 1, 2", value


def test_legacy_callers_may_send_more_than_is_known() -> None:
    request = {"action": "plan", "token": 1, "data": {"goal": "x", "mood": 1, "steps": [{"text": "a", "more": 1}]}}
    assert ask(make_actions(), encode(request, "json"), "json")["status"] == "success"
    for body in ({**request, "v": 1}, {"v": 1, "action": "plan", "data": request["data"]}):
        assert ask(make_actions(), encode(body, "msgpack"))["error_code"] == "invalid_field"


def test_text_that_may_not_be_blank() -> None:
    name = Annotated[str, Span(1, 20, blank=False)]
    read = reader_of(name | None)
    assert expected(name) == "text of 1 to 20 characters that is not blank"
    assert (read(" a ", "name", True), read(None, "name", True)) == (" a ", None)
    for blank in ("", " ", "\n\t", "\u3000"):
        with pytest.raises(InvalidField, match="name: expected text of 1 to 20 characters that is not blank") as caught:
            read(blank, "name", True)
        assert caught.value.field == "name"


def test_what_no_field_can_be_is_refused_when_the_server_is_built() -> None:
    def untyped(*, a) -> None: ...  # type: ignore[no-untyped-def]

    def packed(*args: str) -> None: ...

    def keywords(**more: str) -> None: ...

    def positional(a: str, /) -> None: ...

    def foreign(*, a: bytes) -> None: ...

    def keys(*, a: dict[int, str]) -> None: ...

    def nested(*, a: list[set[int]] | None) -> None: ...

    for handler, part in (
        (untyped, "annotation"), (packed, "args"), (keywords, "more"), (positional, "by its name"), (foreign, "bytes"),
        (keys, "keys of a map"), (nested, "set"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=part):
            make_actions(other=handler)


def test_methods_partly_positional_parameters_and_callable_objects_are_handlers() -> None:
    class Counter:
        def __init__(self) -> None:
            self.sum = 0

        def add(self, amount: int, times: int = 1) -> dict[str, Any]:
            self.sum += amount * times
            return {"sum": self.sum}

        async def __call__(self, *, amount: int) -> Mapping[str, Any]:
            return self.add(amount)

    counter = Counter()
    actions = make_actions(add=counter.add, call=counter)
    assert send(actions, "add", {"amount": 2, "times": 3})["sum"] == 6
    assert send(actions, "call", {"amount": 1})["sum"] == 7


def test_a_handler_may_ask_for_the_request() -> None:
    seen: list[Request] = []

    def note(request: Request, *, n: int = 0) -> None:
        seen.append(request)

    actions = make_actions(note=note)
    around = {"request_id": "a" * 16, "agent_id": "ada", "session_id": "s", "namespace": "n", "deadline_ms": 30_000}
    assert send(actions, "note", {"n": 1}, **around) == {"status": "success", "request_id": "a" * 16}
    (request,) = seen
    assert (request.request_id, request.agent_id, request.session_id) == ("a" * 16, "ada", "s")
    assert (request.namespace, request.legacy, request.peer) == ("n", False, PEER)
    assert request.deadline_s is not None and 0 < request.deadline_s - time.monotonic() <= 30.0
    assert send(actions, "note", {"request": {}})["error_code"] == "invalid_field"
    assert ask(actions, encode({"action": "note"}, "msgpack"))["status"] == "success"
    assert (seen[1].namespace, seen[1].legacy, seen[1].deadline_s) == ("default", True, None)


# -- envelope ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("around", "code", "field_name"),
    [
        ({"v": 2}, "unsupported_version", None),
        ({"v": "1"}, "unsupported_version", None),
        ({"v": True}, "unsupported_version", None),
        ({"action": "pla"}, "unknown_action", None),
        ({"action": 1}, "invalid_field", "action"),
        ({"action": ""}, "invalid_field", "action"),
        ({"data": []}, "invalid_field", "data"),
        ({"data": "x"}, "invalid_field", "data"),
        ({"request_id": "short"}, "invalid_field", "request_id"),
        ({"request_id": 1}, "invalid_field", "request_id"),
        ({"request_id": "x" * 129}, "invalid_field", "request_id"),
        ({"agent_id": "a\nb"}, "invalid_field", "agent_id"),
        ({"namespace": ""}, "invalid_field", "namespace"),
        ({"session_id": []}, "invalid_field", "session_id"),
        ({"deadline_ms": "1"}, "invalid_field", "deadline_ms"),
        ({"deadline_ms": -1}, "invalid_field", "deadline_ms"),
        ({"deadline_ms": 86_400_001}, "invalid_field", "deadline_ms"),
        ({"deadline_ms": 0}, "deadline_exceeded", None),
        ({"agentid": "x"}, "invalid_field", "agentid"),
    ],
)
def test_the_envelope_is_checked(encoding: str, around: dict[str, Any], code: str, field_name: str | None) -> None:
    request = {"v": 1, "action": "plan", "data": {"goal": "x"}, "request_id": "r" * 16, **around}
    reply = ask(make_actions(), encode(request, encoding), encoding)
    assert reply["error_code"] == code, reply
    assert reply["details"].get("field") == field_name
    if "request_id" not in around:
        assert reply["request_id"] == "r" * 16


def test_an_unknown_action_has_a_suggestion() -> None:
    reply = send(make_actions(), "plam")
    assert reply["details"] == {"suggestion": "plan"}
    assert "did you mean plan?" in reply["message"]
    assert "there are plan" in send(make_actions(), "zzz")["message"]


def test_the_reply_comes_in_the_encoding_of_the_request() -> None:
    assert ask(make_actions(), b'  \r\n{"action": "plan", "data": {"goal": "\xc3\xa9"}}', "json")["status"] == "success"
    assert ask(make_actions(), b'{"action": 1}', "json")["error_code"] == "invalid_field"


# -- bytes from anybody -----------------------------------------------------------------------------------------

GARBAGE = [
    b"", b"\xc1", b"\x80", b"\x90", b"\xc0", b"\x01", b"\xff" * 1000, b"\x81", b"\x81\xa6action",
    b"\xdf\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\x91" * 100_000, b"\x81\xa1a" * 100_000, b"\x81\x01\x02",
    b"\x81\xc4\x01a\x02", b"\x81\x90\x01", b"\x81\xa6action\xd6\xff\x00\x00\x00\x00", b"\x81\xa6action\xc1",
    b"\x80" * 2, b"\x81\xa6action\xa1\xff", b"\xc9\x00\x00\x00\x01\x05a",
    b"{", b"{}", b'{"a"', b'{"action":NaN}', b'{"action":' + b"[" * 100_000, b'{"a":' * 100_000, b"{\x00", b"\t {",
    b'{"action":"plan"} x', b'{"action":"\xff"}', b'{"action":"\\ud800"}', b'{"a":"' + b"\\" * 99_999,
    b'{"action":' + b"9" * 10_000 + b"}", b'{"action":1e999}', b'{"\\u0000":1}', b"{\xff\xfe", b'{"action":"plan",}',
]  # fmt: skip


@pytest.mark.parametrize("body", GARBAGE, ids=lambda body: repr(body[:24]))
def test_garbage_is_answered(body: bytes) -> None:
    reply = ask(make_actions(), body, "json" if protocol.is_json(body) else "msgpack")
    assert reply["error_code"] in {"invalid_request", "invalid_field"}, reply


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"{", b'{"action":"plan","data":', b"\x82\xa6action\xa4plan\xa4data"]),
)
def test_any_bytes_are_answered(tail: bytes, head: bytes) -> None:
    body = head + tail
    ask(make_actions(), body, "json" if protocol.is_json(body) else "msgpack")


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["goal", "steps", "kind", "share", "limit", "extra", "either", "x"]), values))
def test_any_values_are_answered_and_what_is_taken_has_its_type(data: dict[str, Any]) -> None:
    taken: list[dict[str, Any]] = []

    def keep(
        *, goal: str = "", share: float = 0.0, limit: int = 0, extra: dict[str, Any] | None = None,
        either: str | list[int] = "", kind: Literal["walk"] = "walk", steps: list[Step] | None = None, x: Any = None,
    ) -> None:  # fmt: skip
        taken.append({"goal": goal, "share": share, "limit": limit, "either": either})

    reply = ask(Actions({"keep": keep}), bytes(msgpack.packb({"v": 1, "action": "keep", "data": data})))
    assert reply.get("error_code", "invalid_field") == "invalid_field"
    for each in taken:
        assert (type(each["goal"]), type(each["share"]), type(each["limit"])) == (str, float, int)
        assert math.isfinite(each["share"])


def body_of(data: bytes, encoding: str) -> bytes:
    if encoding == "json":
        return b'{"v":1,"request_id":"rrrrrrrrrrrrrrrr","action":"plan","data":{"goal":"x","extra":%s}}' % data
    head = {"v": 1, "request_id": "r" * 16, "action": "plan"}
    packed = bytes(msgpack.packb(head))[1:]
    return b"\x84" + packed + b"\xa4data\x82\xa4goal\xa1x\xa5extra" + data


def test_a_request_of_many_small_values_costs_little_memory() -> None:
    room = protocol.MAX_MESSAGE_BYTES - 200
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
    chain = b"[" * 400 + b"]" * 400
    for encoding, data in (
        ("json", b'{"a":[' + b"{}," * (room // 3) + b"{}]}"),
        ("json", b'{"a":[' + b",".join([chain] * (room // 801)) + b"]}"),
        ("json", b'{"a":' + b"[" * (room // 2) + b"]" * (room // 2) + b"}"),
        ("msgpack", b"\x81\xa1a\xdd" + struct.pack(">I", room) + b"\x80" * room),
        ("msgpack", b"\x81\xa1a\xdd" + struct.pack(">I", room) + b"\x01" * room),
        ("msgpack", b"\x81\xa1a" + b"\xdd\x00\x00\x27\x10" * 1000),
        ("msgpack", b"\x81\xa1a\xdc\x27\x10" + (b"\x91" * 800 + b"\xc0") * 10_000),
        ("msgpack", b"\x81\xa1a\xdc\x03\xe8" + (b"\xdc\x20\x00" + b"\x80" * 8192) * 1000),
    ):
        began_s = time.process_time()
        reply = ask(make_actions(), body_of(data, encoding), encoding)
        assert reply["error_code"] in {"invalid_request", "invalid_field"}, (encoding, data[:20])
        assert time.process_time() - began_s < 5.0, (encoding, data[:20])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0 - before_mb < 200


def test_a_string_that_is_never_closed_takes_no_longer_than_others() -> None:
    for body in (
        b'{"action":"plan","data":[' + b"1," * 300_000 + b'"' + b'\\"' * 3_000_000,
        b'{"action":"plan","data":[' + b"1," * 300_000 + b'"' + b"\\" * 3_000_001,
    ):
        began_s = time.process_time()
        assert ask(make_actions(), body, "json")["error_code"] == "invalid_request"
        assert time.process_time() - began_s < 5.0


def test_commas_in_text_are_no_values() -> None:
    extra = {"prose": "so, [or] {not}, " * 100_000}
    for encoding in ENCODINGS:
        assert send(make_actions(), "plan", {"goal": "x", "extra": extra}, encoding)["status"] == "success"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sizes_at_the_limits(encoding: str) -> None:
    def nested(levels: int) -> dict[str, Any]:
        return {"a": nested(levels - 1)} if levels > 1 else {}

    for extra, accepted in (
        ({"a": [0] * MAX_ITEMS}, True),
        ({"a": [0] * (MAX_ITEMS + 1)}, False),
        ({str(number): 0 for number in range(MAX_ITEMS + 1)}, False),
        ({"a": [[0] * (MAX_ITEMS // 2)] * (MAX_VALUES // MAX_ITEMS)}, True),
        ({"a": [[0] * MAX_ITEMS] * (MAX_VALUES // MAX_ITEMS + 1)}, False),
        (nested(protocol.MAX_DEPTH - 1), True),
        (nested(protocol.MAX_DEPTH + 1), False),
    ):
        reply = send(make_actions(), "plan", {"goal": "x", "extra": extra}, encoding, request_id="r" * 16)
        assert (reply["status"] == "success") is accepted, (str(extra)[:50], str(reply)[:200])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_request_over_the_limit_is_told_so_under_its_id(encoding: str) -> None:
    data = {"goal": "x", "extra": {"a": "y" * protocol.MAX_MESSAGE_BYTES}}
    reply = send(make_actions(), "plan", data, encoding, request_id="r" * 16)
    assert (reply["error_code"], reply["request_id"]) == ("request_too_large", "r" * 16)
    assert reply["details"]["limit"] == protocol.MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    ("encoding", "value"),
    [
        ("json", b'"\\ud800"'), ("json", b'"\\u0000"'), ("json", b"18446744073709551615"), ("json", b"1e999"),
        ("json", b'{"\\udfff":1}'), ("msgpack", b"\xc4\x01a"), ("msgpack", b"\xd6\xff\x00\x00\x00\x00"),
        ("msgpack", b"\xa1\x00"), ("msgpack", b"\xcf" + b"\xff" * 8), ("msgpack", b"\xcb\x7f\xf8" + b"\x00" * 6),
        ("msgpack", b"\xd4\x05a"), ("msgpack", b"\x81\xa1\x00\x01"),
    ],
)  # fmt: skip
def test_values_that_could_not_be_sent_on_are_named(encoding: str, value: bytes) -> None:
    data = b'{"k":%s}' % value if encoding == "json" else b"\x81\xa1k" + value
    reply = ask(make_actions(), body_of(data, encoding), encoding)
    assert (reply["error_code"], reply["details"]["field"]) == ("invalid_field", "extra"), reply
    assert reply["request_id"] == "r" * 16


# -- replies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_errors_of_handlers(encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    async def late(*, what: str) -> dict[str, Any]:
        await asyncio.sleep(0)
        return early(what=what)

    def early(*, what: str) -> dict[str, Any]:
        raise {
            "busy": Busy("wait", retry_after_ms=5),
            "missing": MemoryNotFound("no such memory", memory_id="m"),
            "defect": ZeroDivisionError("1 / 0"),
            "config": ConfigError("not for the wire"),
            "details": InvalidField("x", "bad", value=object()),
            "surrogate": InvalidRequest("half a \ud800"),
        }[what]

    actions = make_actions(early=early, late=late)
    for action in ("early", "late"):
        for what, code in (
            ("busy", "busy"),
            ("missing", "memory_not_found"),
            ("defect", "internal_error"),
            ("config", "internal_error"),
            ("details", "invalid_field"),
            ("surrogate", "invalid_request"),
        ):
            reply = send(actions, action, {"what": what}, encoding, request_id="r" * 16)
            assert (reply["error_code"], reply["request_id"]) == (code, "r" * 16)
            assert "1 / 0" not in reply["message"]
    assert send(actions, "late", {"what": "busy"}, encoding)["details"] == {"retry_after_ms": 5}
    assert sum("internal_error" in record.getMessage() for record in caplog.records) == 4
    assert actions.traffic.requests() == {
        "busy": 3, "memory_not_found": 2, "internal_error": 4, "invalid_field": 2, "invalid_request": 2
    }  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("result", "code"),
    [
        ({"a": object()}, "internal_error"),
        ({"a": "\ud800"}, "internal_error"),
        ({"status": "fine"}, "internal_error"),
        ({"message": "done"}, "internal_error"),
        ([1], "internal_error"),
        ("text", "internal_error"),
        ({"a": "x" * protocol.MAX_MESSAGE_BYTES}, "reply_too_large"),
        ({"a": [1, None, {"b": 2.5}]}, None),
        ({}, None),
        (None, None),
    ],
)
def test_what_handlers_return(encoding: str, result: Any, code: str | None) -> None:
    reply = send(make_actions(give=lambda: result), "give", None, encoding)
    assert reply.get("error_code") == code, reply
    if code is None:
        assert reply == {"status": "success", **(result or {})}


def test_numbers_that_json_lacks_are_a_defect_of_the_handler() -> None:
    assert send(make_actions(give=lambda: {"a": math.nan}), "give", None, "json")["error_code"] == "internal_error"


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_slow_handler_holds_up_no_other() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def slow() -> dict[str, Any]:
            await gate.wait()
            return {"slow": True}

        actions = make_actions(slow=slow, quick=lambda: {"quick": True})
        waiting = asyncio.create_task(actions.answer(encode({"action": "slow"}, "msgpack")))
        await asyncio.sleep(0)
        assert msgpack.unpackb(await actions.answer(encode({"action": "quick"}, "msgpack")))["quick"]
        assert not waiting.done()
        gate.set()
        assert msgpack.unpackb(await waiting)["slow"]

    run(scenario)


def test_what_is_cancelled_is_answered_and_one_that_resists_is_left() -> None:
    async def scenario() -> None:
        async def forever(*, stubborn: bool) -> None:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                if stubborn:
                    await asyncio.sleep(3600)
                raise

        actions, replies = make_actions(forever=forever), []
        for stubborn in (False, True):
            body = encode({"action": "forever", "data": {"stubborn": stubborn}}, "msgpack")
            actions.handle(body, replies.append)
        await asyncio.sleep(0)
        began_s = time.monotonic()
        await actions.cancel()
        assert time.monotonic() - began_s < 5
        await asyncio.sleep(0)
        assert [msgpack.unpackb(reply)["error_code"] for reply in replies] == ["shutting_down"]
        await actions.cancel()

    run(scenario)


def test_fields_may_be_used_alone() -> None:
    fields = Fields.of(plan)
    assert fields.read({"goal": "x", "limit": 2}, strict=True) == {"goal": "x", "limit": 2}
    assert repr(Fields.of_dataclass(Step)) == "Fields(text, minutes=, tags=)"
    assert read_request(b'{"action":"a"}').data == {}

"""What an event is: bounded, encodable, and read as publishers of the mesh commonly write it."""

from __future__ import annotations

import json
import math
from typing import Any
from unittest.mock import ANY

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_system.events import (
    MAX_DETAILS_CHARS,
    MAX_DETAILS_CONTAINERS,
    MAX_EVENT_BYTES,
    MAX_MESSAGE_CHARS,
    MAX_NAME_CHARS,
    SEVERITIES,
    WITHHELD,
    MalformedEvent,
    at_least,
    bounded_details,
    decode_message,
    encode_message,
    kind_of,
    make_event,
    parse_event,
)
from memory_system.health.reports import Batch, read_report
from memory_system.outbox import MAX_BATCH_EVENTS, Outbox, encode_event

NOW_S = 1_700_000_000.0
ANY_TEXT = st.text(st.characters(), max_size=40)  # lone surrogates too
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)


def test_a_full_event_is_read_as_it_is() -> None:
    sent = make_event("planner", "lost", "gone", "warning", request_id="r", details={"n": 1}, now_s=5.0, count=3)
    assert parse_event(sent.fields(), NOW_S) == sent


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"agent_id": "a", "error": "x"}, {"agent": "a", "message": "x", "error_type": "unknown"}),
        ({"source": "a", "code": 404}, {"error_type": "404", "message": ""}),
        ({"agent": "a", "type": "t", "level": "WARN"}, {"error_type": "t", "severity": "warning"}),
        ({"agent": "a", "msg": "m", "severity": "Fatal"}, {"severity": "critical"}),
        ({"agent": "a", "msg": "m"}, {"severity": "error", "timestamp": NOW_S, "count": 1, "details": {}}),
        ({"agent": "a", "msg": "m", "timestamp": "2023-11-14T22:13:20Z"}, {"timestamp": NOW_S}),
        ({"agent": "a", "msg": "m", "ts": "2023-11-14T22:13:20"}, {"timestamp": NOW_S}),
        ({"agent": "a", "msg": "m", "time": "12.5"}, {"timestamp": 12.5}),
        ({"agent": "a", "msg": "m", "details": "text"}, {"details": {"value": "text"}}),
        ({"agent": "a", "msg": "m", "count": True}, {"count": 1}),
        ({"agent": "a", "msg": "m", "details": {"query": "secret", "n": 1}}, {"details": {"query": WITHHELD, "n": 1}}),
    ],
)
def test_names_and_values_of_the_mesh(value: dict[str, Any], expected: dict[str, Any]) -> None:
    event = parse_event(value, NOW_S)
    assert {name: getattr(event, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("value", "reason", "agent"),
    [
        ([], "a JSON object, not an array", None),
        (None, "not null", None),
        (True, "not a boolean", None),
        (7, "not a number", None),
        ("x", "not a string", None),
        ({}, "no agent", None),
        ({"agent": "  "}, "no agent", None),
        ({"agent": "a"}, "neither error_type nor message", "a"),
    ],
)
def test_what_is_no_event_is_told_with_its_sender(value: object, reason: str, agent: str | None) -> None:
    with pytest.raises(MalformedEvent, match=reason) as caught:
        parse_event(value, NOW_S)
    assert caught.value.agent == agent


@pytest.mark.parametrize(
    ("fields", "severity", "timestamp", "sent"),
    [
        ({"severity": "loud"}, "error", NOW_S, {"severity_sent": "loud"}),
        ({"level": 3}, "error", NOW_S, {"severity_sent": "3"}),
        ({"level": "x" * 999}, "error", NOW_S, {"severity_sent": "x" * 63 + "…"}),
        ({"timestamp": "yesterday"}, "error", NOW_S, {"timestamp_sent": "yesterday"}),
        ({"timestamp": "0001-01-01T00:00+23:00"}, "error", NOW_S, {"timestamp_sent": "0001-01-01T00:00+23:00"}),
        ({"timestamp": -1}, "error", NOW_S, {"timestamp_sent": "-1"}),
        ({"timestamp": float("nan")}, "error", NOW_S, {"timestamp_sent": "nan"}),
        ({"timestamp": NOW_S * 1000 - 5000}, "error", NOW_S - 5, {}),  # milliseconds
        ({"timestamp": NOW_S * 1e6}, "error", NOW_S, {"timestamp_sent": "1700000000000000.0"}),
        ({"timestamp": NOW_S + 59}, "error", NOW_S + 59, {}),
        ({"timestamp": NOW_S + 61}, "error", NOW_S, {"timestamp_sent": "1700000061.0"}),
        ({"timestamp": (NOW_S + 61) * 1000}, "error", NOW_S, {"timestamp_sent": "1700000061000.0"}),
        ({"timestamp": "2123-11-14T22:13:20Z", "severity": "warn"}, "warning", NOW_S, {"timestamp_sent": ANY}),
    ],
)
def test_an_unusable_severity_or_time_is_no_reason_to_lose_an_event(
    fields: dict[str, Any], severity: str, timestamp: float, sent: dict[str, Any]
) -> None:
    event = parse_event({"agent": "a", "msg": "m", "details": {"n": 1}, **fields}, NOW_S)
    assert (event.severity, event.timestamp, event.details) == (severity, timestamp, {"n": 1, **sent})
    assert parse_event(event.fields(), NOW_S) == event


def test_what_was_sent_is_kept_beside_details_that_are_too_long() -> None:
    sent = {"agent": "a", "msg": "m", "timestamp": 10**400, "details": {"n": "d" * MAX_DETAILS_CHARS}}
    details = parse_event(sent, NOW_S).details
    assert details["truncated"] is True
    assert details["timestamp_sent"].startswith("1000")


def test_a_reader_takes_the_times_that_the_manager_took() -> None:
    event = make_event("a", "t", "m", now_s=NOW_S + 1000)
    assert parse_event(event.fields(), NOW_S, ahead_s=math.inf) == event


def test_our_own_reporters_may_call_severities_what_others_do() -> None:
    assert make_event("a", "t", "m", "warn").severity == "warning"
    assert make_event("a", "t", "m", "FATAL").severity == "critical"
    assert make_event("a", None, "m").error_type == "unknown"


def test_repeats_are_of_one_component_and_of_one_flaw() -> None:
    def kind(error_type: str, message: str, **details: object) -> tuple[str, str, str]:
        return kind_of(make_event("a", error_type, message, details=details))

    assert kind("component_down", "m", component="one") != kind("component_down", "m", component="two")
    assert kind("component_down", "m", component="one") == kind("component_down", "n", component="one")
    assert kind("t", "m", component=["one"]) == kind("t", "n")
    assert kind("malformed_event", "it has 70 bytes") == kind("malformed_event", "it has 9 bytes")
    assert kind("malformed_event", "it has 70 bytes") != kind("malformed_event", "it has no agent")


@given(st.dictionaries(ANY_TEXT, ANYTHING, max_size=6))
def test_details_can_always_be_sent_and_are_bounded(details: dict[str, Any]) -> None:
    kept = bounded_details(details)
    assert len(json.dumps(kept, ensure_ascii=False)) <= MAX_DETAILS_CHARS + 200
    assert json.loads(json.dumps(kept, allow_nan=False, ensure_ascii=False).encode()) == kept


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT, st.dictionaries(ANY_TEXT, ANYTHING, max_size=4))
def test_what_we_report_never_raises_and_travels(agent: str, kind: str, message: str, details: dict[str, Any]) -> None:
    event = make_event(agent, kind, message, details=details, now_s=NOW_S)
    topic, fields = decode_message(encode_message("ERROR:", event.fields()))
    assert topic == "ERROR:"
    assert fields == event.fields()


def test_everything_long_is_cut() -> None:
    event = make_event("a" * 9999, "t" * 9999, "m" * 9999, "nonsense", request_id="r" * 999, details={"n": "d" * 9999})
    assert len(event.agent) == len(event.error_type) == MAX_NAME_CHARS
    assert len(event.message) == MAX_MESSAGE_CHARS
    assert event.severity == "error"
    assert event.details == {"truncated": True, "size": 9999 + len('{"n": ""}')}
    assert len(encode_message("ERROR:", event.fields())) < MAX_EVENT_BYTES


def test_a_full_batch_of_the_most_intricate_events_is_taken() -> None:
    for parts in (MAX_DETAILS_CONTAINERS // 2, 120, 1000):
        events = [make_event("a", "t", "m", details={"steps": [{}] * parts}) for _ in range(MAX_BATCH_EVENTS)]
        outbox = Outbox("a", MAX_BATCH_EVENTS, 2.0)
        for event in events:
            outbox.put(encode_event(event), "t", "error")
        body = outbox.batch(0.0)
        assert body is not None
        batch = read_report(body, NOW_S)
        assert isinstance(batch, Batch)
        assert [event.event_id for event in batch.events] == [event.event_id for event in events]


def test_details_that_nest_without_end_are_described() -> None:
    nested: dict[str, Any] = {}
    nested["self"] = nested
    assert set(bounded_details({"loop": nested})) == {"loop"}


def test_severities_are_ordered() -> None:
    assert at_least("info") == SEVERITIES
    assert at_least("critical") == ("critical",)

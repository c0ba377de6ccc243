"""What an event is: bounded, encodable, and read as publishers of the mesh commonly write it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_system.events import (
    MAX_DETAILS_CHARS,
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
    make_event,
    parse_event,
)

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
        ([], "not list", None),
        (None, "not NoneType", None),
        ({}, "no agent", None),
        ({"agent": "  "}, "no agent", None),
        ({"agent": "a"}, "neither error_type nor message", "a"),
        ({"agent": "a", "msg": "m", "severity": "loud"}, "severity", "a"),
        ({"agent": "a", "msg": "m", "severity": 3}, "severity", "a"),
        ({"agent": "a", "msg": "m", "timestamp": "yesterday"}, "timestamp", "a"),
        ({"agent": "a", "msg": "m", "timestamp": -1}, "timestamp", "a"),
        ({"agent": "a", "msg": "m", "timestamp": float("nan")}, "timestamp", "a"),
        ({"agent": "a", "msg": "m", "timestamp": 10**400}, "timestamp", "a"),
    ],
)
def test_what_is_no_event_is_told_with_its_sender(value: object, reason: str, agent: str | None) -> None:
    with pytest.raises(MalformedEvent, match=reason) as caught:
        parse_event(value, NOW_S)
    assert caught.value.agent == agent


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


def test_details_that_nest_without_end_are_described() -> None:
    nested: dict[str, Any] = {}
    nested["self"] = nested
    assert set(bounded_details({"loop": nested})) == {"loop"}


def test_severities_are_ordered() -> None:
    assert at_least("info") == SEVERITIES
    assert at_least("critical") == ("critical",)

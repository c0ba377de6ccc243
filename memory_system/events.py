"""Events of the error bus: what one is, how it is written, and how a foreign one is read. Pure.

An event says who (`agent`), what (`error_type`), how bad (`severity`) and when; `details` has ids, codes and sizes,
never what a person wrote or asked. Everything is bounded, so that no reporter can fill the bus with one event.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

SEVERITIES: Final = ("info", "warning", "error", "critical")
ERROR_TOPIC: Final = "ERROR:"
HEARTBEAT_TOPIC: Final = "HEARTBEAT:"
HEALTH_TOPIC: Final = "HEALTH:"

MAX_EVENT_BYTES: Final = 64 * 1024
MAX_NAME_CHARS: Final = 128
MAX_MESSAGE_CHARS: Final = 2000
MAX_DETAILS_CHARS: Final = 4096
# A full batch of a reporter has to stay below the containers that the health manager takes apart at once.
MAX_DETAILS_CONTAINERS: Final = 64
# Clocks differ; what lies further ahead than this is no time that something happened at.
MAX_AHEAD_S: Final = 60.0
MALFORMED: Final = "malformed_event"
# Details with these keys hold what people wrote; they are taken out wherever they come from.
WITHHELD_KEYS: Final = frozenset(
    {"content", "metadata", "query", "queries", "text", "texts", "data", "body", "payload", "session_metadata"}
)
WITHHELD: Final = "(withheld)"

# What publishers of the mesh call the same things.
_FOREIGN_NAMES: Final = {
    "agent": ("agent", "agent_id", "component", "source"),
    "error_type": ("error_type", "type", "error_code", "code"),
    "message": ("message", "error_message", "error", "msg"),
    "severity": ("severity", "level"),
    "timestamp": ("timestamp", "time", "ts"),
}
_FOREIGN_SEVERITIES: Final = {
    "debug": "info",
    "notice": "info",
    "warn": "warning",
    "err": "error",
    "fatal": "critical",
    "alert": "critical",
    "emergency": "critical",
}
_NUMBER: Final = re.compile(r"\d+")
_MAX_SENT_CHARS: Final = 64
# Epoch seconds end at 1e11, in the year 5138; the same number of milliseconds is the year 1973.
_MILLISECONDS_FROM: Final = 1e11

Kind = tuple[str, str, str]  # agent, error_type, what it is about


class MalformedEvent(ValueError):
    """What arrived is no event; `agent` is who it seems to be from, if that could be read."""

    def __init__(self, reason: str, agent: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.agent = agent


@dataclass(frozen=True, slots=True)
class Event:
    """One error event. `timestamp` is epoch seconds, UTC; `count` how many it stands for."""

    event_id: str
    timestamp: float
    agent: str
    error_type: str
    message: str
    severity: str = "error"
    request_id: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    count: int = 1

    def fields(self) -> dict[str, Any]:
        """The event as it travels; `request_id` and `count` only where they say something."""
        found: dict[str, Any] = {
            "event_id": self.event_id,
            "timestamp": self.timestamp,
            "agent": self.agent,
            "error_type": self.error_type,
            "message": self.message,
            "severity": self.severity,
            "details": dict(self.details),
        }
        if self.request_id is not None:
            found["request_id"] = self.request_id
        if self.count != 1:
            found["count"] = self.count
        return found


def kind_of(event: Event) -> Kind:
    """What has to be equal for two events to be repeats of each other.

    Beside the agent and the error_type that is the component in the details, and of a malformed event what is wrong
    with it, whatever the numbers in it.
    """
    if event.error_type == MALFORMED:
        return event.agent, MALFORMED, _NUMBER.sub("#", event.message[:MAX_NAME_CHARS])
    component = event.details.get("component")
    return event.agent, event.error_type, component[:MAX_NAME_CHARS] if isinstance(component, str) else ""


def severity_of(value: object) -> str | None:
    """The severity that is meant (`WARN` is warning), None when that is none."""
    name = value.strip().lower() if isinstance(value, str) else ""
    name = _FOREIGN_SEVERITIES.get(name, name)
    return name if name in SEVERITIES else None


def new_event_id() -> str:
    """A time-ordered random id of 32 hex digits."""
    return f"{int(time.time() * 1000) & 0xFFFFFFFFFFFF:012x}{os.urandom(10).hex()}"


def make_event(
    agent: str,
    error_type: str | None,
    message: str,
    severity: str = "error",
    *,
    request_id: str | None = None,
    details: Mapping[str, Any] | None = None,
    now_s: float | None = None,
    count: int = 1,
) -> Event:
    """An event of our own. Never raises: what is too long is cut, what cannot be encoded becomes its repr."""
    return Event(
        event_id=new_event_id(),
        timestamp=time.time() if now_s is None else now_s,
        agent=_cut(agent, MAX_NAME_CHARS) or "unknown",
        error_type="unknown" if error_type is None else _cut(error_type, MAX_NAME_CHARS) or "unknown",
        message=_cut(message, MAX_MESSAGE_CHARS),
        severity=severity_of(severity) or "error",
        request_id=None if request_id is None else _cut(request_id, MAX_NAME_CHARS),
        details=bounded_details(details or {}),
        count=count,
    )


def parse_event(value: object, now_s: float, *, ahead_s: float = MAX_AHEAD_S) -> Event:
    """An event that somebody sent, decoded from JSON or msgpack. Raises MalformedEvent.

    Publishers of the mesh have their own habits, so names, severities and times are taken as they commonly come:
    `agent_id` for agent, WARN for warning, ISO 8601 or milliseconds for epoch seconds. Needed are a sender and
    something said. An unusable severity is an error, and an unusable time, or one more than `ahead_s` ahead of
    `now_s`, becomes `now_s`; what was sent is then in the details, as `severity_sent` and `timestamp_sent`.
    """
    if not isinstance(value, Mapping):
        raise MalformedEvent(f"an event is a JSON object, not {_json_name(value)}")
    agent = _text(value, "agent")
    if agent is None:
        raise MalformedEvent("the event has no agent")
    error_type, message = _text(value, "error_type"), _text(value, "message")
    if error_type is None and message is None:
        raise MalformedEvent("the event has neither error_type nor message", agent)
    request_id, event_id = value.get("request_id"), value.get("event_id")
    count = value.get("count", 1)
    severity, timestamp = severity_of(_named(value, "severity")), _time(value, now_s, ahead_s)
    sent = _sent(value, severity=severity, timestamp=timestamp)
    details = bounded_details(_as_mapping(value.get("details")))
    return Event(
        event_id=_cut(event_id, MAX_NAME_CHARS) if isinstance(event_id, str) and event_id else new_event_id(),
        timestamp=now_s if timestamp is None else timestamp,
        agent=agent,
        error_type=_cut(error_type or "unknown", MAX_NAME_CHARS),
        message=_cut(message or "", MAX_MESSAGE_CHARS),
        severity=severity or "error",
        request_id=_cut(request_id, MAX_NAME_CHARS) if isinstance(request_id, str) else None,
        details={**bounded_details({**details, **sent}), **sent} if sent else details,
        count=count if isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= 1_000_000_000 else 1,
    )


def bounded_details(details: Mapping[str, Any]) -> dict[str, Any]:
    """Details that can be encoded as JSON, without what people wrote, of at most MAX_DETAILS_CHARS and so many lists
    and maps."""
    kept = {_cut(name, MAX_NAME_CHARS): WITHHELD if name in WITHHELD_KEYS else each for name, each in details.items()}
    try:
        text = json.dumps(kept, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        kept = {name: _plain(each) for name, each in kept.items()}
        text = json.dumps(kept, ensure_ascii=False)
    if len(text) > MAX_DETAILS_CHARS or text.count("[") + text.count("{") > MAX_DETAILS_CONTAINERS:
        return {"truncated": True, "size": len(text)}
    if not text.isascii():
        # Whatever has a form in UTF-8 stays as it is; a lone surrogate would stop every page that it stands on.
        kept = json.loads(text.encode("utf-8", "replace"))
    return kept


def encode_message(topic: str, fields: Mapping[str, Any]) -> bytes:
    """One frame of the broadcast: the topic, then JSON."""
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False, default=repr)
    # A publisher may have sent a lone surrogate, which UTF-8 has no form for.
    return topic.encode() + text.encode("utf-8", "replace")


def decode_message(frame: bytes) -> tuple[str, dict[str, Any]]:
    """Topic and fields of a frame of the broadcast. Raises MalformedEvent."""
    topic, colon, body = frame.partition(b":")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise MalformedEvent("the message is not TOPIC:JSON") from None
    if not colon or not isinstance(fields, dict):
        raise MalformedEvent("the message is not TOPIC:{...}")
    return f"{topic.decode('ascii', 'replace')}:", fields


def at_least(severity: str) -> tuple[str, ...]:
    """This severity and those above it."""
    return SEVERITIES[SEVERITIES.index(severity) :]


def _cut(text: object, limit: int) -> str:
    # A lone surrogate cannot be written as UTF-8, and would stop the bus at the moment it is sent.
    whole = str(text).encode("utf-8", "replace").decode()
    return whole if len(whole) <= limit else whole[: limit - 1] + "…"


def _plain(value: object) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    try:
        return _cut(repr(value), 200)
    except (RecursionError, ValueError):
        return type(value).__name__


def _as_mapping(details: object) -> Mapping[str, Any]:
    if isinstance(details, Mapping):
        return details
    return {} if details is None else {"value": details}


def _named(value: Mapping[Any, Any], name: str) -> Any:
    return next((value[key] for key in _FOREIGN_NAMES[name] if value.get(key) is not None), None)


def _text(value: Mapping[Any, Any], name: str) -> str | None:
    found = _named(value, name)
    limit = MAX_MESSAGE_CHARS if name == "message" else MAX_NAME_CHARS
    return _cut(found, limit) if isinstance(found, (str, int)) and str(found).strip() else None


def _sent(value: Mapping[Any, Any], **read: object) -> dict[str, Any]:
    """What was sent in the place of what could not be read."""
    found = {name: _named(value, name) for name, each in read.items() if each is None}
    return {f"{name}_sent": _cut(_plain(each), _MAX_SENT_CHARS) for name, each in found.items() if each is not None}


def _time(value: Mapping[Any, Any], now_s: float, ahead_s: float) -> float | None:
    """Epoch seconds; None when there is no time, or none that can be."""
    found = _named(value, "timestamp")
    try:
        seconds = float(found)
    except (TypeError, ValueError):
        seconds = _iso_time(found)
    except OverflowError:
        return None
    if seconds >= _MILLISECONDS_FROM:
        seconds /= 1000.0
    return seconds if 0.0 <= seconds <= min(now_s + ahead_s, _MILLISECONDS_FROM) else None


def _iso_time(found: object) -> float:
    try:
        moment = datetime.fromisoformat(str(found))
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return math.nan


def _json_name(value: object) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return names.get(type(value), "bytes" if isinstance(value, bytes) else "something else")

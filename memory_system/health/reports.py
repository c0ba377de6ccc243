"""What reporters and publishers send, decoded; and the answers to it. Pure.

A batch is `{"v": 1, "kind": "events", "batch": N, "events": [...]}`, a heartbeat `{"v": 1, "kind": "heartbeat",
"component": ..., ...}`, both msgpack or JSON; the mesh sends `ERROR:` and JSON. All of it is untrusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import msgpack

from memory_system import protocol
from memory_system.events import (
    ERROR_TOPIC,
    MAX_EVENT_BYTES,
    MAX_NAME_CHARS,
    Event,
    MalformedEvent,
    bounded_details,
    parse_event,
)

VERSION: Final = 1
MAX_BODY_BYTES: Final = 2 * 1024 * 1024
MAX_BATCH_EVENTS: Final = 2_000
# Small containers cost far more in memory than on the wire.
MAX_CONTAINERS: Final = 50_000

_TOPIC: Final = ERROR_TOPIC.encode()
_WHO_AND_HOW: Final = ("pid", "state", "interval_s")


@dataclass(frozen=True, slots=True)
class Batch:
    """Events of one reporter; `malformed` says what is wrong with each that is none."""

    number: int
    events: list[Event]
    malformed: list[MalformedEvent]
    as_json: bool


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A component lives; `fields` are plain values, `component` and `timestamp` (epoch seconds) among them."""

    component: str
    fields: Mapping[str, Any]


class NoReport(MalformedEvent):
    """What arrived is no report; `batch` is its number, where it has one."""

    def __init__(self, reason: str, agent: str | None = None, batch: int | None = None) -> None:
        super().__init__(reason, agent)
        self.batch = batch


def read_report(body: bytes, now_s: float) -> Batch | Heartbeat:
    """Decode what came on the reporters' port. Raises MalformedEvent when it is neither of the two."""
    message = _decode(body)
    if message.get("v") == VERSION and message.get("kind") == "heartbeat":
        return _heartbeat(message, now_s)
    number, events = _number(message.get("batch")), message.get("events")
    flaw = _flaw(message)
    if flaw is not None or number is None or not isinstance(events, list):
        agent = message.get("component")
        raise NoReport(flaw or "", agent[:MAX_NAME_CHARS] if isinstance(agent, str) else None, number)
    batch = Batch(number, [], [], protocol.is_json(body))
    for each in events:
        try:
            batch.events.append(read_event(each, now_s))
        except MalformedEvent as error:
            batch.malformed.append(error)
    return batch


def _flaw(message: Mapping[Any, Any]) -> str | None:
    """What keeps a map from being a batch of events; None when nothing does."""
    kind, events = message.get("kind"), message.get("events")
    if "v" not in message:
        return f"v is missing; the version is {VERSION}"
    if message["v"] != VERSION:
        return f"v names an unknown version; known is {VERSION}"
    if kind != "events":
        return f"kind is {'missing' if kind is None else 'unknown'}; known are events and heartbeat"
    if _number(message.get("batch")) is None:
        return f"batch is {'no integer from 0' if 'batch' in message else 'missing: a number of the sender'}"
    if not isinstance(events, list):
        return f"events is {'no list' if 'events' in message else 'missing'}"
    return f"the batch has more than {MAX_BATCH_EVENTS} events" if len(events) > MAX_BATCH_EVENTS else None


def read_mesh(frames: list[bytes], now_s: float) -> Event:
    """The event of a message of the mesh: `ERROR:{...}`, or the topic and the JSON in two frames.

    Raises MalformedEvent.
    """
    if len(frames) > 2:
        raise MalformedEvent("the message has more than two frames")
    size = sum(map(len, frames))
    if size > MAX_EVENT_BYTES:
        raise MalformedEvent(f"the event has {size} bytes, the limit is {MAX_EVENT_BYTES}")
    body = frames[1] if len(frames) == 2 else frames[0][len(_TOPIC) :]
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise MalformedEvent("the event is no JSON") from None
    return read_event(value, now_s)


def read_event(value: object, now_s: float) -> Event:
    """`events.parse_event`, which whatever anybody sends cannot get out of otherwise. Raises MalformedEvent."""
    try:
        return parse_event(value, now_s)
    except MalformedEvent:
        raise
    except Exception as error:  # noqa: BLE001  one event that breaks the reader must not stop those of all others
        raise MalformedEvent(f"the event cannot be read: {type(error).__name__}") from None


def signed(event: Event, name: str) -> Event:
    """The event as one of the key of this name; whom it named itself is then in the details, as `agent_sent`."""
    if event.agent == name:
        return event
    sent = {"agent_sent": event.agent}
    return replace(event, agent=name, details={**bounded_details({**event.details, **sent}), **sent})


def acknowledgement(batch: Batch, accepted: int, known: int) -> bytes:
    """The events are on disk, or were before; those that are none need not come again either."""
    malformed = len(batch.malformed)
    fields = {"batch": batch.number, "accepted": accepted, "known": known, "malformed": malformed}
    return _encode({"v": VERSION, "kind": "ack", **fields}, batch.as_json)


def try_again(batch: Batch, retry_after_ms: int, message: str) -> bytes:
    """Nothing of the batch was kept."""
    fields = {"batch": batch.number, "retry_after_ms": retry_after_ms, "message": message}
    return _encode({"v": VERSION, "kind": "retry", **fields}, batch.as_json)


def refusal(body: bytes, message: str, batch: int | None = None) -> bytes:
    """What came is no report; sending it again does not help. `batch`: its number, where it has one."""
    known = {} if batch is None else {"batch": batch}
    return _encode({"v": VERSION, "kind": "refused", **known, "message": message}, protocol.is_json(body))


def _decode(body: bytes) -> dict[Any, Any]:
    if len(body) > MAX_BODY_BYTES:
        raise MalformedEvent(f"the report has {len(body)} bytes, the limit is {MAX_BODY_BYTES}")
    try:
        value = json.loads(body) if protocol.is_json(body) else _unpack(body)
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.exceptions.UnpackException):
        raise MalformedEvent("the report is neither msgpack nor JSON") from None
    if not isinstance(value, dict):
        raise MalformedEvent("the report is no map")
    return value


def _unpack(body: bytes) -> Any:
    left = MAX_CONTAINERS

    def count(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("too many containers")
        return container

    return msgpack.unpackb(
        body,
        raw=False,
        unicode_errors="replace",  # one broken text is no reason to refuse the events beside it
        strict_map_key=False,
        object_hook=count,
        list_hook=count,
        max_array_len=MAX_BATCH_EVENTS + 1,
        max_map_len=MAX_CONTAINERS,
    )


def _heartbeat(message: Mapping[Any, Any], now_s: float) -> Heartbeat:
    component, timestamp = message.get("component"), message.get("timestamp")
    if not isinstance(component, str) or not 0 < len(component) <= MAX_NAME_CHARS:
        raise MalformedEvent("the heartbeat has no component")
    try:
        said = {str(name): each for name, each in message.items() if name not in ("v", "kind")}
        # Too many figures must not hide which process it is, and how it says it is.
        rest = bounded_details(said) | bounded_details({name: said[name] for name in _WHO_AND_HOW if name in said})
    except Exception as error:  # noqa: BLE001  as in read_event
        raise MalformedEvent(f"the heartbeat cannot be read: {type(error).__name__}", component) from None
    is_time = isinstance(timestamp, int | float) and math.isfinite(timestamp) and 0 <= timestamp < 1e11
    return Heartbeat(component, {**rest, "component": component, "timestamp": timestamp if is_time else now_s})


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _encode(answer: dict[str, Any], as_json: bool) -> bytes:
    packed: bytes = json.dumps(answer).encode() if as_json else msgpack.packb(answer, use_bin_type=True)
    return packed

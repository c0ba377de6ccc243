"""Metrics as a program has them: families of values, read at the moment somebody asks, so they cost nothing between.

`metrics_server` shows them to Prometheus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from memory_system.events import Event
from memory_system.traffic import Latency, Traffic, by_action

PREFIX: Final = "memory_system_"
COMPONENT_STATES: Final = ("starting", "healthy", "degraded", "down", "flapping")
BREAKER_EVENTS: Final = {"circuit_opened": "open", "circuit_closed": "closed"}
# Agents name themselves and their errors; what comes after so many combinations is counted together.
MAX_SERIES: Final = 1_000

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: `values` by the values of `labels`, in their order. A counter's name ends in _total."""

    name: str
    help: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: Labels
    values: Mapping[Labels, float | Latency]


Source = Callable[[], Iterable[Family]]


def counter(name: str, help: str, labels: Labels, values: Mapping[Labels, float]) -> Family:
    return Family(f"{PREFIX}{name}_total", help, "counter", labels, values)


def gauge(name: str, help: str, labels: Labels, values: Mapping[Labels, float | None]) -> Family:
    """What has no value now (None) is left out."""
    known = {labels: value for labels, value in values.items() if value is not None}
    return Family(f"{PREFIX}{name}", help, "gauge", labels, known)


def single(name: str, help: str, value: float | None) -> Family:
    """A gauge without labels."""
    return gauge(name, help, (), {(): value})


def states(name: str, help: str, label: str, values: Mapping[str, str], known: Sequence[str]) -> Family:
    """A gauge of `label` and `state`: 1 for the state that each is in, 0 for the others of `known`."""
    cells: dict[Labels, float | None] = {
        (each, state): float(state == now) for each, now in values.items() for state in dict.fromkeys((*known, now))
    }
    return gauge(name, help, (label, "state"), cells)


def traffic_families(traffic: Traffic) -> list[Family]:
    """Requests by action and outcome, errors by code, latencies by action."""
    latencies = traffic.latencies()
    requests: Mapping[Labels, float] = {labels: latency.count for labels, latency in latencies.items()}
    histogram: Mapping[Labels, float | Latency] = {
        (action,): latency for action, latency in by_action(latencies).items()
    }
    return [
        counter(
            "requests", "Requests answered, by outcome: success, or the error code.", ("action", "outcome"), requests
        ),
        Family(
            f"{PREFIX}request_seconds",
            "Time from a request's arrival in the program to its reply.",
            "histogram",
            ("action",),
            histogram,
        ),
    ]


class EventCounts:
    """For the health manager: the events that the bus took, and the circuit breakers of clients as they told of them.

    `note` belongs to one thread; `families` may be called from any.
    """

    def __init__(self) -> None:
        self._events: dict[Labels, int] = {}
        self._breakers: dict[str, str] = {}

    def note(self, event: Event) -> None:
        labels = (event.agent, event.error_type, event.severity)
        if labels not in self._events and len(self._events) >= MAX_SERIES:
            labels = ("(various)", "(various)", event.severity)
        self._events[labels] = self._events.get(labels, 0) + event.count
        state = BREAKER_EVENTS.get(event.error_type)
        if state is not None and (event.agent in self._breakers or len(self._breakers) < MAX_SERIES):
            self._breakers[event.agent] = state

    def families(self) -> list[Family]:
        events: dict[Labels, float] = {**self._events.copy()}
        breakers = self._breakers.copy()
        return [
            counter("events", "Events taken by the error bus.", ("agent", "error_type", "severity"), events),
            states("client_breaker_state", "1 for the last told state.", "agent", breakers, ("closed", "open")),
        ]


def component_families(components: Iterable[Mapping[str, Any]]) -> list[Family]:
    """For the health manager: `components` as get_health returns them."""
    known = [(str(each["component"]), each) for each in components]
    now = {name: str(each["state"]) for name, each in known}

    def figure(key: str) -> dict[Labels, float]:
        return {(name,): value for name, each in known if (value := each.get(key)) is not None}

    return [
        states("component_state", "1 for the state that each component is in.", "component", now, COMPONENT_STATES),
        counter("component_deaths", "Deaths of a component that were noticed.", ("component",), figure("deaths")),
        counter("component_kills", "Kills of a component that hung.", ("component",), figure("kills")),
        gauge("component_latency_ms", "Time that its last answer took.", ("component",), {**figure("latency_ms")}),
    ]

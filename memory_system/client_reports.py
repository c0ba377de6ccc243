"""What a client reports on the error bus: calls that failed for no fault of the caller, and its circuit breaker."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from memory_system.breaker import BreakerSnapshot, Transition
from memory_system.error_bus import ADDRESS_VARIABLE, REPORT_PORT, shared_reporter
from memory_system.keys import KeyFile
from memory_system.protocol import DEFAULT_PORT, ERROR_CODES

# Errors that somebody has to look after; all others are between the service and the caller.
REPORTED: Final = frozenset({"timeout", "unreachable", "invalid_reply", "internal_error"}).union(
    code for code in ERROR_CODES if code.startswith("storage_")
)
# One event of a kind in this time; those that come meanwhile are counted in the next.
INTERVAL_S: Final = 10.0
NAMELESS_AGENT: Final = "memory_client"


def bus_endpoint(error_bus: str | None, endpoint: str) -> str:
    """Where a client of this orchestrator reports to; "": nowhere."""
    if error_bus is not None:
        return error_bus
    given = os.environ.get(ADDRESS_VARIABLE)
    if given is not None:
        return given
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{REPORT_PORT}" if host and port == str(DEFAULT_PORT) else ""


@dataclass(frozen=True, slots=True)
class Report:
    """An event to be: see ErrorReporter.report."""

    error_type: str
    message: str
    severity: str
    details: Mapping[str, Any]


class FailureLimit:
    """One of each kind in INTERVAL_S. Monotonic seconds; the clock is passed in.

    Without a lock, which a fork could leave locked: two threads at the same instant may report the same kind twice.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[float, int]] = {}  # when the next may go, how many were held back

    def admit(self, kind: str, now_s: float) -> int | None:
        """How many of this kind were held back before this one, which goes; None: it is held back too."""
        next_s, held_back = self._kinds.get(kind, (now_s, 0))
        if now_s < next_s:
            self._kinds[kind] = next_s, held_back + 1
            return None
        self._kinds[kind] = now_s + INTERVAL_S, 0
        return held_back


def failure_report(reply: Mapping[str, Any], action: str, endpoint: str, held_back: int) -> Report:
    """The event of a failed call. The reply's message stays out of it: it may quote what was asked."""
    code = str(reply["error_code"])
    details: dict[str, Any] = {"endpoint": endpoint, "action": action, "outcome": reply.get("outcome")}
    if held_back:
        details["held_back"] = held_back
    more = f"; {held_back} more calls since the last such event" if held_back else ""
    return Report(code, f"{action} at {endpoint} ended in {code}{more}", "error", details)


def transition_report(transition: Transition, seen: BreakerSnapshot, endpoint: str) -> Report:
    """The event of a circuit breaker that opened or closed; `seen` is the breaker afterwards."""
    if transition == "opened":
        text = f"the circuit breaker for {endpoint} opened after {seen.failure_count} failed calls in a row"
        details = {"endpoint": endpoint, "failures": seen.failure_count, "reset_timeout_s": seen.reset_timeout_s}
        return Report("circuit_opened", text, "error", details)
    return Report("circuit_closed", f"the circuit breaker for {endpoint} closed", "info", {"endpoint": endpoint})


class Reports:
    """The events of one client, sent by the process's one reporter for this bus. Never blocks and never raises."""

    def __init__(self, endpoint: str, bus: str, key: KeyFile | None = None) -> None:
        self._endpoint = endpoint
        self._bus = bus
        self._key = key
        self._limit = FailureLimit()

    def tell_failure(self, reply: Mapping[str, Any], action: str, request_id: str, agent: str | None) -> None:
        code = reply.get("error_code")
        if not self._bus or not isinstance(code, str) or code not in REPORTED:
            return
        held_back = self._limit.admit(code, time.monotonic())
        if held_back is not None:
            self._send(failure_report(reply, action, self._endpoint, held_back), request_id, agent)

    def tell_transition(
        self, transition: Transition, seen: BreakerSnapshot, agent: str | None, request_id: str | None = None
    ) -> None:
        if self._bus:
            self._send(transition_report(transition, seen, self._endpoint), request_id, agent)

    def _send(self, report: Report, request_id: str | None, agent: str | None) -> None:
        shared_reporter(self._bus, NAMELESS_AGENT, self._key).report(
            report.error_type,
            report.message,
            report.severity,
            request_id=request_id,
            details=report.details,
            agent=agent or NAMELESS_AGENT,
        )

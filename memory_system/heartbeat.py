"""Heartbeats of a program: sent from its event loop, so that a loop that hangs does not beat."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from memory_system.error_bus import ErrorReporter

LOOK_S: Final = 1.0
STOPPED: Final = "stopped"


class Heartbeat:
    """Says every `interval_s` that a component lives, and within a second that its state has changed.

    figures: called on the loop at each look; returns `state` and whatever else is to be told, quickly and without I/O.
    """

    def __init__(
        self,
        reporter: ErrorReporter,
        component: str,
        figures: Callable[[], Mapping[str, Any]],
        interval_s: float = 5.0,
    ) -> None:
        self._reporter = reporter
        self._component = component
        self._figures = figures
        self._interval_s = interval_s
        self._state: object = None
        self._sent_s = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Send the first one; needs the running loop."""
        self._turn(asyncio.get_running_loop())

    def close(self) -> None:
        """Sign off: a last heartbeat with the state `stopped`, so that the silence after it alarms nobody. Closing
        twice is fine."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._state = STOPPED
            self._send({**self._read(), "state": STOPPED})

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(min(LOOK_S, self._interval_s), self._turn, loop)
        self._look(time.monotonic())

    def _look(self, now_s: float) -> None:
        figures = self._read()
        # Loops fire timers a little early at times; without the tolerance a beat would then wait for the next look.
        is_due = now_s - self._sent_s >= self._interval_s - 0.05
        if is_due or figures.get("state") != self._state:
            self._sent_s, self._state = now_s, figures.get("state")
            self._send(figures)

    def _send(self, figures: Mapping[str, Any]) -> None:
        self._reporter.heartbeat(
            {
                **figures,
                "component": self._component,
                "timestamp": time.time(),
                "pid": os.getpid(),
                "interval_s": self._interval_s,
            }
        )

    def _read(self) -> Mapping[str, Any]:
        try:
            return self._figures()
        except Exception as error:  # noqa: BLE001 - a defect in a figure must not make a program look dead
            return {"state": "unknown", "figures_error": type(error).__name__}

    def __repr__(self) -> str:
        return f"<Heartbeat {self._component} state={self._state} {'stopped' if self._timer is None else 'beating'}>"

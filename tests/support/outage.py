"""A crowd of clients whose service goes away for a while: what they ask of it when it is back, and when they are."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.crowd import counting_orchestrator, crowd, not_once
from tests.support.footprint import Footprint, footprint
from tests.support.process import Orchestrator

NORMAL_S = 3.0


@dataclass
class Outage:
    """`normal`: requests a second before. `peak`: most requests that arrived within one second afterwards.
    `back_s`: for each client, from the moment at which the service answered again to its own next answer."""

    clients: int
    away_s: float
    normal: float
    peak: int
    back_s: list[float]
    wrong: dict[str, int]
    errors: dict[str, int]
    before: list[Footprint]
    after: list[Footprint]

    @property
    def storm(self) -> float:
        return self.peak / self.normal

    def __str__(self) -> str:
        return (
            f"{self.clients} clients, {self.away_s:.0f} s away: {self.normal:.0f} requests/s before, at most "
            f"{self.peak} in a second after ({self.storm:.2f}x), all back after {max(self.back_s):.1f} s; "
            f"{len(self.wrong)} writes not there once; "
            f"files of the clients {sum(f.files for f in self.before)} before, {sum(f.files for f in self.after)} after"
        )


def outage(
    folder: Path,
    *,
    clients: int,
    kinds: tuple[str, ...],
    away_s: float,
    period_s: float = 1.0,
    watched_s: float = 12.0,
    frozen: bool = False,
    **settings: Any,
) -> Outage:
    """Kill the service under its clients, each with a call every `period_s`, start it anew after `away_s`, and watch
    for `watched_s`. `frozen`: it is not killed but stopped and let go on, so that connections stand meanwhile."""
    with counting_orchestrator(folder, **settings) as (orchestrator, arrivals):
        with crowd(orchestrator.address, clients=clients, kinds=kinds, period_s=period_s) as members:
            time.sleep(NORMAL_S)
            killed_s = time.monotonic()
            normal = arrivals.rate(killed_s - NORMAL_S, killed_s)
            before = [footprint(pid) for pid in members.pids]
            _stop(orchestrator, frozen=frozen)
            time.sleep(away_s)
            started_s = time.monotonic()
            _go_on(orchestrator, frozen=frozen)
            answers_s = time.monotonic()
            time.sleep(watched_s)
            after = [footprint(pid) for pid in members.pids]
            peak = arrivals.peak(started_s, time.monotonic())
        orchestrator.kill()
        wrong = not_once(orchestrator.database, members.texts)
    back_s = members.back_after_s(answers_s)
    return Outage(clients, away_s, normal, peak, back_s, wrong, dict(members.errors), before, after)


def _stop(orchestrator: Orchestrator, *, frozen: bool) -> None:
    if frozen:
        os.kill(orchestrator.pid, signal.SIGSTOP)
    else:
        orchestrator.kill()


def _go_on(orchestrator: Orchestrator, *, frozen: bool) -> None:
    if frozen:
        os.kill(orchestrator.pid, signal.SIGCONT)
        orchestrator.wait_ready()
    else:
        orchestrator.start()

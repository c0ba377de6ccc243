"""Writing clients behind a network that fails, and what that left: in the database, and open in the processes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import crash
from tests.support.crash import Entry, Findings
from tests.support.footprint import Footprint, footprint, sockets_of
from tests.support.lossy_proxy import Fault, LossyProxy
from tests.support.process import running_orchestrator, wait_until

CLIENTS = 8
# A connection that is dead is closed after HEARTBEAT_S and twice that without an answer.
HEARTBEAT_S = 0.5
DETECTED_S = 3 * HEARTBEAT_S
# Beside the connections of clients: those that the service has open for itself, and what the sampling itself costs.
SLACK = 4
# And files: the service opens connections to its database when they are first needed. One for each fault and client
# would be many more.
FILES_SLACK = 20


@dataclass
class Aftermath:
    """`before` and `after` are of the service; `own_*` of the clients' process. `most_sockets`: of the service."""

    findings: Findings
    entries: list[Entry]
    before: Footprint
    after: Footprint
    most_sockets: int
    own_before: Footprint
    own_after: Footprint

    @property
    def left_open(self) -> str:
        """What the processes hold that they did not hold before; "" when nothing."""
        found = []
        if self.after.sockets > self.before.sockets + SLACK:
            found.append(f"sockets of the service: {self.before.sockets} before, {self.after.sockets} after")
        if self.after.files > self.before.files + FILES_SLACK:
            found.append(f"files of the service: {self.before.files} before, {self.after.files} after")
        if self.after.threads > self.before.threads + SLACK:
            found.append(f"threads of the service: {self.before.threads} before, {self.after.threads} after")
        if self.own_after.files > self.own_before.files + SLACK:
            found.append(f"files of the clients: {self.own_before.files} before, {self.own_after.files} after")
        return "; ".join(found)

    @property
    def acknowledged(self) -> int:
        return sum(entry.outcome == "ok" for entry in self.entries)

    def __str__(self) -> str:
        return (
            f"{self.acknowledged} acknowledged, {len(self.findings.missing)} lost, {len(self.findings.twice)} twice; "
            f"sockets of the service {self.before.sockets} before, at most {self.most_sockets}, "
            f"{self.after.sockets} after; files of the clients {self.own_before.files} before, "
            f"{self.own_after.files} after"
        )


def write_through(faults: list[Fault], folder: Path, seed: int, *, idempotency: bool = True) -> Aftermath:
    """Clients write while the faults come one after the other; when all are over, the database is checked."""
    own_before = footprint()
    settings: dict[str, Any] = {"network__heartbeat_s": HEARTBEAT_S, "storage__idempotency": idempotency}
    with running_orchestrator(folder, **settings) as orchestrator:
        before = footprint(orchestrator.pid)
        with (
            LossyProxy(orchestrator.port, seed) as proxy,
            _Sampler(orchestrator.pid) as sampler,
            crash.writing_clients(proxy.endpoint, folder, seed, CLIENTS, reading=idempotency) as workers,
        ):
            proxy.play(faults)
            time.sleep(0.5)  # for every client to get through again
        after = shrunk(lambda: footprint(orchestrator.pid), before)
        orchestrator.kill()
        journals = [worker.journal.entries for worker in workers]
        findings = crash.check(orchestrator.database, journals)
    own_after = shrunk(footprint, own_before)
    entries = [entry for journal in journals for entry in journal]
    return Aftermath(findings, entries, before, after, sampler.most_sockets, own_before, own_after)


def shrunk(look: Callable[[], Footprint], to: Footprint, timeout_s: float = 45.0) -> Footprint:
    """What a process holds when it holds no more than it did, or else after the timeout."""
    deadline_s = time.monotonic() + timeout_s
    while (now := look()).sockets > to.sockets + SLACK and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return now


class _Sampler(threading.Thread):
    """Looks at a process again and again."""

    def __init__(self, pid: int) -> None:
        super().__init__(name="sampler", daemon=True)
        self.most_sockets = 0
        self._pid = pid
        self._ended = threading.Event()

    def __enter__(self) -> _Sampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join(10)

    def run(self) -> None:
        while not self._ended.wait(0.1):
            self.most_sockets = max(self.most_sockets, footprint(self._pid).sockets)


def wait_detected(pid: int, dead: set[str], within_s: float) -> float:
    """Seconds until a process has closed these of its sockets, whatever came since; fails after `within_s`."""
    began_s = time.monotonic()
    wait_until(lambda: not dead & sockets_of(pid), "dead connections are closed", within_s)
    return time.monotonic() - began_s


def chance_of(seed: int) -> random.Random:
    return random.Random(f"network-{seed}")

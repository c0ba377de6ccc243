"""Crowds of clients in processes of their own, and when their requests arrived at the service.

with counting_orchestrator(folder) as (orchestrator, arrivals), crowd(orchestrator.address, clients=60) as members:
    ...
told = members.told
"""

from __future__ import annotations

import contextlib
import json
import mmap
import select
import sqlite3
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.process import PROJECT, Orchestrator, running_orchestrator

SLOTS_PER_S = 10
LONGEST_S = 7200
_PROGRAMS = PROJECT / "tests" / "programs"
_HEAD = struct.Struct("d")


class Arrivals:
    """Requests that arrived at the service, in tenths of a second; see programs/counting_orchestrator.py."""

    def __init__(self, path: Path) -> None:
        self.began_s = time.monotonic()
        path.write_bytes(_HEAD.pack(self.began_s) + bytes(4 * LONGEST_S * SLOTS_PER_S))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 0)

    def counts(self, from_s: float, to_s: float) -> list[int]:
        """Of each tenth of a second between two monotonic times."""
        first, last = (int((at_s - self.began_s) * SLOTS_PER_S) for at_s in (from_s, to_s))
        return [struct.unpack_from("I", self._shared, _HEAD.size + 4 * slot)[0] for slot in range(first, last)]

    def rate(self, from_s: float, to_s: float) -> float:
        """Requests per second, on the average."""
        counts = self.counts(from_s, to_s)
        return sum(counts) * SLOTS_PER_S / len(counts)

    def peak(self, from_s: float, to_s: float) -> int:
        """Most requests within any one second."""
        counts = self.counts(from_s, to_s)
        return max(sum(counts[at : at + SLOTS_PER_S]) for at in range(max(1, len(counts) - SLOTS_PER_S + 1)))


@contextlib.contextmanager
def counting_orchestrator(folder: Path, **settings: Any) -> Iterator[tuple[Orchestrator, Arrivals]]:
    arrivals = Arrivals(folder / "arrivals")
    with running_orchestrator(folder, start=False, **settings) as orchestrator:
        orchestrator.command = [sys.executable, str(_PROGRAMS / "counting_orchestrator.py")]
        orchestrator.environ["TEST_ARRIVALS"] = str(folder / "arrivals")
        orchestrator.start()
        yield orchestrator, arrivals


@dataclass
class Members:
    """`pids` of the processes; after the block what every client was told."""

    pids: list[int] = field(default_factory=list)
    successes: list[list[float]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def back_after_s(self, since_s: float) -> list[float]:
        """For each client, seconds from this time to its next success; infinite if there is none."""
        return [
            min((at_s - since_s for at_s in each if at_s > since_s), default=float("inf")) for each in self.successes
        ]


@contextlib.contextmanager
def crowd(
    endpoint: str,
    *,
    clients: int,
    kinds: tuple[str, ...] = ("threads", "async"),
    period_s: float = 1.0,
    ready_s: float = 60.0,
    prefix: tuple[str, ...] = (),
) -> Iterator[Members]:
    """Clients of these kinds, a process for each; ready when each was answered once. `prefix` is put before the
    command."""
    members = Members()
    share = clients // len(kinds)
    processes = []
    try:
        for number, kind in enumerate(kinds):
            processes.append(_start(prefix, endpoint, kind, str(share), str(period_s), f"{kind}{number}"))
        members.pids = [process.pid for process in processes]
        deadline_s = time.monotonic() + ready_s
        for process in processes:
            _await_ready(process, deadline_s)
        yield members
        for process in processes:
            _collect(process, members)
    finally:
        for process in processes:
            process.kill()
            process.wait(30)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _start(prefix: tuple[str, ...], *arguments: str) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, str(_PROGRAMS / "crowd.py"), *arguments]
    return subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _await_ready(process: subprocess.Popen[str], deadline_s: float) -> None:
    assert process.stdout is not None
    # A crowd that is not ready in time says nothing, and readline would wait for ever.
    ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline_s - time.monotonic()))
    assert ready, "not every client was answered in time"
    assert process.stdout.readline() == "ready\n"


def _collect(process: subprocess.Popen[str], members: Members) -> None:
    told = json.loads(process.communicate(timeout=90)[0])
    members.successes += [client["successes"] for client in told["clients"]]
    members.texts += [text for client in told["clients"] for text in client["texts"]]
    members.errors.update(told["errors"])


def not_once(database: Path, texts: list[str]) -> dict[str, int]:
    """Which acknowledged texts are not there once, and how often they are; and those that are there twice anyway."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        stored = Counter(content for (content,) in db.execute("SELECT content FROM memories"))
    wrong = {text: stored[text] for text in texts if stored[text] != 1}
    return wrong | {text: count for text, count in stored.items() if count > 1}

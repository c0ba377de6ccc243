"""A mixed load on a store that does not grow, with faults of the network, and what the service holds meanwhile.

What is held for each memory stays the same, as the clients delete what they added; so do the rows that are kept for
each write (`storage.idempotency_ttl_h`), of which the store would have ever more for a day. The slope goes by the least
that was held in each `LEAST_OF_S`: what is kept for good raises that too, and what comes and goes does not.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from memory_client import MemoryClient
from tests.support.footprint import Footprint, footprint, slope_per_hour, wal_kib
from tests.support.lossy_proxy import FAULTS, LossyProxy
from tests.support.process import PROJECT, do_wrong, running_orchestrator

CLIENTS = 6
KEPT = 100
PAUSE_S = 0.02
FAULT_S = 2.0
# Beside the connections of the clients, which a fault makes anew.
SLACK = 6
LEAST_OF_S = 60.0
# As after a day of the same load: as much is dropped as comes.
STEADY: Final = {"storage__idempotency_ttl_h": 0.02}
WORDS = ("heron", "river", "copper", "window", "lantern", "orchard", "saddle", "winter", "harbour", "violin")


@dataclass(frozen=True)
class Sample:
    at_s: float
    held: Footprint
    wal_kib: int


@dataclass
class Soak:
    """Samples since the warm-up ended, and what became of the calls."""

    samples: list[Sample] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: int = 0

    @property
    def slope_mib_per_hour(self) -> float:
        return slope_per_hour(self.least_mib())

    def least_mib(self) -> list[tuple[float, float]]:
        """When the service held the least memory in each `LEAST_OF_S`, and how much that was; whole ones only, unless
        there is none."""
        begin_s = self.samples[0].at_s
        windows: dict[int, list[Sample]] = {}
        for each in self.samples:
            windows.setdefault(int((each.at_s - begin_s) / LEAST_OF_S), []).append(each)
        whole = [windows[number] for number in sorted(windows)[:-1]] or [self.samples]
        least = [min(window, key=lambda each: each.held.resident_kib) for window in whole]
        return [(each.at_s, each.held.resident_kib / 1024.0) for each in least]

    def span(self, of: Callable[[Sample], int]) -> tuple[int, int]:
        """Least and most of the settled samples."""
        values = [of(each) for each in self.samples]
        return min(values), max(values)

    def typical(self, of: Callable[[Sample], int], *, late: bool) -> int:
        """The middle value of the first or the last third: a fault in between makes connections come and go."""
        third = max(1, len(self.samples) // 3)
        values = sorted(of(each) for each in (self.samples[-third:] if late else self.samples[:third]))
        return values[len(values) // 2]

    def __str__(self) -> str:
        minutes = (self.samples[-1].at_s - self.samples[0].at_s) / 60.0
        pairs = {
            "files": (lambda each: each.held.files),
            "threads": (lambda each: each.held.threads),
            "MiB": (lambda each: each.held.resident_kib // 1024),
        }
        held = ", ".join(
            f"{self.typical(of, late=False)} -> {self.typical(of, late=True)} {name}" for name, of in pairs.items()
        )
        return (
            f"{minutes:.1f} minutes, {self.outcomes['success']} calls, {self.faults} faults: {held}, "
            f"slope {self.slope_mib_per_hour:+.2f} MiB/h, WAL at most {self.span(lambda each: each.wal_kib)[1]} KiB; "
            f"not successful: {sum(self.outcomes.values()) - self.outcomes['success']}"
        )


def soak(
    folder: Path,
    seed: int,
    *,
    warm_up_s: float,
    lasts_s: float,
    every_s: float,
    quiet_s: float,
    wrong: str = "",
    measured: Path | None = None,
    pause_s: float = PAUSE_S,
    **settings: Any,
) -> Soak:
    """Run the load for `warm_up_s` and then `lasts_s`, with a sample each `every_s` and a fault each `quiet_s`.
    `wrong`: what the service is to do wrong, see programs/failing_orchestrator.py. `measured`: where it is to write
    what its memory is made of, see programs/measured_orchestrator.py. `pause_s`: of a client between two calls, on
    average."""
    found, ended = Soak(), threading.Event()
    settings = {"network__heartbeat_s": 0.5, **STEADY, **settings}
    with running_orchestrator(folder, start=False, **settings) as orchestrator:
        if wrong:
            do_wrong(orchestrator, wrong)
        if measured is not None:
            orchestrator.command = [sys.executable, str(PROJECT / "tests" / "programs" / "measured_orchestrator.py")]
            orchestrator.environ["MEASURED"] = str(measured)
        orchestrator.start()
        with LossyProxy(orchestrator.port, seed) as proxy:
            loads = [
                threading.Thread(target=_load, args=(proxy.endpoint, n, seed, pause_s, ended, found))
                for n in range(CLIENTS)
            ]
            loads.append(threading.Thread(target=_trouble, args=(proxy, seed, quiet_s, ended, found)))
            for load in loads:
                load.start()
            try:
                time.sleep(warm_up_s)
                until_s = time.monotonic() + lasts_s
                while time.monotonic() < until_s:
                    log_kib = wal_kib(orchestrator.database)
                    found.samples.append(Sample(time.monotonic(), footprint(orchestrator.pid), log_kib))
                    time.sleep(every_s)
            finally:
                ended.set()
                for load in loads:
                    load.join(60)
        assert orchestrator.alive
        assert not any(load.is_alive() for load in loads)
    return found


def _trouble(proxy: LossyProxy, seed: int, quiet_s: float, ended: threading.Event, found: Soak) -> None:
    chance = random.Random(f"trouble-{seed}")
    while not ended.wait(chance.uniform(0.5, 1.5) * quiet_s):
        with proxy.faulty(chance.choice(FAULTS)):
            ended.wait(chance.uniform(0.2, 1.0) * FAULT_S)
        found.faults += 1


def _load(endpoint: str, number: int, seed: int, pause_s: float, ended: threading.Event, found: Soak) -> None:
    """One client. It holds at most KEPT memories, of which the oldest goes for each new one."""
    chance = random.Random(f"load-{seed}-{number}")
    own: deque[str] = deque()
    with MemoryClient(endpoint, agent_id=f"load-{number}", namespace="soak", attempt_timeout_ms=1_000) as client:
        while not ended.wait(chance.uniform(0.0, 2.0 * pause_s)):
            reply = _step(client, chance, own)
            found.outcomes[str(reply.get("error_code", reply["status"]))] += 1


def _step(client: MemoryClient, chance: random.Random, own: deque[str]) -> dict[str, Any]:
    if len(own) >= KEPT:
        return client.delete_memory(own.popleft())
    kind = chance.choice(("add", "add", "add", "update", "get", "list", "search", "semantic", "reinforce"))
    text = " ".join(chance.choices(WORDS, k=12))
    if kind == "add" or not own:
        reply = client.add_memory(text, tags=["soak"])
        if reply["status"] == "success":
            own.append(reply["memory_id"])
        return reply
    if kind == "update":
        return client.update_memory(chance.choice(own), {"content": text})
    if kind == "get":
        return client.get_memory(chance.choice(own))
    if kind == "reinforce":
        return client.reinforce_memory(chance.choice(own), 1.01)
    if kind == "list":
        return client.list_memories(limit=20)
    return client.search_memory(text[:12]) if kind == "search" else client.semantic_search(text, k=5)

"""Point 6: ten thousand connected clients, and a mixed load with faults for as long as there is time."""

from __future__ import annotations

import time
from typing import Final

from tests.support.crowd import crowd
from tests.support.footprint import footprint
from tests.support.process import running_orchestrator
from tests.support.soak import SLACK, soak
from tests.torture import Run, torture

CLIENTS = 10_000
PROCESSES = 4
ANSWERED_S = 30.0
EACH_KIB = 40.0
# A slope of memory means something after this time alone; the project's own figure is for half an hour and more.
LONG_S = 1_500.0
SLOPE_MIB_PER_HOUR = 1.0
LEAK_MIB_PER_HOUR = 500.0  # far above that of caches that fill
# Caches that are full within the warm-up: what grows after it is no cache that fills.
FULL_SOON: Final = {"cache__max_vectors": 500, "cache__max_results": 100, "cache__max_records": 500}
WAL_KIB = 64 * 1024


@torture("load", "10,000 connected clients", share=0.5)
def many_clients(run: Run) -> str:
    with running_orchestrator(run.folder, embedding__provider="off") as orchestrator:
        before = footprint(orchestrator.pid)
        began_s = time.monotonic()
        with crowd(
            orchestrator.address, clients=CLIENTS, kinds=("sockets",) * PROCESSES, ready_s=240.0, period_s=10.0
        ) as members:
            among = footprint(orchestrator.pid)
            for _ in range(200):
                assert orchestrator.ask("add_memory", content="among many")["status"] == "success"
    connected_s = max(each[0] for each in members.successes) - began_s
    answered_s = max(each[1] for each in members.successes) - began_s - connected_s
    assert len(members.successes) == CLIENTS
    assert answered_s <= ANSWERED_S, answered_s
    each_kib = (among.resident_kib - before.resident_kib) / CLIENTS
    assert each_kib <= EACH_KIB, each_kib
    return (
        f"all connected after {connected_s:.1f} s; then all asked at once and were answered within {answered_s:.1f} s; "
        f"{among}; {each_kib:.1f} KiB a connection; "
        "200 writes of another client among them succeeded"
    )


@torture("load", "soak: mixed load with faults", share=4.0)
def long_soak(run: Run) -> str:
    # Of a long one: its memory rises by 1 MiB until 20 minutes after its start, and then hardly.
    lasts_s = max(40.0, run.budget_s * 0.6)
    seen = soak(
        run.folder,
        run.seed,
        warm_up_s=max(15.0, run.budget_s * 0.4),
        lasts_s=lasts_s,
        every_s=max(0.5, lasts_s / 600),
        quiet_s=20.0,
        **FULL_SOON,
    )
    run.say(str(seen))
    run.say("least MiB by the minute: " + " ".join(f"{mib:.1f}" for _, mib in seen.least_mib()))
    assert seen.outcomes["success"] > 20 * (seen.outcomes.total() - seen.outcomes["success"]), seen.outcomes
    for of in (lambda each: each.held.files, lambda each: each.held.threads):
        assert seen.typical(of, late=True) <= seen.typical(of, late=False) + SLACK, seen
    assert max(each.wal_kib for each in seen.samples) <= WAL_KIB, seen
    if lasts_s >= LONG_S:
        assert seen.slope_mib_per_hour < SLOPE_MIB_PER_HOUR, seen
    return str(seen)


@torture("load", "soak of a service that keeps 10 kB for each request (must be found)", share=0.5)
def leaking_soak(run: Run) -> str:
    lasts_s = max(150.0, run.budget_s * 0.8)
    seen = soak(
        run.folder, run.seed, warm_up_s=30.0, lasts_s=lasts_s, every_s=0.5, quiet_s=20.0, wrong="leak", **FULL_SOON
    )
    assert seen.slope_mib_per_hour > LEAK_MIB_PER_HOUR, seen
    return f"found out: a slope of {seen.slope_mib_per_hour:+.0f} MiB/h"

"""Damaged files, and disks that fail or are slow, for long."""

from __future__ import annotations

from collections import Counter

from tests.acceptance import test_trust_disk
from tests.support import damage
from tests.support.service import running_orchestrator
from tests.torture import Run, torture


@torture("disk", "damaged write-ahead log", share=0.5)
def damaged_log(run: Run) -> str:
    return _damaged(run, damage.of_the_log)


@torture("disk", "damaged database", share=0.5)
def damaged_database(run: Run) -> str:
    return _damaged(run, damage.of_the_database)


def _damaged(run: Run, kinds: damage.Kinds) -> str:
    with running_orchestrator(run.folder, storage__synchronous="full") as orchestrator:
        left = damage.fill_and_kill(orchestrator)
    counts: Counter[str] = Counter()
    while run.goes_on(counts.total(), least=300):
        found = damage.judged(left, run.folder / "copy", kinds(left, run.chance, 60))
        assert found.silent == [], found.silent
        counts.update(found.counts)
        run.say(f"{counts.total()} damages")
    told = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    return f"{counts.total()} damages: {told}; 0 silently shortened"


@torture("disk", "EIO from the n-th sync on", share=1.0)
def failing_syncs(run: Run) -> str:
    """Every n, as far as the time goes."""
    outcomes: Counter[str] = Counter()
    while run.goes_on(outcomes.total(), least=12):
        call = outcomes.total() + 1
        folder = run.folder / str(call)
        folder.mkdir()
        outcomes[test_trust_disk.failed_sync(folder, call)] += 1
        run.say(f"n = {call}")
        if outcomes["went on"] > 3:
            break
    told = ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items()))
    return f"n = 1 to {outcomes.total()}: {told}; 0 acknowledged writes lost"


@torture("disk", "slow syncs", share=0.5)
def slow_syncs(run: Run) -> str:
    told = []
    for delay_ms in (50, 200, 500):
        folder = run.folder / str(delay_ms)
        folder.mkdir()
        writes = 10
        reads, longest_s = test_trust_disk.slow_disk(folder, delay_ms, writes)
        assert reads > 2 * writes, (delay_ms, reads)
        told.append(f"{delay_ms} ms: {reads} reads during {writes} writes, the longest {longest_s * 1000.0:.0f} ms")
    return "; ".join(told) + "; heartbeats as ever"

"""kill -9 under writing clients: nothing acknowledged is lost, nothing is done twice, and the test can tell."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import crash
from tests.support.crash import Entry, Findings
from tests.support.lossy_proxy import LossyProxy
from tests.support.service import Orchestrator, running_orchestrator, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(240)]

CLIENTS = 8
# It is ready within 5 s, mostly within one, where the processors have nothing else to do; a test waits longer.
READY_S = 20.0
# What each life of the service lasts under load, before it is killed.
LIFE_S = (0.1, 0.8)
SETTLE_S = 0.15


@dataclass
class Run:
    """What one run left behind."""

    database: Path
    journals: list[list[Entry]]
    findings: Findings
    ready_s: list[float]

    @property
    def entries(self) -> list[Entry]:
        return [entry for journal in self.journals for entry in journal]


def seed_of_run() -> int:
    """CRASH_SEED repeats a run's decisions; the moments at which they meet the service are never quite the same."""
    return int(os.environ.get("CRASH_SEED") or random.SystemRandom().randrange(2**32))


def kill_and_restart(orchestrator: Orchestrator, tmp_path: Path) -> float:
    """Kill the service, look at a copy of what it left, start it anew; seconds until it answers."""
    orchestrator.kill()
    assert damage_of_copy(orchestrator.database, tmp_path / "copy") == []
    began_s = time.monotonic()
    orchestrator.start(wait=False)
    return crash.ready_within(orchestrator.ask, READY_S, began_s)


def damage_of_copy(database: Path, folder: Path) -> list[str]:
    """Check a copy with its write-ahead log, so that the service itself has to recover the original."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in (database, database.with_name(database.name + "-wal")):
        if file.exists():
            shutil.copy(file, folder / file.name)
    with contextlib.closing(sqlite3.connect(folder / database.name)) as db:
        return crash.damage(db)


def run_under_fire(tmp_path: Path, *, kills: int, cuts: int, idempotency: bool, seed: int) -> Run:
    """Kill the service again and again, and lose replies on the way, while clients write; then check."""
    print(f"CRASH_SEED={seed}")  # noqa: T201  pytest shows it when the test fails
    chance = random.Random(seed)
    faults = ["kill"] * kills + ["cut"] * cuts
    chance.shuffle(faults)
    ready_s: list[float] = []
    with (
        running_orchestrator(tmp_path, storage__idempotency=idempotency, storage__synchronous="full") as orchestrator,
        LossyProxy(orchestrator.port) as proxy,
    ):
        with crash.writing_clients(proxy.endpoint, tmp_path, seed, CLIENTS, reading=idempotency) as workers:
            for fault in faults:
                time.sleep(chance.uniform(*LIFE_S))
                if fault == "kill":
                    ready_s.append(kill_and_restart(orchestrator, tmp_path))
                else:
                    proxy.cut()
            time.sleep(SETTLE_S)
        wait_until(lambda: all_embedded(orchestrator), "every memory has its vector", 30.0)
        spot_check(orchestrator, [worker.journal.entries for worker in workers])
        orchestrator.kill()
        journals = [worker.journal.entries for worker in workers]
        return Run(orchestrator.database, journals, crash.check(orchestrator.database, journals), ready_s)


def all_embedded(orchestrator: Orchestrator) -> bool:
    around = {"namespace": crash.NAMESPACE}
    ready = orchestrator.ask("health_check")["readiness"]["search_index"] == "ready"
    return ready and orchestrator.ask("stats", around)["pending"] == 0


def spot_check(orchestrator: Orchestrator, journals: list[list[Entry]]) -> None:
    """The last text of each client that still stands is found by its own word."""
    around = {"namespace": crash.NAMESPACE}
    for entries in journals:
        entry = entries[-1]
        if entry.kind == "add" and entry.outcome == "ok":
            found = orchestrator.ask("search_memory", around, query=entry.texts[0].split()[1])
            assert entry.memory_ids[0] in [result["memory_id"] for result in found["results"]]


def vectors(database: Path) -> list[tuple[bool, str, int]]:
    """For each memory: whether its vector is that of its present text, the model, the vector's bytes."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        return db.execute(
            "SELECT m.content_digest = e.digest, e.model_id, length(e.vector) FROM memories m "
            "LEFT JOIN embeddings e ON e.row_id = m.row_id WHERE m.memory_type <> 'session'"
        ).fetchall()


def test_kill_9_loses_no_acknowledged_write_and_does_none_twice(tmp_path: Path) -> None:
    run = run_under_fire(tmp_path, kills=20, cuts=6, idempotency=True, seed=seed_of_run())
    assert run.findings == Findings()
    assert len(run.ready_s) == 20
    assert max(run.ready_s) < READY_S
    done = [entry for entry in run.entries if entry.outcome == "ok"]
    assert len(done) > 200
    assert {entry.kind for entry in done} == set(crash.KINDS)
    assert all(len(journal) > 10 for journal in run.journals)
    assert set(vectors(run.database)) == {(True, "stub-64", 256)}


def test_without_idempotency_the_same_run_does_writes_twice(tmp_path: Path) -> None:
    """The negative control: were nothing found here, the test above would prove nothing."""
    run = run_under_fire(tmp_path, kills=3, cuts=8, idempotency=False, seed=seed_of_run())
    assert run.findings.twice != []
    assert run.findings.damage == []


def test_the_checker_sees_what_is_wrong(tmp_path: Path) -> None:
    """The checker itself is tested: a lost write, a doubled one and a broken table are each found."""
    with running_orchestrator(tmp_path) as orchestrator:
        around = {"namespace": crash.NAMESPACE}
        journal = []
        for number in range(3):
            text = f"memory number {number}"
            reply = orchestrator.ask("add_memory", around, content=text)
            journal.append(Entry("add", "ok", [text], [reply["memory_id"]], reply["commit_seq"]))
        wait_until(lambda: all_embedded(orchestrator), "every memory has its vector")
        orchestrator.kill()
        assert crash.check(orchestrator.database, [journal]) == Findings()

        lost = Entry("add", "ok", ["never stored"], ["mem-lost"], 4)
        assert len(crash.check(orchestrator.database, [[*journal, lost]]).missing) == 2
        assert len(crash.check(orchestrator.database, [journal[:2]]).twice) == 1
        refused = Entry("add", "failed", ["memory number 1"], code="storage_error")
        assert crash.check(orchestrator.database, [[*journal, refused]]).undone == ["memory number 1"]

        with contextlib.closing(sqlite3.connect(orchestrator.database, isolation_level=None)) as db:
            db.execute("UPDATE memories SET content_digest = zeroblob(16) WHERE row_id = 1")
            db.execute("DELETE FROM index_log WHERE row_id = 2")
            assert len(crash.damage(db)) == 2

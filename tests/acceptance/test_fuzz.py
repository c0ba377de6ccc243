"""Mutated requests against a running orchestrator: each gets one reply, and the service is unharmed.

FUZZ_REQUESTS says how many (`make fuzz` sends 100,000), FUZZ_SEED which (printed at the start; the same seed sends the
same bytes).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import sys
import time
from pathlib import Path

import pytest

from memory_system import protocol
from tests.support.mutations import Mutations, PoliteCaller, corpus_of, send_all, valid_requests
from tests.support.process import running_orchestrator

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "20000"))
SEED = int(os.environ.get("FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
GROWTH_MB = 400.0

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(3600)]

# The one that writes files, and the one that takes words out of the index for a while: the polite caller misses them.
NOT_SENT = {"backup", "reindex"}


def test_the_same_seed_sends_the_same_bytes() -> None:
    corpus = valid_requests("m", "s", 1)
    first, second = iter(Mutations(7, corpus)), iter(Mutations(7, corpus))
    assert [next(first) for _ in range(2000)] == [next(second) for _ in range(2000)]
    actions = {protocol.ACTION_ALIASES.get(request["action"], request["action"]) for request in corpus}
    assert actions == protocol.ACTIONS - NOT_SENT


# -- the run ----------------------------------------------------------------------------------------------------


def log_text(folder: Path) -> str:
    lines = [
        line for file in sorted(folder.glob("logs/*")) for line in file.read_text().splitlines() if "error" in line
    ]
    return "\n".join(lines[:5])


def check_database(path: Path, copy: Path) -> None:
    shutil.copy(path, copy)
    with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        assert db.execute("SELECT count(*) FROM memories").fetchone()[0] > 0
        bad = "SELECT count(*) FROM memories WHERE not json_valid(metadata) OR not json_valid(tags) OR content = ''"
        assert db.execute(bad).fetchone() == (0,)


def test_mutated_requests_are_each_answered_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\nfuzz: FUZZ_SEED={SEED} FUZZ_REQUESTS={REQUESTS}\n")
    with running_orchestrator(tmp_path) as orchestrator:
        pid = orchestrator.pid
        messages = iter(Mutations(SEED, corpus_of(orchestrator)))
        polite = PoliteCaller(orchestrator.address)
        polite.round()
        with orchestrator.peer(dealer=True) as peer, polite:
            warm = min(REQUESTS, 2000)
            outcomes = send_all(peer.socket, messages, warm, SEED)
            resident_mb = orchestrator.resident_mb()
            began_s = time.monotonic()
            outcomes += send_all(peer.socket, messages, REQUESTS - warm, SEED)
            took_s = time.monotonic() - began_s
        polite.failure is None or pytest.fail(f"seed {SEED}: the polite caller failed: {polite.failure!r}")
        grown_mb = orchestrator.resident_mb() - resident_mb
        health = orchestrator.ask("health_check")
        with capsys.disabled():
            sys.stdout.write(f"fuzz: {took_s:.1f} s, +{grown_mb:.0f} MiB, polite rounds {polite.rounds}, {outcomes}\n")
        assert (orchestrator.alive, health["pid"], health["state"]) == (True, pid, "healthy")
        assert sum(outcomes.values()) == REQUESTS
        assert outcomes["internal_error"] == 0, f"seed {SEED}: {log_text(tmp_path)}"
        assert outcomes["success"] > REQUESTS // 20
        assert grown_mb < GROWTH_MB
        assert polite.rounds > 1
        assert orchestrator.terminate() == 0
        check_database(orchestrator.database, tmp_path / "copy.db")

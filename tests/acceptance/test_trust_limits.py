"""Limits of a caller at a real orchestrator: the client waits, its breaker stays closed, and figures outlive kills."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from pathlib import Path

import pytest

from memory_client import MemoryClient
from memory_system.storage import usage
from tests.support.process import Orchestrator, running_orchestrator
from tests.support.wire import decode, encode, envelope


def test_a_client_above_its_rate_waits_and_its_breaker_stays_closed(tmp_path: Path) -> None:
    limits = {"limits__rate_per_s": 20.0, "limits__burst": 2}
    with (
        running_orchestrator(tmp_path, **limits) as orchestrator,
        MemoryClient(orchestrator.address, agent_id="ada", failure_threshold=1, timeout_ms=20_000) as client,
    ):
        for number in range(12):
            assert client.add_memory(f"memory {number}")["status"] == "success"
        assert client.get_circuit_breaker_status()["state"] == "closed"
        assert orchestrator.ask("health_check")["rate_limited"] > 0


def test_a_client_that_cannot_wait_so_long_is_told_and_its_breaker_stays_closed(tmp_path: Path) -> None:
    limits = {"limits__rate_per_s": 0.001, "limits__burst": 1}
    with (
        running_orchestrator(tmp_path, **limits) as orchestrator,
        MemoryClient(orchestrator.address, agent_id="ada", failure_threshold=1, timeout_ms=5_000) as client,
    ):
        assert client.stats()["status"] == "success"
        for _ in range(5):
            reply = client.stats()
            assert (reply["error_code"], reply["outcome"], reply["retryable"]) == ("rate_limited", "failed", True)
        status = client.get_circuit_breaker_status()
        assert (status["state"], status["failure_count"]) == ("closed", 0)


MOST = 80


@pytest.mark.timeout(120)
def test_a_quota_is_exact_after_kills_in_the_midst_of_writes(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201
    chance = random.Random(seed)
    with running_orchestrator(tmp_path, limits__max_memories=MOST, limits__max_mb=10.0) as orchestrator:
        for _ in range(2):
            write_and_kill(orchestrator, chance)
            assert kept(orchestrator.database) == counted(orchestrator.database)
            orchestrator.restart()
        codes = []
        while not codes or codes[-1] == "success":
            reply = orchestrator.ask("add_memory", {"agent_id": "ada"}, content="one more")
            codes.append(reply.get("error_code", "success"))
            assert len(codes) <= MOST + 1
        assert codes[-1] == "quota_exceeded"
    assert counted(orchestrator.database)["@/ada"][0] == MOST


def write_and_kill(orchestrator: Orchestrator, chance: random.Random) -> None:
    """Adds, updates and deletions without a wait for their replies, and kill -9 in between."""
    around = {"agent_id": "ada"}
    with orchestrator.peer(dealer=True) as peer:
        known: list[str] = []
        for number in range(chance.randrange(20, 40)):
            if known and chance.random() < 0.5:
                action = chance.choice(["update_memory", "delete_memory"])
                data = {"memory_id": chance.choice(known)}
                if action == "update_memory":
                    data["update_payload"] = {"content": "ü" * chance.randrange(1, 200)}  # type: ignore[assignment]
                peer.send(encode(envelope(action, data, **around), "json"))
            else:
                peer.send(encode(envelope("add_memory", {"content": "x" * number or "x"}, **around), "json"))
            if chance.random() < 0.3:
                reply = decode(peer.receive(), "json")
                known += [reply["memory_id"]] if "created_at" in reply else []
    orchestrator.kill()


def counted(database: Path) -> dict[str, tuple[int, int]]:
    with contextlib.closing(sqlite3.connect(database)) as db:
        return {owner: (number, size) for owner, number, size in db.execute(usage.COUNTED)}


def kept(database: Path) -> dict[str, tuple[int, int]]:
    with contextlib.closing(sqlite3.connect(database)) as db:
        found = db.execute("SELECT owner, memories, bytes FROM usage WHERE memories > 0")
        return {owner: (number, size) for owner, number, size in found}

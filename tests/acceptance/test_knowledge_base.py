"""The knowledge base under load, killed, without its memory service, and with the real model."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from memory_client import MemoryClient
from tests.support.agents import Agent, running_agent
from tests.support.process import PROJECT, running_orchestrator, wait_until
from tests.support.wire import Reply

pytestmark = pytest.mark.acceptance


def every_fact(agent: Agent, **data: Any) -> list[Reply]:
    """All facts on a topic."""
    found: list[Reply] = []
    cursor: dict[str, str] = {}
    while True:
        reply = agent.succeed("get_fact", limit=100, **data, **cursor)
        found += reply["results"]
        if "next_cursor" not in reply:
            return found
        cursor = {"cursor": reply["next_cursor"]}


def together(callers: int, work: Callable[[int], Reply]) -> list[Reply]:
    with ThreadPoolExecutor(callers) as pool:
        return list(pool.map(work, range(callers)))


def test_fifty_callers_at_once(tmp_path: Path) -> None:
    with (
        running_orchestrator(tmp_path) as orchestrator,
        running_agent(tmp_path, "knowledge_base", orchestrator.address) as agent,
    ):
        start = threading.Barrier(50)

        def same(place: int) -> Reply:
            start.wait(20)
            return agent.ask("add_fact", {"agent_id": f"caller-{place}"}, topic="Office", content="It has wifi.")

        replies = together(50, same)
        assert {reply["status"] for reply in replies} == {"success"}
        # What is looked up and then written is done under the topic's lock: one of them added it.
        assert sum(reply["added"] for reply in replies) == 1
        assert len({reply["fact_id"] for reply in replies}) == 1

        def rent(place: int) -> Reply:
            start.wait(20)
            return agent.ask("add_fact", topic="Rent", content=f"The rent is {900 + place} euros.")

        assert all(reply["added"] for reply in together(50, rent))
        current = every_fact(agent, topic="Rent")
        assert len(current) == 1, "each supersedes the one before"
        assert agent.succeed("delete_fact", fact_id=current[0]["fact_id"])["deleted"] == 50


def test_a_killed_agent_loses_nothing(tmp_path: Path) -> None:
    """Callers go on while the agent is killed and started again: what was acknowledged is there, once."""
    with (
        running_orchestrator(tmp_path) as orchestrator,
        running_agent(tmp_path, "knowledge_base", orchestrator.address) as agent,
    ):
        acknowledged: list[str] = []
        end = threading.Event()

        def tell(place: int) -> Reply:
            with MemoryClient(agent.address, timeout_ms=20_000, error_bus="") as client:
                number = 0
                while not end.is_set():
                    content = f"Caller {place} noticed thing {number}."
                    reply = client.call("add_fact", {"topic": f"Things {place}", "content": content})
                    assert reply["status"] == "success", reply
                    assert reply["added"], "a retried request does not reinforce what it added itself"
                    acknowledged.append(content)
                    number += 1
            return {}

        def kill() -> None:
            for _ in range(3):
                before = len(acknowledged)
                wait_until(lambda before=before: len(acknowledged) > before + 40, "callers get on")
                agent.kill()
                time.sleep(0.2)
                agent.restart()
            end.set()

        killer = threading.Thread(target=kill)
        killer.start()
        together(8, tell)
        killer.join()
        there = [fact["content"] for place in range(8) for fact in every_fact(agent, topic=f"Things {place}")]
        assert len(there) == len(set(there))
        assert set(acknowledged) == set(there)


def test_without_the_memory_service_it_says_so_at_once_and_recovers(tmp_path: Path) -> None:
    with (
        running_orchestrator(tmp_path) as orchestrator,
        running_agent(tmp_path, "knowledge_base", orchestrator.address, agents__call_s=1.0) as agent,
    ):
        agent.succeed("add_fact", topic="Office", content="It has wifi.")
        orchestrator.kill()
        agent.wait_state("degraded")
        wait_until(lambda: agent.succeed("health_check")["breaker"] == "open", "the breaker is open")
        for action, data in (
            ("get_fact", {"topic": "Office"}),
            ("add_fact", {"topic": "Office", "content": "x"}),
            ("list_topics", {}),
            ("import_facts", {"records": [{"topic": "a", "content": "b"}]}),
        ):
            reply = agent.refused(action, **data)
            assert (reply["error_code"], reply["retryable"]) == ("unavailable", True)
            assert reply["details"]["retry_after_ms"] >= 0
        orchestrator.restart()
        agent.wait_state("healthy")
        assert agent.succeed("get_fact", topic="Office")["fact"]["content"] == "It has wifi."


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_with_the_real_model_what_is_not_known_is_not_found(tmp_path: Path) -> None:
    facts = [
        ("Office", "The guest wifi password is blue-otter-42."),
        ("People", "Ben Okafor is responsible for payroll."),
        ("Expenses", "Receipts must be handed in within 30 days."),
        ("Kusina", "Ang bigas ay nasa malaking lalagyan sa ilalim ng lababo."),
    ]
    with (
        running_orchestrator(tmp_path, embedding__provider="sentence-transformers") as orchestrator,
        running_agent(tmp_path, "knowledge_base", orchestrator.address) as agent,
    ):
        for topic, content in facts:
            agent.succeed("add_fact", topic=topic, content=content)

        def embedded() -> bool:
            ready = orchestrator.ask("health_check")["readiness"]["embedding"] == "ready"
            return ready and orchestrator.ask("stats")["pending"] == 0

        wait_until(embedded, "every fact has its vector", 150.0)
        for question, place in (
            ("What is the wifi password for guests?", 0),
            ("Who handles payroll?", 1),
            ("How long may I keep my receipts before I hand them in?", 2),
            ("Nasaan ang bigas?", 3),
        ):
            assert agent.succeed("get_fact", topic=question)["fact"]["content"] == facts[place][1]
        for question in ("What is the capital of Mongolia?", "How do I bake sourdough bread?", "Where can I park?"):
            reply = agent.refused("get_fact", topic=question)
            assert reply["error_code"] == "memory_not_found"
            assert agent.succeed("search_facts", query=question)["results"] == []
        same = agent.succeed("add_fact", topic="expenses", content="Receipts must be handed in within thirty days.")
        other = agent.succeed("add_fact", topic="expenses", content="Receipts must be handed in within 60 days.")
        assert other["added"]
        assert len(other["superseded"]) == 1, (same, other)


def run_import(agent: Agent, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(PROJECT / "scripts" / "import_facts.py")
    return subprocess.run(
        [sys.executable, script, *arguments, "--endpoint", agent.address],
        env={**os.environ, "MEMORY_CONFIG": os.devnull},
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_an_older_knowledge_base_is_imported(tmp_path: Path) -> None:
    database, lines = tmp_path / "old base.db", tmp_path / "facts.jsonl"
    with sqlite3.connect(database) as db:
        db.execute(
            "CREATE TABLE knowledge (id INTEGER PRIMARY KEY, subject TEXT, fact TEXT, certainty REAL, created TEXT)"
        )
        db.execute("CREATE TABLE other (x)")
        rows = [(f"Topic {each % 7}", f"Thing {each} is here.", 0.5, "2020-01-02 03:04:05") for each in range(450)]
        db.executemany("INSERT INTO knowledge (subject, fact, certainty, created) VALUES (?, ?, ?, ?)", rows)
    db.close()
    lines.write_text('{"about": "Rail", "text": "Trains run."}\n\n{"about": "Rail", "text": ""}\n')
    with (
        running_orchestrator(tmp_path) as orchestrator,
        running_agent(tmp_path, "knowledge_base", orchestrator.address) as agent,
    ):
        dry = run_import(agent, str(database), "--dry-run")
        assert (dry.returncode, dry.stdout) == (0, "450 rows would be imported\n"), dry
        assert agent.succeed("list_topics")["total"] == 0
        first = run_import(agent, str(database), "--source", "old")
        assert (first.returncode, first.stdout) == (0, "450 added, 0 there already\n"), first
        assert "topic from subject" in first.stderr
        again = run_import(agent, str(database), "--source", "old")
        assert (again.returncode, again.stdout) == (0, "0 added, 450 there already\n"), again
        assert agent.succeed("list_topics")["total"] == 7
        fact = agent.succeed("get_fact", topic="topic 3", limit=1)["fact"]
        assert (fact["confidence"], fact["source"]) == (0.5, "old")
        assert fact["said_at"] == 1577934245.0
        bad = run_import(agent, str(lines), "--column", "topic=about")
        assert bad.returncode == 2
        assert "line 3.content is missing or empty" in bad.stderr
        skipped = run_import(agent, str(lines), "--column", "topic=about", "--skip-bad", "--namespace", "trial")
        assert (skipped.returncode, skipped.stdout) == (3, "1 added, 0 there already\n"), skipped
        assert agent.succeed("list_topics", {"namespace": "trial"})["total"] == 1
        for wrong in (["none.db"], [str(database), "--table", "nope"], [str(lines), "--table", "x"]):
            assert run_import(agent, *wrong).returncode == 2


def test_an_import_without_the_memory_service_says_so(tmp_path: Path) -> None:
    lines = tmp_path / "facts.jsonl"
    lines.write_text('{"topic": "Rail", "content": "Trains run."}\n')
    with (
        running_orchestrator(tmp_path) as orchestrator,
        running_agent(tmp_path, "knowledge_base", orchestrator.address) as agent,
    ):
        orchestrator.kill()
        agent.wait_state("degraded")
        done = run_import(agent, str(lines))
        assert done.returncode == 1
        assert "does not answer" in done.stderr

"""The session memory with real processes that are killed: nothing that was acknowledged is lost, nothing is twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from memory_client import MemoryClient
from tests.support.agents import Agent, running_agent
from tests.support.process import PROJECT, running_orchestrator, wait_until
from tests.support.wire import request_id


def client_of(agent: Agent) -> MemoryClient:
    return MemoryClient(agent.address, agent_id="host", timeout_ms=20_000, failure_threshold=10**6, raise_on_error=True)


def said_in(agent: Agent, session_id: str) -> list[str]:
    found, cursor = [], {}
    while True:
        page = agent.succeed("get_context", session_id=session_id, limit=500, **cursor)
        found = [turn["content"] for turn in page["results"]] + found
        if "next_cursor" not in page:
            return found
        cursor = {"cursor": page["next_cursor"]}


@pytest.mark.parametrize("victim", ["agent", "orchestrator"])
def test_a_conversation_goes_on_through_kills(tmp_path: Path, victim: str) -> None:
    """A caller talks on while a program is killed again and again, and sends again what was not answered."""
    with (
        running_orchestrator(tmp_path) as orchestrator,
        running_agent(tmp_path, "session_memory", orchestrator.address, agents__reset_timeout_s=0.1) as agent,
    ):
        session_id = agent.succeed("create_session", user_id="ada")["session_id"]
        acknowledged: list[str] = []
        stop = threading.Event()

        def talk() -> None:
            with client_of(agent) as client:
                while not stop.is_set():
                    text = f"sentence {len(acknowledged)}"
                    client.call("add_interaction", {"session_id": session_id, "role": "user", "content": text})
                    acknowledged.append(text)

        talker = threading.Thread(target=talk)
        talker.start()
        try:
            for _ in range(3):
                before = len(acknowledged)
                wait_until(lambda: len(acknowledged) > before + 20, "the conversation goes on")  # noqa: B023
                if victim == "agent":
                    agent.restart()
                else:
                    orchestrator.restart()
            before = len(acknowledged)
            wait_until(lambda: len(acknowledged) > before, "the conversation goes on")
        finally:
            stop.set()
            talker.join(30)
        assert not talker.is_alive()
        assert said_in(agent, session_id) == acknowledged


def test_a_restarted_agent_knows_every_session(tmp_path: Path) -> None:
    with (
        running_orchestrator(tmp_path) as orchestrator,
        running_agent(tmp_path, "session_memory", orchestrator.address) as agent,
    ):
        made = [agent.succeed("create_session", user_id="ada", idle_timeout_s=each) for each in (0, 0, 6, 6)]
        ids = [each["session_id"] for each in made]
        for session_id in ids:
            agent.succeed("add_interaction", session_id=session_id, role="Ada", content=f"I said this in {session_id}.")
        agent.succeed("end_session", session_id=ids[0], summary="Short.")
        retried = {"request_id": request_id()}
        said = {"session_id": ids[1], "role": "user", "content": "Once."}
        first = agent.succeed("add_interaction", retried, **said)
        before = [agent.succeed("get_context", session_id=each)["results"] for each in ids]
        agent.kill()
        # Nobody is there to end it when its time has come; the other one is resumed after that.
        time.sleep(6.1)
        agent.restart()
        assert [agent.succeed("get_context", session_id=each)["results"] for each in ids] == [
            [{**turn, "importance": pytest.approx(turn["importance"], abs=0.001)} for turn in turns] for turns in before
        ]
        states = {each["session_id"]: each["session_state"] for each in agent.succeed("list_sessions")["results"]}
        assert states == dict(zip(ids, ["ended", "open", "ended", "ended"], strict=True))
        assert agent.succeed("get_session", session_id=ids[0])["session"]["summary"] == "Short."
        again = agent.succeed("add_interaction", retried, **said)
        assert (again["interaction_id"], again["replayed"]) == (first["interaction_id"], True)
        late = {"session_id": ids[2], "role": "user", "content": "Late."}
        assert agent.refused("add_interaction", **late)["error_code"] == "session_ended"
        agent.succeed("resume_session", session_id=ids[2])
        agent.succeed("add_interaction", **late)


def test_without_the_memory_service_the_agent_says_so_and_recovers(tmp_path: Path) -> None:
    with (
        running_orchestrator(tmp_path) as orchestrator,
        running_agent(
            tmp_path, "session_memory", orchestrator.address, agents__call_s=1, agents__reset_timeout_s=0.2
        ) as agent,
    ):
        session_id = agent.succeed("create_session", user_id="ada")["session_id"]
        orchestrator.kill()
        agent.wait_state("degraded")
        for action, data in (
            ("create_session", {"user_id": "ada"}),
            ("add_interaction", {"session_id": session_id, "role": "user", "content": "Hello?"}),
            ("get_context", {"session_id": session_id}),
            ("search_interactions", {"session_id": session_id, "query": "hello"}),
            ("import_sessions", {"user_id": "ada", "conversations": [conversation("c", 1)]}),
        ):
            reply = agent.refused(action, **data)
            assert (reply["error_code"], reply["retryable"]) == ("unavailable", True), reply
            assert 0 < reply["details"]["retry_after_ms"] <= 1000
        orchestrator.start()
        agent.wait_state("healthy")
        assert agent.succeed("get_context", session_id=session_id)["count"] == 0


# -- the script that imports conversations ----------------------------------------------------------------------------


def conversation(name: str, turns: int) -> dict[str, Any]:
    said = [{"role": ("user", "assistant")[n % 2], "content": f"{name} turn {n}"} for n in range(turns)]
    return {"conversation_id": name, "turns": said}


def script(agent: Agent, *arguments: str) -> subprocess.Popen[str]:
    """To be used as a context."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "scripts" / "import_sessions.py"), *arguments, "--endpoint", agent.address],
        env={**kept, "MEMORY_CONFIG": os.devnull},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(agent: Agent, *arguments: str) -> tuple[int, str]:
    with script(agent, *arguments) as process:
        try:
            output, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    return process.returncode, output + errors


def stored(agent: Agent, user: str) -> dict[str, list[str]]:
    """What was said, by the conversation's id."""
    found = agent.succeed("list_sessions", user_id=user, limit=1000)["results"]
    names = {each["metadata"]["imported"]["conversation_id"]: each["session_id"] for each in found}
    assert len(names) == len(found), "no conversation is there twice"
    return {name: said_in(agent, session_id) for name, session_id in names.items()}


def test_an_import_that_is_broken_off_goes_on_and_makes_nothing_twice(tmp_path: Path) -> None:
    every = [conversation(f"c{number}", 60) for number in range(100)]
    expected = {each["conversation_id"]: [turn["content"] for turn in each["turns"]] for each in every}
    file = tmp_path / "dump.jsonl"
    file.write_text("\n".join(map(json.dumps, every)))
    with (
        running_orchestrator(tmp_path) as orchestrator,
        running_agent(tmp_path, "session_memory", orchestrator.address) as agent,
    ):
        asked = [str(file), "--user-id", "ada"]
        status, told = run(agent, *asked, "--dry-run")
        assert (status, agent.succeed("list_sessions")["count"]) == (0, 0)
        assert "sessions: 100 would be added, 0 there already" in told

        with script(agent, *asked) as process:
            try:
                begun = "the import has begun"
                wait_until(lambda: agent.succeed("list_sessions")["count"] > 10, begun, timeout_s=60)
            finally:
                process.kill()
        agent.restart()
        partly = stored(agent, "ada")
        assert 0 < len(partly) < 100, "it was broken off under way"

        status, told = run(agent, *asked)
        assert status == 0, told
        assert stored(agent, "ada") == expected
        count = orchestrator.ask("stats")["memories"]
        assert count == 6000
        status, told = run(agent, *asked)
        assert (status, told) == (
            0,
            "sessions: 0 added, 100 there already\nturns: 0 added, 6000 there already, 0 in conflict\n",
        )
        assert orchestrator.ask("stats")["memories"] == count


def test_what_the_script_says_of_files_and_conflicts(tmp_path: Path) -> None:
    with (
        running_orchestrator(tmp_path) as orchestrator,
        running_agent(tmp_path, "session_memory", orchestrator.address) as agent,
    ):
        file = tmp_path / "dump.json"
        asked = [str(file), "--user-id", "ada", "--namespace", "old"]
        assert run(agent, *asked) == (2, f"import_sessions: {file}: No such file or directory\n")
        file.write_text('[{"id": "7", "turns": [{"role": "user"}]}]')
        status, told = run(agent, *asked)
        assert (status, told.splitlines()[0]) == (
            2,
            f"import_sessions: {file}: item 1, turn 1 has no text: expected one of content, text, value, message, "
            "utterance",
        )
        file.write_text(json.dumps([conversation("c", 3)]))
        assert run(agent, *asked)[0] == 0
        said = conversation("c", 4)
        said["turns"][1]["content"] = "Something else."
        file.write_text(json.dumps([said]))
        assert run(agent, *asked) == (
            3,
            "sessions: 0 added, 1 there already\nturns: 1 added, 2 there already, 1 in conflict\n"
            "c: turn 2 is there with another content\n",
        )
        assert agent.succeed("list_sessions")["count"] == 0
        assert agent.succeed("list_sessions", {"namespace": "old"})["count"] == 1
        said["turns"][0]["metadata"] = {"a": "x" * 40_000}
        file.write_text(json.dumps([said]))
        status, told = run(agent, *asked)
        assert status == 2
        assert "conversations[0].turns[0].metadata" in told

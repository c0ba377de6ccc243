"""examples/two_sessions.py with the real model and the real agents, and what the README shows of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.agents import running_agent
from tests.support.process import PROJECT, running_orchestrator, wait_until

EXAMPLE = PROJECT / "examples" / "two_sessions.py"
SAID = "Please remember that she is allergic to peanuts."

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]


def shown() -> str:
    """The block below the README's heading."""
    page = (PROJECT / "README.md").read_text(encoding="utf-8").split("## Two sessions")[1]
    found = re.search(r"^```\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def parts(text: str) -> tuple[str, str]:
    """What is said in both sessions, and what the prompt gets of the first."""
    said, _, remembered = text.partition("what a prompt")
    return said, remembered


def test_the_second_session_knows_what_the_first_said(tmp_path: Path) -> None:
    with (
        running_orchestrator(tmp_path, embedding__provider="sentence-transformers") as orchestrator,
        running_agent(tmp_path, "session_memory", orchestrator.address) as sessions,
        running_agent(tmp_path, "context_manager", orchestrator.address) as context,
    ):
        wait_until(lambda: orchestrator.ask("health_check")["readiness"]["embedding"] == "ready", "the model", 60)
        done = subprocess.run(
            [sys.executable, str(EXAMPLE), "--sessions", sessions.address, "--context", context.address],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "MEMORY_KEY_FILE": ""},  # whatever keys this checkout has
        )
        assert done.returncode == 0, done.stderr
        left = orchestrator.ask("stats", {"namespace": "two_sessions"})
        assert (left["memories"], left["sessions"]) == (0, 0)
    said, remembered = parts(done.stdout)
    assert said == parts(shown())[0]
    for text in (remembered, parts(shown())[1]):
        assert SAID in text
        assert "weather" not in text

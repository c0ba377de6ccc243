"""docs/write_an_agent.md as a newcomer follows it: files saved, commands pasted, answers as the page shows them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memory_system.deployment import Address, program_addresses
from memory_system.settings import Settings
from tests.support.mesh import running_mesh
from tests.support.process import PROJECT, Orchestrator, free_port, running_orchestrator, wait_until

PAGE = (PROJECT / "docs" / "write_an_agent.md").read_text(encoding="utf-8")
PORT = "5600"

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)[number]


def saved(folder: Path, port: int) -> None:
    """The files of the page, in a project folder of the reader's, at another port."""
    for name in ("agents", "memory_system", "memory_client.py"):
        (folder / name).symlink_to(PROJECT / name)
    for number, name in enumerate(("note_agent.py", "ask.py")):
        text = block("python", number)
        assert PORT in text
        (folder / name).write_text(text.replace(PORT, str(port)))


def pasted(folder: Path, orchestrator: Orchestrator) -> list[dict[str, Any]]:
    """What the commands of the page print."""
    commands = block("sh")
    assert commands.count(".venv/bin/python ") >= 5
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEMORY_", "PYTHONPATH"))}
    done = subprocess.run(
        ["sh", "-e", "-c", commands.replace(".venv/bin/python", sys.executable)],
        env={**kept, **orchestrator.environ, "MEMORY_CONFIG": os.devnull},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def without_ids(answers: Any) -> Any:
    return json.loads(re.sub(r"mem-[0-9a-f]+", "mem-", json.dumps(answers)))


def test_the_agent_has_thirty_lines() -> None:
    code = [line for line in block("python").splitlines() if line.strip()]
    assert len(code) <= 30
    assert max(map(len, code)) <= 120


def test_the_page_works_by_copy_and_paste(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path) as orchestrator:
        folder = tmp_path / "project"
        folder.mkdir()
        saved(folder, free_port())
        answers = pasted(folder, orchestrator)
    shown = [json.loads(line) for line in block("json").splitlines()]
    assert without_ids(answers[:3]) == without_ids(shown)
    described, health = answers[3:]
    assert [each["action"] for each in described["actions"]] == ["add_note", "find_notes"]
    assert health["state"] == "healthy"


def test_started_by_hand_the_health_manager_sees_it(tmp_path: Path) -> None:
    with running_mesh(tmp_path) as mesh:
        folder = tmp_path / "project"
        folder.mkdir()
        saved(folder, free_port())
        with (folder / "output").open("wb") as output:
            agent = subprocess.Popen(
                [sys.executable, "note_agent.py"], cwd=folder, env=mesh.environ, stdout=output, stderr=output
            )
        try:
            mesh.wait_state("note_agent", "healthy")
            assert mesh.component("note_agent")["pid"] == agent.pid
        finally:
            agent.terminate()
            assert agent.wait(30) == 0
        wait_until(lambda: mesh.component("note_agent").get("cause") == "stopped", "it signed off")


def test_its_section_of_supervisord_conf_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "supervisord.conf"
    shutil.copy(PROJECT / "config" / "supervisord.conf", path)
    with path.open("a") as file:
        file.write(f"\n{block('ini')}")
    assert program_addresses(Settings(), path)["note_agent"] == Address("", "127.0.0.1", int(PORT))

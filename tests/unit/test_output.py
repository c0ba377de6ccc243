"""A reader of a script's output that goes before the end: `make status | head -1`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.process import PROJECT, free_port
from tests.support.wire import environment


def run_unread(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the project, with nobody at the other end of its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
    ports = {f"{name}__port": free_port() for name in ("network", "health", "scheduler")}
    agents = {f"agents__{name}__port": free_port() for name in ("knowledge_base", "session_memory", "context_manager")}
    own = environment(tmp_path, {**ports, **agents, "security__keys_dir": tmp_path / "keys"})
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run(
            [sys.executable, *command],
            env={**kept, **own, "MEMORY_CONFIG": os.devnull, "MEMORY_RUN_DIR": str(tmp_path / "run")},
            cwd=PROJECT,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=90,
        )
    finally:
        os.close(write)


@pytest.mark.parametrize(
    ("command", "status"), [(("scripts/pc2.py", "status"), 3), (("scripts/keys.py", "--agent", "planner"), 0)]
)
def test_a_reader_that_has_gone_changes_nothing(tmp_path: Path, command: tuple[str, ...], status: int) -> None:
    done = run_unread(tmp_path, *command)
    assert (done.returncode, done.stderr) == (status, "")
    assert (tmp_path / "keys" / "planner.key").exists() == (command[0] == "scripts/keys.py")


def test_the_log_files_are_followed_until_their_reader_goes(tmp_path: Path) -> None:
    (tmp_path / "program.log").write_text("a line\n")
    make = ["make", "--no-print-directory", "logs", "SERVICE=", f"PY={sys.executable}"]
    environ = {**os.environ, "MEMORY__LOG__DIR": str(tmp_path), "MEMORY_RUN_DIR": str(tmp_path / "run")}
    with subprocess.Popen(
        make, cwd=PROJECT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as follow:
        assert follow.stdout is not None
        assert follow.stderr is not None
        assert follow.stdout.readline() == "a line\n"
        follow.stdout.close()
        with (tmp_path / "program.log").open("a") as log:
            log.write("another\n")
        assert follow.wait(60) == 0
        assert follow.stderr.read() == ""

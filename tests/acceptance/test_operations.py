"""Starting, watching and stopping the programs as an operator does, with the real supervisord and orchestrator."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent.parent
PC2 = [sys.executable, str(PROJECT / "scripts" / "pc2.py")]
TARGETS = ["start-pc2", "stop-pc2", "status", "logs", "demo", "test", "lint", "type", "fuzz", "bench", "clean"]

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


@dataclass
class Host:
    """A deployment of its own: folder, port, environment."""

    folder: Path
    run_dir: Path
    port: int = field(default_factory=free_port)

    def environ(self, **overrides: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
        return {
            **kept,
            "MEMORY_RUN_DIR": str(self.run_dir),
            "MEMORY__NETWORK__PORT": str(self.port),
            "MEMORY__STORAGE__PATH": str(self.folder / "memory.db"),
            "MEMORY__LOG__DIR": str(self.folder / "logs"),
            "MEMORY__EMBEDDING__PROVIDER": "stub",
            **overrides,
        }

    def pc2(self, *arguments: str, **overrides: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PC2, *arguments],
            env=self.environ(**overrides),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=100,
        )

    def row(self) -> dict[str, str]:
        """The orchestrator's row of the status table by heading; empty when nothing runs."""
        lines = self.pc2("status").stdout.splitlines()
        if len(lines) != 2:
            return {}
        starts = [lines[0].index(heading) for heading in lines[0].split()]
        cells = [lines[1][a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        return dict(zip(lines[0].split(), cells, strict=True))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path, tmp_path / "run")
    yield host
    assert host.pc2("stop").returncode == 0


def assert_nothing_runs(host: Host, **overrides: str) -> None:
    assert host.pc2("status", **overrides).returncode == 3
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", host.port)) != 0


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    lines = [line for line in done.stderr.splitlines() if not line.startswith("starting ")]
    assert len(lines) == 1, done.stderr
    assert all(part in lines[0] for part in parts), lines[0]
    assert done.stdout == ""


def test_start_is_repeatable_heals_and_stops(host: Host) -> None:
    assert host.row() == {}
    first = host.pc2("start")
    assert first.returncode == 0, first.stderr
    row = host.row()
    assert row["PROGRAM"] == "orchestrator"
    assert row["ADDRESS"] == f"tcp://127.0.0.1:{host.port}"
    assert row["STATE"] in {"healthy", "starting", "degraded"}
    assert row["PID"] in first.stdout

    again = host.pc2("start")
    assert again.returncode == 0
    assert host.row()["PID"] == row["PID"]

    os.kill(int(row["PID"]), signal.SIGKILL)
    wait_for(lambda: host.row().get("UPTIME", "-") != "-" and host.row()["PID"] != row["PID"], "a restart")
    after_kill = host.row()["PID"]

    os.kill(int(after_kill), signal.SIGTERM)
    wait_for(lambda: host.row().get("PID") != after_kill, "the exit")
    assert host.pc2("start").returncode == 0
    assert host.row()["PID"] not in {row["PID"], after_kill}

    stopped = host.pc2("stop")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped\n")
    assert_nothing_runs(host)
    assert host.pc2("stop").stdout == "not running\n"


def test_start_and_status_follow_the_configuration_of_the_running_programs(host: Host, tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(f"network: {{port: {free_port()}}}\n")
    assert host.pc2("start").returncode == 0
    address = host.row()["ADDRESS"]
    other = host.pc2("start", MEMORY_CONFIG="my.yaml", MEMORY__NETWORK__PORT=str(free_port()))
    assert other.returncode == 0
    assert f"stop it first to use {config}" in other.stderr
    assert address in other.stdout


@pytest.fixture
def short_temporary() -> Iterator[Path]:
    """A temporary folder whose own path leaves room for a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_run_folder_with_a_path_too_long_for_a_socket(tmp_path: Path, short_temporary: Path) -> None:
    host = Host(tmp_path, tmp_path / ("long" * 30) / "run")
    temporary = str(short_temporary)
    try:
        assert host.pc2("start", TMPDIR=temporary).returncode == 0
        assert host.pc2("status", TMPDIR=temporary).returncode == 0
        (folder,) = short_temporary.glob("memory-*")
        assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        assert host.pc2("stop", TMPDIR=temporary).returncode == 0
    assert_nothing_runs(host, TMPDIR=temporary)


def test_socket_folder_of_someone_else_is_refused(tmp_path: Path, short_temporary: Path) -> None:
    host = Host(tmp_path, tmp_path / ("long" * 30) / "run")
    host.pc2("status", TMPDIR=str(short_temporary))
    (folder,) = short_temporary.glob("memory-*")
    folder.chmod(0o777)
    done = host.pc2("start", TMPDIR=str(short_temporary))
    assert done.returncode == 1
    assert_one_line(done, str(folder), "not a private folder")


def test_nowhere_to_put_the_socket(tmp_path: Path) -> None:
    host = Host(tmp_path, tmp_path / ("long" * 30) / "run")
    temporary = tmp_path / ("long" * 30)
    temporary.mkdir(exist_ok=True)
    done = host.pc2("start", TMPDIR=str(temporary))
    assert done.returncode == 1
    assert_one_line(done, "too long for a socket", "MEMORY_RUN_DIR")


def test_port_in_use_is_named_before_anything_starts(host: Host) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", host.port))
        taken.listen()
        done = host.pc2("start")
    assert done.returncode == 1
    assert_one_line(done, f"port {host.port} on 127.0.0.1 is in use", "network.port")
    assert not (host.folder / "logs" / "supervisord.log").exists()
    assert_nothing_runs(host)


def test_address_of_another_machine_is_named(host: Host) -> None:
    done = host.pc2("start", MEMORY__NETWORK__BIND="192.0.2.1", MEMORY__SECURITY__ALLOW_INSECURE="true")
    assert done.returncode == 1
    assert_one_line(done, f"cannot listen on tcp://192.0.2.1:{host.port}", "network.bind")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("network:\n  prot: 1\n", ["my.yaml:2", "network.prot", "network.port"]),
        ("network:\n  port: x\n", ["my.yaml:2", "network.port = 'x'"]),
        ("network: [\n", ["my.yaml:2", "not valid YAML"]),
    ],
)
def test_broken_configuration_is_named_before_anything_starts(host: Host, text: str, parts: list[str]) -> None:
    (host.folder / "my.yaml").write_text(text)
    done = host.pc2("start", MEMORY_CONFIG="my.yaml")
    assert done.returncode == 2
    assert_one_line(done, *parts)
    assert_nothing_runs(host)


def test_program_that_exits_is_quoted_and_leaves_nothing_behind(host: Host) -> None:
    (host.folder / "file").write_text("")
    done = host.pc2("start", MEMORY__STORAGE__PATH=str(host.folder / "file" / "memory.db"))
    assert done.returncode == 1
    assert_one_line(done, "orchestrator did not start: ")
    assert_nothing_runs(host)


def test_logs_follows_the_files(host: Host) -> None:
    assert_one_line(host.pc2("logs"), "no logs yet")
    assert host.pc2("start").returncode == 0
    follow = subprocess.Popen([*PC2, "logs"], env=host.environ(), stdout=subprocess.PIPE, text=True)
    try:
        assert follow.stdout is not None
        assert any("supervisord started" in line for line in follow.stdout)
    finally:
        follow.terminate()
        follow.communicate(timeout=10)


def test_help_is_the_default_and_lists_every_target() -> None:
    listed = subprocess.run(["make"], cwd=PROJECT, capture_output=True, text=True, check=True, timeout=10).stdout
    assert [target for target in TARGETS if f"make {target} " not in listed] == []


def prerequisites(python: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PATH": path or os.environ["PATH"]}
    environ.pop("CXX", None)
    script = str(PROJECT / "scripts" / "prerequisites.sh")
    return subprocess.run(["/bin/sh", script, python], env=environ, capture_output=True, text=True, timeout=30)


def test_prerequisites_present() -> None:
    done = prerequisites(sys.executable)
    assert (done.returncode, done.stderr) == (0, "")


def test_missing_prerequisites_are_named_one_a_line(tmp_path: Path) -> None:
    done = prerequisites("/does/not/exist/python3", path=str(tmp_path))
    assert done.returncode == 1
    make, compiler, python = done.stderr.splitlines()
    assert make.startswith("missing: make")
    assert compiler.startswith("missing: a C++ compiler")
    assert python.startswith("missing: /does/not/exist/python3: Python 3.11 or later")


def test_make_stops_at_a_missing_prerequisite(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.txt", "scripts"):
        source = PROJECT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    make = ["make", "start-pc2", "PYTHON=/does/not/exist/python3"]
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "missing: /does/not/exist/python3" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_runs_the_tests() -> None:
    script = PROJECT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"

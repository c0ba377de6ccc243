"""Starting, watching and stopping the programs as an operator does, with the real supervisord and programs."""

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
from pathlib import Path

import pytest

from memory_system.storage.database import StoreLock
from tests.support.process import free_port

PROJECT = Path(__file__).resolve().parent.parent.parent
PC2 = [sys.executable, str(PROJECT / "scripts" / "pc2.py")]
TARGETS = ["start-pc2", "stop-pc2", "status", "logs", "demo", "test", "lint", "type", "fuzz", "bench", "clean"]
TARGETS += ["install-boot", "uninstall-boot", "tail-errors"]
TARGETS += ["jobs", "run-job", "backup", "restore", "export", "import", "import-facts", "import-sessions"]
HEALTH_PORTS = ("port", "publish_port", "mesh_port", "report_port")
AGENTS = ("knowledge_base", "session_memory", "context_manager")
PROGRAMS = ["orchestrator", "health_manager", "memory_scheduler", *(f"{name}_agent" for name in AGENTS)]

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


class Host:
    """A deployment of its own: folder, ports, environment."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.folder = folder
        self.run_dir = run_dir
        ports = [free_port() for _ in range(2 + len(HEALTH_PORTS) + len(AGENTS))]
        self.port, self.scheduler_port, *others = ports
        self.health_ports = dict(zip(HEALTH_PORTS, others, strict=False))
        self.agent_ports = dict(zip(AGENTS, others[len(HEALTH_PORTS) :], strict=True))

    def environ(self, **overrides: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
        return {
            **kept,
            "MEMORY_RUN_DIR": str(self.run_dir),
            "MEMORY__NETWORK__PORT": str(self.port),
            "MEMORY__SCHEDULER__PORT": str(self.scheduler_port),
            **{f"MEMORY__HEALTH__{name.upper()}": str(port) for name, port in self.health_ports.items()},
            **{f"MEMORY__AGENTS__{name.upper()}__PORT": str(port) for name, port in self.agent_ports.items()},
            "MEMORY__STORAGE__PATH": str(self.folder / "memory.db"),
            "MEMORY__BACKUP__DIR": str(self.folder / "backups"),
            "MEMORY__ERROR_BUS__HISTORY_PATH": str(self.folder / "health.db"),
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

    def row(self, program: str = "orchestrator") -> dict[str, str]:
        """A program's row of the status table by heading; empty when nothing runs."""
        return next((row for row in table(self.pc2("status").stdout) if row["PROGRAM"] == program), {})

    def is_well(self) -> bool:
        """Whether the health manager itself says that all programs are healthy."""
        done = self.pc2("status")
        states = {row["PROGRAM"]: row["STATE"] for row in table(done.stdout)}
        return done.stderr == "" and all(states.get(program) == "healthy" for program in PROGRAMS)


def table(text: str) -> list[dict[str, str]]:
    """The rows of a status table by heading; none when the text has no table."""
    headings, *lines = text.splitlines()
    names = headings.split()
    if names[0] != "PROGRAM":
        return []
    starts = [headings.index(name) for name in names]
    ends = [*starts[1:], None]
    return [{name: line[a:b].strip() for name, a, b in zip(names, starts, ends, strict=True)} for line in lines]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path, tmp_path / "run")
    yield host
    assert host.pc2("stop").returncode == 0


def assert_nothing_runs(host: Host, **overrides: str) -> None:
    assert host.pc2("status", **overrides).returncode == 3
    for port in (host.port, host.scheduler_port, *host.health_ports.values(), *host.agent_ports.values()):
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", port)) != 0


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
    assert row["ADDRESS"] == f"tcp://127.0.0.1:{host.port}"
    assert row["STATE"] in {"healthy", "starting", "degraded"}
    assert row["PID"] in first.stdout

    assert host.row("health_manager")["ADDRESS"] == f"tcp://127.0.0.1:{host.health_ports['port']}"

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


def test_what_outlives_its_supervisord_is_stopped(host: Host) -> None:
    assert host.pc2("start").returncode == 0
    supervisord = int((host.run_dir / "supervisord.pid").read_text())
    pids = [int(host.row(name)["PID"]) for name in ("orchestrator", "health_manager")]
    os.kill(supervisord, signal.SIGKILL)

    again = host.pc2("start")
    assert again.returncode == 0, again.stderr
    assert all(f"(pid {pid})" in again.stderr.splitlines()[0] for pid in pids), again.stderr
    assert int(host.row()["PID"]) not in pids

    os.kill(int((host.run_dir / "supervisord.pid").read_text()), signal.SIGKILL)
    stopped = host.pc2("stop")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped\n")
    assert_nothing_runs(host)


def test_the_health_manager_starts_first_ends_last_and_is_restarted(host: Host) -> None:
    assert host.pc2("start").returncode == 0
    wait_for(host.is_well, "the health manager's word on all programs")
    assert all(row["SINCE"] != "-" for row in table(host.pc2("status").stdout))
    first_pid = host.row("health_manager")["PID"]
    os.kill(int(first_pid), signal.SIGKILL)
    wait_for(lambda: host.row("health_manager").get("PID") not in {first_pid, "-"}, "a restart")
    wait_for(host.is_well, "the new one's word on all programs")
    assert host.pc2("stop").returncode == 0
    log = (host.folder / "logs" / "supervisord.log").read_text()
    assert log.index("spawned: 'health_manager'") < log.index("spawned: 'orchestrator'")
    assert log.rindex("stopped: orchestrator") < log.rindex("stopped: health_manager")


def test_status_without_the_health_manager_says_so_and_looks_itself(host: Host) -> None:
    assert host.pc2("start").returncode == 0
    pid = int(host.row("health_manager")["PID"])
    os.kill(pid, signal.SIGSTOP)
    try:
        done = host.pc2("status")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["the health manager does not answer: each program was asked by itself"]
    orchestrator, manager, *_ = table(done.stdout)
    assert (orchestrator["STATE"], orchestrator["SINCE"]) == ("healthy", "-")
    assert orchestrator["REASON"] == "it answers"
    assert (manager["STATE"], manager["PID"]) == ("no answer", str(pid))


def test_a_program_that_is_down_is_told_with_the_reason_and_by_the_exit_status(host: Host) -> None:
    assert host.pc2("start", MEMORY__HEALTH__HANG_S="1", MEMORY__HEALTH__HEAL="false").returncode == 0
    pid = int(host.row()["PID"])
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: host.row()["STATE"] == "down", "the hang")
        done = host.pc2("status")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 1
    row = table(done.stdout)[0]
    assert row["PID"] == str(pid)
    assert row["REASON"] not in {"", "-"}
    wait_for(lambda: host.pc2("status").returncode == 0, "the end of the hang")


@pytest.mark.parametrize("name", HEALTH_PORTS)
def test_every_port_of_the_health_manager_is_checked_before_anything_starts(host: Host, name: str) -> None:
    port = host.health_ports[name]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        done = host.pc2("start")
    assert done.returncode == 1
    assert_one_line(done, f"port {port} on 127.0.0.1 is in use by another program", f"health.{name}")
    assert not (host.folder / "logs" / "supervisord.log").exists()


def test_one_port_named_twice_is_refused(host: Host) -> None:
    done = host.pc2("start", MEMORY__METRICS__HEALTH_MANAGER_PORT=str(host.port))
    assert done.returncode == 1
    assert_one_line(done, "network.port and metrics.health_manager_port are both", str(host.port))


def test_folders_with_odd_names(host: Host) -> None:
    odd = host.folder / "100% it's"
    assert host.pc2("start", MEMORY__LOG__DIR=str(odd / "logs"), MEMORY_RUN_DIR=str(odd / "run")).returncode == 0
    try:
        assert (odd / "logs" / "orchestrator.console.log").exists()
    finally:
        assert host.pc2("stop", MEMORY_RUN_DIR=str(odd / "run")).returncode == 0


@pytest.fixture
def foreground(host: Host) -> Iterator[subprocess.Popen[str]]:
    """`pc2.py run`, which is no one's child but the test's."""
    process = subprocess.Popen(
        [*PC2, "run"], env=host.environ(), cwd=host.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    yield process
    process.terminate()
    process.communicate(timeout=90)


def test_run_is_supervisord_in_the_foreground(host: Host, foreground: subprocess.Popen[str]) -> None:
    waited = host.pc2("wait", MAINPID=str(foreground.pid))
    assert waited.returncode == 0, waited.stderr
    assert [row["PROGRAM"] for row in table(waited.stdout)][: len(PROGRAMS)] == PROGRAMS
    assert (host.run_dir / "supervisord.pid").read_text().strip() == str(foreground.pid)
    assert_one_line(host.pc2("run"), f"already running under supervisord, pid {foreground.pid}")
    assert host.pc2("start").returncode == 0
    assert (host.folder / "logs" / "orchestrator.log").stat().st_mode & 0o077 == 0

    foreground.send_signal(signal.SIGTERM)
    assert foreground.wait(30) == 0
    assert_nothing_runs(host)


def test_stop_ends_what_runs_in_the_foreground(host: Host, foreground: subprocess.Popen[str]) -> None:
    assert host.pc2("wait").returncode == 0
    assert host.pc2("stop").stdout == "stopped\n"
    assert foreground.wait(30) == 0


def test_run_refuses_a_broken_configuration_as_start_does(host: Host) -> None:
    done = host.pc2("run", MEMORY__NETWORK__PORT="x")
    assert done.returncode == 2
    assert_one_line(done, "MEMORY__NETWORK__PORT")


def test_wait_ends_with_the_process_that_it_waits_for(host: Host) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    done = host.pc2("wait", MAINPID=str(ended.pid))
    assert done.returncode == 1
    assert_one_line(done, "supervisord did not start")


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
    (host.folder / "memory.db").write_text("not a database, " * 512)
    done = host.pc2("start")
    assert done.returncode == 1
    assert_one_line(done, "orchestrator did not start", "file is not a database")
    assert_nothing_runs(host)


@pytest.mark.parametrize("path", ["file/memory.db", "folder", "/proc/memory.db"])
def test_a_store_that_cannot_be_there_is_named_before_anything_starts(host: Host, path: str) -> None:
    (host.folder / "file").write_text("")
    (host.folder / "folder").mkdir()
    done = host.pc2("start", MEMORY__STORAGE__PATH=str(host.folder / path))
    assert done.returncode == 1
    assert_one_line(done, f"the store {host.folder / path} cannot be opened: ", "storage.path")
    assert not (host.folder / "logs" / "supervisord.log").exists()


def test_a_store_of_an_orchestrator_started_elsewhere_is_named_before_anything_starts(host: Host) -> None:
    lock = StoreLock(host.folder / "memory.db")
    try:
        done = host.pc2("start")
    finally:
        lock.release()
    assert done.returncode == 1
    assert_one_line(done, f"in use by another orchestrator (pid {os.getpid()})", "storage.path")
    assert not (host.folder / "logs" / "supervisord.log").exists()


@pytest.mark.parametrize("command", ["start", "run"])
def test_an_open_address_without_keys_is_refused_before_anything_starts(host: Host, command: str) -> None:
    keys = str(host.folder / "keys")
    done = host.pc2(command, MEMORY__NETWORK__BIND="0.0.0.0", MEMORY__SECURITY__KEYS_DIR=keys)
    assert done.returncode == 2
    assert_one_line(done, "network.bind is 0.0.0.0", "make keys")
    assert not (host.folder / "logs" / "supervisord.log").exists()


def test_logs_follows_the_files(host: Host) -> None:
    assert_one_line(host.pc2("logs"), "no logs yet")
    assert host.pc2("start").returncode == 0
    follow = subprocess.Popen([*PC2, "logs"], env=host.environ(), stdout=subprocess.PIPE, text=True)
    try:
        assert follow.stdout is not None
        assert any("supervisord started" in line for line in follow.stdout)
    finally:
        follow.terminate()
        follow.communicate(timeout=90)


def test_help_is_the_default_and_lists_every_target() -> None:
    listed = subprocess.run(["make"], cwd=PROJECT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert [target for target in TARGETS if f"make {target} " not in listed] == []


def prerequisites(python: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PATH": path or os.environ["PATH"]}
    environ.pop("CXX", None)
    script = str(PROJECT / "scripts" / "prerequisites.sh")
    return subprocess.run(["/bin/sh", script, python], env=environ, capture_output=True, text=True, timeout=90)


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
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert done.returncode != 0
    assert "missing: /does/not/exist/python3" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_runs_the_tests() -> None:
    script = PROJECT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"

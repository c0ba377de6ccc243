"""scripts/tail_error_bus.py as a person runs it: a process, its lines and its exit status."""

from __future__ import annotations

import argparse
import json
import os
import pty
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import pytest
from tail_error_bus import LAST, since

from tests.support.fake_manager import FakeManager
from tests.support.process import PROJECT, free_port, wait_until

SCRIPT = PROJECT / "scripts" / "tail_error_bus.py"


class Tail:
    """The running script; its lines are awaited with a deadline."""

    def __init__(self, *arguments: str, **environ: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(SCRIPT), *arguments],
            env={**kept, "MEMORY_CONFIG": os.devnull, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.out, self.err = self._lines(self.process.stdout), self._lines(self.process.stderr)

    @staticmethod
    def _lines(stream: IO[str]) -> queue.Queue[str]:
        lines: queue.Queue[str] = queue.Queue()

        def read() -> None:
            for line in stream:
                lines.put(line.rstrip("\n"))

        threading.Thread(target=read, daemon=True).start()
        return lines

    def line(self, timeout_s: float = 45.0) -> str:
        return self.out.get(timeout=timeout_s)

    def lines(self, number: int) -> list[str]:
        return [self.line() for _ in range(number)]

    def complaint(self, timeout_s: float = 45.0) -> str:
        return self.err.get(timeout=timeout_s)

    def end(self, timeout_s: float = 45.0) -> int:
        return self.process.wait(timeout_s)


@pytest.fixture
def tail() -> Iterator[Callable[..., Tail]]:
    started: list[Tail] = []

    def start(*arguments: str, **environ: str) -> Tail:
        started.append(Tail(*arguments, **environ))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        for stream in (each.process.stdout, each.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def manager() -> Iterator[FakeManager]:
    with FakeManager() as made:
        yield made


def at(manager: FakeManager) -> tuple[str, ...]:
    return "--publish", manager.publish, "--api", manager.api


def shown(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """What it shows with these arguments, if it ends by itself."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
    return subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), *arguments],
        env={**kept, "MEMORY_CONFIG": os.devnull, **environ},
        capture_output=True,
        text=True,
        timeout=90,
    )


def texts(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [json.loads(line)["message"] for line in done.stdout.splitlines()]


def numbered(lines: list[str]) -> list[int]:
    return [int(json.loads(line)["message"]) for line in lines]


def wait_for_questions(manager: FakeManager, number: int) -> None:
    wait_until(lambda: len(manager.questions) >= number, f"{number} questions")


# -- lines ------------------------------------------------------------------------------------------------------------


def test_one_line_says_everything(manager: FakeManager) -> None:
    moment = datetime(2026, 1, 31, 12, 30, 5)
    manager.report(
        "planner", "timeout", "no answer", severity="warning", request_id="r-1", count=12, now_s=moment.timestamp()
    )
    manager.report("archiver", "storage_full", "", severity="critical", now_s=moment.timestamp())
    done = shown("--no-follow", *at(manager))
    assert done.stdout.splitlines() == [
        "2026-01-31 12:30:05  WARNING   planner  timeout  no answer  x12  request_id=r-1",
        "2026-01-31 12:30:05  CRITICAL  archiver  storage_full",
    ]
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stranger_s_text_stays_on_its_line_and_commands_no_terminal(manager: FakeManager) -> None:
    manager.report("plan\x1b[2Jner", "time\x07out", "two\nlines\r\x9b31m\u202e", request_id="\x1b]0;r\x07")
    (line,) = shown("--no-follow", *at(manager)).stdout.splitlines()
    assert r"plan\x1b[2Jner  time\x07out  two\nlines\r\x9b31m\u202e  request_id=\x1b]0;r\x07" in line


def test_json_is_one_object_a_line(manager: FakeManager) -> None:
    manager.report("planner", "timeout", "a\nb\x1b", severity="info", request_id="r-1", details={"after_s": 5}, count=3)
    (line,) = shown("--json", "--no-follow", *at(manager)).stdout.splitlines()
    assert line.isascii()
    assert line.isprintable()
    found = json.loads(line)
    assert abs(found.pop("timestamp") - time.time()) < 60
    assert len(found.pop("event_id")) == 32
    assert found == {
        "seq": 1,
        "agent": "planner",
        "error_type": "timeout",
        "message": "a\nb\x1b",
        "severity": "info",
        "request_id": "r-1",
        "details": {"after_s": 5},
        "count": 3,
    }


@pytest.mark.parametrize(
    ("environ", "coloured"), [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"NO_COLOR": "1"}, False)]
)
def test_a_terminal_gets_colours(manager: FakeManager, environ: dict[str, str], coloured: bool) -> None:
    manager.report(message="no answer", severity="critical")
    ours, theirs = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    try:
        command = [sys.executable, str(SCRIPT), "--no-follow", *at(manager)]
        done = subprocess.run(command, env={**kept, "TERM": "xterm", **environ}, stdout=theirs, timeout=90)
        assert done.returncode == 0
        line = os.read(ours, 4096)
    finally:
        os.close(theirs)
        os.close(ours)
    assert b"no answer" in line
    assert (b"\x1b[1;37;41mCRITICAL" in line) is coloured
    assert (b"\x1b" in line) is coloured


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_filters(manager: FakeManager) -> None:
    for severity in ("info", "warning", "error", "critical"):
        for agent in ("planner", "archiver"):
            manager.report(agent, message=f"{agent} {severity}", severity=severity)
    common = ("--json", "--no-follow", *at(manager))
    assert texts(shown("--severity", "error", "--agent", "planner", *common)) == ["planner error", "planner critical"]
    assert len(texts(shown("--severity", "warning", *common))) == 6
    assert texts(shown("--agent", "nobody", *common)) == []


def test_filters_hold_for_what_comes_live(manager: FakeManager, tail: Callable[..., Tail]) -> None:
    running = tail("--json", "--severity", "error", "--agent", "planner", *at(manager))
    wait_for_questions(manager, 1)
    for agent, severity in (("archiver", "error"), ("planner", "warning"), ("planner", "critical")):
        manager.report(agent, message=f"{agent} {severity}", severity=severity)
    manager.heartbeat()
    assert json.loads(running.line())["message"] == "planner critical"


def test_the_newest_come_first_without_a_time(manager: FakeManager) -> None:
    for number in range(LAST + 5):
        manager.report(message=str(number))
    common = ("--json", "--no-follow", *at(manager))
    assert texts(shown(*common)) == [str(number) for number in range(5, LAST + 5)]
    assert texts(shown("--lines", "2", *common)) == [str(LAST + 3), str(LAST + 4)]
    assert texts(shown("--lines", "0", *common)) == []


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("90s", ["1 m"]),
        ("10m", ["5 m", "1 m"]),
        ("2h", ["30 m", "5 m", "1 m"]),
        ("1.5d", ["1 d", "30 m", "5 m", "1 m"]),
    ],
)
def test_since_ago(manager: FakeManager, form: str, wanted: list[str]) -> None:
    now_s = time.time()
    for name, ago_s in (("2 d", 172_800), ("1 d", 86_400), ("30 m", 1800), ("5 m", 300), ("1 m", 60)):
        manager.report(message=name, now_s=now_s - ago_s)
    assert texts(shown("--json", "--no-follow", "--since", form, *at(manager))) == wanted


@pytest.mark.parametrize("form", ["1769860800", "1769860800.0", "2026-01-31T12:00:00Z", "2026-01-31T13:00+01:00"])
def test_since_a_time(manager: FakeManager, form: str) -> None:
    for name, timestamp in (("before", 1769860799.0), ("after", 1769860801.0)):
        manager.report(message=name, now_s=timestamp)
    assert texts(shown("--json", "--no-follow", "--since", form, *at(manager))) == ["after"]


def test_a_time_without_a_zone_is_local() -> None:
    assert since("2026-01-31T12:00") == datetime(2026, 1, 31, 12).timestamp()
    assert since("10m", now_s=1000.0) == 400.0
    assert since("10d", now_s=1000.0) == 0.0


@pytest.mark.parametrize("form", ["", "soon", "10", "-5", "10 m", "5w", "nan", "inf", "1e400", "12:00", "2026-13-01"])
def test_times_that_are_none(form: str) -> None:
    if form == "10":
        assert since(form) == 10.0, "epoch seconds"
        return
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        since(form)


# -- history, then live -----------------------------------------------------------------------------------------------


def test_history_first_then_live_without_a_seam(manager: FakeManager, tail: Callable[..., Tail]) -> None:
    total = 1200
    for number in range(600):
        manager.report(message=str(number))
    running = tail("--json", "--since", "1h", *at(manager))
    for number in range(600, total):
        manager.report(message=str(number))
    manager.heartbeat()
    assert numbered(running.lines(total)) == list(range(total))
    manager.report(message=str(total))
    assert numbered([running.line()]) == [total]


def test_a_restart_of_the_manager_loses_nothing(tail: Callable[..., Tail]) -> None:
    with FakeManager(fold_s=60.0) as first:
        rows, ports = first.rows, first.ports
        running = tail("--json", *at(first))
        wait_for_questions(first, 1)
        for number in range(3):
            first.report(message=str(number))  # one is broadcast, two are held back
        first.heartbeat()
        assert numbered([running.line()]) == [0]
    assert f"the connection to {first.publish} is lost" in running.complaint()
    with FakeManager(rows=rows, ports=ports, boot_id="boot-2") as second:
        assert numbered(running.lines(2)) == [1, 2]
        assert running.complaint() == "tail_error_bus: connected again"
        second.report(message="3")
        assert numbered([running.line()]) == [3]


def test_repeats_are_one_line_with_their_number(tail: Callable[..., Tail]) -> None:
    with FakeManager(fold_s=10.0) as manager:
        running = tail(*at(manager))
        wait_for_questions(manager, 1)
        wait_until(lambda: manager.broadcaster.subscriptions >= 2, "it is subscribed")
        manager.report(message="again")
        assert running.line().endswith("again")
        for _ in range(41):
            manager.report(message="again")
        manager.later(11.0)
        assert running.line().endswith("again  x41")


def test_what_repeats_in_the_history_is_one_line_until_something_else_comes(tail: Callable[..., Tail]) -> None:
    moment = datetime(2026, 1, 31, 12, 30, 0).timestamp()
    with FakeManager() as manager:
        running = tail("--since", "1d", *at(manager))
        wait_for_questions(manager, 1)
        wait_until(lambda: manager.broadcaster.subscriptions >= 2, "it is subscribed")
        manager.report(message="live")
        assert running.line().endswith("live")
        rows, ports = list(manager.rows), manager.ports
    with FakeManager() as elsewhere:
        now_s = time.time()
        for number in range(300):
            elsewhere.report(message=str(number), now_s=now_s + number / 100)
        elsewhere.report(message="other", severity="critical", now_s=now_s)
        for number in range(2):
            elsewhere.report("archiver", message=str(number), now_s=moment + number * 5)
        missed = [{**row, "seq": row["seq"] + len(rows)} for row in elsewhere.rows]
    with FakeManager(rows=rows + missed, ports=ports, boot_id="boot-2") as second:
        first, other, last = running.lines(3)
        assert "299  x300  " in first
        assert ".." in first
        assert other.endswith("other")
        assert last.endswith("1  x2  12:30:00..12:30:05")
        second.report("archiver", message="live again")
        assert running.line().endswith("live again")


# -- the end ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_it_quietly(manager: FakeManager, tail: Callable[..., Tail]) -> None:
    manager.report(message="1")
    running = tail("--json", *at(manager))
    assert numbered([running.line()]) == [1]
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 130
    assert running.err.empty()


def test_a_reader_that_goes_ends_it_quietly(manager: FakeManager) -> None:
    for number in range(1000):
        manager.report(message=str(number), details={"padding": "x" * 2000})
    command = f'"{sys.executable}" "{SCRIPT}" --json --lines 1000 {" ".join(at(manager))} | head -n 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=90)
    assert json.loads(done.stdout)["message"] == "0"
    assert done.stderr == ""


def test_no_manager_is_said_and_waited_for(tail: Callable[..., Tail]) -> None:
    ports = free_port(), free_port()
    addresses = tuple(f"tcp://127.0.0.1:{port}" for port in ports)
    running = tail("--json", "--publish", addresses[0], "--api", addresses[1])
    assert "is the health manager running?" in running.complaint()
    with FakeManager(ports=ports) as manager:
        manager.report(message="1")
        manager.heartbeat()
        assert numbered([running.line()]) == [1]
        wait_until(lambda: "tail_error_bus: connected again" in running.err.queue, "it says so")
    assert running.process.poll() is None


def test_no_manager_is_a_failure_for_who_does_not_follow() -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    done = shown("--no-follow", "--publish", address, "--api", address)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"tail_error_bus: no answer from {address}; is the health manager running?\n"


def test_a_refusal_is_said(manager: FakeManager) -> None:
    manager.refusal = {"status": "error", "error_code": "access_denied", "message": "not you", "details": {}}
    done = shown(*at(manager))
    assert (done.returncode, done.stderr) == (1, "tail_error_bus: not you\n")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--severity", "bad"],
        ["--since", "soon"],
        ["--lines", "-1"],
        ["--lines", "100000"],
        ["--unknown"],
        ["--publish", "nonsense"],
        ["--api", "tcp://"],
    ],
)
def test_wrong_arguments_are_named(wrong: list[str]) -> None:
    done = shown(*wrong, "--no-follow")
    assert done.returncode == 2
    assert wrong[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_addresses_come_from_the_configuration(manager: FakeManager, tmp_path: Path) -> None:
    manager.report(message="1")
    file = tmp_path / "config.yaml"
    file.write_text(f"health:\n  publish_port: {manager.ports[0]}\n")
    environ: dict[str, Any] = {"MEMORY_CONFIG": str(file), "MEMORY__HEALTH__PORT": str(manager.ports[1])}
    assert texts(shown("--json", "--no-follow", **environ)) == ["1"]
    file.write_text("health:\n  publish_prt: 1\n")
    done = shown("--no-follow", **environ)
    assert done.returncode == 2
    assert "publish_port" in done.stderr

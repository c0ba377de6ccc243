"""The error reporter among processes: a stopped bus, programs that end at once, forked children."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_system.error_bus import ErrorReporter
from tests.support.ingest import FakeIngest, acknowledged, numbers, report_numbers
from tests.support.process import free_port

PROJECT = Path(__file__).resolve().parents[2]
NOWHERE = "tcp://127.0.0.1:1"  # a reserved port that nothing listens on


@pytest.fixture
def ingest() -> Iterator[FakeIngest]:
    with FakeIngest() as fake:
        yield fake


def test_a_stopped_process_blocks_nobody_and_gets_everything_later() -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.ingest", str(port)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "bound\n"
            reporter = ErrorReporter(f"tcp://127.0.0.1:{port}", "tester", queue_events=500, resend_s=0.2)
            reporter.report("before", "all is well")
            acknowledged(reporter, 1)
            process.send_signal(signal.SIGSTOP)
            report_numbers(reporter, 20_000)
            stats = reporter.stats()
            assert (stats["waiting"], stats["dropped"]) == (500, 19_500)
            process.send_signal(signal.SIGCONT)
            acknowledged(reporter, 501)
            reporter.close()
        finally:
            process.kill()


def run_python(script: str, *arguments: str, timeout_s: float = 50.0) -> tuple[str, float]:
    """The script's output and the seconds it took. A warning or a word on standard error fails the test."""
    started_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout, time.monotonic() - started_s


REPORT_AND_EXIT = """
import sys
from memory_system.error_bus import ErrorReporter
reporter = ErrorReporter(sys.argv[1], "short-lived")
for number in range(100):
    reporter.report(f"e{number}", "x")
"""


def test_a_program_that_ends_at_once_is_heard(ingest: FakeIngest) -> None:
    run_python(REPORT_AND_EXIT, ingest.endpoint)
    assert ingest.arrivals() == dict.fromkeys(numbers(100), 1)


@pytest.mark.parametrize("kind", ["nobody", "silent"])
def test_a_program_ends_without_the_bus(kind: str, ingest: FakeIngest) -> None:
    ingest.mode = "silent"
    _, plain_s = run_python(REPORT_AND_EXIT, "")
    _, taken_s = run_python(REPORT_AND_EXIT, NOWHERE if kind == "nobody" else ingest.endpoint)
    assert taken_s < plain_s + 5.0


FORK = """
import os, sys, threading
from memory_system.error_bus import ErrorReporter
reporter = ErrorReporter(sys.argv[1], "parent")
idle = ErrorReporter(sys.argv[1], "idle")
stop = threading.Event()


def storm():
    while not stop.is_set():
        reporter.report("storm", "x")


workers = [threading.Thread(target=storm) for _ in range(4)]  # so that forks happen with the locks held
for worker in workers:
    worker.start()
children = []
for number in range(10):
    pid = os.fork()
    if pid == 0:
        assert reporter.stats()["reported"] == 0, "the child starts with nothing to tell"
        reporter.report(f"child{number}", "x")
        idle.report(f"idle{number}", "x")
        reporter.close(20.0)
        idle.close(20.0)
        assert reporter.stats()["acknowledged"] == 1
        os._exit(0)
    children.append(pid)
for pid in children:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
stop.set()
for worker in workers:
    worker.join()
reporter.close(30.0)
stats = reporter.stats()
assert stats["waiting"] == 0, stats
os.write(1, str(stats["acknowledged"]).encode())
"""


def test_forked_children_report_for_themselves(ingest: FakeIngest) -> None:
    output, _ = run_python(FORK, ingest.endpoint)
    arrivals = ingest.arrivals()
    assert arrivals.pop("storm") == int(output)
    arrivals.pop("events_dropped", None)
    assert arrivals == {f"{kind}{number}": 1 for kind in ("child", "idle") for number in range(10)}


FORK_AND_EXIT = """
import os, sys
from memory_system.error_bus import ErrorReporter
reporter = ErrorReporter(sys.argv[1], "parent")
reporter.report("parent", "x")
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
else:
    reporter.report("child", "x")
"""


def test_a_child_that_ends_as_usual_is_heard_and_quiet(ingest: FakeIngest) -> None:
    run_python(FORK_AND_EXIT, ingest.endpoint)
    assert ingest.arrivals() == {"parent": 1, "child": 1}

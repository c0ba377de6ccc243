"""The guard of the benchmarks: which ratios of a run fell, and what is made the published ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.process import PROJECT

CHECK = PROJECT / "bench" / "check.py"


def run_of(add: float = 0.5, cpu_us: float = 200.0) -> dict[str, Any]:
    """What bench/run.py writes, as far as the guard reads it."""
    echo = {"workload": "echo", "clients": 8, "of_echo": None, "of_reference": None, "cpu_us": 50.0}
    reference = {"workload": "reference add", "clients": 8, "of_echo": 0.4, "of_reference": None, "cpu_us": 100.0}
    adds = {"workload": "add_memory", "clients": 8, "of_echo": 0.2, "of_reference": add, "cpu_us": cpu_us}
    return {"machine": {"cores": 2}, "rows": [echo, reference, adds]}


def peers_run(add: float = 60.0, memory: float = 0.5) -> dict[str, Any]:
    return {"kind": "peers", "ratios": {"chroma": {"add, 8 clients": add, "resident memory": memory}}}


class Guard:
    """bench/check.py over files of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.published = folder / "published.json"

    def __call__(self, run: Any, *options: str) -> subprocess.CompletedProcess[str]:
        path = self._folder / "run.json"
        path.write_text(json.dumps(run), encoding="utf-8")
        command = [sys.executable, str(CHECK), str(path), "--published", str(self.published), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    return Guard(tmp_path)


def test_a_run_that_was_published_has_not_fallen(guard: Guard) -> None:
    assert guard(run_of(), "--publish").returncode == 0
    done = guard(run_of())
    assert done.returncode == 0
    assert "3 ratios compared, 0 fell" in done.stdout


def test_what_fell_by_more_than_the_limit_is_named(guard: Guard) -> None:
    guard(run_of(add=0.5), "--publish")
    done = guard(run_of(add=0.4))
    assert done.returncode == 1
    assert "fell by 20%: add_memory, 8 clients: of reference" in done.stdout
    assert "1 fell by more than 15%" in done.stdout


def test_a_smaller_fall_or_a_rise_passes(guard: Guard) -> None:
    guard(run_of(add=0.5), "--publish")
    assert guard(run_of(add=0.44)).returncode == 0
    assert guard(run_of(add=0.9)).returncode == 0
    assert guard(run_of(add=0.44), "--fall", "0.1").returncode == 1


def test_more_processor_time_is_a_fall(guard: Guard) -> None:
    guard(run_of(cpu_us=200.0), "--publish")
    done = guard(run_of(cpu_us=300.0))
    assert done.returncode == 1
    assert "fell by 33%: add_memory, 8 clients: echo's processor time over its own" in done.stdout


def test_more_memory_than_a_peer_is_a_fall(guard: Guard) -> None:
    guard(peers_run(memory=0.5), "--publish")
    assert guard(peers_run(memory=0.4)).returncode == 0
    done = guard(peers_run(memory=0.8))
    assert done.returncode == 1
    assert "resident memory, over chroma" in done.stdout


def test_what_is_not_measured_any_more_is_told_and_fails(guard: Guard) -> None:
    guard(run_of(), "--publish")
    run = run_of(add=0.6)
    run["rows"][2]["of_echo"] = None
    done = guard(run)
    assert done.returncode == 1
    assert "not measured: add_memory, 8 clients: of echo" in done.stdout
    assert "2 ratios compared, 0 fell" in done.stdout


def test_what_is_measured_for_the_first_time_passes(guard: Guard) -> None:
    run = run_of()
    run["rows"][2]["of_echo"] = None
    guard(run, "--publish")
    done = guard(run_of())
    assert done.returncode == 0
    assert "not measured" not in done.stdout


def test_a_ratio_of_nothing_is_no_traceback(guard: Guard) -> None:
    guard(peers_run(memory=0.5), "--publish")
    done = guard(peers_run(memory=0.0))
    assert (done.returncode, done.stderr) == (1, "")
    assert "not measured: resident memory, over chroma" in done.stdout
    guard(peers_run(add=0.0), "--publish")
    done = guard(peers_run())
    assert (done.returncode, done.stderr) == (0, "")
    assert "not compared" in done.stdout


def test_publishing_one_kind_leaves_the_other(guard: Guard) -> None:
    guard(run_of(), "--publish")
    guard(peers_run(), "--publish")
    assert set(json.loads(guard.published.read_text("utf-8"))) == {"service", "peers"}
    assert guard(run_of()).returncode == 0
    assert guard(peers_run(add=20.0)).returncode == 1


@pytest.mark.parametrize("run", [[], {}, {"rows": [{"workload": "x"}]}, {"rows": []}], ids=str)
def test_a_file_of_no_benchmark_is_refused(guard: Guard, run: Any) -> None:
    guard(run_of(), "--publish")
    done = guard(run)
    assert done.returncode == 2
    assert "error" in done.stdout


def test_nothing_published_is_an_error(guard: Guard) -> None:
    assert guard(run_of()).returncode == 2


def test_the_published_ratios_are_there() -> None:
    published = json.loads((PROJECT / "bench" / "published.json").read_text("utf-8"))
    assert "add_memory, 64 clients: of reference" in published["service"]["ratios"]

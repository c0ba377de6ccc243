"""What bench/stages.py tells of an interrupt and of a server that fails: one line."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from types import ModuleType

import pytest

from memory_system.errors import StorageFailed
from tests.support.process import PROJECT


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROJECT / "bench"))
    monkeypatch.setattr(sys, "argv", ["stages.py"])
    spec = importlib.util.spec_from_file_location("bench_stages", PROJECT / "bench" / "stages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "INTERRUPTS", ())  # those of the test run stay as they are
    return module


def test_what_it_times_is_there(stages: ModuleType) -> None:
    assert [name for owner, name, _ in stages.TIMED if name not in vars(owner)] == []


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        ("ServerFailure", 1, "error: echo did not start: no port"),
        ("LoadFailure", 1, "error: echo did not start: no port"),
        (StorageFailed, 1, "error: echo did not start: no port"),
        (KeyboardInterrupt, 130, "interrupted"),
    ],
)
def test_what_ends_it_is_one_line(
    stages: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: str | type[BaseException],
    status: int,
    line: str,
) -> None:
    kind = getattr(stages, error) if isinstance(error, str) else error

    def fail(options: argparse.Namespace, console: object) -> int:
        raise kind("echo did not start: no port")

    monkeypatch.setattr(stages, "take_apart", fail)
    assert stages.main() == status
    said = capsys.readouterr()
    assert (said.out, said.err) == (f"{line}\n", "")

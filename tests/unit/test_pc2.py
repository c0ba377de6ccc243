"""What scripts/pc2.py tells of a start that fails, and when."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import pc2
import pytest
from supervision import Deployment, Failure, RunDir

from memory_system.deployment import Address

NAMES = ("orchestrator", "health_manager", "memory_scheduler")


class FakeRun:
    """supervisord, with programs that all start at once and answer nothing; a test ends them."""

    def __init__(self) -> None:
        self.infos: dict[str, dict[str, Any]] = {
            name: {"name": name, "statename": "STARTING", "pid": pid, "exitstatus": 0}
            for pid, name in enumerate(NAMES, start=100)
        }

    def supervisor_pid(self) -> int | None:
        return 99

    def processes(self) -> dict[str, dict[str, Any]]:
        return self.infos


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    addresses = {name: Address("network", "127.0.0.1", 1) for name in NAMES}
    return Deployment(addresses, str(tmp_path), "none")


@pytest.mark.parametrize("restarts", [False, True])
def test_an_end_is_told_before_the_next_program_is_asked(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, restarts: bool
) -> None:
    run, asked = FakeRun(), list[Address]()

    def ask_health(address: Address, *_: object) -> None:
        asked.append(address)
        run.infos["memory_scheduler"].update(statename="EXITED", pid=0, exitstatus=2)
        deployment.console_log("memory_scheduler").write_text("old\nmemory_scheduler: no such setting\n")

    monkeypatch.setattr(pc2, "ask_health", ask_health)
    seen_bytes, deadline_s = dict.fromkeys(NAMES, 4), time.monotonic() + 30.0
    with pytest.raises(Failure) as failed:
        pc2.wait_healthy(cast(RunDir, run), deployment, deadline_s, seen_bytes, restarts=restarts)
    assert str(failed.value) == ("memory_scheduler did not start (exit status 2): memory_scheduler: no such setting")
    assert len(asked) == 1


def test_a_failed_start_is_told_before_the_other_programs_are_stopped(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Failure("orchestrator did not start: it said why")

    told: list[str] = []
    monkeypatch.setenv("MEMORY__STORAGE__PATH", str(tmp_path / "memory.db"))
    monkeypatch.setattr(pc2, "checked", lambda settings: deployment)
    monkeypatch.setattr(pc2, "launch", lambda *_: None)
    monkeypatch.setattr(pc2, "wait_healthy", fail)
    monkeypatch.setattr(pc2, "shut_down", lambda *_: told.append(capsys.readouterr().err))
    with pytest.raises(SystemExit) as ended:
        pc2.first_start(cast(RunDir, FakeRun()), time.monotonic() + 30.0)
    assert ended.value.code == 1
    assert [line for text in told for line in text.splitlines() if not line.startswith("starting ")] == [
        "error: orchestrator did not start: it said why"
    ]
    assert capsys.readouterr().err == ""

"""The audit log: what its lines say, that a flood is bounded and counted, and that a file that fails stops nobody."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from memory_system import audit
from memory_system.audit import AuditLog, Entry
from memory_system.errors import ConfigError
from memory_system.settings import LogSettings, SecuritySettings, Settings

ENTRY = Entry("planner", "10.0.0.7", "get_memory", "home", "request-1")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(tmp_path: Path, clock: Clock) -> Any:
    made = AuditLog(tmp_path / "audit.log", clock=clock, monotonic=clock)
    yield made
    made.close()


def lines(log: AuditLog) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]


def test_a_line_says_when_who_from_where_what_and_how_it_ended(log: AuditLog) -> None:
    log.denied(ENTRY, "access_denied")
    log.admin(Entry("root", "127.0.0.1", "backup", on_behalf_of="ada"), "success")
    when = {"time": "2023-11-14T22:13:20.000+00:00"}
    who = {"name": "planner", "address": "10.0.0.7"}
    what = {"action": "get_memory", "namespace": "home", "request_id": "request-1"}
    assert lines(log) == [
        {**when, "event": "denied", **who, **what, "outcome": "access_denied"},
        {**when, "event": "admin", "name": "root", "address": "127.0.0.1", "action": "backup",
         "on_behalf_of": "ada", "outcome": "success"},
    ]  # fmt: skip
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_what_comes_from_outside_stays_on_its_line_and_is_cut(log: AuditLog) -> None:
    log.denied(Entry("a\nb", '"}{', "x" * 1000, "\ud800", "\u2028"), "access_denied")
    (line,) = lines(log)
    assert (line["name"], line["address"], len(line["action"]), line["request_id"]) == ("a\nb", '"}{', 128, "\u2028")
    assert log.failed == 0


def test_a_flood_of_one_peer_is_bounded_and_counted(log: AuditLog, clock: Clock) -> None:
    for _ in range(10_000):
        log.denied(ENTRY, "access_denied")
    assert len(lines(log)) == 20
    log.denied(Entry("other", "10.0.0.8", "stats"), "access_denied")
    assert lines(log)[-1]["left_out_before"] == 9_980
    clock.now_s += 10.0
    log.denied(ENTRY, "access_denied")
    assert (len(lines(log)), "left_out_before" in lines(log)[-1]) == (22, False)
    assert log.figures() == {"denied": 10_002, "left_out": 9_980, "failed": 0}


def test_a_flood_of_many_peers_is_bounded_too(log: AuditLog, clock: Clock) -> None:
    for number in range(3_000):
        log.denied(Entry(f"peer-{number}", "10.0.0.7", "stats"), "access_denied")
    assert len(lines(log)) == 500
    clock.now_s += 86_400.0
    for number in range(10):
        log.admin(ENTRY, "admitted")  # never left out
        log.denied(Entry(f"peer-{number}", "10.0.0.7", "stats"), "access_denied")
    assert len(lines(log)) == 520


def test_what_was_left_out_last_is_noted_at_the_end(log: AuditLog) -> None:
    for _ in range(25):
        log.denied(ENTRY, "access_denied")
    log.close()
    log.close()
    assert lines(log)[-1]["left_out_before"] == 5
    log.denied(ENTRY, "access_denied")
    log.admin(ENTRY, "admitted")
    assert len(lines(log)) == 21
    assert "audit.log" in repr(log)


def test_a_file_is_rotated_and_older_ones_are_private_too(tmp_path: Path) -> None:
    with mock.patch.object(audit, "FILE_BYTES", 2000):
        log = AuditLog(tmp_path / "audit.log")
    for _ in range(200):
        log.admin(ENTRY, "admitted")
    log.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1 + audit.OLD_FILES
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert all(file.stat().st_size <= 2000 for file in files)


def test_a_disk_that_is_full_stops_nobody(log: AuditLog) -> None:
    with mock.patch.object(log._file.stream, "write", side_effect=OSError(28, "No space left on device")):
        log.admin(ENTRY, "admitted")
        log.denied(ENTRY, "access_denied")
    assert log.figures()["failed"] == 2
    log.admin(ENTRY, "success")
    assert [line["outcome"] for line in lines(log)] == ["success"]


def test_lines_of_many_threads_are_whole(log: AuditLog) -> None:
    threads = [threading.Thread(target=lambda: [log.admin(ENTRY, "admitted") for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(lines(log)) == 400


def settings(tmp_path: Path, name: str) -> Settings:
    return Settings(log=LogSettings(dir=str(tmp_path)), security=SecuritySettings(audit_log=name))


def test_where_the_file_is(tmp_path: Path) -> None:
    found = []
    for name in ("audit.log", "sub/audit.log", str(tmp_path / "elsewhere" / "a.log")):
        for program in ("orchestrator", "memory_scheduler"):
            log = AuditLog.open(settings(tmp_path, name), program)
            assert log is not None
            found.append(str(log.path.relative_to(tmp_path)))
            log.close()
    assert found == [
        *("audit.log", "memory_scheduler.audit.log", "sub/audit.log", "sub/memory_scheduler.audit.log"),
        *("elsewhere/a.log", "elsewhere/memory_scheduler.a.log"),
    ]
    assert AuditLog.open(settings(tmp_path, ""), "orchestrator") is None


def test_a_file_that_cannot_be_made_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "audit.log").mkdir()
    with pytest.raises(ConfigError, match=r"security\.audit_log.*cannot be written"):
        AuditLog.open(settings(tmp_path, "audit.log"), "orchestrator")

"""What a line of the log holds, where it goes, and what never gets into it."""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog

from memory_system import log
from memory_system.errors import ConfigError
from memory_system.settings import LogSettings


@pytest.fixture(autouse=True)
def leave_logging_as_it_was() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    structlog.contextvars.clear_contextvars()
    log.close()
    logging.getLogger().setLevel(level)


def lines(folder: Path, program: str = "orchestrator") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{program}.log").read_text(encoding="utf-8").splitlines()]


def configured(folder: Path, level: str = "info", console: str = "never") -> LogSettings:
    settings = LogSettings(level=level, dir=str(folder), console=console)
    log.configure("orchestrator", settings)
    return settings


def test_every_line_says_what_when_how_bad_and_from_where(tmp_path: Path) -> None:
    logger = log.get_logger("storage.writer")  # made before the set-up, as modules do at import
    configured(tmp_path / "made" / "here")
    logger.info("group_committed", rows=3)
    (line,) = lines(tmp_path / "made" / "here")
    written = datetime.fromisoformat(line.pop("timestamp"))
    assert abs((datetime.now(UTC) - written).total_seconds()) < 60
    assert line == {
        "event": "group_committed",
        "level": "info",
        "logger": "memory_system.storage.writer",
        "program": "orchestrator",
        "rows": 3,
    }


def test_request_id_of_the_context_is_on_each_line(tmp_path: Path) -> None:
    configured(tmp_path)
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        log.get_logger("memory_system.dispatch").bind(action="stats").info("request_done")
        logging.getLogger("some.library").warning("slow")
    assert [line["request_id"] for line in lines(tmp_path)] == ["r-1", "r-1"]


def test_level_applies_to_our_lines_and_libraries_stay_at_warning(tmp_path: Path) -> None:
    configured(tmp_path, level="debug")
    log.get_logger("a").debug("ours")
    logging.getLogger("aiosqlite").debug("INSERT with values")
    logging.getLogger("aiosqlite").warning("theirs %s", 1)
    configured(tmp_path, level="error")
    log.get_logger("a").warning("dropped")
    assert [line["event"] for line in lines(tmp_path)] == ["ours", "theirs 1"]


def test_python_warnings_are_lines_too(tmp_path: Path) -> None:
    configured(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old call", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    (line,) = lines(tmp_path)
    assert line["logger"] == "py.warnings"
    assert "old call" in line["event"]


def test_content_never_gets_into_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    configured(tmp_path, console="always")
    secret = "what a person said"
    logger = log.get_logger("a")
    logger.info("added", content=secret, metadata={"a": secret}, query=secret, memory_id="mem-1")

    def fail(kept_in_a_local_variable: str) -> None:
        raise RuntimeError("no space")

    try:
        fail(secret)
    except RuntimeError:
        logger.exception("write_failed")
    added, failed = lines(tmp_path)
    assert added["memory_id"] == "mem-1"
    assert added["content"] == log.WITHHELD
    assert "RuntimeError: no space" in failed["exception"]
    console = capfd.readouterr().err
    assert "RuntimeError: no space" in console
    assert secret not in console + (tmp_path / "orchestrator.log").read_text()


def test_awkward_values_still_make_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The test runner keeps log lines too, and cannot carry a lone surrogate from one process to another.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    configured(tmp_path)
    log.get_logger("a").info("odd", text_id="\ud800\0\n", blob=b"\xff", thing=object(), number=float("inf"))
    logging.getLogger("some.library").warning("\ud800")
    assert [line["event"] for line in lines(tmp_path)] == ["odd", "\ud800"]


@pytest.mark.parametrize(
    ("console", "is_terminal", "expected"),
    [("auto", True, True), ("auto", False, False), ("always", False, True), ("never", True, False)],
)
def test_console_lines(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    console: str,
    is_terminal: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    configured(tmp_path, console=console)
    log.get_logger("a").info("hello_there", n=1)
    written = capfd.readouterr().err
    assert ("hello_there" in written) is expected
    assert ("\x1b[" in written) is (expected and is_terminal)


def test_set_up_twice_writes_once_and_close_stops_writing(tmp_path: Path) -> None:
    configured(tmp_path)
    configured(tmp_path)
    log.get_logger("a").warning("once")
    log.close()
    log.close()
    log.get_logger("a").warning("nowhere")
    assert [line["event"] for line in lines(tmp_path)] == ["once"]


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "FILE_BYTES", 2000)
    configured(tmp_path)
    for number in range(200):
        log.get_logger("a").info("line", number=number)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1 + log.OLD_FILES
    assert all(file.stat().st_size <= 2000 for file in files)
    assert lines(tmp_path)[-1]["number"] == 199


def test_unusable_folder_is_a_config_error_and_keeps_the_earlier_set_up(tmp_path: Path) -> None:
    configured(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"log\.dir = .*cannot write other\.log"):
        log.configure("other", LogSettings(dir=str(tmp_path / "file" / "logs")))
    log.get_logger("a").info("still here")
    assert [line["event"] for line in lines(tmp_path)] == ["still here"]

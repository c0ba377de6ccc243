"""Which lines of the log become events, and what of them does not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from memory_system import bus_log, log
from memory_system.error_bus import ErrorReporter

SECRET = "Ada prefers trains"


class Recorder(ErrorReporter):
    """Keeps the reports that it is given."""

    def __init__(self) -> None:
        super().__init__("", "tester")
        self.reports: list[dict[str, Any]] = []

    def report(self, error_type: str, message: str, severity: str = "error", **fields: Any) -> None:
        self.reports.append({"error_type": error_type, "message": message, "severity": severity, **fields})


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    found = Recorder()
    handler = bus_log.install(found)
    yield found
    bus_log.remove(handler)
    bus_log.remove(handler)
    structlog.contextvars.clear_contextvars()


def test_a_line_becomes_an_event(recorder: Recorder) -> None:
    log.get_logger("storage.writer").error(
        "write_failed", request_id="r-1", error_code="SQLITE_FULL", pages=7, ratio=0.5, late=True
    )
    assert recorder.reports == [
        {
            "error_type": "write_failed",
            "message": "write_failed",
            "severity": "error",
            "request_id": "r-1",
            "details": {
                "error_code": "SQLITE_FULL",
                "pages": 7,
                "ratio": 0.5,
                "late": True,
                "logger": "memory_system.storage.writer",
            },
        }
    ]


@pytest.mark.parametrize(
    ("level", "severity"),
    [("debug", None), ("info", None), ("warning", "warning"), ("error", "error"), ("critical", "critical")],
)
def test_from_warning_up(level: str, severity: str | None, recorder: Recorder) -> None:
    logging.getLogger(log.ROOT).setLevel(logging.DEBUG)
    try:
        getattr(log.get_logger("x"), level)("happened")
    finally:
        logging.getLogger(log.ROOT).setLevel(logging.NOTSET)
    assert [each["severity"] for each in recorder.reports] == ([] if severity is None else [severity])


def test_a_reason_is_the_message(recorder: Recorder) -> None:
    logger = log.get_logger("embedding.process")
    logger.warning("embedding_worker_down", reason="the model file is missing", hint="not this")
    logger.warning("port_taken", hint="set network.port")
    logger.warning("long", reason="x" * 1000)
    assert [each["message"] for each in recorder.reports] == [
        "the model file is missing",
        "set network.port",
        "x" * 300,
    ]
    assert "reason" not in recorder.reports[0]["details"]


def test_what_people_wrote_does_not_leave_the_log(recorder: Recorder) -> None:
    try:
        raise ValueError(SECRET)
    except ValueError as error:
        logger = log.get_logger("x")
        logger.exception("in_handler", content="one", query="two", metadata={"a": SECRET})
        logger.error("given", exc_info=error, error=error, text="three", note=SECRET, items=[SECRET], body=4)
        logging.getLogger("memory_system.plain").error("cannot store %s", SECRET, exc_info=True)
        logging.getLogger("memory_system.plain").warning("half done: %d of %s", 7, SECRET)
    assert SECRET not in repr(recorder.reports)
    assert [each["message"] for each in recorder.reports] == [
        "in_handler: ValueError",
        "given: ValueError",
        "cannot store %s: ValueError",
        "half done: %d of %s",
    ]
    assert recorder.reports[1]["details"] == {
        "error": "ValueError",
        "exception": "ValueError",
        "logger": "memory_system.x",
    }


def test_the_request_id_of_the_context_is_taken(recorder: Recorder) -> None:
    with structlog.contextvars.bound_contextvars(request_id="r-2"):
        log.get_logger("x").warning("happened")
    log.get_logger("x").warning("happened", request_id=7)
    assert [each["request_id"] for each in recorder.reports] == ["r-2", None]


def test_other_loggers_are_not_reported(recorder: Recorder) -> None:
    logging.getLogger("asyncio").error("a task failed")
    logging.getLogger("memory_systems.other").error("not ours")
    logging.getLogger().error("root")
    assert recorder.reports == []


def test_after_remove_nothing_is_reported() -> None:
    found = Recorder()
    bus_log.remove(bus_log.install(found))
    log.get_logger("x").error("happened")
    assert found.reports == []


def test_a_defect_here_does_not_reach_who_logs(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("defect")

    monkeypatch.setattr(recorder, "report", fail)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    log.get_logger("x").error("happened")

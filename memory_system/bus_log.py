"""Lines of this project's log, from warning up, as events of the error bus.

A line's event is the error type, its `reason` (else its `hint`) the message: sentences of our own, which quote nobody.
Its numbers, codes and short identifiers are the details. All other text stays in the log, that of exceptions above all:
it may quote what people wrote.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, Final, Protocol

from memory_system.events import MAX_NAME_CHARS, WITHHELD_KEYS
from memory_system.log import ROOT

# Names, codes, addresses, versions: nothing with a space in it, and nothing long.
_IDENTIFIER: Final = re.compile(r"[\w.:/@+\-\[\]]{1,96}")
_NO_DETAILS: Final = frozenset(
    {"event", "reason", "hint", "exc_info", "stack_info", "request_id", "level", "timestamp", "logger"}
)
_MAX_REASON_CHARS: Final = 300


class Reports(Protocol):
    """What takes an event from any thread, never blocks and never raises: an ErrorReporter, or the manager itself."""

    def report(
        self,
        error_type: str,
        message: str,
        severity: str = "error",
        *,
        request_id: str | None = None,
        details: Mapping[str, Any] | None = None,
        agent: str | None = None,
    ) -> None: ...


class BusHandler(logging.Handler):
    """Reports each line. The lines of loggers outside this project do not come here: see `install`."""

    def __init__(self, reporter: Reports) -> None:
        super().__init__(logging.WARNING)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._report(record)
        except Exception:  # noqa: BLE001 - logging never raises into the code that logs; this is its own way out
            self.handleError(record)

    def _report(self, record: logging.LogRecord) -> None:
        line = _line(record)
        error_type = str(line["event"])[:MAX_NAME_CHARS]
        error = _exception(record, line)
        details = {name: value for name, value in map(_detail, line.items()) if value is not None}
        details["logger"] = record.name
        if error is not None:
            details["exception"] = error
        request_id = line.get("request_id") or _context().get("request_id")
        message = _reason(line) or error_type
        self._reporter.report(
            error_type,
            message if error is None else f"{message}: {error}",
            _severity(record.levelno),
            request_id=request_id if isinstance(request_id, str) else None,
            details=details,
        )


def install(reporter: Reports) -> BusHandler:
    """Report the lines of this project's loggers from now on, until `remove`."""
    handler = BusHandler(reporter)
    logging.getLogger(ROOT).addHandler(handler)
    return handler


def remove(handler: BusHandler) -> None:
    """Undo `install`. Removing twice is fine."""
    logging.getLogger(ROOT).removeHandler(handler)
    handler.close()


def _line(record: logging.LogRecord) -> Mapping[Any, Any]:
    """The keys of a line. Of one that was not written by structlog the template alone: its values are anything."""
    if isinstance(record.msg, dict):
        return {"event": "log_line", **record.msg}
    return {"event": record.msg}


def _reason(line: Mapping[Any, Any]) -> str | None:
    found = (line.get(name) for name in ("reason", "hint"))
    return next((text[:_MAX_REASON_CHARS] for text in found if isinstance(text, str) and text), None)


def _exception(record: logging.LogRecord, line: Mapping[Any, Any]) -> str | None:
    """The class of the exception that a line is about."""
    found = line.get("exc_info") or record.exc_info
    if found is True:
        found = sys.exc_info()
    error = found[1] if isinstance(found, tuple) else found
    return type(error).__name__ if isinstance(error, BaseException) else None


def _detail(item: tuple[Any, Any]) -> tuple[str, Any]:
    """A key with its value, None where that is not for others to read."""
    name, value = str(item[0]), item[1]
    if name in WITHHELD_KEYS or name in _NO_DETAILS or name.startswith("_"):
        return name, None
    if isinstance(value, BaseException):
        return name, type(value).__name__
    if isinstance(value, str):
        return name, value if _IDENTIFIER.fullmatch(value) else None
    return name, value if isinstance(value, (bool, int, float)) else None


def _context() -> Mapping[str, Any]:
    """What is bound to this task; empty without structlog."""
    structlog = sys.modules.get("structlog")
    bound: Mapping[str, Any] = {} if structlog is None else structlog.contextvars.get_contextvars()
    return bound


def _severity(level: int) -> str:
    if level >= logging.CRITICAL:
        return "critical"
    return "error" if level >= logging.ERROR else "warning"

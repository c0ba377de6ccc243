"""Logging of every program: JSON lines to a bounded file, readable lines to a terminal.

Loggers belong to this project's own branch of the standard library's tree, so a host application that uses the
client alone keeps its own logging, and nothing is set up until a program calls `configure`.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from memory_system.errors import ConfigError

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger
    from structlog.typing import Processor

    from memory_system.settings import LogSettings

ROOT: Final = "memory_system"
FILE_BYTES: Final = 16 * 1024 * 1024
OLD_FILES: Final = 4
WITHHELD: Final = "(withheld)"
# What a person wrote or asked never enters a log, whoever passes it by mistake.
_WITHHELD_KEYS: Final = frozenset(
    {"content", "metadata", "query", "queries", "text", "texts", "data", "body", "payload", "session_metadata"}
)

_handlers: list[logging.Handler] = []


def get_logger(name: str) -> BoundLogger:
    """A structlog logger whose lines carry `logger: name`; usable at import time, before `configure`."""
    import structlog

    full_name = name if name == ROOT or name.startswith(f"{ROOT}.") else f"{ROOT}.{name}"
    return cast(
        "BoundLogger",
        structlog.wrap_logger(
            logging.getLogger(full_name),
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.stdlib.PositionalArgumentsFormatter(),
                structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
            ],
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=True,
        ),
    )


def configure(program: str, settings: LogSettings) -> None:
    """Send the lines of this process to `<settings.dir>/<program>.log` and, if asked, to stderr.

    Replaces what an earlier call set up. Other libraries log at warning and above: below that some quote
    statements with their values. Raises ConfigError when the file cannot be written.
    """
    file_handler = _file_handler(program, settings)
    close()
    _handlers.append(file_handler)
    if settings.console == "always" or (settings.console == "auto" and sys.stderr.isatty()):
        _handlers.append(_console_handler(program))
    root = logging.getLogger()
    for handler in _handlers:
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(ROOT).setLevel(settings.level.upper())
    logging.captureWarnings(True)


def close() -> None:
    """Undo `configure`: detach and close its handlers. May be called at any time."""
    logging.captureWarnings(False)
    for handler in _handlers:
        logging.getLogger().removeHandler(handler)
        handler.close()
    _handlers.clear()
    logging.getLogger(ROOT).setLevel(logging.NOTSET)


def _file_handler(program: str, settings: LogSettings) -> logging.Handler:
    import structlog

    path = Path(settings.dir) / f"{program}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8", errors="backslashreplace"
        )
    except OSError as error:
        raise ConfigError(f"log.dir = {settings.dir}: cannot write {path.name}: {error.strerror}") from error
    # Plain tracebacks: they show code, never the values of local variables.
    finish: list[Processor] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler.setFormatter(_formatter(program, finish))
    return handler


def _console_handler(program: str) -> logging.Handler:
    import structlog

    renderer = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(program, [renderer]))
    return handler


def _formatter(program: str, finish: list[Processor]) -> logging.Formatter:
    """The same line for our loggers and for those of other libraries, ended by the given renderer."""
    import structlog

    def add_program(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["program"] = program
        return event

    return structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            add_program,
            _withhold,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *finish,
        ],
    )


def _withhold(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key in _WITHHELD_KEYS.intersection(event):
        event[key] = WITHHELD
    return event

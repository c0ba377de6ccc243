"""The audit log: who was refused, and what administrators did. JSON lines in a file of their own.

    audit = AuditLog.open(settings, "orchestrator")
    audit.denied(Entry(name="planner", address="10.0.0.7", action="get_memory", namespace="home"), "access_denied")

Lines have names, addresses, codes and ids, never contents. What is refused is written at a bounded rate, so that a
flood can neither fill the disk nor push older lines out of the file; what is left out is counted.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from memory_system.errors import ConfigError
from memory_system.log import get_logger
from memory_system.rates import Rates

if TYPE_CHECKING:
    from memory_system.settings import Settings

log = get_logger("audit")

FILE_BYTES: Final = 16 * 1024 * 1024
OLD_FILES: Final = 4
# One peer that is refused all the time writes 2 MB a day, and all of them together 20.
_PEER_PER_S, _PEER_BURST = 0.1, 20
_ALL_PER_S, _ALL_BURST = 1.0, 500
_MAX_CHARS: Final = 128
_MAIN_PROGRAM: Final = "orchestrator"


@dataclass(frozen=True, slots=True)
class Entry:
    """Whose request it was and what it asked for. `name`: of the key, or of the caller where there are no keys."""

    name: str
    address: str
    action: str
    namespace: str = ""
    request_id: str = ""
    on_behalf_of: str = ""


class AuditLog:
    """Takes entries from any thread, and raises nothing: what cannot be written is counted, and the log told once."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError when the file cannot be written."""
        self.path = path
        self.denials = self.suppressed = self.failed = 0
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._by_peer, self._by_all = Rates(_PEER_PER_S, _PEER_BURST), Rates(_ALL_PER_S, _ALL_BURST)
        self._left_out = 0  # since the last line of a denial
        self._closed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _File(path, self._on_failure)
        except OSError as error:
            raise ConfigError(f"security.audit_log: {path} cannot be written: {error.strerror}") from error

    def __repr__(self) -> str:
        return f"AuditLog({self.path}, {self.denials} denied, {self.suppressed} of them left out)"

    @classmethod
    def open(cls, settings: Settings, program: str) -> AuditLog | None:
        """The log of a program; None where the configuration wants none. Raises ConfigError.

        Two programs cannot rotate one file: any but the orchestrator puts its own name before the file's.
        """
        if not settings.security.audit_log:
            return None
        path = Path(settings.log.dir) / Path(settings.security.audit_log).expanduser()
        return cls(path if program == _MAIN_PROGRAM else path.with_name(f"{program}.{path.name}"))

    def denied(self, entry: Entry, code: str) -> None:
        """Note a request or a connection that was refused."""
        with self._lock:
            self.denials += 1
            now_s = self._monotonic()
            peer = f"{entry.name} {entry.address}"
            if self._by_peer.take(peer, now_s) > 0.0 or self._by_all.take("", now_s) > 0.0:
                self.suppressed += 1
                self._left_out += 1
                return
            left_out, self._left_out = self._left_out, 0
        self._write("denied", entry, code, **({"left_out_before": left_out} if left_out else {}))

    def admin(self, entry: Entry, outcome: str) -> None:
        """Note a request for the administration of the store. `outcome`: admitted, success, or the code of an error."""
        self._write("admin", entry, outcome)

    def figures(self) -> dict[str, int]:
        """denied, left_out (of those), failed (lines that could not be written)."""
        return {"denied": self.denials, "left_out": self.suppressed, "failed": self.failed}

    def close(self) -> None:
        """Note what was left out last, and close the file. May be called twice."""
        with self._lock:
            left_out, self._left_out = self._left_out, 0
        if left_out:
            self._write("denied", Entry("", "", ""), "left_out", left_out_before=left_out)
        self._closed = True
        self._file.close()

    def _write(self, event: str, entry: Entry, outcome: str, **more: int) -> None:
        fields = {name: value[:_MAX_CHARS] for name, value in asdict(entry).items() if value}
        when = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": when, "event": event, **fields, "outcome": outcome, **more})
        if not self._closed:  # the handler would open its file again
            self._file.handle(logging.makeLogRecord({"msg": line}))

    def _on_failure(self) -> None:
        self.failed += 1
        if self.failed == 1:
            log.error("audit_failed", path=str(self.path), reason="the audit log cannot be written; requests go on")


class _File(logging.handlers.RotatingFileHandler):
    """A file that its owner alone can read, and older ones beside it."""

    def __init__(self, path: Path, on_failure: Callable[[], None]) -> None:
        self._on_failure = on_failure
        super().__init__(path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8", errors="backslashreplace")

    def _open(self) -> IO[Any]:  # type: ignore[override]
        return open(self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors, opener=_private)

    def handleError(self, record: logging.LogRecord) -> None:
        self._on_failure()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)

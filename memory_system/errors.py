"""Every error of the system, one class for each error code of the wire.

A class carries the code that a caller sees and whether the same call may succeed later.
`message` is written for a person; `details` holds the machine-readable rest and must stay
encodable as JSON.
"""

from __future__ import annotations

from typing import Any, ClassVar


class MemorySystemError(Exception):
    """The root of all errors of this project."""

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    on_wire: ClassVar[bool] = True

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class InternalError(MemorySystemError):
    """The service met a situation that is a defect of its own; the log has the traceback."""

    code = "internal_error"


class ConfigError(MemorySystemError):
    """The configuration is not usable; the message names the key and a hint."""

    code = "invalid_config"
    on_wire = False


class CannotStart(MemorySystemError):
    """A program cannot start here; the message says what stands in its way and what to do."""

    code = "cannot_start"
    on_wire = False


class InvalidRequest(MemorySystemError):
    """The body is not a msgpack map or JSON object of the documented shape."""

    code = "invalid_request"


class UnknownAction(MemorySystemError):
    """No operation has this name."""

    code = "unknown_action"


class InvalidField(MemorySystemError):
    """A field is missing, unknown, of a wrong type or out of its range."""

    code = "invalid_field"

    def __init__(self, field: str, message: str, **details: Any) -> None:
        super().__init__(message, field=field, **details)

    @property
    def field(self) -> str:
        """The field's name; "" in an error of somebody else's that has none."""
        return str(self.details.get("field", ""))


class InvalidFilter(MemorySystemError):
    """The filter names an unknown field or operator, or an operand of a wrong type."""

    code = "invalid_filter"


class InvalidCursor(MemorySystemError):
    """The cursor was not made by this operation with these arguments."""

    code = "invalid_cursor"


class RequestTooLarge(MemorySystemError):
    """The request is larger than the wire allows."""

    code = "request_too_large"


class ReplyTooLarge(MemorySystemError):
    """The reply would be larger than the wire allows; ask for less."""

    code = "reply_too_large"


class UnsupportedVersion(MemorySystemError):
    """The request names a protocol version that this service does not speak."""

    code = "unsupported_version"


class AccessDenied(MemorySystemError):
    """The caller may not do this."""

    code = "access_denied"


class MemoryNotFound(MemorySystemError):
    """No such memory in this namespace, or it has expired."""

    code = "memory_not_found"


class SessionNotFound(MemorySystemError):
    """No such session in this namespace."""

    code = "session_not_found"


class SessionEnded(MemorySystemError):
    """The session has ended, and the program adds nothing to it until it is resumed."""

    code = "session_ended"


class GroupNotFound(MemorySystemError):
    """No such context group in this namespace."""

    code = "group_not_found"


class Cycle(MemorySystemError):
    """The new parent is the memory itself or one of its descendants."""

    code = "cycle"


class VersionConflict(MemorySystemError):
    """`expected_version` is not the memory's version; `details.current` has the record."""

    code = "version_conflict"


class IdempotencyMismatch(MemorySystemError):
    """The request_id was used before with another payload; nothing was done."""

    code = "idempotency_mismatch"


class Busy(MemorySystemError):
    """Too many requests of this caller are in flight; wait `details.retry_after_ms`."""

    code = "busy"
    retryable = True


class RateLimited(MemorySystemError):
    """The caller makes more requests than it may; wait `details.retry_after_ms`."""

    code = "rate_limited"
    retryable = True


class QuotaExceeded(MemorySystemError):
    """The caller keeps as much as it may; nothing was done. It has to delete something first."""

    code = "quota_exceeded"


class ShuttingDown(MemorySystemError):
    """The service is stopping and took no new work; it is usually back within seconds."""

    code = "shutting_down"
    retryable = True


class DeadlineExceeded(MemorySystemError):
    """The request's `deadline_ms` ran out before its turn came; nothing was done."""

    code = "deadline_exceeded"
    retryable = True


class ClockUnsettled(MemorySystemError):
    """The clock was moved a moment ago: nothing irreversible is done until `details.retry_after_ms` have passed."""

    code = "clock_unsettled"
    retryable = True


class VectorsUnavailable(MemorySystemError):
    """The call needs an embedding and there is none now: the model loads, or its worker is down."""

    code = "vectors_unavailable"
    retryable = True


class Unavailable(MemorySystemError):
    """The program needs another one that does not answer now; wait `details.retry_after_ms`."""

    code = "unavailable"
    retryable = True


class StorageFull(MemorySystemError):
    """The disk is full; reads work, writes do not."""

    code = "storage_full"
    retryable = True


class StorageFailed(MemorySystemError):
    """The database reported an error; nothing of this call was kept."""

    code = "storage_error"
    retryable = True


class CircuitOpen(MemorySystemError):
    """The client's circuit breaker is open; nothing was sent. See `details.retry_after_ms`."""

    code = "circuit_open"
    retryable = True


class Unreachable(MemorySystemError):
    """No connection to the orchestrator within the connect budget; nothing was sent."""

    code = "unreachable"
    retryable = True


class RequestTimeout(MemorySystemError):
    """No reply before the deadline; a write may or may not have happened (retry with its request_id)."""

    code = "timeout"
    retryable = True


class InvalidReply(MemorySystemError):
    """What came back is not a reply of this protocol."""

    code = "invalid_reply"


class ClientClosed(MemorySystemError):
    """The client was closed before the call."""

    code = "client_closed"


def _subclasses(root: type[MemorySystemError]) -> list[type[MemorySystemError]]:
    direct = root.__subclasses__()
    return direct + [leaf for child in direct for leaf in _subclasses(child)]


BY_CODE: dict[str, type[MemorySystemError]] = {cls.code: cls for cls in _subclasses(MemorySystemError) if cls.on_wire}


def from_reply(reply: dict[str, Any]) -> MemorySystemError:
    """Turn an error reply back into the exception it stands for (unknown codes: the root class)."""
    cls = BY_CODE.get(str(reply.get("error_code")), MemorySystemError)
    error = cls.__new__(cls)
    MemorySystemError.__init__(error, str(reply.get("message", "")))
    details = reply.get("details")
    error.details = dict(details) if isinstance(details, dict) else {}
    return error

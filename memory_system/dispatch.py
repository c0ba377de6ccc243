"""bytes -> request -> operation -> reply -> bytes. The only place where an exception becomes a reply."""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from memory_system import protocol
from memory_system.calls import Call
from memory_system.decoding import Encoding, decode_envelope, encoding_of
from memory_system.errors import (
    CannotStart,
    DeadlineExceeded,
    InternalError,
    MemorySystemError,
    ReplyTooLarge,
    ShuttingDown,
    UnknownAction,
)
from memory_system.log import get_logger
from memory_system.models import PARAMS, Envelope
from memory_system.params import Params
from memory_system.router import Sender
from memory_system.security.guard import Asked, Caller, Guard
from memory_system.storage.idempotency import fingerprint
from memory_system.traffic import SUCCESS, Traffic
from memory_system.turns import CLIENT

log = get_logger("dispatch")

Reply = dict[str, Any]
Handler = Callable[[Call, Any], Reply | Awaitable[Reply]]
DEFAULT_NAMESPACE = "default"
_LOCAL = Sender("", None)
# What holds the items of a batch, each of which counts as a request.
_ITEMS = {"batch_add_memories": "memories", "batch_get_memories": "memory_ids", "batch_search": "queries"}


class _EchoId(msgspec.Struct):
    """As much of a bad envelope as is needed to answer it."""

    request_id: str | None = None


class Dispatcher:
    """Answers request bodies; knows nothing of sockets.

    `handlers`: action -> operation. `commit_seq`: namespace -> number of its last change. `guard` says who may do what.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        commit_seq: Callable[[str], int],
        guard: Guard | None = None,
    ) -> None:
        missing = protocol.ACTIONS ^ set(handlers)
        if missing:
            raise InternalError(f"actions without an operation, or the reverse: {sorted(missing)}")
        self._handlers = handlers
        self._commit_seq = commit_seq
        self._guard = guard or Guard()
        self._tasks: set[asyncio.Task[Reply]] = set()
        self.traffic = Traffic()
        self.ignored_fields = 0

    async def answer(self, body: bytes) -> bytes:
        """The reply to one request."""
        answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.handle(body, answered.set_result)
        return await answered

    def handle(self, body: bytes, reply: Callable[[bytes], None], peer: bytes = b"", sender: Sender = _LOCAL) -> None:
        """Answer a request of a peer by calling `reply` exactly once, now or later on the event loop.

        `sender`: the peer's IP address (empty: it is of this machine) and its key.
        """
        started_s = time.monotonic()
        CLIENT.set(peer)  # for this call and the tasks that it begins
        encoding = encoding_of(body)
        request_id: str | None = None
        action = "invalid"
        who: Caller | None = None
        try:
            envelope = self._envelope(body, encoding)
            request_id = envelope.request_id
            action, handler = self._handler(envelope)
            who = self._guard.admit(_asked(action, envelope, sender))
            params, call = self._call(action, envelope, encoding, peer, who, started_s)
            result = handler(call, params)
        except MemorySystemError as error:
            if request_id is None:
                request_id = _echo_id(body, encoding)
            reply(self._error(error, action, encoding, request_id, started_s, who))
            return
        except Exception as error:  # noqa: BLE001  whatever a request provokes is answered, never a crash
            reply(self._error(_unexpected(error, action, request_id), action, encoding, request_id, started_s, who))
            return
        if isinstance(result, dict):
            reply(self._success(result, call, request_id))
        else:
            self._later(result, call, request_id, reply)

    def refuse(self, body: bytes, error: MemorySystemError) -> bytes:
        """The reply to a request that is not admitted."""
        started_s = time.monotonic()
        encoding = encoding_of(body)
        return self._error(error, "refused", encoding, _echo_id(body, encoding), started_s)

    def _envelope(self, body: bytes, encoding: Encoding) -> Envelope:
        decoded = decode_envelope(body, encoding)
        self.ignored_fields += decoded.ignored
        return decoded.envelope

    def _handler(self, envelope: Envelope) -> tuple[str, Handler]:
        action = protocol.ACTION_ALIASES.get(envelope.action, envelope.action)
        handler = self._handlers.get(action)
        if handler is None:
            raise _unknown_action(envelope.action)
        return action, handler

    def _call(
        self, action: str, envelope: Envelope, encoding: Encoding, peer: bytes, who: Caller, started_s: float
    ) -> tuple[Params, Call]:
        legacy = envelope.v is None
        data = bytes(envelope.data)
        if not data or data == encoding.null:
            data = encoding.encode({})
        params, unknown = encoding.decode(PARAMS[action], data, lax=legacy)
        if unknown is not None:
            self._note_ignored()
        if action in _ITEMS:
            self._guard.charge(who, len(getattr(params, _ITEMS[action])))
        write = action not in protocol.READ_ACTIONS
        deadline_s = None
        if envelope.deadline_ms is not None:
            deadline_s = started_s + envelope.deadline_ms / 1000.0
            if envelope.deadline_ms <= 0.0:
                raise DeadlineExceeded("deadline_ms is 0: the caller had stopped waiting; nothing was done")
        call = Call(
            action=action,
            peer=peer,
            namespace=envelope.namespace or DEFAULT_NAMESPACE,
            caller=who.label,
            who=who,
            session_id=envelope.session_id,
            request_id=envelope.request_id if write and not legacy else None,
            fingerprint=fingerprint(action, data + (envelope.session_id or "").encode()) if write else b"",
            encoding=encoding,
            legacy=legacy,
            now_s=time.time(),
            started_s=started_s,
            deadline_s=deadline_s,
            note_ignored=self._note_ignored,
        )
        return params, call

    def _note_ignored(self) -> None:
        self.ignored_fields += 1

    def _later(
        self, result: Awaitable[Reply], call: Call, request_id: str | None, reply: Callable[[bytes], None]
    ) -> None:
        if isinstance(result, asyncio.Future):
            future = result
        else:
            future = task = asyncio.ensure_future(result)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        future.add_done_callback(lambda done: reply(self._finished(done, call, request_id)))

    def _finished(self, done: asyncio.Future[Reply], call: Call, request_id: str | None) -> bytes:
        if done.cancelled():
            error: BaseException | None = ShuttingDown("the service is stopping; try again", retry_after_ms=500)
        else:
            error = done.exception()
        if error is None:
            return self._success(done.result(), call, request_id)
        if not isinstance(error, MemorySystemError):
            error = _unexpected(error, call.action, request_id)
        return self._failure(error, call, request_id)

    def _success(self, result: Reply, call: Call, request_id: str | None) -> bytes:
        reply = {"status": "success", "request_id": request_id, "commit_seq": 0, **result}
        if request_id is None:
            del reply["request_id"]
        if "commit_seq" not in result:
            seen = call.who.sees_namespace(call.namespace)
            reply["commit_seq"] = self._commit_seq(call.namespace) if seen else 0
        try:
            body = call.encoding.encode(reply)
        except Exception as error:  # noqa: BLE001  a reply that cannot be encoded is a defect, and still answered
            return self._failure(_unexpected(error, call.action, request_id), call, request_id)
        if len(body) > protocol.MAX_MESSAGE_BYTES:
            large = ReplyTooLarge(f"the reply has {len(body)} bytes, the limit is {protocol.MAX_MESSAGE_BYTES}")
            return self._failure(large, call, request_id)
        self.traffic.record(call.action, SUCCESS, time.monotonic() - call.started_s)
        self._guard.ended(call.who, SUCCESS)
        return body

    def _failure(self, error: MemorySystemError, call: Call, request_id: str | None) -> bytes:
        return self._error(error, call.action, call.encoding, request_id, call.started_s, call.who)

    def _error(
        self,
        error: MemorySystemError,
        action: str,
        encoding: Encoding,
        request_id: str | None,
        started_s: float,
        who: Caller | None = None,
    ) -> bytes:
        if who is not None:
            self._guard.ended(who, error.code)
        self.traffic.record(action, error.code, time.monotonic() - started_s)
        log.debug("request_refused", action=action, error_code=error.code, request_id=request_id)
        return encoding.encode(
            protocol.error_reply(error.code, error.message, error.retryable, error.details, request_id)
        )


def handlers_of(services: Sequence[object]) -> dict[str, Handler]:
    """action -> bound method of the one service that has it. Raises CannotStart."""
    handlers: dict[str, Handler] = {}
    for action in protocol.ACTIONS:
        owners = [service for service in services if hasattr(service, action)]
        if len(owners) != 1:
            raise CannotStart(f"the action {action} has {len(owners)} operations")
        handlers[action] = getattr(owners[0], action)
    return handlers


def _asked(action: str, envelope: Envelope, sender: Sender) -> Asked:
    return Asked(
        action,
        envelope.namespace or DEFAULT_NAMESPACE,
        envelope.agent_id or "",
        envelope.request_id,
        envelope.on_behalf_of,
        sender.address,
        sender.user_id,
    )


def _echo_id(body: bytes, encoding: Encoding) -> str | None:
    decode = msgspec.json.decode if encoding.name == "json" else msgspec.msgpack.decode
    try:
        request_id = decode(body, type=_EchoId).request_id
    except (ValueError, RecursionError):
        return None
    return request_id if request_id is not None and len(request_id) <= protocol.MAX_ID_CHARS else None


def _unknown_action(action: str) -> UnknownAction:
    if action in ("get_health", "get_errors"):
        return UnknownAction(f"{action} is an action of the health manager, on another port (7121 by default)")
    near = next(iter(difflib.get_close_matches(action[:80], [*protocol.ACTIONS, *protocol.ACTION_ALIASES], n=1)), None)
    hint = f"; did you mean {near}?" if near else "; docs/protocol.md lists them"
    return UnknownAction(f"there is no action {action[:80]!r}{hint}", **({"suggestion": near} if near else {}))


def _unexpected(error: BaseException, action: str, request_id: str | None) -> InternalError:
    log.error("internal_error", action=action, request_id=request_id, error=type(error).__name__, exc_info=error)
    return InternalError("the service failed at this request; its log has the details")

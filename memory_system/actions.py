"""A request server for a program of the mesh: each action is a function, its annotated parameters are its fields.

    async def find(*, query: str, limit: Annotated[int, Span(1, 100)] = 10) -> dict[str, Any]:
        return {"results": await look_up(query, limit)}

    server = ActionServer("planner", "tcp://127.0.0.1:5600", {"find": find}, settings)
    async with server:
        await end.wait()

Types, ranges and names are checked before the function is called (`fields.py` says what annotations may be), so that
`{"action": "find", "data": {"query": "trains", "limt": 5}}` is answered with: unknown field limt; did you mean limit?
A function returns the fields of its reply, or None for none. It raises the errors of `errors.py`; any other exception
is a defect, which the caller sees as internal_error and the log with its traceback. Functions that are not async run
on the event loop: they must not wait.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from memory_system import protocol
from memory_system.envelope import Request, echo_id, encode, read_request
from memory_system.errors import (
    InternalError,
    MemorySystemError,
    ReplyTooLarge,
    ShuttingDown,
    UnknownAction,
)
from memory_system.fields import Span
from memory_system.grants import OPERATE, Identity, permission_for
from memory_system.handlers import Action, Around, Handler
from memory_system.log import get_logger
from memory_system.permits import Needs, Permits
from memory_system.request_server import RequestServer
from memory_system.router import Sender
from memory_system.security import Gate
from memory_system.settings import Settings
from memory_system.traffic import SUCCESS, Traffic

__all__ = ["ActionServer", "Actions", "Request", "Span"]

log = get_logger("actions")

HealthFigures = Callable[[], Mapping[str, Any] | Awaitable[Mapping[str, Any]]]

# What a request is counted under that names no action of ours, or was not admitted.
_INVALID: Final = "invalid"
_REFUSED: Final = "refused"
_CANCEL_S: Final = 1.0  # for what a cancelled handler has to put back
# What health_check tells whoever has a key; the rest is for operators.
_HEALTH_FOR_ALL: Final = ("state", "readiness", "pid", "uptime_s", "version", "draining")
_LOCAL: Final = Sender("", None)


@dataclass(slots=True)
class _Asked:
    """What has become known of a request, for its reply."""

    as_json: bool
    started_s: float
    action: str = _INVALID
    request_id: str | None = None


class Actions:
    """Answers request bodies with functions; knows nothing of sockets.

    `handlers`: action -> function. Raises TypeError for a function whose parameters cannot be fields. `flat`: requests
    may give their fields beside `action` instead of in `data`. `around(request, call)` is asked for every result
    instead of `call()`, if given. `permits`: what callers may do, where they have keys.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        flat: bool = False,
        around: Around | None = None,
        permits: Permits | None = None,
    ) -> None:
        self._actions = {name: Action.of(name, handler, flat) for name, handler in handlers.items()}
        self._flat = flat
        self._around = around
        self._permits = permits
        self._tasks: set[asyncio.Future[Any]] = set()
        self.traffic = Traffic()

    def __repr__(self) -> str:
        return f"Actions({', '.join(self._actions)}; running={len(self._tasks)})"

    async def answer(self, body: bytes, peer: bytes = b"") -> bytes:
        """The reply to one request."""
        answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.handle(body, answered.set_result, peer)
        return await answered

    def handle(self, body: bytes, reply: Callable[[bytes], None], peer: bytes = b"", sender: Sender = _LOCAL) -> None:
        """Answer a request of a peer by calling `reply` exactly once, now or later on the event loop."""
        asked = _Asked(protocol.is_json(body), time.monotonic())
        try:
            request = self._read(body, peer, sender)
            asked.request_id = request.request_id
            action = self._find(request.action)
            asked.action = action.name
            if self._permits is not None:
                self._permits.check(action.name, request)
            result = action.call(request, self._around)
        except Exception as error:  # noqa: BLE001  whatever a request provokes is answered, never a crash
            if asked.request_id is None:
                asked.request_id = echo_id(body)
            reply(self._failure(error, asked))
            return
        if inspect.isawaitable(result):
            self._later(result, asked, reply)
        else:
            reply(self._success(result, asked))

    def refuse(self, body: bytes, error: MemorySystemError) -> bytes:
        """The reply to a request that is not admitted."""
        asked = _Asked(protocol.is_json(body), time.monotonic(), _REFUSED, echo_id(body))
        return self._failure(error, asked)

    async def cancel(self) -> None:
        """End what still runs; its callers get `shutting_down`."""
        running = list(self._tasks)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=_CANCEL_S)

    def _read(self, body: bytes, peer: bytes, sender: Sender) -> Request:
        if self._permits is None:
            return read_request(body, peer, sender.address, flat=self._flat)
        return self._permits.read(body, peer, sender, flat=self._flat)

    def _find(self, name: str) -> Action:
        action = self._actions.get(name)
        if action is None:
            raise _unknown_action(name, self._actions)
        return action

    def _later(self, result: Awaitable[Any], asked: _Asked, reply: Callable[[bytes], None]) -> None:
        task = asyncio.ensure_future(result)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: reply(self._finished(done, asked)))

    def _finished(self, done: asyncio.Future[Any], asked: _Asked) -> bytes:
        if done.cancelled():
            return self._failure(ShuttingDown("the program is stopping; try again", retry_after_ms=500), asked)
        error = done.exception()
        return self._success(done.result(), asked) if error is None else self._failure(error, asked)

    def _success(self, result: Any, asked: _Asked) -> bytes:
        reply: dict[str, Any] = {"status": "success"}
        if asked.request_id is not None:
            reply["request_id"] = asked.request_id
        try:
            reply.update(_reply_fields(result))
            body = encode(reply, as_json=asked.as_json)
        except Exception as error:  # noqa: BLE001  a reply that cannot be encoded is a defect, and still answered
            return self._failure(error, asked)
        if len(body) > protocol.MAX_MESSAGE_BYTES:
            text = f"the reply has {len(body)} bytes, the limit is {protocol.MAX_MESSAGE_BYTES}"
            return self._failure(ReplyTooLarge(text), asked)
        self.traffic.record(asked.action, SUCCESS, time.monotonic() - asked.started_s)
        return body

    def _failure(self, error: BaseException, asked: _Asked) -> bytes:
        if not isinstance(error, MemorySystemError) or not error.on_wire:
            where = {"action": asked.action, "request_id": asked.request_id}
            log.error("internal_error", **where, error=type(error).__name__, exc_info=error)
            error = InternalError("the program failed at this request; its log has the details")
        self.traffic.record(asked.action, error.code, time.monotonic() - asked.started_s)
        log.debug("request_refused", action=asked.action, error_code=error.code, request_id=asked.request_id)
        shape = protocol.error_reply(error.code, error.message, error.retryable, error.details, asked.request_id)
        try:
            return encode(shape, as_json=asked.as_json)
        except (TypeError, ValueError, OverflowError, RecursionError):
            # Details that a handler gave and that no encoding has a form for; code and message are what matters.
            plain = {**shape, "details": {}, "message": error.message.encode("utf-8", "replace").decode()}
            return encode(plain, as_json=asked.as_json)


class ActionServer:
    """Serves actions on a ROUTER socket: bounded, never blocking, with the wire and the errors of the memory service.

    `name` is the program's, `address` such as `tcp://127.0.0.1:5600` (see `program.listen_address`), `port_key` the
    setting to name when the port is taken. The server answers `health_check` with its process's figures, over which
    those of `health()` are laid: at least `state`, and whatever tells how the program is. The limits are those of
    `settings.limits`; from other hosts come in whom `settings.security` names, or, with a `gate`, who has a key that
    may enter its `domain`. For `flat`, `around` and `needs` see Actions.

    Either `async with`, or `bind()`, `start()`, and at the end `await drain()` and `close()`.
    """

    def __init__(
        self,
        name: str,
        address: str,
        actions: Mapping[str, Handler],
        settings: Settings,
        *,
        health: HealthFigures | None = None,
        port_key: str = "its port",
        flat: bool = False,
        around: Around | None = None,
        gate: Gate | None = None,
        domain: str = "agents",
        needs: Needs = permission_for,
    ) -> None:
        self._settings = settings
        self._health = health
        handlers = {"health_check": self._health_check, **actions}
        self._gate = gate
        self._permits = Permits.of(gate, needs, settings, name)
        self.actions = Actions(handlers, flat=flat, around=around, permits=self._permits)
        self._server = RequestServer(address, settings, program=name, port_key=port_key, gate=gate, domain=domain)

    def __repr__(self) -> str:
        return f"ActionServer({self.actions!r}, {self._server!r})"

    @property
    def address(self) -> str:
        return self._server.router.address

    def bind(self) -> None:
        """Take the address; requests wait from now on. Raises CannotStart."""
        self._server.bind()

    def start(self) -> None:
        """Begin to answer, on the running event loop."""
        self._server.start(self.actions)

    async def drain(self, timeout_s: float | None = None) -> None:
        """Refuse what comes, answer what was accepted; after `limits.shutdown_s` what still runs is cancelled."""
        self._server.refuse_more()
        await self._server.answered(self._settings.limits.shutdown_s if timeout_s is None else timeout_s)
        await self.actions.cancel()
        await asyncio.sleep(0)  # what was cancelled is still to be answered

    def close(self) -> None:
        """Close the socket. May be called at any time."""
        self._server.close()
        if self._permits is not None:
            self._permits.close()

    async def __aenter__(self) -> ActionServer:
        try:
            self.bind()
        except BaseException:
            self.close()
            raise
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.drain()
        finally:
            self.close()

    def figures(self) -> dict[str, Any]:
        """pid, uptime_s, in_flight, dropped_replies, busy_replies, draining, requests (by action or error code), and
        security where there are keys (see Gate.figures)."""
        found = {**self._server.figures(), "requests": self.actions.traffic.requests()}
        return found if self._gate is None else {**found, "security": self._gate.figures()}

    def _health_check(self, request: Request) -> dict[str, Any] | Awaitable[dict[str, Any]]:
        found = self._health() if self._health is not None else {}
        if inspect.isawaitable(found):
            return self._health_later(found, request.identity)
        return _health_for(request.identity, {"state": "healthy", **self.figures(), **found})

    async def _health_later(self, figures: Awaitable[Mapping[str, Any]], identity: Identity | None) -> dict[str, Any]:
        found = await figures
        return _health_for(identity, {"state": "healthy", **self.figures(), **found})


def _unknown_action(name: str, known: Iterable[str]) -> UnknownAction:
    near = next(iter(difflib.get_close_matches(name[:80], known, n=1)), None)
    hint = f"; did you mean {near}?" if near else f"; there are {', '.join(sorted(known))}"
    return UnknownAction(f"there is no action {name[:80]!r}{hint}", **({"suggestion": near} if near else {}))


def _health_for(identity: Identity | None, figures: dict[str, Any]) -> dict[str, Any]:
    if identity is None or identity.may(OPERATE):
        return figures
    return {name: figures[name] for name in _HEALTH_FOR_ALL if name in figures}


def _reply_fields(result: Any) -> Mapping[str, Any]:
    if result is None:
        return {}
    if not isinstance(result, Mapping):
        raise TypeError(f"a handler returns a map of reply fields, not {type(result).__name__}")
    taken = protocol.RESERVED_REPLY_FIELDS.intersection(result)
    if taken:
        raise ValueError(f"a handler's reply may not have the fields {', '.join(sorted(taken))}")
    return result

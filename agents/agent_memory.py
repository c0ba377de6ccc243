"""The memory service as an agent uses it: in the name of whoever's request is being handled.

A method of AgentMemory returns the reply when all went well and raises the error otherwise. An agent lets it pass: its
own caller then gets that error. That the service does not answer becomes `unavailable`, with the time to wait.

Whether it answers is found out by `watch` alone, with looks of its own; a call that waits for a while has it look at
once. No connection is certain after one look; a connection that brings no answer is so after as many looks as the
circuit breaker takes to open, since a service may be slow. From then on nothing is sent and nobody waits: whoever calls
is told at once, and so is whoever waits already. One look that is answered ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from memory_client import AsyncMemoryClient
from memory_system.agent_settings import AgentsSettings
from memory_system.envelope import Request
from memory_system.errors import (
    AccessDenied,
    CircuitOpen,
    ClientClosed,
    DeadlineExceeded,
    InvalidField,
    MemorySystemError,
    RequestTimeout,
    ShuttingDown,
    Unavailable,
    Unreachable,
)
from memory_system.keys import KeyFile
from memory_system.log import get_logger
from memory_system.protocol import RESERVED_REPLY_FIELDS, new_request_id

log = get_logger("agent")

Reply = dict[str, Any]

SILENCE: Final = (CircuitOpen, ClientClosed, RequestTimeout, ShuttingDown, Unreachable)
# The wait that is suggested while it is not yet known that the service is gone.
RETRY_MS: Final = 500.0
LOOK_MS: Final = 1000.0
# A call that waits longer is a reason to look.
DOUBT_S: Final = 0.25
# Programs start together: so long it is no news that the service does not answer yet.
START_S: Final = 30.0
_MIN_CALL_MS: Final = 1.0
_PAUSE_S: Final = 0.05
# A key that was refused is shown again after this time: it may be granted meanwhile.
REFUSED_S: Final = 2.0
_MARK: Final = "mark"  # memory type
_MARK_S: Final = 60.0
_NO_BREAKER: Final = 1_000_000_000  # failures in a row that nobody will see
# Of an error's details, what is about the agent's call and not about its caller's request.
_OF_THE_CALL: Final = frozenset({"outcome", "request_id"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request is handled. `request_id` is None where a retry could not be told from a new request.

    `on_behalf_of` names the key that the request came with, and after it those that this key speaks for (`a>b`); None
    where callers have no keys.
    """

    namespace: str = "default"
    agent_id: str | None = None
    session_id: str | None = None
    request_id: str | None = None
    deadline_s: float | None = None
    on_behalf_of: str | None = None

    @classmethod
    def of(cls, request: Request) -> Caller:
        request_id = None if request.legacy else request.request_id
        scope = None if request.identity is None else request.identity.scope
        return cls(request.namespace, request.agent_id, request.session_id, request_id, request.deadline_s, scope)

    @property
    def sender(self) -> tuple[str | None, ...]:
        """Who sends it: the same request_id of another one is another request."""
        return (self.agent_id,) if self.on_behalf_of is None else (self.agent_id, self.on_behalf_of)


NOBODY: Final = Caller()
_caller: ContextVar[Caller] = ContextVar("caller", default=NOBODY)


def caller() -> Caller:
    """Whose request is being handled; outside of one, that of nobody in namespace "default"."""
    return _caller.get()


@contextlib.contextmanager
def acting(**changes: Any) -> Iterator[None]:
    """Within it, calls are made as this Caller with these changes: `with acting(session_id=None): ...`."""
    token = _caller.set(dataclasses.replace(caller(), **changes))
    try:
        yield
    finally:
        _caller.reset(token)


@contextlib.contextmanager
def handling(request: Request) -> Iterator[None]:
    """Within it, calls are made in the name of this request's caller."""
    token = _caller.set(Caller.of(request))
    try:
        yield
    finally:
        _caller.reset(token)


class AgentMemory(AsyncMemoryClient):
    """All methods of AsyncMemoryClient. They raise MemorySystemError; the service's silence is Unavailable.

    `name`: the agent's, under which the service knows calls whose caller gave no agent_id. `on_change(state)` hears
    of each change of `state`: loading until the service first answers, then ready or unavailable. `key`: the agent's,
    with which all calls are made; what they may do is what both this key and the caller's own may.
    """

    def __init__(
        self,
        endpoint: str,
        name: str,
        rules: AgentsSettings,
        on_change: Callable[[str], None] = lambda state: None,
        key: KeyFile | None = None,
    ) -> None:
        super().__init__(
            endpoint,
            agent_id=name,
            timeout_ms=rules.call_s * 1000.0,
            failure_threshold=_NO_BREAKER,
            raise_on_error=True,
            error_bus="",  # the agent reports what it means for its callers
            key_file=key,
        )
        # Whether it answers is for these to say: a caller with a short deadline is no witness of its silence.
        self._looks = AsyncMemoryClient(
            endpoint,
            agent_id=name,
            timeout_ms=min(LOOK_MS, self.timeout_ms),
            failure_threshold=rules.failure_threshold,
            reset_timeout_s=rules.reset_timeout_s,
            error_bus="",
            key_file=key,
        )
        self.state = "loading"
        self._look_s = rules.look_s
        self._on_change = on_change
        self._began_s = time.monotonic()
        self._doubt = asyncio.Event()
        self._silent = False  # known not to answer
        self._refused = False  # it does not let this agent in
        self._waiting: set[asyncio.Timeout] = set()

    def key(self, step: str) -> str:
        """The request_id for one write of the request being handled, 32 hex digits: the same each time that request is
        sent, so that the service does it once. A request that has no request_id, or no `v`, gets a new one each time.
        """
        who = caller()
        if who.request_id is None:
            return new_request_id()
        parts = json.dumps([self.agent_id, who.namespace, *who.sender, who.request_id, step])
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    async def done(self, step: str) -> Reply | None:
        """The reply of the write with `key(step)` if the request being handled was sent before and came that far."""
        if caller().request_id is None:
            return None
        # The agent may have been killed with the write on its way; the service tells when it is asked.
        while (status := await self.get_request_status(self.key(step)))["state"] == "in_progress":  # noqa: ASYNC110
            await asyncio.sleep(_PAUSE_S)
        return dict(status["reply"]) if status["state"] == "committed" else None

    async def begun_s(self) -> float:
        """When the request being handled was first begun: epoch seconds of the service's clock; infinite where there
        is no telling. What it is to remove is what was there then: sent again, it leaves alone what came since."""
        if caller().request_id is None:
            return math.inf
        mark = await self.done("begun")
        if mark is None:
            with acting(session_id=None):
                mark = await self.add_memory(
                    "A request was begun.", _MARK, expires_at=time.time() + _MARK_S, request_id=self.key("begun")
                )
            # Its time is in the reply that the service keeps under the key; the mark itself is of no more use.
            await self.delete_memory(mark["memory_id"], request_id=self.key("mark"))
        return float(mark["created_at"])

    async def call(
        self,
        action: str,
        data: dict[str, Any] | None = None,
        *,
        deadline_ms: float | None = None,
        request_id: str | None = None,
    ) -> Reply:
        if self._silent:
            raise self._unavailable()
        budget_ms = self._budget_ms(deadline_ms)
        try:
            async with self._until_silent():
                return await super().call(action, data, deadline_ms=budget_ms, request_id=request_id)
        except SILENCE as error:
            self._doubt.set()
            raise self._unavailable() from error
        except MemorySystemError as error:
            if _is_own_key_refused(error.code, error.details.get("outcome")):
                self._doubt.set()
                raise self._unavailable() from error
            error.details = {name: value for name, value in error.details.items() if name not in _OF_THE_CALL}
            raise

    @contextlib.asynccontextmanager
    async def _until_silent(self) -> AsyncIterator[None]:
        """Within it, what is awaited ends with Unavailable when it becomes known that the service does not answer."""
        look = asyncio.get_running_loop().call_later(DOUBT_S, self._doubt.set)
        waiting = asyncio.timeout(None)
        try:
            async with waiting:
                self._waiting.add(waiting)
                yield
        except TimeoutError as error:
            raise self._unavailable() from error
        finally:
            self._waiting.discard(waiting)
            look.cancel()

    def get_circuit_breaker_status(self) -> dict[str, Any]:
        """That of the looks, see MemoryClient."""
        return self._looks.get_circuit_breaker_status()

    async def close(self) -> None:
        await self._looks.close()
        await super().close()

    async def watch(self) -> None:
        """Look again and again whether the service answers, now and then while it does. Never ends."""
        while True:
            self._doubt.clear()
            if await self._look():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._doubt.wait(), self._look_s)
            else:
                least_s = REFUSED_S if self._refused else _PAUSE_S
                await asyncio.sleep(max(least_s, self.get_circuit_breaker_status()["next_attempt_in_s"]))

    async def _look(self) -> bool:
        reply = await self._looks.get_commit_seq()
        refused, self._refused = self._refused, _is_own_key_refused(reply.get("error_code"), reply.get("outcome"))
        if self._refused:
            if not refused:
                log.error("key_refused", reason="the memory service does not let in the key of this agent")
            self._fall_silent()
            return False
        # A refusal of the call itself is an answer too: what is wrong then shows in the calls.
        if reply["status"] == "success" or not reply["retryable"]:
            self._silent = False
            self._turn("ready")
            return True
        if _no_connection(reply) or self.get_circuit_breaker_status()["state"] != "closed":
            self._fall_silent()
        return False

    def _fall_silent(self) -> None:
        self._silent = True
        for waiting in self._waiting:
            waiting.reschedule(0.0)  # that is: now
        self._waiting.clear()
        if self.state != "loading" or time.monotonic() - self._began_s > START_S:
            self._turn("unavailable")

    def _turn(self, state: str) -> None:
        if state != self.state:
            self.state = state
            self._on_change(state)

    def _caller(self) -> dict[str, str]:
        who = caller()
        fields = {
            "namespace": who.namespace,
            "agent_id": who.agent_id or self.agent_id,
            "session_id": who.session_id,
            "on_behalf_of": who.on_behalf_of,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _budget_ms(self, asked_ms: float | None) -> float:
        budget_ms = self.timeout_ms if asked_ms is None else asked_ms
        deadline_s = caller().deadline_s
        if deadline_s is None:
            return budget_ms
        left_ms = (deadline_s - time.monotonic()) * 1000.0
        if left_ms < _MIN_CALL_MS:
            raise DeadlineExceeded("the request's deadline has passed before all of it was done")
        return min(budget_ms, left_ms)

    def _unavailable(self) -> Unavailable:
        wait_ms = self.get_circuit_breaker_status()["next_attempt_in_s"] * 1000.0
        text = "the memory service does not answer; try again later, with the same request_id"
        return Unavailable(text, retry_after_ms=round(wait_ms or RETRY_MS, 1))


def _is_own_key_refused(code: object, outcome: object) -> bool:
    """Whether the agent itself was not let in: what a caller of its may not do is refused by a reply."""
    return code == AccessDenied.code and outcome == "not_sent"


def _no_connection(reply: Reply) -> bool:
    """Whether there was nobody to connect to, again and again: once may be this program's own slowness."""
    return bool(reply["error_code"] == Unreachable.code and reply["details"]["attempts"] > 1)


def renamed(error: InvalidField, sent: str, own: str) -> InvalidField:
    """The service's error about the field `sent`, or one inside of it, as one about the caller's field `own`; any other
    as it is."""
    inside = error.field.removeprefix(sent)
    if not error.field.startswith(sent) or inside[:1] not in ("", ".", "["):
        return error
    rest = {name: value for name, value in error.details.items() if name != "field"}
    return InvalidField(own + inside, error.message.replace(sent, own, 1), **rest)


def passed_on(reply: Reply) -> Reply:
    """The fields of a reply of the service that an agent's own reply may have."""
    return {name: value for name, value in reply.items() if name not in RESERVED_REPLY_FIELDS}

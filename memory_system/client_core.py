"""The half of the client that does no I/O: what to send, what an answer means, when to try again.

The drivers in memory_client.py ask a `Call` what to do and tell it what happened:

    reply            the result; None while the call goes on
    resume_at_s      when the next attempt may begin
    body(now)        bytes of the next attempt; None: the call is over
    sent(now)        the attempt left and may be waited for until `attempt_ends_s`
    not_sent(now)    no connection came up within the connect budget (`closed_early`: the service hung up on each)
    unanswered(now)  the connection was lost, or `attempt_ends_s` passed
    received(body)   bytes came back (`answered`: already decoded)
    fail(error)      the driver cannot go on

All times ending in `_s` are monotonic seconds.
"""

from __future__ import annotations

import abc
import os
import time
from typing import Any, Final, Generic, TypeVar

from memory_system import errors
from memory_system import protocol as p
from memory_system.breaker import CircuitBreaker, Transition
from memory_system.client_reports import Reports, bus_endpoint
from memory_system.client_retry import backoff_s, retry_after_s
from memory_system.keys import KeyFile, key_given

Reply = dict[str, Any]
R = TypeVar("R")

MAX_DEADLINE_MS: Final = 86_400_000.0
_HANGS_UP: Final = (
    "ends each connection in its handshake: it wants a key (MEMORY_KEY_FILE), the key file is of another service (its "
    "line `server`), or it is too busy"
)
# Less time than this is not worth an attempt; timers of some event loops fire up to 1 ms early.
MIN_ATTEMPT_S: Final = 0.001


class Call:
    """One call of a client, from its first attempt to its reply. Not shared between threads."""

    __slots__ = (
        "_attempt_timeout_s",
        "_attempts",
        "_breaker",
        "_closed_early",
        "_endpoint",
        "_heard",
        "_lost",
        "_refusal",
        "_request",
        "action",
        "attempt_ends_s",
        "deadline_s",
        "reply",
        "request_id",
        "resume_at_s",
        "sent_s",
        "transition",
    )

    def __init__(
        self, request: dict[str, Any], endpoint: str, now_s: float, timeout_s: float, attempt_timeout_s: float
    ) -> None:
        self.action: str = request["action"]
        self.request_id: str = request["request_id"]
        self.reply: Reply | None = None
        self.transition: Transition | None = None  # what its end changed about the circuit breaker
        self.deadline_s = now_s + timeout_s
        self.resume_at_s = self.sent_s = self.attempt_ends_s = now_s
        self._request = request
        self._endpoint = endpoint
        self._attempt_timeout_s = attempt_timeout_s
        self._attempts = 0
        self._breaker: CircuitBreaker | None = None
        self._heard = False  # some attempt was answered, so the service lives
        self._closed_early = False  # the last attempt's connections were closed in their handshake
        self._lost = False  # some attempt left and was never answered, so its effect is unknown
        self._refusal: Reply | None = None  # the last attempt's answer, if it was "not now"

    def admit(self, breaker: CircuitBreaker, now_s: float) -> None:
        """Ask the breaker; when it refuses, the call is over."""
        if breaker.allow(now_s):
            self._breaker = breaker
            return
        wait_s = breaker.retry_after_s(now_s)
        text = (
            f"the circuit breaker is open after repeated failures of {self._endpoint}; next attempt in {wait_s:.1f} s"
        )
        self.fail(errors.CircuitOpen(text, retry_after_ms=round(wait_s * 1000.0, 1)))

    def body(self, now_s: float) -> bytes | None:
        left_s = self.deadline_s - now_s
        if left_s < MIN_ATTEMPT_S:
            self._expire(now_s)
            return None
        self._attempts += 1
        self._request["deadline_ms"] = left_s * 1000.0
        try:
            return p.encode_request(self._request)
        except (errors.InvalidRequest, errors.RequestTooLarge) as error:
            self.fail(error)
            return None

    def sent(self, now_s: float) -> None:
        self.sent_s = now_s
        self.attempt_ends_s = min(now_s + self._attempt_timeout_s, self.deadline_s)

    def not_sent(self, now_s: float, *, closed_early: bool = False) -> None:
        self._refusal = None
        self._closed_early = closed_early
        self._pause(now_s, 0.0)

    def unanswered(self, now_s: float) -> None:
        self._refusal = None
        self._lost = True
        self._pause(now_s, 0.0)

    def received(self, body: bytes, now_s: float) -> None:
        try:
            reply = p.decode_reply(body)
        except errors.InvalidReply as error:
            self.garbled(error)
        else:
            self.answered(reply, now_s)

    def garbled(self, error: errors.InvalidReply) -> None:
        """The peer does not speak this protocol: another attempt would bring the same."""
        self._lost = True
        self.fail(error)

    def answered(self, reply: Reply, now_s: float) -> None:
        """A reply without a request_id answers a request that the service could not read, hence this one."""
        if reply.get("request_id", self.request_id) != self.request_id:
            self.unanswered(now_s)
            return
        self._heard = True
        wait_s = None if reply["status"] == "success" else retry_after_s(reply)
        if wait_s is None:
            self._conclude(reply, now_s)
            return
        self._refusal = reply
        self._pause(now_s, wait_s)
        if self.resume_at_s >= self.deadline_s:
            self._expire(now_s)

    def fail(self, error: errors.MemorySystemError) -> None:
        """End the call with an error of the client's own, which is no verdict about the service."""
        self.reply = self._error(error)
        if self._breaker is not None:
            self._breaker.abandon()

    def abandon(self) -> None:
        """The caller went away (cancelled, interrupted)."""
        if self.reply is None and self._breaker is not None:
            self._breaker.abandon()

    def _pause(self, now_s: float, at_least_s: float) -> None:
        if self.deadline_s - now_s < MIN_ATTEMPT_S:
            self.resume_at_s = now_s
        else:
            self.resume_at_s = min(now_s + at_least_s + backoff_s(self._attempts), self.deadline_s)

    def _conclude(self, reply: Reply, now_s: float) -> None:
        if reply["status"] == "error":
            # "Try later" says nothing about an earlier attempt that got no answer.
            reply["outcome"] = "unknown" if self._lost and reply.get("retryable") else "failed"
        self.reply = reply
        if self._breaker is not None:
            self.transition = self._breaker.success(now_s)

    def _expire(self, now_s: float) -> None:
        """The deadline is used up. It counts against the service only if nothing was heard from it."""
        facts = {"endpoint": self._endpoint, "attempts": self._attempts}
        if self._refusal is not None:
            self.reply = {**self._refusal, "outcome": "unknown" if self._lost else "failed"}
        elif self._lost:
            text = f"no reply from {self._endpoint} in time"
            self.reply = self._error(errors.RequestTimeout(text, **facts))
        else:
            text = f"no connection to {self._endpoint} in time; is the orchestrator running?"
            if self._closed_early:
                text = f"{self._endpoint} {_HANGS_UP}"
            self.reply = self._error(errors.Unreachable(text, **facts))
        if self._breaker is None:
            return
        if self._heard:
            self._breaker.abandon()
        else:
            self.transition = self._breaker.failure(now_s)

    def _error(self, error: errors.MemorySystemError) -> Reply:
        reply = p.error_reply(error.code, error.message, error.retryable, error.details, self.request_id)
        reply["outcome"] = "unknown" if self._lost else "not_sent"
        return reply


class ClientCore(abc.ABC, Generic[R]):
    """Who calls, with what budgets, and the circuit breaker. R is what a call returns: a reply or a coroutine of one.

    endpoint: address of the orchestrator; None: the environment's MEMORY_ORCHESTRATOR_ADDR, else tcp://127.0.0.1:7140.
    timeout_ms: the budget of one call, all its attempts and pauses included.
    attempt_timeout_ms: how long one attempt is waited for; None: half the call's budget. A lost connection is noticed
        at once and needs no timeout. This one covers a peer that vanished without a word and a reply that got lost, so
        a slow operation is sent twice at most; the shared request_id keeps the second from being done again.
    connect_timeout_ms: how long an attempt waits for a connection before it counts as not sent.
    raise_on_error: raise the error's exception (memory_system.errors) instead of returning the error dict;
        its `details` then have `outcome` and `request_id`.
    error_bus: where failures are reported to, an endpoint; "": nowhere. None: the environment's MEMORY_ERROR_BUS_ADDR,
        else port 7152 of the orchestrator's host if the orchestrator has its usual port, else nowhere.
    key_file: the file with this client's key, for a service whose callers need one, or what `load_key_file` read of it;
        None: the environment's MEMORY_KEY_FILE, else no key. Raises ConfigError for a file that is not usable.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        agent_id: str | None = None,
        session_id: str | None = None,
        namespace: str = "default",
        timeout_ms: float = 5000,
        failure_threshold: int = 5,
        reset_timeout_s: float = 30.0,
        raise_on_error: bool = False,
        attempt_timeout_ms: float | None = None,
        connect_timeout_ms: int = 300,
        error_bus: str | None = None,
        key_file: str | os.PathLike[str] | KeyFile | None = None,
    ) -> None:
        if not 1.0 <= timeout_ms <= MAX_DEADLINE_MS:
            raise ValueError(f"timeout_ms must be from 1 to {MAX_DEADLINE_MS:.0f}, not {timeout_ms}")
        if connect_timeout_ms < 1 or (attempt_timeout_ms is not None and not attempt_timeout_ms >= 1.0):
            raise ValueError("connect_timeout_ms and attempt_timeout_ms must be at least 1")
        self.endpoint = endpoint or os.environ.get(p.ENDPOINT_VARIABLE) or p.DEFAULT_ENDPOINT
        self.agent_id = agent_id
        self.session_id = session_id
        self.namespace = namespace
        self.timeout_ms = timeout_ms
        self.raise_on_error = raise_on_error
        self.attempt_timeout_ms = attempt_timeout_ms
        self.connect_timeout_ms = connect_timeout_ms
        self._breaker_limits = (failure_threshold, reset_timeout_s)
        # One for each process: a lock that another thread held during a fork stays locked in the child.
        self._breakers = {os.getpid(): CircuitBreaker(*self._breaker_limits)}
        self._connections: dict[int, Any] = {}  # the driver's, by process id
        self._key = key_given(key_file)
        self._reports = Reports(self.endpoint, bus_endpoint(error_bus, self.endpoint), self._key)
        self._closed = False

    def set_agent_id(self, agent_id: str | None) -> None:
        """Later calls name this agent. None: no agent."""
        self.agent_id = agent_id

    def set_session_id(self, session_id: str | None) -> None:
        """Later calls carry this session, which is then the parent of new memories. None: no session."""
        self.session_id = session_id

    @abc.abstractmethod
    def call(
        self,
        action: str,
        data: dict[str, Any] | None = None,
        *,
        deadline_ms: float | None = None,
        request_id: str | None = None,
    ) -> R:
        """Run any action of the wire. `deadline_ms` replaces `timeout_ms` for this call."""

    @abc.abstractmethod
    def _is_connected_again(self) -> bool:
        """Whether the connection that the caller's last attempt did not find has come up since."""

    def get_circuit_breaker_status(self) -> dict[str, Any]:
        """state (closed | open | half_open), failure_count, failure_threshold, last_failure_time (epoch seconds or
        None), reset_timeout_s, next_attempt_in_s (0.0: now). Local: asks nobody."""
        now_s = time.monotonic()
        return self._breaker().snapshot(now_s).figures(now_s, time.time())

    def reset_circuit_breaker(self) -> None:
        """Close the breaker and forget its failures."""
        breaker = self._breaker()
        if (transition := breaker.reset()) is not None:
            self._reports.tell_transition(transition, breaker.snapshot(time.monotonic()), self.agent_id)

    def _breaker(self) -> CircuitBreaker:
        pid = os.getpid()
        return self._breakers.get(pid) or self._breakers.setdefault(pid, CircuitBreaker(*self._breaker_limits))

    def _caller(self) -> dict[str, str]:
        """The fields of the envelope that say who calls."""
        fields = {"namespace": self.namespace, "agent_id": self.agent_id, "session_id": self.session_id}
        return {name: value for name, value in fields.items() if value is not None}

    def _begin(
        self, action: str, data: dict[str, Any] | None, deadline_ms: float | None, request_id: str | None
    ) -> Call:
        request = {
            "v": p.VERSION,
            "action": action,
            "data": {} if data is None else data,
            "request_id": p.new_request_id() if request_id is None else request_id,
            **self._caller(),
        }
        now_s = time.monotonic()
        budget_ms = self.timeout_ms if deadline_ms is None else deadline_ms
        attempt_ms = budget_ms / 2.0 if self.attempt_timeout_ms is None else self.attempt_timeout_ms
        call = Call(request, self.endpoint, now_s, budget_ms / 1000.0, attempt_ms / 1000.0)
        if self._closed:
            call.fail(errors.ClientClosed("the client is closed"))
        elif not 1.0 <= budget_ms <= MAX_DEADLINE_MS:
            call.fail(errors.InvalidField("deadline_ms", f"deadline_ms must be from 1 to {MAX_DEADLINE_MS:.0f}"))
        else:
            breaker = self._breaker()
            if breaker.state == "open" and self._is_connected_again():
                breaker.peer_is_back()
            call.admit(breaker, now_s)
        return call

    def _end(self, call: Call) -> Reply:
        reply = call.reply
        assert reply is not None
        if reply["status"] == "error":
            self._reports.tell_failure(reply, call.action, call.request_id, self.agent_id)
            if call.transition is not None:
                self._tell_transition(call, call.transition)
            if self.raise_on_error:
                details = reply.get("details")
                known = details if isinstance(details, dict) else {}
                extra = {"outcome": reply["outcome"], "request_id": call.request_id}
                raise errors.from_reply({**reply, "details": {**known, **extra}})
            return reply
        if call.transition is not None:
            self._tell_transition(call, call.transition)
        if call.action == "create_session" and isinstance(reply.get("session_id"), str):
            self.session_id = reply["session_id"]
        return reply

    def _tell_transition(self, call: Call, transition: Transition) -> None:
        seen = self._breaker().snapshot(time.monotonic())
        self._reports.tell_transition(transition, seen, self.agent_id, call.request_id)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"breaker={self._breaker().state}"
        return f"<{type(self).__name__} {self.endpoint} namespace={self.namespace} {state}>"

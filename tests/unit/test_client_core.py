"""What a call does next, decided without a socket or a clock."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_system import errors, protocol
from memory_system.breaker import CircuitBreaker
from memory_system.client_core import Call, backoff_s, retry_after_s

ID = "0123456789abcdef"
START_S = 1000.0
TIMEOUT_S = 5.0


def new_call(breaker: CircuitBreaker | None = None, **request: Any) -> Call:
    fields = {"action": "add_memory", "data": {}, "request_id": ID, **request}
    call = Call(fields, "tcp://host:1", START_S, TIMEOUT_S, TIMEOUT_S / 2)
    call.admit(breaker or CircuitBreaker(), START_S)
    return call


def attempt(call: Call, now_s: float) -> dict[str, Any]:
    body = call.body(now_s)
    assert body is not None
    request: dict[str, Any] = msgpack.unpackb(body)
    return request


def refusal(code: str = "busy", **details: Any) -> dict[str, Any]:
    return {"status": "error", "error_code": code, "message": "", "retryable": True, "details": details}


def test_each_attempt_carries_what_remains() -> None:
    call = new_call()
    assert attempt(call, START_S)["deadline_ms"] == pytest.approx(5000.0)
    call.sent(START_S)
    assert call.attempt_ends_s == START_S + 2.5
    call.unanswered(START_S + 2.5)
    again = attempt(call, START_S + 2.6)
    assert again["deadline_ms"] == pytest.approx(2400.0)
    assert again["request_id"] == ID
    call.sent(START_S + 2.6)
    assert call.attempt_ends_s == START_S + TIMEOUT_S  # the last attempt has all that is left


def test_success_ends_the_call_and_closes_the_breaker() -> None:
    breaker = CircuitBreaker(2)
    breaker.failure(START_S)
    call = new_call(breaker)
    attempt(call, START_S)
    call.answered({"status": "success", "request_id": ID, "memory_id": "m"}, START_S)
    assert call.reply == {"status": "success", "request_id": ID, "memory_id": "m"}
    assert breaker.snapshot(START_S).failure_count == 0


@pytest.mark.parametrize(
    ("steps", "code", "outcome", "failures"),
    [
        (["not_sent"], "unreachable", "not_sent", 1),
        (["unanswered"], "timeout", "unknown", 1),
        (["unanswered", "not_sent"], "timeout", "unknown", 1),
        (["busy"], "busy", "failed", 0),
        (["unanswered", "busy"], "busy", "unknown", 0),
        (["busy", "unanswered"], "timeout", "unknown", 0),
        (["busy", "not_sent"], "unreachable", "not_sent", 0),
    ],
)
def test_the_end_of_the_deadline(steps: list[str], code: str, outcome: str, failures: int) -> None:
    breaker = CircuitBreaker()
    call = new_call(breaker)
    for step in steps:
        attempt(call, START_S)
        if step == "not_sent":
            call.not_sent(START_S)
            continue
        call.sent(START_S)
        if step == "busy":
            call.answered(refusal(), START_S)
        else:
            call.unanswered(START_S)
    assert call.reply is None
    assert call.body(START_S + TIMEOUT_S) is None
    assert call.reply is not None
    assert (call.reply["error_code"], call.reply["outcome"], call.reply["status"]) == (code, outcome, "error")
    assert breaker.snapshot(START_S).failure_count == failures


@pytest.mark.parametrize(
    ("code", "retryable", "outcome"), [("memory_not_found", False, "failed"), ("storage_error", True, "unknown")]
)
def test_an_error_after_a_lost_attempt(code: str, retryable: bool, outcome: str) -> None:
    call = new_call()
    attempt(call, START_S)
    call.sent(START_S)
    call.unanswered(START_S + 2.5)
    attempt(call, START_S + 2.6)
    call.answered({**refusal(code), "retryable": retryable}, START_S + 2.7)
    assert call.reply is not None
    assert call.reply["outcome"] == outcome


def test_a_refusal_waits_at_least_as_long_as_asked() -> None:
    call = new_call()
    attempt(call, START_S)
    call.answered(refusal(retry_after_ms=700), START_S)
    assert call.reply is None
    assert START_S + 0.7 <= call.resume_at_s <= START_S + 0.7 + 0.05


def test_a_refusal_beyond_the_deadline_ends_the_call() -> None:
    call = new_call()
    attempt(call, START_S)
    call.answered(refusal(retry_after_ms=5001), START_S)
    assert call.reply is not None
    assert (call.reply["error_code"], call.reply["outcome"]) == ("busy", "failed")


@pytest.mark.parametrize(
    ("reply", "wait_s"),
    [
        (refusal("busy"), 0.0),
        (refusal("busy", retry_after_ms=250), 0.25),
        (refusal("rate_limited"), 0.0),
        (refusal("shutting_down"), 0.0),
        (refusal("storage_full"), None),
        (refusal("vectors_unavailable", retry_after_ms=100), 0.1),
        ({**refusal("memory_not_found", retry_after_ms=100), "retryable": False}, None),
        (refusal("busy", retry_after_ms="soon"), 0.0),
        (refusal("busy", retry_after_ms=-5), 0.0),
        (refusal("busy", retry_after_ms=float("nan")), 0.0),
        ({"status": "error", "error_code": "busy", "details": None}, 0.0),
        ({"status": "error"}, None),
    ],
)
def test_when_a_reply_asks_for_another_attempt(reply: dict[str, Any], wait_s: float | None) -> None:
    assert retry_after_s(reply) == wait_s


def test_another_calls_reply_is_no_answer() -> None:
    call = new_call()
    attempt(call, START_S)
    call.sent(START_S)
    call.answered({"status": "success", "request_id": "another"}, START_S)
    assert call.reply is None


def test_a_refused_call_does_not_take_the_probe_from_another() -> None:
    breaker = CircuitBreaker(1, 10.0)
    breaker.failure(START_S - 10.0)
    probe, second = new_call(breaker), new_call(breaker)
    assert probe.reply is None
    assert second.reply is not None
    assert (second.reply["error_code"], second.reply["outcome"]) == ("circuit_open", "not_sent")
    assert second.reply["details"]["retry_after_ms"] == pytest.approx(10_000.0)
    second.abandon()
    assert not breaker.allow(START_S)


@pytest.mark.parametrize("end", ["abandon", "fail", "too_large", "garbled"])
def test_a_probe_without_a_verdict_is_given_back(end: str) -> None:
    breaker = CircuitBreaker(1, 10.0)
    breaker.failure(START_S - 10.0)
    call = new_call(breaker, data={"content": "x" * (protocol.MAX_MESSAGE_BYTES + 1)} if end == "too_large" else {})
    if end == "abandon":
        call.abandon()
    elif end == "fail":
        call.fail(errors.ClientClosed("closed"))
    elif end == "too_large":
        assert call.body(START_S) is None
    else:
        call.received(b"\xc1", START_S)
    assert breaker.state == "half_open"
    assert breaker.allow(START_S)


@given(st.integers(1, 1000))
def test_the_backoff_grows_to_half_a_second(attempt_number: int) -> None:
    assert 0.0 <= backoff_s(attempt_number) <= min(0.05 * 2.0 ** (attempt_number - 1), 0.5)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["not_sent", "unanswered", "busy", "stale", "error", "success", "garbage"]),
        st.floats(0.0, 3.0),
    ),
    min_size=1,
    max_size=30,
)


@given(STEPS)
def test_every_call_ends_in_one_well_formed_reply(steps: list[tuple[str, float]]) -> None:
    call, now_s = new_call(), START_S
    for step, taken_s in steps:
        now_s = max(now_s, call.resume_at_s)
        if call.body(now_s) is None:
            break
        now_s = min(now_s + taken_s, call.deadline_s)
        play(call, step, now_s)
        if call.reply is not None:
            break
        assert now_s <= call.resume_at_s <= call.deadline_s
    if call.reply is None:
        assert call.body(call.deadline_s) is None
    reply = call.reply
    assert reply is not None
    if reply["status"] == "error":
        assert reply["outcome"] in ("not_sent", "failed", "unknown")
        sent = any(step != "not_sent" for step, _ in steps)
        assert sent or reply["outcome"] == "not_sent"


def play(call: Call, step: str, now_s: float) -> None:
    if step == "not_sent":
        call.not_sent(now_s)
        return
    call.sent(now_s)
    if step == "unanswered":
        call.unanswered(now_s)
    elif step == "busy":
        call.answered(refusal(retry_after_ms=100), now_s)
    elif step == "stale":
        call.answered({"status": "success", "request_id": "another"}, now_s)
    elif step == "error":
        call.answered({**refusal("memory_not_found"), "retryable": False}, now_s)
    elif step == "success":
        call.answered({"status": "success", "request_id": ID}, now_s)
    else:
        call.received(b"garbage", now_s)

"""When a call of the client is repeated, and after how long."""

from __future__ import annotations

import functools
from typing import Any, Final

# Error replies that say "not now" about the service, not about the call. Any other retryable error is repeated
# only if the service says when: a full disk is not waited for.
REFUSALS: Final = frozenset({"busy", "rate_limited", "shutting_down"})


@functools.cache
def _tenacity() -> tuple[Any, Any]:
    import tenacity  # Loaded at the first retry: most processes never need it.

    # Full jitter; the low cap keeps the time between a restart of the service and the next attempt short.
    return tenacity, tenacity.Retrying(wait=tenacity.wait_random_exponential(multiplier=0.05, max=0.5))


def backoff_s(attempt: int) -> float:
    """Seconds to wait after the attempt with this number (from 1): random within 50 ms, 100 ms, ... 500 ms."""
    tenacity, policy = _tenacity()
    state = tenacity.RetryCallState(policy, None, (), {})
    state.attempt_number = attempt
    return float(policy.wait(state))


def retry_after_s(reply: dict[str, Any]) -> float | None:
    """How long an error reply asks to wait before the same call is repeated; None: do not repeat it."""
    details = reply.get("details")
    asked_ms = details.get("retry_after_ms") if isinstance(details, dict) else None
    if not isinstance(asked_ms, (int, float)) or not asked_ms >= 0.0:
        asked_ms = None
    if str(reply.get("error_code")) in REFUSALS or (reply.get("retryable") and asked_ms is not None):
        return (asked_ms or 0.0) / 1000.0
    return None

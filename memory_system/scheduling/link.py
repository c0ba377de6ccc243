"""The orchestrator as the scheduler sees it: whether it answers, and the calls that start runs.

Whether it answers is asked by short calls, which the circuit breaker counts. The call for a run may take as long as
the run, so its silence says nothing: after `scheduler.call_s` a short call tells whether to go on waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from memory_client import AsyncMemoryClient
from memory_system.client_retry import retry_after_s
from memory_system.keys import KeyFile
from memory_system.scheduler_settings import SchedulerSettings
from memory_system.scheduling.jobs import Job
from memory_system.scheduling.runs import Run

AGENT: Final = "memory_scheduler"
OPERATOR: Final = "operator"
LOOK_MS: Final = 2000
# Programs start together: so long it is no news that the orchestrator does not answer yet.
START_S: Final = 30.0
# How old the knowledge of whether it answers may become.
LOOK_EVERY_S: Final = 15.0
_LAST_RUNS: Final = 20
_MARGIN_S: Final = 0.01
_SILENCE: Final = frozenset({"timeout", "unreachable"})
_NO_BREAKER: Final = 1_000_000_000  # failures in a row that nobody will see

Reply = dict[str, Any]


class Link:
    """`state` is loading until it first answers, then ready or unavailable.

    `on_change(state)` hears of each change. `on_ready` is awaited whenever the orchestrator answers again, before
    anybody who waits for it goes on.
    """

    def __init__(
        self,
        endpoint: str,
        rules: SchedulerSettings,
        *,
        on_change: Callable[[str], None],
        on_ready: Callable[[], Awaitable[None]],
        key: KeyFile | None = None,
    ) -> None:
        self.state = "loading"
        self._began_s = time.monotonic()
        self._reset_timeout_s = rules.reset_timeout_s
        self._on_change = on_change
        self._on_ready = on_ready
        call_ms = rules.call_s * 1000.0
        self._looks = AsyncMemoryClient(
            endpoint,
            agent_id=AGENT,
            timeout_ms=LOOK_MS,
            failure_threshold=rules.failure_threshold,
            reset_timeout_s=rules.reset_timeout_s,
            error_bus="",
            key_file=key,
        )
        # Runs are recorded under who asked for them: the scheduler itself, or a person.
        self._runs, self._runs_by_hand = (
            AsyncMemoryClient(
                endpoint,
                agent_id=agent_id,
                timeout_ms=call_ms,
                attempt_timeout_ms=call_ms,
                failure_threshold=_NO_BREAKER,
                error_bus="",
                key_file=key,
            )
            for agent_id in (AGENT, OPERATOR)
        )
        self._ready = asyncio.Event()
        self._doubt = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Link {self._looks.endpoint} {self.state}>"

    @property
    def breaker(self) -> dict[str, Any]:
        """The circuit breaker's state, see MemoryClient.get_circuit_breaker_status."""
        return self._looks.get_circuit_breaker_status()

    async def watch(self) -> None:
        """Ask again and again whether it answers: soon while it does not, now and then while it does. Never ends."""
        tries = 0
        while True:
            self._doubt.clear()
            refusal = await self.look()
            if refusal is None:
                tries = 0
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._doubt.wait(), LOOK_EVERY_S)
            else:
                tries += 1
                await asyncio.sleep(pause_s(refusal, tries, self._reset_timeout_s))

    async def look(self) -> Reply | None:
        """Whether it answers now: None, or the error reply that says what is in the way."""
        reply = await self._looks.call("list_runs", {"limit": 1})
        # A refusal of the call itself is an answer too: what is wrong then shows in the runs.
        if reply["status"] == "success" or not reply.get("retryable"):
            await self._answers()
            return None
        self._ready.clear()
        self._doubt.set()
        if self.state != "loading" or time.monotonic() - self._began_s > START_S:
            self._turn("unavailable")
        return reply

    @property
    def is_ready(self) -> bool:
        """Whether it answered when it was last asked."""
        return self._ready.is_set()

    async def wait_ready(self, timeout_s: float) -> bool:
        """Return when it answers, or after this time; whether it does."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), timeout_s)
        return self.is_ready

    async def runs(self, job: Job) -> list[Run]:
        """The last runs of a job, newest first; none when it does not answer."""
        reply = await self._looks.call("list_runs", {"job": job.recorded_as, "limit": _LAST_RUNS})
        results = reply.get("results")
        return [Run.of(each) for each in results if isinstance(each, Mapping)] if isinstance(results, list) else []

    async def run(self, job: Job, data: Mapping[str, Any], request_id: str, *, by_hand: bool = False) -> Reply:
        """Have a run done, or join it, and wait for its end as long as the orchestrator answers. Returns its reply,
        of whatever kind."""
        client = self._runs_by_hand if by_hand else self._runs
        while True:
            reply = await client.call(job.action, dict(data), request_id=request_id)
            if reply.get("error_code") not in _SILENCE or await self.look() is not None:
                return reply

    async def close(self) -> None:
        for client in (self._looks, self._runs, self._runs_by_hand):
            await client.close()

    async def _answers(self) -> None:
        if self._ready.is_set():
            return
        await self._on_ready()
        self._ready.set()
        self._turn("ready")

    def _turn(self, state: str) -> None:
        if state != self.state:
            self.state = state
            self._on_change(state)


def pause_s(refusal: Mapping[str, Any], tries: int, at_most_s: float) -> float:
    """How long to wait after the try with this number, from 1: as long as the refusal asks for, else twice as long
    each time."""
    asked_s = retry_after_s(dict(refusal))
    return min(at_most_s, asked_s + _MARGIN_S if asked_s else 0.5 * 2.0 ** min(tries, 16))

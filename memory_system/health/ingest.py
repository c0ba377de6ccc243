"""Taking in errors and heartbeats: a ROUTER that acknowledges after the commit, and a SUB for the mesh's publishers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import zmq

from memory_system.errors import AccessDenied
from memory_system.events import MALFORMED, Event, MalformedEvent, make_event
from memory_system.health import reports
from memory_system.health.folding import BroadcastFolder
from memory_system.health.history import History
from memory_system.health.history_file import MANAGER
from memory_system.health.mesh import DOMAIN, MeshSubscriber, Message
from memory_system.health.records import Committed
from memory_system.log import get_logger
from memory_system.program import listen_address
from memory_system.router import Route, Router, Sender
from memory_system.security import Gate, policy_for
from memory_system.settings import Settings

log = get_logger("health.ingest")

OnHeartbeat = Callable[[Mapping[str, Any], str], None]

RETRY_MS: Final = 1000
# A batch may have hundreds of events to decode; others on the loop get their turn after so many.
ROUTER_BATCH: Final = 2
UNKNOWN_AGENT: Final = "unknown"

_LOOK_S: Final = 1.0
_COMPLAINT_FOLD_S: Final = 10.0
_COMPLAINTS_PER_S: Final = 20
_CLOSE_S: Final = 2.0


class Ingest:
    """Receives on `health.report_port` and `health.mesh_port`, and hands events to the history.

    What is no event becomes one about its sender, with repeats summed up. `on_heartbeat(fields, address)` gets each
    heartbeat. Where there are keys, `gate` says whose a message is: events are those of the key, and a heartbeat is
    taken from the component's own key alone. While the history is full, nothing is read and reporters wait; while it
    fails, they are told to try again, and what the mesh sends is lost, counted, and told of afterwards.
    """

    def __init__(
        self, settings: Settings, history: History, *, on_heartbeat: OnHeartbeat, gate: Gate | None = None
    ) -> None:
        bind, health = settings.network.bind, settings.health
        self._history = history
        self._on_heartbeat = on_heartbeat
        self._gate = gate
        policy = policy_for(settings.network, settings.security) if gate is None else None
        self._router = Router(
            listen_address(bind, health.report_port),
            network=settings.network,
            on_message=self._report,
            on_malformed=self._not_one_body,
            on_denied=self._denied,
            policy=policy,
            batch=ROUTER_BATCH,
            is_full=lambda: history.is_full,
            options={zmq.MAXMSGSIZE: 2 * reports.MAX_BODY_BYTES},
            program="health manager",
            port_key="health.report_port",
            gate=gate,
            domain=DOMAIN,
        )
        self._mesh = MeshSubscriber(
            listen_address(bind, health.mesh_port),
            network=settings.network,
            on_messages=self._mesh_messages,
            is_full=lambda: history.is_full,
            policy=policy,
            gate=gate,
        )
        self._complaints = BroadcastFolder(_COMPLAINT_FOLD_S, _COMPLAINTS_PER_S)
        self._counts = dict.fromkeys(
            ("received", "known", "malformed", "dropped", "retries", "heartbeats", "refused"), 0
        )
        self._lost = 0
        self._pending: set[asyncio.Future[Committed]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"Ingest({self._router.address}, {self._mesh.address}, {len(self._pending)} pending)"

    def bind(self) -> None:
        """Take both ports. Raises CannotStart."""
        self._router.bind()
        self._mesh.bind()

    def start(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Begin to read, on this loop (default: the running one); the history has been started."""
        self._loop = loop or asyncio.get_running_loop()
        self._router.start(self._loop)
        self._mesh.start(self._loop)
        self._look()

    def figures(self) -> dict[str, int]:
        """Counts since the start: events `received` and how many of them were `known`; `malformed` messages; events
        `dropped` because the history failed; `retries` asked for; `heartbeats`, and those `refused`, with
        the key of another; messages `denied`; `unsent` answers.
        """
        denied = self._router.denied + self._mesh.denied
        return {**self._counts, "denied": denied, "unsent": self._router.dropped}

    async def close(self) -> None:
        """Read no more, acknowledge what is being committed, close. The history is closed after this."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._mesh.close()
        self._complain(self._complaints.flush(time.monotonic()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                while self._pending:
                    await asyncio.wait(self._pending)
        await asyncio.sleep(0)  # the answers go out
        self._router.close()

    # -- reporters --------------------------------------------------------------------------------------------

    def _report(self, _peer: bytes, route: Route, body: bytes, sender: Sender) -> None:
        if self._closed:
            return  # it is sent again, to the manager that comes
        try:
            name = self._name(sender)
            report = reports.read_report(body, time.time())
        except AccessDenied as error:
            self._denied(route, body, sender, error)
            return
        except MalformedEvent as error:
            self._malformed(error, sender, len(body), name)
            self._router.send(route, reports.refusal(body, error.reason, getattr(error, "batch", None)))
            return
        if isinstance(report, reports.Heartbeat):
            self._heartbeat(report, sender, name)
            return
        for flaw in report.malformed:
            self._malformed(flaw, sender, None, name)
        events = report.events if name is None else [reports.signed(event, name) for event in report.events]
        self._counts["received"] += len(events)
        self._submit(events, partial(self._answer, route, report), may_return=True)

    def _name(self, sender: Sender) -> str | None:
        """The name of the key that a message came with, None where there are none. Raises AccessDenied."""
        return None if self._gate is None else self._gate.identity(sender.user_id).name

    def _heartbeat(self, heartbeat: reports.Heartbeat, sender: Sender, name: str | None) -> None:
        if name in (None, heartbeat.component):
            self._counts["heartbeats"] += 1
            self._on_heartbeat(heartbeat.fields, sender.address)
            return
        self._counts["refused"] += 1
        message = f"the key of {name} sent a heartbeat in another name"
        self._complain_of("peer_denied", message, name or UNKNOWN_AGENT, {"claimed": heartbeat.component})

    def _answer(self, route: Route, batch: reports.Batch, done: asyncio.Future[Committed]) -> None:
        failure = done.exception()
        if failure is not None:
            self._counts["retries"] += 1
            self._router.send(route, reports.try_again(batch, RETRY_MS, _reason(failure)))
            return
        known = done.result().known
        self._counts["known"] += known
        self._router.send(route, reports.acknowledgement(batch, len(batch.events) - known, known))

    def _not_one_body(self, _route: Route, _peer: bytes, sender: Sender) -> None:
        self._malformed(MalformedEvent("a report is [empty frame, body]"), sender, None)

    def _denied(self, route: Route, body: bytes, sender: Sender, error: AccessDenied) -> None:
        self._router.send(route, reports.refusal(body, error.message))
        self._complain_of("peer_denied", error.message, UNKNOWN_AGENT, {"peer": sender.address})

    # -- the mesh ---------------------------------------------------------------------------------------------

    def _mesh_messages(self, messages: list[Message]) -> None:
        now_s = time.time()
        events: list[Event] = []
        for frames, sender, name in messages:
            try:
                event = reports.read_mesh(frames, now_s)
                events.append(event if name is None else reports.signed(event, name))
            except MalformedEvent as error:
                self._malformed(error, sender, sum(map(len, frames)), name)
        self._counts["received"] += len(events)
        self._submit(events, partial(self._mesh_done, events), may_return=False)

    def _mesh_done(self, events: Sequence[Event], done: asyncio.Future[Committed]) -> None:
        if done.exception() is None:
            self._counts["known"] += done.result().known
            return
        lost = sum(event.count for event in events)
        self._counts["dropped"] += lost
        self._lost += lost

    # -- both -------------------------------------------------------------------------------------------------

    def _submit(
        self, events: Sequence[Event], then: Callable[[asyncio.Future[Committed]], None], *, may_return: bool
    ) -> None:
        future = self._history.submit(events, may_return=may_return)
        self._pending.add(future)
        future.add_done_callback(then)
        future.add_done_callback(self._settled)

    def _settled(self, future: asyncio.Future[Committed]) -> None:
        self._pending.discard(future)
        if not self._closed and not self._history.is_full:
            self._router.schedule()
            self._mesh.schedule()

    def _look(self) -> None:
        """Every second: sums of complaints that are due, and what was lost while the history failed."""
        assert self._loop is not None
        self._timer = self._loop.call_later(_LOOK_S, self._look)
        self._complain(self._complaints.due(time.monotonic()))
        if self._lost and self._history.failing is None:
            lost, self._lost = self._lost, 0
            message = f"{lost} events of the mesh were lost while the error history failed"
            event = make_event(MANAGER, "events_dropped", message, details={"total": lost}, count=lost)
            self._submit([event], partial(self._mesh_done, [event]), may_return=False)
        self._router.schedule()

    def _malformed(self, error: MalformedEvent, sender: Sender, size: int | None, name: str | None = None) -> None:
        self._counts["malformed"] += 1
        details = {"peer": sender.address or "loopback"} | ({} if size is None else {"size": size})
        self._complain_of(MALFORMED, error.reason, name or error.agent or UNKNOWN_AGENT, details)

    def _complain_of(self, error_type: str, message: str, agent: str, details: dict[str, Any]) -> None:
        event = make_event(agent, error_type, message, "warning", details=details)
        self._complain(self._complaints.admit(0, event, time.monotonic()))

    def _complain(self, messages: Sequence[Any]) -> None:
        events = [message.event for message in messages]
        if events:
            self._submit(events, partial(self._mesh_done, events), may_return=False)


def _reason(failure: BaseException) -> str:
    return getattr(failure, "message", None) or type(failure).__name__

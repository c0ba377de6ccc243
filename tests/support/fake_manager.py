"""The broadcasting half of a health manager: the real Broadcaster and folder, and an API that answers from a list.

with FakeManager() as manager:
    manager.report("planner", "timeout", "no answer")

The list `rows` is the history; a second manager made with it and the same ports is a restart.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import zmq

from memory_system.events import Event, at_least, make_event
from memory_system.health.broadcast import Broadcaster
from memory_system.health.folding import Broadcast, BroadcastFolder
from memory_system.settings import ErrorBusSettings, Settings
from tests.support.process import free_port

T = TypeVar("T")
Row = dict[str, Any]
UNLIMITED = 100_000


class FakeManager:
    """Runs an event loop in a thread of its own. `fold_s` 0: everything is broadcast as it comes."""

    def __init__(
        self,
        *,
        boot_id: str = "boot-1",
        rows: list[Row] | None = None,
        ports: tuple[int, int] | None = None,
        fold_s: float = 0.0,
        broadcasts_per_s: int = UNLIMITED,
        **error_bus: Any,
    ) -> None:
        self.ports = ports or (free_port(), free_port())
        self.publish, self.api = (f"tcp://127.0.0.1:{port}" for port in self.ports)
        self.boot_id = boot_id
        self.rows = [] if rows is None else rows
        self.deaf = False
        self.refusal: Row | None = None
        self.questions: list[Row] = []
        self.now_s = 0.0
        settings = dataclasses.replace(Settings(), error_bus=ErrorBusSettings(**error_bus))
        self._folder = BroadcastFolder(fold_s, broadcasts_per_s, len(self.rows))
        self.broadcaster = Broadcaster(self.publish, settings, boot_id, last_error_seq=len(self.rows))
        self._context: zmq.Context[Any] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> FakeManager:
        self.broadcaster.bind()
        self._router.bind(self.api)
        self._thread.start()
        self.do(self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self._stop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _start(self) -> None:
        self.broadcaster.start(self._loop)
        self._loop.add_reader(self._router.fileno(), self._answer_all)

    def _stop(self) -> None:
        self.broadcaster.close()
        self._loop.remove_reader(self._router.fileno())
        self._router.close()
        self._context.term()

    def do(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call it on the loop's thread, and wait for what it returns."""

        async def call() -> T:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(20)

    # -- what happens -----------------------------------------------------------------------------------------

    def report(
        self, agent: str = "planner", error_type: str = "timeout", message: str = "no answer", **given: Any
    ) -> int:
        """Commit an event and broadcast what the folder makes of it; its row. `lost=True`: broadcast to nobody."""
        lost = given.pop("lost", False)
        return self.do(self._report, make_event(agent, error_type, message, **given), lost)

    def _report(self, event: Event, lost: bool) -> int:
        seq = len(self.rows) + 1
        self.rows.append({"seq": seq, "received_at": event.timestamp, **event.fields()})
        self._tell(self._folder.admit(seq, event, self.now_s), lost)
        return seq

    def later(self, seconds: float, *, lost: bool = False) -> None:
        """Let the folder's clock go on, and broadcast what is due then."""
        self.now_s += seconds
        self.do(lambda: self._tell(self._folder.due(self.now_s), lost))

    def _tell(self, messages: list[Broadcast], lost: bool) -> None:
        for each in messages:
            if lost:
                self.broadcaster.last_error_seq = each.seq
            else:
                self.broadcaster.publish_error(each.fields())

    def heartbeat(self, component: str = "health_manager", /, **fields: Any) -> None:
        self.do(self.broadcaster.publish_heartbeat, component, {"state": "healthy", **fields})

    def health(self, component: str, /, **fields: Any) -> None:
        self.do(self.broadcaster.publish_health, component, fields)

    # -- the API ----------------------------------------------------------------------------------------------

    def _answer_all(self) -> None:
        while not self._router.closed and self._router.poll(0):
            *route, body = self._router.recv_multipart()
            request = json.loads(body)
            self.questions.append(request["data"])
            if not self.deaf:
                reply = self.refusal or {"status": "success", **self.get_errors(**request["data"])}
                reply["request_id"] = request["request_id"]
                self._router.send_multipart([*route, json.dumps(reply).encode()])

    def get_errors(
        self,
        since_seq: int | None = None,
        since: float | None = None,
        agent: str | None = None,
        severity: str | None = None,
        error_type: str | None = None,
        limit: int = 100,
        newest: bool = False,
    ) -> Row:
        found = [
            row
            for row in self.rows
            if row["seq"] > (since_seq or 0)
            and row["timestamp"] >= (since or 0.0)
            and agent in (None, row["agent"])
            and error_type in (None, row["error_type"])
            and row["severity"] in at_least(severity or "info")
        ]
        page = found[-limit:] if newest else found[:limit]
        more = len(page) < len(found) and not newest
        return {
            "results": page,
            "count": len(page),
            "total": sum(row.get("count", 1) for row in found),
            "last_seq": len(self.rows),
            "oldest_seq": 1,
            "next_since_seq": page[-1]["seq"] if more else None,
        }

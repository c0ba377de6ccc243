"""A ROUTER that stands for the health manager's: it notes what is reported to it and acknowledges every batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import msgpack
import zmq

Event = dict[str, Any]


class FakeBus:
    """`with FakeBus() as bus:` listens at `bus.address`, in a thread of its own."""

    def __init__(self) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self.address = f"tcp://127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
        self._events: dict[str, Event] = {}
        self._heartbeats: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake-bus", daemon=True)
        self._thread.start()

    def __enter__(self) -> FakeBus:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._router.close()
        self._context.term()

    def events(self, error_type: str | None = None) -> list[Event]:
        """What came so far, each once, in order."""
        with self._changed:
            return [event for event in self._events.values() if error_type in (None, event["error_type"])]

    def heartbeats(self) -> list[dict[str, Any]]:
        with self._changed:
            return list(self._heartbeats)

    def wait(self, error_type: str, timeout_s: float = 30.0, count: int = 1) -> list[Event]:
        """The events of this type, once there are so many of them."""
        self._wait(lambda: len(self.events(error_type)) >= count, f"{count} x {error_type}", timeout_s)
        return self.events(error_type)

    def wait_for_heartbeat(self, timeout_s: float = 30.0, **fields: Any) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [beat for beat in self.heartbeats() if fields.items() <= beat.items()]

        self._wait(lambda: bool(found()), f"a heartbeat with {fields}", timeout_s)
        return found()[0]

    def _wait(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while not condition():
                left_s = deadline_s - time.monotonic()
                assert left_s > 0, f"not within {timeout_s} s: {what}; there are {list(self._events.values())}"
                self._changed.wait(left_s)

    def _run(self) -> None:
        while not self._ending.is_set():
            if self._router.poll(20):
                self._take(self._router.recv_multipart())

    def _take(self, frames: list[bytes]) -> None:
        message = msgpack.unpackb(frames[-1])
        with self._changed:
            if message["kind"] == "heartbeat":
                self._heartbeats.append(message)
            else:
                known = sum(event["event_id"] in self._events for event in message["events"])
                for event in message["events"]:
                    self._events.setdefault(event["event_id"], event)
                accepted = len(message["events"]) - known
                ack = {"v": 1, "kind": "ack", "batch": message["batch"], "accepted": accepted, "known": known}
                self._router.send_multipart([*frames[:-1], msgpack.packb({**ack, "malformed": 0})])
            self._changed.notify_all()

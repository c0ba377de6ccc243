"""Clients that change a memory again and again and search for it, and tell when what they find is not so."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from memory_client import MemoryClient
from tests.support.process import Orchestrator


class Watcher(threading.Thread):
    """Changes one memory again and again, and searches: what it changed must show at once, what was before never."""

    def __init__(self, endpoint: str, name: str, stop: threading.Event) -> None:
        super().__init__(name=name)
        self.problems: list[str] = []
        self.took_s: list[float] = []
        self.rounds = 0
        self._endpoint = endpoint
        self._stop_event = stop

    @property
    def slowest_s(self) -> float:
        return max(self.took_s, default=0.0)

    def run(self) -> None:
        try:
            with MemoryClient(self._endpoint, agent_id=self.name, timeout_ms=30_000, raise_on_error=True) as client:
                self._watch(client)
        except Exception as error:  # noqa: BLE001  whatever ends the thread is a finding
            self.problems.append(repr(error))

    def _watch(self, client: MemoryClient) -> None:
        memory_id = client.add_memory(self._content())["memory_id"]
        while not self._stop_event.is_set():
            self._look(client, memory_id)
            self.rounds += 1
            self._timed(client.update_memory, memory_id, {"content": self._content()})

    def _content(self) -> str:
        return f"the door of {self.name} has code {self.name}x{self.rounds}x"

    def _look(self, client: MemoryClient, memory_id: str) -> None:
        mine, before = f"{self.name}x{self.rounds}x", f"{self.name}x{self.rounds - 1}x"
        for search in (client.search_memory, client.semantic_search):
            for query, expected in ((f"door code {mine}", True), (f"door of {self.name}", True)):
                self._expect(self._timed(search, query, touch=False), memory_id, query, expected)
        self._expect(self._timed(client.search_memory, before, touch=False), memory_id, before, False)
        self._expect(self._timed(client.search_memory, mine, touch=False), memory_id, mine, True)

    def _expect(self, reply: dict[str, Any], memory_id: str, query: str, expected: bool) -> None:
        found = {result["memory_id"]: result["content"] for result in reply["results"]}
        if (memory_id in found) != expected:
            self.problems.append(f"{query!r} in round {self.rounds}: {'not ' if expected else ''}found")
        if found.get(memory_id, self._content()) != self._content():
            self.problems.append(f"{query!r} in round {self.rounds}: stale {found[memory_id]!r}")

    def _timed(self, call: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> dict[str, Any]:
        began_s = time.monotonic()
        reply = call(*arguments, **options)
        self.took_s.append(time.monotonic() - began_s)
        return reply


@contextlib.contextmanager
def watching(service: Orchestrator) -> Iterator[list[Watcher]]:
    """Two clients that change and search while the block runs."""
    stop = threading.Event()
    watchers = [Watcher(service.address, name, stop) for name in ("ada", "bob")]
    for watcher in watchers:
        watcher.start()
    try:
        yield watchers
    finally:
        stop.set()
        for watcher in watchers:
            watcher.join(30)

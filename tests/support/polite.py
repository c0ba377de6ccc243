"""A client that keeps to the rules, beside those that do not."""

from __future__ import annotations

from memory_client import MemoryClient
from tests.support.process import Orchestrator

POLITE_WITHIN_S = 20.0


class Polite:
    """A client with one connection that writes, reads back and searches; each call is answered right, and in time."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._orchestrator = orchestrator
        self._rounds = 0
        self.client = MemoryClient(
            orchestrator.address, namespace="polite", timeout_ms=int(POLITE_WITHIN_S * 1000), raise_on_error=True
        )

    def __enter__(self) -> Polite:
        self.round()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def round(self) -> None:
        self._rounds += 1
        word = f"number{self._rounds}"
        memory_id = self.client.add_memory(f"polite memory {word}")["memory_id"]
        assert self.client.get_memory(memory_id)["memory"]["content"] == f"polite memory {word}"
        assert self.client.search_memory(word, limit=1)["results"][0]["memory_id"] == memory_id
        assert self._orchestrator.alive

"""This project's service, as its clients have it: over ZeroMQ, with the built-in settings."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(BENCH.parent), str(BENCH)]

from servers import start_service, wait_for_embedder  # noqa: E402

from memory_client import MemoryClient  # noqa: E402

CALL_MS = 600_000
POLL_S = 0.02


FACTS = {
    "durable": "each add is on disk before it is acknowledged (WAL, synchronous=FULL)",
    "embeds": "after the acknowledgement, in a process of its own; searches find the words at once",
    "clients": "threads, over tcp, each with a socket of its own",
}


class Store:
    def __init__(self, folder: str, model: str) -> None:
        self._end = contextlib.ExitStack()
        settings = {"embedding.model": model}
        self._server = self._end.enter_context(
            start_service(Path(folder), "service", "sentence-transformers", settings=settings)
        )
        wait_for_embedder(self._server)
        self._client = self._connect()
        self._sessions_client = self._connect()  # a client carries the session that it made
        self._sessions: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def add(self, item: dict[str, Any]) -> None:
        fields = self._fields(item)
        self._client.add_memory(fields.pop("content"), **fields)

    def add_many(self, items: list[dict[str, Any]]) -> None:
        self._client.batch_add_memories([self._fields(item) for item in items])

    def settle(self) -> None:
        while self._client.stats()["pending"]:
            time.sleep(POLL_S)

    def search(self, question: str, user: str, k: int) -> list[str]:
        reply = self._client.semantic_search(question, k=k, filters={"user_id": user}, touch=False)
        if reply["degraded"]:
            raise RuntimeError(f"a search is degraded: {reply['degraded_reason']}")
        return [result["metadata"]["key"] for result in reply["results"]]

    def pids(self) -> list[int]:
        return [int(self._client.health_check()["pid"])]

    def close(self) -> None:
        self._end.close()

    def _connect(self) -> MemoryClient:
        client = MemoryClient(self._server.endpoint, namespace="peers", timeout_ms=CALL_MS, raise_on_error=True)
        return self._end.enter_context(client)

    def _fields(self, item: dict[str, Any]) -> dict[str, Any]:
        return {
            "content": item["text"],
            "memory_type": "turn",
            "metadata": {"key": item["key"]},
            "occurred_at": item["occurred_at"],
            "parent_id": self._session(item["user"], item["session"]),
        }

    def _session(self, user: str, session: str) -> str:
        """The turns of a session belong together; it is made when its first turn comes."""
        with self._lock:
            if (user, session) not in self._sessions:
                made = self._sessions_client.create_session(user, "conversation")
                self._sessions[user, session] = made["session_id"]
            return self._sessions[user, session]

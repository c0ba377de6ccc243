"""mem0 without a language model (`infer=False`), its default embedded store (Qdrant, on disk), its own embedder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Set before the import: it neither reports to anybody nor keeps anything outside of the benchmark's folder.
os.environ["MEM0_TELEMETRY"] = "False"
os.environ.setdefault("OPENAI_API_KEY", "none: infer=False asks no language model")
os.environ.setdefault("MEM0_DIR", str(Path.cwd() / ".mem0"))

from mem0 import Memory

DIMENSION = 384


FACTS = {
    "durable": "its SQLite files, synced as the libraries set them up",
    "embeds": "before the acknowledgement, in the caller's thread, one text at a time",
    "clients": "threads of the process that has the store; no wire",
}


class Store:
    def __init__(self, folder: str, model: str) -> None:
        store = {"path": f"{folder}/qdrant", "on_disk": True, "embedding_model_dims": DIMENSION}
        self._memory = Memory.from_config(
            {
                "vector_store": {"provider": "qdrant", "config": store},
                "embedder": {
                    "provider": "huggingface",
                    "config": {"model": model, "embedding_dims": DIMENSION},
                },
                "history_db_path": f"{folder}/history.db",
            }
        )

    def add(self, item: dict[str, Any]) -> None:
        metadata = {name: item[name] for name in ("key", "session", "occurred_at")}
        self._memory.add(item["text"], user_id=item["user"], metadata=metadata, infer=False)

    def add_many(self, items: list[dict[str, Any]]) -> None:
        """It has no call for many texts with metadata of their own."""
        for item in items:
            self.add(item)

    def settle(self) -> None:
        """Nothing is left to do after an add."""

    def search(self, question: str, user: str, k: int) -> list[str]:
        found = self._memory.search(question, filters={"user_id": user}, top_k=k)
        return [result["metadata"]["key"] for result in found["results"]]

    def pids(self) -> list[int]:
        return [os.getpid()]

    def close(self) -> None:
        self._memory.close()

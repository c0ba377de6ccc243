"""Chroma, embedded and persistent, with its own embedding function for sentence-transformers."""

from __future__ import annotations

import os
from typing import Any

import chromadb
from chromadb.config import Settings
from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

FACTS = {
    "durable": "its SQLite log, synced as the library sets it up",
    "embeds": "before the acknowledgement, in the caller's thread",
    "clients": "threads of the process that has the store; no wire",
}


class Store:
    def __init__(self, folder: str, model: str) -> None:
        embed = SentenceTransformerEmbeddingFunction(model_name=model)
        self._client = chromadb.PersistentClient(folder, Settings(anonymized_telemetry=False))
        self._items = self._client.create_collection(
            "turns", embedding_function=embed, metadata={"hnsw:space": "cosine"}
        )

    def add(self, item: dict[str, Any]) -> None:
        self.add_many([item])

    def add_many(self, items: list[dict[str, Any]]) -> None:
        self._items.add(
            ids=[item["key"] for item in items],
            documents=[item["text"] for item in items],
            metadatas=[{name: item[name] for name in ("user", "session", "occurred_at")} for item in items],
        )

    def settle(self) -> None:
        """Nothing is left to do after an add."""

    def search(self, question: str, user: str, k: int) -> list[str]:
        found = self._items.query(query_texts=[question], n_results=k, where={"user": user})
        return list(found["ids"][0])

    def pids(self) -> list[int]:
        return [os.getpid()]

    def close(self) -> None:
        self._client.close()

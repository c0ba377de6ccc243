"""Texts to vectors: one interface, a worker process with the real model, a stub, and the queue before them."""

from __future__ import annotations

from memory_system.embedding.interface import Embedder, EmbedderState, VectorCache, Vectors
from memory_system.embedding.process import WorkerEmbedder
from memory_system.embedding.queue import EmbeddingQueue
from memory_system.embedding.stub import OffEmbedder, StubEmbedder
from memory_system.errors import ConfigError
from memory_system.settings import EmbeddingSettings

__all__ = [
    "Embedder",
    "EmbedderState",
    "EmbeddingQueue",
    "OffEmbedder",
    "StubEmbedder",
    "VectorCache",
    "Vectors",
    "WorkerEmbedder",
    "make_embedder",
]


def make_embedder(settings: EmbeddingSettings) -> Embedder:
    """Build the embedder that `embedding.provider` names; it does nothing before `start()`.

    Raises ConfigError for an unknown provider.
    """
    match settings.provider:
        case "sentence-transformers":
            return WorkerEmbedder(settings)
        case "stub":
            return StubEmbedder()
        case "off":
            return OffEmbedder()
    raise ConfigError(
        f"embedding.provider: {settings.provider!r} is none of 'sentence-transformers', 'stub', 'off'",
        key="embedding.provider",
    )

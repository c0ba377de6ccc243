"""Embedders without a model: a deterministic toy for tests and trials, and none at all."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from memory_system.embedding.interface import EmbedderState, StateCallback, StateListeners, Vectors
from memory_system.errors import VectorsUnavailable

_WORD = re.compile(r"\w+")
_ENDINGS = ("ingly", "edly", "ing", "ies", "ed", "es", "ly", "s", "e")
_MIN_STEM_CHARS = 3
# Words this short are mostly articles and pronouns; at full weight every two sentences would look alike.
_SHORT_CHARS = 3
_SHORT_WEIGHT = 0.25


class StubEmbedder:
    """A hashed bag of words: texts that share words are near. Ready as soon as it is started."""

    def __init__(self, dimension: int = 64) -> None:
        self.dimension: int | None = dimension
        self.model_id: str | None = f"stub-{dimension}"
        self._dimension = dimension
        self._listeners = StateListeners("starting")

    @property
    def state(self) -> EmbedderState:
        return self._listeners.state

    @property
    def reason(self) -> str | None:
        return None if self.state == "ready" else "not started, or closed"

    def on_state(self, callback: StateCallback) -> None:
        self._listeners.add(callback)

    async def start(self) -> None:
        self._listeners.set("ready")

    async def encode(self, texts: Sequence[str]) -> Vectors:
        if self.state != "ready":
            raise VectorsUnavailable("the stub embedder is not started")
        rows = [_embed(text, self._dimension) for text in texts]
        return np.stack(rows) if rows else np.empty((0, self._dimension), dtype=np.float32)

    async def close(self) -> None:
        self._listeners.set("down")


class OffEmbedder:
    """Semantic search switched off: never ready, search answers by keyword alone."""

    state: EmbedderState = "off"
    reason: str | None = "embedding.provider is off"
    model_id: str | None = None
    dimension: int | None = None

    def on_state(self, callback: StateCallback) -> None:
        """The state never changes."""

    async def start(self) -> None:
        """Nothing to start."""

    async def encode(self, texts: Sequence[str]) -> Vectors:
        raise VectorsUnavailable("embedding is switched off (embedding.provider: off)")

    async def close(self) -> None:
        """Nothing to close."""


def _embed(text: str, dimension: int) -> Vectors:
    vector = np.zeros(dimension, dtype=np.float32)
    for word, count in Counter(_stem(word) for word in _WORD.findall(text.lower())).items():
        weight = _SHORT_WEIGHT if len(word) <= _SHORT_CHARS else 1.0
        vector += weight * (1.0 + np.log(count)) * _word_vector(word, dimension)
    norm = float(np.linalg.norm(vector))
    if norm < 1e-6:
        # No words: a vector of its own, which no real word has (words are never empty).
        vector, norm = _word_vector("", dimension), 1.0
    return (vector / norm).astype(np.float32)


def _stem(word: str) -> str:
    """Cut one common English ending, so that "hikes", "hiked" and "hiking" meet."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= _MIN_STEM_CHARS:
            return word[: -len(ending)]
    return word


@lru_cache(maxsize=20_000)
def _word_vector(word: str, dimension: int) -> Vectors:
    """A pseudo-random unit vector; vectors of different words are nearly orthogonal."""
    raw = np.frombuffer(hashlib.shake_128(word.encode("utf-8", "replace")).digest(dimension), dtype=np.uint8)
    vector = raw.astype(np.float32) - np.float32(127.5)
    unit: Vectors = vector / np.float32(np.linalg.norm(vector))
    unit.setflags(write=False)
    return unit

"""What the service asks of an embedder, and of the cache of vectors beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
EmbedderState = Literal["starting", "ready", "down", "off"]
StateCallback = Callable[[EmbedderState], None]


class Embedder(Protocol):
    """Turns texts into vectors of unit length. One event loop uses it; no method blocks that loop."""

    @property
    def state(self) -> EmbedderState:
        """starting: the model loads; ready; down: it failed and will be tried again; off: there is none."""

    @property
    def reason(self) -> str | None:
        """Why it is not ready, for a person; None while ready."""

    @property
    def model_id(self) -> str | None:
        """Name, weights digest and, unless fp32, precision, such as "all-MiniLM-L6-v2:53aa5117"; None until known.

        Vectors of two ids must never be compared; the id stays known while the worker is down.
        """

    @property
    def dimension(self) -> int | None:
        """Length of a vector; None until known."""

    def on_state(self, callback: StateCallback) -> None:
        """Call `callback(state)` on the event loop after each change of state, until closed. It must not raise."""

    async def start(self) -> None:
        """Begin to load the model; returns at once."""

    async def encode(self, texts: Sequence[str]) -> Vectors:
        """Return float32 of shape (len(texts), dimension), each row of unit length, in the order of the texts.

        Raises VectorsUnavailable when not ready, when the worker dies or hangs meanwhile, or fails at these texts.
        """

    async def close(self) -> None:
        """Stop for good; pending calls raise VectorsUnavailable. May be called twice."""


class VectorCache(Protocol):
    """Vectors by (model id, digest of the text). A failure of the cache is a miss: no method raises."""

    async def get_many(self, model_id: str, digests: Sequence[bytes]) -> dict[bytes, Vectors]:
        """Return what is cached among `digests`, each of shape (dimension,)."""

    async def put_many(self, model_id: str, vectors: Mapping[bytes, Vectors]) -> None:
        """Keep the vectors, each of shape (dimension,), as long as there is room."""


class StateListeners:
    """The state of an embedder and who hears of its changes; shared by the implementations."""

    def __init__(self, state: EmbedderState) -> None:
        self.state: EmbedderState = state
        self._callbacks: list[StateCallback] = []

    def add(self, callback: StateCallback) -> None:
        self._callbacks.append(callback)

    def set(self, state: EmbedderState) -> None:
        """Change the state and tell the listeners, if it is a change."""
        if state == self.state:
            return
        self.state = state
        for callback in self._callbacks:
            callback(state)

"""The embedder that keeps a worker process: starts it, watches it, starts it anew when it dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final

import numpy as np

from memory_system.embedding.child import Hello, WorkerProcess
from memory_system.embedding.interface import EmbedderState, StateCallback, StateListeners, Vectors
from memory_system.errors import ConfigError, VectorsUnavailable
from memory_system.log import get_logger
from memory_system.settings import EmbeddingSettings

_FIRST_RETRY_S: Final = 0.2
_LAST_RETRY_S: Final = 30.0

_log = get_logger("embedding")


class WorkerEmbedder:
    """sentence-transformers in a process of its own, behind the Embedder interface."""

    def __init__(self, settings: EmbeddingSettings) -> None:
        self._settings = settings
        self._listeners = StateListeners("starting")
        self._reason: str | None = "not started"
        self._hello: Hello | None = None
        self._worker: WorkerProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        # Ending is a request, never a cancellation: that could leave a process half started or half ended to nobody.
        self._closing = asyncio.Event()
        self._process: WorkerProcess | None = None

    def __repr__(self) -> str:
        return f"<WorkerEmbedder {self.state} model_id={self.model_id} pid={self.pid}>"

    @property
    def state(self) -> EmbedderState:
        return self._listeners.state

    @property
    def reason(self) -> str | None:
        return None if self.state == "ready" else self._reason

    @property
    def model_id(self) -> str | None:
        return self._hello.model_id if self._hello else None

    @property
    def dimension(self) -> int | None:
        return self._hello.dimension if self._hello else None

    @property
    def pid(self) -> int | None:
        """Process id of the worker that serves now, None when none does."""
        return self._worker.pid if self._worker else None

    def on_state(self, callback: StateCallback) -> None:
        self._listeners.add(callback)

    async def start(self) -> None:
        """Begin to start the worker; a second call changes nothing. The calling thread must outlive the worker."""
        if self._supervisor is None and not self._closing.is_set():
            self._supervisor = asyncio.create_task(self._supervise(), name="embedding-supervisor")

    async def encode(self, texts: Sequence[str]) -> Vectors:
        async with self._turn:
            worker, hello = self._worker, self._hello
            if worker is None or hello is None:
                raise VectorsUnavailable(f"no embedding now, {self.state}: {self._reason}")
            if not texts:
                return np.empty((0, hello.dimension), dtype=np.float32)
            return await self._ask(worker, hello, [text[: self._settings.max_chars] for text in texts])

    async def close(self) -> None:
        self._closing.set()
        if self._process is not None:
            self._process.kill("closed")
        if self._supervisor is not None:
            await asyncio.wait([self._supervisor])
            self._supervisor = None
        self._reason = "closed"
        self._listeners.set("down")

    async def _ask(self, worker: WorkerProcess, hello: Hello, texts: list[str]) -> Vectors:
        try:
            async with asyncio.timeout(self._settings.encode_timeout_s):
                vectors = await worker.encode(texts, hello.dimension)
        except TimeoutError:
            worker.kill(f"gave no answer within {self._settings.encode_timeout_s:g} s")
            raise VectorsUnavailable("the embedding worker hangs and is started anew") from None
        return vectors

    async def _supervise(self) -> None:
        delay_s = _FIRST_RETRY_S
        while not self._closing.is_set():
            served = await self._one_life()
            if self._closing.is_set():
                return
            delay_s = _FIRST_RETRY_S if served else delay_s
            _log.error("embedding_worker_down", reason=self._reason, retry_in_s=delay_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._closing.wait()
            delay_s = min(2 * delay_s, _LAST_RETRY_S)

    async def _one_life(self) -> bool:
        """Run one worker until it ends; returns whether it ever answered a request."""
        self._reason = "the model is loading"
        self._listeners.set("starting")
        try:
            worker = await WorkerProcess.spawn(self._settings)
        except OSError as error:
            self._fail(f"the worker cannot be started: {error}")
            return False
        self._process = worker
        try:
            if not self._closing.is_set():
                await self._serve(worker)
        finally:
            self._process = self._worker = None
            self._fail(self._reason or worker.reason)
            await worker.finish()
        return worker.served

    async def _serve(self, worker: WorkerProcess) -> None:
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                self._hello = await worker.hello()
        except TimeoutError:
            self._reason = f"the model did not load within {self._settings.start_timeout_s:g} s"
            return
        except (ConfigError, VectorsUnavailable) as error:
            self._reason = error.message
            return
        self._worker = worker
        self._reason = None
        _log.info("embedding_worker_ready", pid=worker.pid, **self._hello.as_log())
        self._listeners.set("ready")
        await worker.serve()

    def _fail(self, reason: str) -> None:
        self._reason = reason
        self._listeners.set("down")

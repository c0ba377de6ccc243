"""One life of one worker process, seen from its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import sysconfig
from asyncio.subprocess import PIPE, Process
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

import memory_system.embedding.frames as frames
from memory_system.embedding.interface import Vectors
from memory_system.errors import ConfigError, VectorsUnavailable
from memory_system.log import get_logger
from memory_system.settings import EmbeddingSettings

_READ_BUFFER_BYTES: Final = 1 << 20
# A longer line of the worker's stderr goes to the log in pieces.
_LOG_LINE_CHARS: Final = 2000
_FINISH_S: Final = 1.0
_PACKAGE_ROOT: Final = Path(__file__).resolve().parents[2]

_log = get_logger("embedding.worker")


@dataclass(frozen=True, slots=True)
class Hello:
    """What the worker says of its model."""

    model_id: str
    dimension: int
    max_tokens: int | None
    threads: int
    backend: str
    device: str

    def as_log(self) -> dict[str, Any]:
        return asdict(self)


class WorkerProcess:
    """A started worker. Whoever spawned it must await `finish()`."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self.reason = "the worker ended"
        self.served = False
        self._process = process
        self._requests = process.stdin
        self._replies = process.stdout
        self._pending: dict[int, asyncio.Future[bytes]] = {}
        self._last_id = 0
        self._stderr = asyncio.create_task(_log_lines(process.stderr, process.pid), name="embedding-stderr")

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def spawn(cls, settings: EmbeddingSettings) -> WorkerProcess:
        """Start the process by exec and send it its settings. Raises OSError."""
        process = await asyncio.create_subprocess_exec(
            *_command(),
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env=_environment(),
            limit=_READ_BUFFER_BYTES,
            # Out of the terminal's process group: Ctrl-C is for the parent, which then ends the worker.
            start_new_session=True,
        )
        worker = cls(process)
        wanted = ("model", "backend", "threads", "nice")
        worker._requests.write(frames.pack({name: getattr(settings, name) for name in wanted}))
        return worker

    async def hello(self) -> Hello:
        """Wait until the model is loaded. Raises ConfigError when it cannot be, VectorsUnavailable when the worker
        dies before."""
        message = await self._receive()
        if message is None:
            raise VectorsUnavailable("the worker ended while it loaded the model; the log has its last words")
        if "error" in message:
            raise ConfigError(message["error"])
        return Hello(**message)

    async def serve(self) -> None:
        """Hand replies to the calls that wait for them until the worker ends."""
        while (message := await self._receive()) is not None:
            waiting = self._pending.pop(message["id"], None)
            if waiting is None or waiting.done():
                continue
            if "error" in message:
                waiting.set_exception(VectorsUnavailable(f"the embedding worker failed: {message['error']}"))
            else:
                self.served = True
                waiting.set_result(message["vectors"])

    async def encode(self, texts: list[str], dimension: int) -> Vectors:
        """Return the vectors, (len(texts), dimension). Raises VectorsUnavailable when the worker dies or fails."""
        self._last_id += 1
        request_id = self._last_id
        reply = self._pending[request_id] = asyncio.get_running_loop().create_future()
        try:
            self._requests.write(frames.pack({"id": request_id, "texts": texts}))
            await self._requests.drain()
            raw = await reply
        # uvloop raises RuntimeError for a write to a pipe that it has closed already.
        except (OSError, RuntimeError) as error:
            raise VectorsUnavailable("the embedding worker died") from error
        finally:
            self._pending.pop(request_id, None)
        return np.frombuffer(raw, dtype=np.float32).reshape(len(texts), dimension)

    def kill(self, reason: str) -> None:
        self.reason = f"the worker {reason}"
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def finish(self) -> None:
        """Kill the process if it still runs, fail what waits for it, and free the pipes."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        for waiting in self._pending.values():
            if not waiting.done():
                waiting.set_exception(VectorsUnavailable(f"no embedding: {self.reason}"))
        self._requests.close()
        # Its children, should a library have made one, may hold the pipes open.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FINISH_S):
                await self._drain()

    async def _drain(self) -> None:
        with contextlib.suppress(OSError):
            await self._requests.wait_closed()
        while await self._replies.read(_READ_BUFFER_BYTES):
            pass
        await self._stderr
        await self._process.wait()

    async def _receive(self) -> dict[str, Any] | None:
        """Return the next message, None when the worker has ended or writes what is no message."""
        try:
            header = await self._replies.readexactly(frames.HEADER.size)
            return frames.unpack(await self._replies.readexactly(frames.body_length(header)))
        except (asyncio.IncompleteReadError, OSError):
            return None
        except ValueError as error:
            self.kill(f"sent what is no message: {error}")
            return None


def _command() -> list[str]:
    # -P: the worker must not import modules from the directory that the service was started in.
    return [sys.executable, "-P", "-m", "memory_system.embedding.worker", "--parent", str(os.getpid())]


def _environment() -> dict[str, str]:
    """The parent's environment, in which `-m` also finds this package when it is not installed."""
    environment = dict(os.environ)
    if str(_PACKAGE_ROOT) not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), known]))
    return environment


async def _log_lines(stream: asyncio.StreamReader, pid: int) -> None:
    """Log what the worker writes to stderr, line by line. A worker that writes faster than this waits on its pipe."""
    rest = b""
    while chunk := await stream.read(4096):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _LOG_LINE_CHARS:
            lines, rest = [*lines, rest], b""
        for line in lines:
            _log_line(line, pid)
    _log_line(rest, pid)


def _log_line(line: bytes, pid: int) -> None:
    text = line.decode("utf-8", "replace").rstrip()
    for start in range(0, len(text), _LOG_LINE_CHARS):
        _log.warning("embedding_worker_stderr", pid=pid, line=text[start : start + _LOG_LINE_CHARS])

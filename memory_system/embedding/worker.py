"""The embedding worker: a process of its own that holds the model and answers frames on its pipe.

Started by exec as `python -m memory_system.embedding.worker --parent PID` with frames.py's messages on stdin and
stdout. First a message with the settings comes in and one with the model's properties (or an error) goes out, then
each `{"id", "texts"}` is answered by `{"id", "vectors"}` (float32, row after row) or `{"id", "error"}`.
It ends at the end of its pipe and with its parent.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import memory_system.embedding.encoders as encoders
import memory_system.embedding.frames as frames
import memory_system.embedding.model as model
from memory_system.embedding.encoders import Encoder
from memory_system.embedding.interface import Vectors
from memory_system.errors import ConfigError

_PR_SET_PDEATHSIG = 1
_WARM_UP = ("warm up", "a longer text, so that the first real request finds all kernels ready " * 8)


class Pipe:
    """The two ends of the pipe, moved away from stdin and stdout, where libraries could write into a frame."""

    def __init__(self) -> None:
        self._requests: BinaryIO = os.fdopen(os.dup(0), "rb")
        self._replies: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any] | None:
        """Return the next message, None at the end of the pipe."""
        header = self._requests.read(frames.HEADER.size)
        if len(header) < frames.HEADER.size:
            return None
        length = frames.body_length(header)
        body = self._requests.read(length)
        return frames.unpack(body) if len(body) == length else None

    def send(self, message: dict[str, Any]) -> None:
        """Write one message. Raises BrokenPipeError when the parent is gone."""
        rest = memoryview(frames.pack(message))
        while rest:
            rest = rest[self._replies.write(rest) :]


def main() -> int:
    """Run until the pipe ends; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable()
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    _die_with_parent(parser.parse_args().parent)
    pipe = Pipe()
    try:
        return _run(pipe)
    except BrokenPipeError:
        return 0


def _run(pipe: Pipe) -> int:
    settings = pipe.receive()
    if settings is None:
        return 0
    _be_modest(settings["nice"])
    try:
        encoder, hello = _load(settings["model"], settings["backend"], settings["threads"])
    except ConfigError as error:
        pipe.send({"error": error.message})
        return 1
    pipe.send(hello)
    while (request := pipe.receive()) is not None:
        pipe.send(_answer(encoder, request))
    return 0


def _die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends; elsewhere the pipe's end does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have gone before the call above.
    if os.getppid() != parent:
        sys.exit(0)


def _be_modest(nice: int) -> None:
    with contextlib.suppress(OSError):
        os.nice(nice)
    # When memory runs out, this process is the one that can be replaced.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def _load(name: str, backend: str, threads: int) -> tuple[Encoder, dict[str, Any]]:
    source = model.resolve(name)
    given = encoders.threads(threads, _cpus())
    _quiet_libraries(given.torch)
    encoder, model_id = encoders.load(source, backend, given)
    dimension = _encode(encoder, list(_WARM_UP)).shape[1]
    hello = {
        "model_id": model_id,
        "dimension": dimension,
        "max_tokens": encoder.max_tokens,
        "threads": encoder.threads,
        "backend": encoder.name,
        "device": encoder.device,
    }
    return encoder, hello


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quiet_libraries(threads: int) -> None:
    """Set what the libraries read from the environment when they are imported."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Idle threads sleep: spinning ones would take the processor that the service needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")


def _answer(encoder: Encoder, request: dict[str, Any]) -> dict[str, Any]:
    try:
        vectors = _encode(encoder, request["texts"])
    except Exception as error:  # noqa: BLE001 - whatever a text makes the libraries raise, the worker answers and goes on
        traceback.print_exc()
        return {"id": request["id"], "error": f"{type(error).__name__} while encoding"}
    return {"id": request["id"], "vectors": vectors.tobytes()}


def _encode(encoder: Encoder, texts: list[str]) -> Vectors:
    """Encode texts, each row of unit length."""
    vectors = encoder.encode(texts)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        raise ValueError("the model gave a vector without a direction")
    unit: Vectors = vectors / norms
    return unit


if __name__ == "__main__":
    sys.exit(main())

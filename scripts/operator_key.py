"""Which key the scripts show: that of MEMORY_KEY_FILE, else the operator's own on this host."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from memory_system.keys import KEY_FILE_VARIABLE, KeyFile, curve_on, load_key_file
from memory_system.settings import Settings

OPERATOR: Final = "operator"


def operator_key_file(settings: Settings, environ: Mapping[str, str] = os.environ) -> str | None:
    """The file of the key to show; None where this host has no keys. Raises ConfigError."""
    given = environ.get(KEY_FILE_VARIABLE)
    if given:
        return given
    return str(Path(settings.security.keys_dir) / f"{OPERATOR}.key") if curve_on(settings.security) else None


def operator_key(settings: Settings, environ: Mapping[str, str] = os.environ) -> KeyFile | None:
    """The key to show. Raises ConfigError for a file that is none, or that others can read."""
    path = operator_key_file(settings, environ)
    return None if path is None else load_key_file(path)

#!/usr/bin/env python3
"""The orchestrator with synthetic vectors in the place of a model's: python bench/scale_server.py SESSIONS."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import orchestrator
from memory_system.settings import Settings
from memory_system.storage.first_look import FirstLook


class Synthetic(orchestrator.Orchestrator):
    """Imports what it needs when the orchestrator itself does."""

    def __init__(self, settings: Settings, look: FirstLook | None = None) -> None:
        from synthetic import SyntheticEmbedder

        from memory_system import runtime

        vars(runtime)["make_embedder"] = lambda _: SyntheticEmbedder(int(sys.argv[1]))
        super().__init__(settings, look)


if __name__ == "__main__":
    vars(orchestrator)["Orchestrator"] = Synthetic
    sys.exit(orchestrator.main([]))

#!/usr/bin/env python3
"""The orchestrator with synthetic vectors in the place of a model's: python bench/scale_server.py SESSIONS."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import orchestrator

if TYPE_CHECKING:
    from memory_system.runtime import Runtime


class Synthetic(orchestrator.Orchestrator):
    def _made_runtime(self) -> Runtime:
        made = super()._made_runtime()
        from synthetic import SyntheticEmbedder

        from memory_system import runtime

        vars(runtime)["make_embedder"] = lambda _: SyntheticEmbedder(int(sys.argv[1]))
        return made


if __name__ == "__main__":
    vars(orchestrator)["Orchestrator"] = Synthetic
    sys.exit(orchestrator.main([]))

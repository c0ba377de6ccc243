#!/usr/bin/env python3
"""The orchestrator with synthetic vectors in the place of a model's: python bench/scale_server.py SESSIONS."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from synthetic import SyntheticEmbedder

import orchestrator
from memory_system import runtime
from memory_system.embedding import Embedder
from memory_system.settings import EmbeddingSettings


def main() -> int:
    sessions = int(sys.argv[1])

    def make_embedder(_: EmbeddingSettings) -> Embedder:
        return SyntheticEmbedder(sessions)

    vars(runtime)["make_embedder"] = make_embedder
    return orchestrator.main([])


if __name__ == "__main__":
    sys.exit(main())
